//! Fixes that can be reverted, to show that the simulation finds the faults.

/// A fault that Sluice had in the past.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// A client's second packet proves its flow, and a flow that is found in the middle of a
    /// connection needs no proof, so that a flood evicts established connections.
    Unconfined,
    /// A guess is used before the endpoint has confirmed it, so that a forged reset translates a
    /// direct connection.
    Believes,
    /// Ended flows stay among idle ones, and displace them.
    KeepsEnded,
    /// A renewal changes the partner entry even if it is of another flow.
    RenewsAny,
    /// A program that writes the current layout leaves the entry of the previous one.
    LeavesPrevious,
}
