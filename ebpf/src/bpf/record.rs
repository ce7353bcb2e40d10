//! Writes what a decision records of its flow.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use sluice_common::abi::{Affinity, AffinityKey, Flow, Tuple, flow, state};
use sluice_common::path::{Decision, Record, leads_to, mark, partner, partner_key};
use sluice_common::{Family, Reason};

use super::maps::{self, Maps};

const ANY: u64 = BPF_ANY as u64;
const NOEXIST: u64 = BPF_NOEXIST as u64;
/// What inserting an entry that is there answers.
const EEXIST: i32 = -17;

/// Records a decision's flow.
///
/// # Errors
///
/// The reason why the packet must not go on: its answers would not find back.
#[inline(always)]
pub(super) fn record<F: Maps>(decision: &Decision<F>) -> Result<(), Reason> {
    if decision.record == Record::Nothing {
        return Ok(());
    }
    let partner = Partner {
        key: partner_key::<F>(&decision.flow, decision.key.protocol),
        flow: partner::<F>(&decision.key, &decision.flow),
    };
    match decision.record {
        Record::Open | Record::Establish => open(decision, &partner, decision.record == Record::Establish),
        Record::Promote => promote(decision, &partner),
        Record::Nothing | Record::Renew | Record::RenewEmbryonic => {
            renew(decision, &partner, decision.record == Record::Renew);
            Ok(())
        }
    }
}

/// The other direction's entry.
struct Partner<F: Family> {
    key: Tuple<F::Address>,
    flow: Flow<F::Address>,
}

#[inline(always)]
fn insert<F: Maps>(
    proven: bool,
    key: &Tuple<F::Address>,
    flow: &Flow<F::Address>,
    flags: u64,
) -> Result<(), i32> {
    if proven { F::flows().insert(key, flow, flags) } else { F::embryonic().insert(key, flow, flags) }
}

/// Makes both entries of a flow: the partner first, and only where its tuple is free.
#[inline(always)]
fn open<F: Maps>(decision: &Decision<F>, partner: &Partner<F>, proven: bool) -> Result<(), Reason> {
    let (key, flow) = (&decision.key, &decision.flow);
    // What an earlier flow of the same client port has left behind.
    // SAFETY: entries are plain data, readable under RCU.
    if let Some(old) = unsafe { F::flows().get(key) } {
        if !leads_to(old, flow) {
            let _ = F::flows().remove(partner_key::<F>(old, key.protocol));
        }
        let _ = F::flows().remove(key);
    }
    // The path found the tuple free, or held by an entry that no longer counts: that one goes.
    // SAFETY: as above.
    if let Some(old) = unsafe { F::flows().get(&partner.key) } {
        if old.seen.wrapping_add(1) >= flow.seen
            && old.state & state::ESTABLISHED != 0
            && !leads_to(old, &partner.flow)
        {
            return Err(Reason::ClashRace);
        }
        // Without its replies the other direction is of no use: the client gets a new flow instead.
        let _ = F::flows().remove(partner_key::<F>(old, key.protocol));
        let _ = F::flows().remove(&partner.key);
    }
    match insert::<F>(proven, &partner.key, &partner.flow, NOEXIST) {
        Ok(()) => {}
        Err(EEXIST) => {
            // SAFETY: as above.
            let there = if proven {
                unsafe { F::flows().get(&partner.key) }
            } else {
                unsafe { F::embryonic().get(&partner.key) }
            };
            let Some(there) = there else { return Err(Reason::ClashRace) };
            // Ours from an earlier try of the same client, or a dead one: overwritten. A fresh one of
            // another flow came between the path's look and now.
            if there.seen.wrapping_add(1) >= flow.seen && !leads_to(there, &partner.flow) {
                return Err(Reason::ClashRace);
            }
            if insert::<F>(proven, &partner.key, &partner.flow, ANY).is_err() {
                return Err(Reason::FlowsFull);
            }
        }
        Err(_) => return Err(Reason::FlowsFull),
    }
    if insert::<F>(proven, key, flow, ANY).is_err() {
        return Err(Reason::FlowsFull);
    }
    let bits = if flow.flags & flow::DIRECT != 0 { mark::DIRECT } else { 0 }
        | if flow.flags & flow::HOST != 0 { mark::HOST } else { 0 }
        | if flow.flags & flow::MASQUERADED != 0 { mark::MASQUERADED } else { 0 };
    if bits != 0 {
        set_marks(bits);
    }
    if decision.affinity {
        let client = AffinityKey { service_port: flow.service_port, client: key.source };
        let to = Affinity {
            backend: flow.backend,
            seen: flow.seen,
            generation: flow.generation,
            round: decision.round,
        };
        // A client that finds no room goes by its slot.
        let _ = F::affinity().insert(&client, to, ANY);
    }
    Ok(())
}

/// Moves both entries of a proven flow from `embryonic` to `flows`.
#[inline(always)]
fn promote<F: Maps>(decision: &Decision<F>, partner: &Partner<F>) -> Result<(), Reason> {
    let (key, flow) = (&decision.key, &decision.flow);
    if F::flows().insert(&partner.key, &partner.flow, ANY).is_err()
        || F::flows().insert(key, flow, ANY).is_err()
    {
        return Err(Reason::FlowsFull);
    }
    let _ = F::embryonic().remove(&partner.key);
    let _ = F::embryonic().remove(key);
    Ok(())
}

/// Brings time and state of both entries up to date; one that is missing is made again.
#[inline(always)]
fn renew<F: Maps>(decision: &Decision<F>, partner: &Partner<F>, proven: bool) {
    let (key, flow) = (&decision.key, &decision.flow);
    if !refresh::<F>(key, flow, proven) {
        let _ = insert::<F>(proven, key, flow, NOEXIST);
    }
    if !refresh::<F>(&partner.key, flow, proven) {
        let _ = insert::<F>(proven, &partner.key, &partner.flow, NOEXIST);
    }
}

/// Writes time and state of an entry in place; false where it is missing.
#[inline(always)]
fn refresh<F: Maps>(key: &Tuple<F::Address>, flow: &Flow<F::Address>, proven: bool) -> bool {
    let entry = if proven { F::flows().get_ptr_mut(key) } else { F::embryonic().get_ptr_mut(key) };
    let Some(entry) = entry else { return false };
    // SAFETY: the entry is there under RCU. A concurrent writer may win: both bring it up to date.
    unsafe {
        (*entry).seen = flow.seen;
        (*entry).state |= flow.state;
    }
    true
}

/// Notes that something has happened at least once.
#[inline(always)]
fn set_marks(bits: u32) {
    if let Some(marks) = maps::marks.get_ptr_mut(0) {
        // SAFETY: the element is there. Bits are only ever added, and each is added again on its next occasion.
        unsafe { *marks |= bits };
    }
}
