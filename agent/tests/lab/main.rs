//! Tests with real sockets between network namespaces. They need root, and the variables that
//! `cargo xtask test lab` sets.
//!
//! A module is one subject. A line `//! alone` in it means that nothing else may run beside its
//! tests.

mod accelerate;
mod audit;
mod bridge;
mod bypass;
mod callers;
mod config;
mod conntrack;
mod dashboard;
mod devices;
mod diff;
mod explain;
mod external;
mod failures;
mod faults;
mod floods;
mod flows;
mod forged;
mod fragments;
mod guarded;
mod hairpin;
mod host;
mod monitor;
mod mtu;
mod observe;
mod operate;
mod overlay;
mod own_addresses;
mod paths;
mod policy;
mod preflight;
mod random;
mod restart;
mod routes;
mod rules;
mod screens;
mod sockets;
mod stack;
mod stack_errors;
mod stack_neighbours;
mod stack_ports;
mod stack_uplinks;
mod support;
mod troubleshooting;
mod upgrade;
mod xdp;
