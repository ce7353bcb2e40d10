//! Searches all source ports for a free one, and remembers searches that failed.

use crate::abi::{Ticks, Tuple};
use crate::family::Family;
use crate::path::{Decision, finish_search, partner_key};

/// The walk over all source ports, and the table of tuples for which it found none.
pub trait PortSearch<F: Family> {
    /// Returns the time.
    fn now(&self) -> Ticks;
    /// Returns when the last search for a key failed, if the table has it.
    fn failed_at(&self, key: &Tuple<F::Address>) -> Option<Ticks>;
    /// Remembers that a search for a key has failed.
    fn set_failed(&mut self, key: &Tuple<F::Address>, at: Ticks);
    /// Performs [`walk_ports`](crate::path::walk_ports).
    fn walk(&mut self, decision: &Decision<F>) -> Option<u16>;
}

/// Searches a source port for a decision. A search that failed is not repeated within the same
/// tick: no other step takes as long, and a flood would cause it with every packet.
#[inline(always)]
pub fn search<F: Family, S: PortSearch<F>>(decision: &mut Decision<F>, ports: &mut S) {
    let mut key = partner_key::<F>(&decision.flow, decision.key.protocol);
    // The port is what is searched for.
    key.destination_port = 0;
    let now = ports.now();
    let has_failed = ports.failed_at(&key) == Some(now);
    let found = if has_failed { None } else { ports.walk(decision) };
    if found.is_none() && !has_failed {
        ports.set_failed(&key, now);
    }
    finish_search(found, decision);
}
