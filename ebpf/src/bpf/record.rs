//! Lends [`record`] the maps.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use sluice_common::abi::{Affinity, AffinityKey, Flow, Tuple};
use sluice_common::engine::record::{FlowMap, FlowTable, InsertError, Partner, Renewal, record};
use sluice_common::path::Decision;
#[cfg(not(feature = "both-layouts"))]
use sluice_common::path::leads_to;
use sluice_common::{Failure, Reason};

use super::count;
use super::maps::{self, Maps};

const ANY: u64 = BPF_ANY as u64;
const NOEXIST: u64 = BPF_NOEXIST as u64;
/// The error of inserting an entry that exists.
const EEXIST: i32 = -17;

/// Records a decision's flow in the maps.
///
/// # Errors
///
/// As [`record`].
#[inline(always)]
pub(super) fn in_maps<F: Maps>(
    decision: &mut Decision<F>,
    partner: &mut Partner<F>,
) -> Result<(), Reason> {
    record(decision, partner, &mut Flows)
}

/// The maps that hold flows.
struct Flows;

impl<F: Maps> FlowTable<F> for Flows {
    #[inline(always)]
    fn get(&self, place: FlowMap, key: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        // SAFETY: entries are plain data, readable under RCU.
        unsafe {
            match place {
                FlowMap::Flows => F::flows().get(key),
                FlowMap::Embryonic => F::embryonic().get(key),
            }
        }
    }

    #[inline(always)]
    fn insert(
        &mut self,
        place: FlowMap,
        key: &Tuple<F::Address>,
        flow: &Flow<F::Address>,
        only_new: bool,
    ) -> Result<(), InsertError> {
        let flags = if only_new { NOEXIST } else { ANY };
        let result = match place {
            FlowMap::Flows => F::flows().insert(key, flow, flags),
            FlowMap::Embryonic => F::embryonic().insert(key, flow, flags),
        };
        match result {
            Ok(()) => Ok(()),
            Err(EEXIST) => Err(InsertError::Exists),
            Err(_) => Err(InsertError::Full),
        }
    }

    #[inline(always)]
    fn remove(&mut self, place: FlowMap, key: &Tuple<F::Address>) {
        let _ = match place {
            FlowMap::Flows => F::flows().remove(key),
            FlowMap::Embryonic => F::embryonic().remove(key),
        };
    }

    #[inline(always)]
    fn refresh(
        &mut self,
        place: FlowMap,
        key: &Tuple<F::Address>,
        to: &Flow<F::Address>,
        renewal: Renewal,
    ) -> bool {
        #[cfg(feature = "both-layouts")]
        return match place {
            FlowMap::Flows => F::flows().renew(key, to, renewal),
            FlowMap::Embryonic => F::embryonic().renew(key, to, renewal),
        };
        #[cfg(not(feature = "both-layouts"))]
        {
            let entry = match place {
                FlowMap::Flows => F::flows().get_ptr_mut(key),
                FlowMap::Embryonic => F::embryonic().get_ptr_mut(key),
            };
            let Some(entry) = entry else { return false };
            // SAFETY: the entry is readable under RCU. A concurrent writer may win: both update it.
            let entry = unsafe { &mut *entry };
            if leads_to(entry, to) {
                renewal.apply(entry, to);
            }
            true
        }
    }

    #[inline(always)]
    fn record_affinity(&mut self, client: &AffinityKey<F::Address>, to: &Affinity) {
        let _ = F::affinity().insert(client, to, ANY);
    }

    #[inline(always)]
    fn count_failure(&mut self, backend: u32, failure: Failure) {
        count::failure(backend | F::COUNTER, failure);
    }

    #[inline(always)]
    fn set_marks(&mut self, bits: u32) {
        if let Some(marks) = maps::marks.get_ptr_mut(0) {
            // SAFETY: the element exists. Bits are only ever added, and each is added again on its
            // next occasion.
            unsafe { *marks |= bits };
        }
    }
}
