//! This machine: the maps and programs in its kernel, its devices, its netfilter, and the files by
//! which our processes find each other.

pub(crate) mod backoff;
pub mod conntrack;
pub mod dataplane;
pub mod devices;
pub mod difference;
pub(crate) mod folder;
pub mod fragments;
pub(crate) mod host;
pub(crate) mod ipsec;
pub(crate) mod kube_proxy;
pub(crate) mod netlink;
pub(crate) mod nft;
pub mod ports;
pub(crate) mod publish;
pub mod settings;
pub mod status;
pub(crate) mod view;
