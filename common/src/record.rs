//! Writes what a [`Decision`] records of its flow.
//!
//! The same code in the kernel and on the host, over the tables that a [`FlowTable`] lends it.

use crate::abi::{Affinity, AffinityKey, Flow, Tuple, flow, state};
use crate::family::Family;
use crate::path::{Decision, Record, is_as_fresh, leads_to, mark, partner, partner_key};
use crate::reason::Reason;

/// One of the two tables that hold flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// `flows`: proven ones.
    Flows,
    /// `embryonic`: those that nothing has proven.
    Embryonic,
}

/// Why an entry was not inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is to be new, and its key has one.
    Exists,
    /// The table has no room.
    Full,
}

/// Write access to the tables that hold flows, and to what is recorded with one.
pub trait FlowTable<F: Family> {
    /// The entry of a key.
    fn get(&self, place: Place, key: &Tuple<F::Address>) -> Option<Flow<F::Address>>;

    /// Inserts an entry; `only_new`: not over another.
    ///
    /// # Errors
    ///
    /// Why it is not there now.
    fn insert(
        &mut self,
        place: Place,
        key: &Tuple<F::Address>,
        flow: &Flow<F::Address>,
        only_new: bool,
    ) -> Result<(), Refused>;

    /// Removes an entry, if there is one.
    fn remove(&mut self, place: Place, key: &Tuple<F::Address>);

    /// Brings time and state of an entry up to date in place; false where it is missing.
    fn refresh(&mut self, place: Place, key: &Tuple<F::Address>, flow: &Flow<F::Address>) -> bool;

    /// Notes where a client has been. One that finds no room goes by its slot.
    fn remember(&mut self, client: &AffinityKey<F::Address>, to: &Affinity);

    /// Notes that something has happened at least once: bits of [`mark`].
    fn set_marks(&mut self, bits: u32);
}

/// Records a decision's flow.
///
/// # Errors
///
/// The reason why the packet must not go on: its answers would not find back.
#[inline(always)]
pub fn record<F: Family, T: FlowTable<F>>(decision: &Decision<F>, tables: &mut T) -> Result<(), Reason> {
    if decision.record == Record::Nothing {
        return Ok(());
    }
    let partner = Partner {
        key: partner_key::<F>(&decision.flow, decision.key.protocol),
        flow: partner::<F>(&decision.key, &decision.flow),
    };
    match decision.record {
        Record::Open => open(decision, &partner, Place::Embryonic, tables),
        Record::Establish => open(decision, &partner, Place::Flows, tables),
        Record::Promote => promote(decision, &partner, tables),
        Record::Renew => {
            renew(decision, &partner, Place::Flows, tables);
            Ok(())
        }
        Record::RenewEmbryonic => {
            renew(decision, &partner, Place::Embryonic, tables);
            Ok(())
        }
        Record::Nothing => Ok(()),
    }
}

/// The other direction's entry.
struct Partner<F: Family> {
    key: Tuple<F::Address>,
    flow: Flow<F::Address>,
}

/// Makes both entries of a flow: the partner first, and only where its tuple is free.
#[inline(always)]
fn open<F: Family, T: FlowTable<F>>(
    decision: &Decision<F>,
    partner: &Partner<F>,
    place: Place,
    tables: &mut T,
) -> Result<(), Reason> {
    let (key, flow) = (&decision.key, &decision.flow);
    // What an earlier flow of the same client port has left behind.
    if let Some(old) = tables.get(Place::Flows, key) {
        if !leads_to(&old, flow) {
            tables.remove(Place::Flows, &partner_key::<F>(&old, key.protocol));
        }
        tables.remove(Place::Flows, key);
    }
    // The path found the tuple free, or held by an entry that no longer counts: that one goes.
    if let Some(old) = tables.get(Place::Flows, &partner.key) {
        if is_as_fresh(&old, flow) && old.state & state::ESTABLISHED != 0 && !leads_to(&old, &partner.flow) {
            return Err(Reason::ClashRace);
        }
        // Without its replies the other direction is of no use: the client gets a new flow instead.
        tables.remove(Place::Flows, &partner_key::<F>(&old, key.protocol));
        tables.remove(Place::Flows, &partner.key);
    }
    match tables.insert(place, &partner.key, &partner.flow, true) {
        Ok(()) => {}
        Err(Refused::Exists) => {
            let Some(there) = tables.get(place, &partner.key) else { return Err(Reason::ClashRace) };
            // Ours from an earlier try of the same client, or a dead one: overwritten. A fresh one of
            // another flow came between the path's look and now.
            if is_as_fresh(&there, flow) && !leads_to(&there, &partner.flow) {
                return Err(Reason::ClashRace);
            }
            if tables.insert(place, &partner.key, &partner.flow, false).is_err() {
                return Err(Reason::FlowsFull);
            }
        }
        Err(Refused::Full) => return Err(Reason::FlowsFull),
    }
    if tables.insert(place, key, flow, false).is_err() {
        return Err(Reason::FlowsFull);
    }
    let bits = if flow.flags & (flow::DIRECT | flow::SOURCE) == flow::DIRECT { mark::DIRECT } else { 0 }
        | if flow.flags & flow::HOST != 0 { mark::HOST } else { 0 }
        | if flow.flags & flow::MASQUERADED != 0 { mark::MASQUERADED } else { 0 };
    if bits != 0 {
        tables.set_marks(bits);
    }
    if decision.affinity {
        let client = AffinityKey { service_port: flow.service_port, client: key.source };
        let to = Affinity::new(flow.backend, flow.seen, flow.generation, decision.round);
        tables.remember(&client, &to);
    }
    Ok(())
}

/// Moves both entries of a proven flow from `embryonic` to `flows`.
#[inline(always)]
fn promote<F: Family, T: FlowTable<F>>(
    decision: &Decision<F>,
    partner: &Partner<F>,
    tables: &mut T,
) -> Result<(), Reason> {
    let (key, flow) = (&decision.key, &decision.flow);
    if tables.insert(Place::Flows, &partner.key, &partner.flow, false).is_err()
        || tables.insert(Place::Flows, key, flow, false).is_err()
    {
        return Err(Reason::FlowsFull);
    }
    tables.remove(Place::Embryonic, &partner.key);
    tables.remove(Place::Embryonic, key);
    Ok(())
}

/// Brings time and state of both entries up to date; one that is missing is made again.
#[inline(always)]
fn renew<F: Family, T: FlowTable<F>>(
    decision: &Decision<F>,
    partner: &Partner<F>,
    place: Place,
    tables: &mut T,
) {
    let (key, flow) = (&decision.key, &decision.flow);
    if !tables.refresh(place, key, flow) {
        let _ = tables.insert(place, key, flow, true);
    }
    if !tables.refresh(place, &partner.key, flow) {
        let _ = tables.insert(place, &partner.key, &partner.flow, true);
    }
}
