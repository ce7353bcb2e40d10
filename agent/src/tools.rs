//! The command line. It starts the agent, and reads the maps and files of one.

pub mod api;
pub mod cli;
pub mod diff;
pub mod explain;
mod plan;
pub mod preflight;
mod top;
mod trace;
mod units;
