//! Writes what a [`Decision`] records of its flow.
//!
//! The kernel and the host run the same code, over the tables that a [`FlowTable`] lends it.

use crate::abi::{Affinity, AffinityKey, Flow, Tuple, flow};
use crate::failure::Failure;
use crate::family::Family;
use crate::path::{
    self, Decision, Record, gives_way, is_as_fresh, leads_back, leads_to, mark, partner_key,
};
use crate::reason::Reason;

/// One of the two tables that hold flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowMap {
    /// `flows`: proven flows.
    Flows,
    /// `embryonic`: flows that nothing has proven yet.
    Embryonic,
}

/// The reason why an entry was not inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// The entry has to be new, and its key has one already.
    Exists,
    /// The table has no room.
    Full,
}

/// Updates of a renewal besides the time.
#[derive(Clone, Copy, Debug)]
pub struct Renewal {
    /// Whether the packet is a reply: then the time when the endpoint was last heard is updated.
    pub is_reply: bool,
    /// Whether the state is replaced; otherwise bits are added to what others have written
    /// meanwhile.
    pub clears_state: bool,
}

impl Renewal {
    /// Updates an entry.
    #[inline(always)]
    pub fn apply<A: Copy>(self, entry: &mut Flow<A>, to: &Flow<A>) {
        entry.seen = to.seen;
        if self.is_reply || self.clears_state {
            entry.replied = to.replied;
        }
        entry.state = if self.clears_state { to.state } else { entry.state | to.state };
    }
}

/// Write access to the tables that hold flows, and to what is recorded with one.
pub trait FlowTable<F: Family> {
    /// Returns the entry of a key.
    fn get(&self, place: FlowMap, key: &Tuple<F::Address>) -> Option<&Flow<F::Address>>;

    /// Inserts an entry. With `only_new` it replaces no other entry of its key.
    ///
    /// # Errors
    ///
    /// Returns why the entry was not inserted.
    fn insert(
        &mut self,
        place: FlowMap,
        key: &Tuple<F::Address>,
        flow: &Flow<F::Address>,
        only_new: bool,
    ) -> Result<(), InsertError>;

    /// Removes an entry, if there is one.
    fn remove(&mut self, place: FlowMap, key: &Tuple<F::Address>);

    /// Updates time and state of an entry in place if it leads where `to` does. Returns false if
    /// there is no entry at all.
    fn refresh(
        &mut self,
        place: FlowMap,
        key: &Tuple<F::Address>,
        to: &Flow<F::Address>,
        renewal: Renewal,
    ) -> bool;

    /// Records a client's affinity. A client that finds no room goes by its slot.
    fn record_affinity(&mut self, client: &AffinityKey<F::Address>, to: &Affinity);

    /// Sets bits of [`mark`]: something has happened at least once.
    fn set_marks(&mut self, bits: u32);

    /// Counts a failure at a backend.
    fn count_failure(&mut self, backend: u32, failure: Failure);
}

/// Records a decision's flow. `partner` is space for the entry of the other direction, for which
/// the kernel's stack has no room.
///
/// # Errors
///
/// Returns the reason why the packet must not go on: its answers would not find their way back.
#[inline(always)]
pub fn record<F: Family, T: FlowTable<F>>(
    decision: &mut Decision<F>,
    partner: &mut Partner<F>,
    tables: &mut T,
) -> Result<(), Reason> {
    if decision.record == Record::Nothing {
        return Ok(());
    }
    partner.key = partner_key::<F>(&decision.flow, decision.key.protocol);
    partner.flow = path::partner::<F>(&decision.key, &decision.flow);
    match decision.record {
        Record::Nothing => {}
        Record::Open | Record::Establish => open(decision, partner, tables)?,
        Record::Promote => promote(decision, partner, tables)?,
        Record::Demote => demote(decision, partner, tables)?,
        Record::Renew => renew(decision, partner, FlowMap::Flows, tables),
        Record::RenewEmbryonic => renew(decision, partner, FlowMap::Embryonic, tables),
    }
    if let Some(failure) = Failure::of(decision) {
        tables.count_failure(decision.flow.backend, failure);
    }
    if decision.records_affinity {
        let flow = &decision.flow;
        let client = if flow.is_reply() { flow.destination } else { decision.key.source };
        let client = AffinityKey { service_port: flow.service_port, client };
        let to = Affinity::new(flow.backend, flow.seen, flow.generation, decision.round);
        tables.record_affinity(&client, &to);
    }
    Ok(())
}

/// The entry of the other direction.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Partner<F: Family> {
    key: Tuple<F::Address>,
    flow: Flow<F::Address>,
    /// The key of the other direction of an entry that is being removed.
    stale: Tuple<F::Address>,
}

impl<F: Family> Default for Partner<F> {
    fn default() -> Self {
        Self { key: Tuple::default(), flow: Flow::default(), stale: Tuple::default() }
    }
}

/// Makes both entries of a flow: the partner first, and only where its tuple is free.
#[inline(always)]
fn open<F: Family, T: FlowTable<F>>(
    decision: &mut Decision<F>,
    partner: &mut Partner<F>,
    tables: &mut T,
) -> Result<(), Reason> {
    let (key, flow) = (&decision.key, &mut decision.flow);
    let proof = clear_way(key, flow, decision.record, partner, tables)?;
    let mut place = FlowMap::Embryonic;
    if let Some((state, replied)) = proof {
        // Half of a proven flow is proof of it.
        place = FlowMap::Flows;
        (flow.state, flow.replied) = (state, replied);
        (partner.flow.state, partner.flow.replied) = (state, replied);
    }
    match tables.insert(place, &partner.key, &partner.flow, true) {
        Ok(()) => {}
        Err(InsertError::Exists) => return Err(Reason::ClashRace),
        Err(InsertError::Full) => return Err(Reason::FlowsFull),
    }
    if tables.insert(place, key, flow, false).is_err() {
        return Err(Reason::FlowsFull);
    }
    let bits = if flow.flags & (flow::DIRECT | flow::SOURCE) == flow::DIRECT { mark::DIRECT } else { 0 }
        // A pod's own node port may lead to the pod itself: then its answer goes to an address of
        // the node, too.
        | if flow.flags & (flow::HOST | flow::HAIRPIN) != 0 { mark::HOST } else { 0 }
        | if flow.is_masqueraded() { mark::MASQUERADED } else { 0 };
    if bits != 0 {
        tables.set_marks(bits);
    }
    Ok(())
}

/// Removes what earlier flows have left at both tuples of a new one. Returns the state of the flow
/// that is recovered, if half of it is still there as a proven one.
///
/// # Errors
///
/// Another flow's entry that counts is there.
#[inline(always)]
fn clear_way<F: Family, T: FlowTable<F>>(
    key: &Tuple<F::Address>,
    flow: &Flow<F::Address>,
    record: Record,
    partner: &mut Partner<F>,
    tables: &mut T,
) -> Result<Option<(u8, u32)>, Reason> {
    let recovers = record == Record::Establish;
    let mut proof = None;
    // Remove what an earlier flow of the same client port has left behind.
    for place in [FlowMap::Flows, FlowMap::Embryonic] {
        let Some(old) = tables.get(place, key) else { continue };
        if !leads_to(old, flow) {
            partner.stale = partner_key::<F>(old, key.protocol);
            forget(place, key, &partner.stale, tables);
        } else if recovers && place == FlowMap::Flows {
            proof = Some((old.state, old.replied));
        }
        if place == FlowMap::Flows {
            tables.remove(place, key);
        }
    }
    // The path found the tuple free, or held by an entry that no longer counts, which is removed.
    for place in [FlowMap::Flows, FlowMap::Embryonic] {
        let Some(old) = tables.get(place, &partner.key) else { continue };
        if leads_to(old, &partner.flow) {
            if recovers && place == FlowMap::Flows {
                proof = Some((old.state, old.replied));
            }
        } else if is_as_fresh(old, flow)
            && !gives_way(old, place == FlowMap::Embryonic, key.protocol, record, flow.seen)
        {
            // Another flow's entry was inserted between the path's lookup and now.
            return Err(Reason::ClashRace);
        } else {
            // Without its replies the other direction is useless: that client gets a new flow.
            partner.stale = partner_key::<F>(old, key.protocol);
            forget(place, &partner.key, &partner.stale, tables);
        }
        tables.remove(place, &partner.key);
    }
    Ok(proof)
}

/// Removes the other direction of an entry that is being removed, unless its tuple belongs to
/// another flow by now.
#[inline(always)]
fn forget<F: Family, T: FlowTable<F>>(
    place: FlowMap,
    key: &Tuple<F::Address>,
    other: &Tuple<F::Address>,
    tables: &mut T,
) {
    if matches!(tables.get(place, other), Some(there) if leads_back::<F>(there, key)) {
        tables.remove(place, other);
    }
}

/// Moves both entries of a proven flow from `embryonic` to `flows`.
#[inline(always)]
fn promote<F: Family, T: FlowTable<F>>(
    decision: &Decision<F>,
    partner: &Partner<F>,
    tables: &mut T,
) -> Result<(), Reason> {
    if !put(FlowMap::Flows, &partner.key, &partner.flow, tables)?
        || !put(FlowMap::Flows, &decision.key, &decision.flow, tables)?
    {
        // Another flow has been proven for the tuple: this one is left to expire.
        return Ok(());
    }
    tables.remove(FlowMap::Embryonic, &partner.key);
    tables.remove(FlowMap::Embryonic, &decision.key);
    Ok(())
}

/// Writes an entry unless another flow's is there, in which case it returns false.
#[inline(always)]
fn put<F: Family, T: FlowTable<F>>(
    place: FlowMap,
    key: &Tuple<F::Address>,
    flow: &Flow<F::Address>,
    tables: &mut T,
) -> Result<bool, Reason> {
    let there = tables.get(place, key);
    if matches!(there, Some(there) if !leads_to(there, flow)) {
        return Ok(false);
    }
    let only_new = there.is_none();
    match tables.insert(place, key, flow, only_new) {
        Ok(()) => Ok(true),
        // Another CPU was faster with a packet of the same flow, or of another: either way its
        // entry stays. An entry that the lookup found leads the same way, so it may be replaced.
        Err(InsertError::Exists) => Ok(false),
        Err(InsertError::Full) => Err(Reason::FlowsFull),
    }
}

/// Moves both entries of a flow that has ended from `flows` to `embryonic`.
#[inline(always)]
fn demote<F: Family, T: FlowTable<F>>(
    decision: &Decision<F>,
    partner: &Partner<F>,
    tables: &mut T,
) -> Result<(), Reason> {
    if tables.insert(FlowMap::Embryonic, &decision.key, &decision.flow, false).is_err() {
        return Err(Reason::FlowsFull);
    }
    tables.remove(FlowMap::Flows, &decision.key);
    // The other direction's tuple may belong to another flow by now.
    let there = tables.get(FlowMap::Flows, &partner.key);
    if matches!(there, Some(there) if !leads_to(there, &partner.flow)) {
        return Ok(());
    }
    let is_there = there.is_some();
    // Inserted before the other is removed, so that no other CPU's packet finds it in neither
    // table.
    let _ = put(FlowMap::Embryonic, &partner.key, &partner.flow, tables)?;
    if is_there {
        tables.remove(FlowMap::Flows, &partner.key);
    }
    Ok(())
}

/// Updates time and state of both entries; one that is missing is made again.
#[inline(always)]
fn renew<F: Family, T: FlowTable<F>>(
    decision: &Decision<F>,
    partner: &Partner<F>,
    place: FlowMap,
    tables: &mut T,
) {
    let renewal =
        Renewal { is_reply: decision.flow.is_reply(), clears_state: decision.clears_state };
    for (key, flow) in [(&decision.key, &decision.flow), (&partner.key, &partner.flow)] {
        if !tables.refresh(place, key, flow, renewal) {
            let _ = tables.insert(place, key, flow, true);
        }
    }
}
