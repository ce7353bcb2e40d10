//! The command line: it starts the agent, and reads what an agent has left in maps and files.

pub mod cli;
pub mod diff;
pub mod explain;
pub mod preflight;
mod top;
mod trace;
mod units;
