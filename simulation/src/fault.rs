//! Mendings that can be taken out, to show that the simulation finds what they mend.

/// A fault that Sluice once had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// A client's second packet proves its flow, and what is found in the middle of a connection
    /// needs no proof: a flood evicts established connections.
    Unconfined,
    /// A guess is believed before the endpoint has confirmed it: a forged reset translates a
    /// direct connection.
    Believes,
    /// What has ended stays beside what is idle, and displaces it.
    KeepsEnded,
    /// A renewal changes the partner entry, whichever flow that leads to.
    RenewsAny,
}
