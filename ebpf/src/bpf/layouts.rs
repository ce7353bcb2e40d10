//! Tables whose layout changes: both layouts are read, and one is written (see [`previous`]).
//!
//! The layout that is written is a constant that is set when the programs are loaded. The verifier
//! leaves out what does not apply, so that settled programs contain nothing of this. In the other
//! rounds the work is done by global functions, checked once and by themselves, with key and value
//! in a map: the path has too many lookups to follow two tables through each.

use core::marker::PhantomData;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::btf_maps::{LruHashMap, PerCpuArray};
use sluice_common::abi::previous::{Moved, Round};
use sluice_common::abi::{Affinity, AffinityKey, EMBRYONIC_MAX, FLOWS_MAX, Flow, Tuple, previous};
use sluice_common::engine::layouts::{Both, Store, Written};
use sluice_common::engine::record::{InsertError, Renewal};
use sluice_common::path::leads_to;
use sluice_common::{Family, V4, V6};

use super::maps::{AFFINITIES, old};

const NOEXIST: u64 = BPF_NOEXIST as u64;
const ANY: u64 = BPF_ANY as u64;
const EEXIST: i32 = -17;
const E2BIG: i32 = -7;

/// Bits of a [`Renewal`].
const IS_REPLY: u32 = 1;
const CLEARS_STATE: u32 = 2;

/// A [`Round`], set by the loader under the name [`previous::ROUND`].
#[allow(non_upper_case_globals, reason = "a symbol that the loader looks for")]
#[unsafe(no_mangle)]
static round: u32 = Round::Settled as u32;

#[inline(always)]
fn is_round(wanted: Round) -> bool {
    // SAFETY: a static. Volatile, since the loader writes another value.
    let found = unsafe { (&raw const round).read_volatile() };
    found == wanted as u32
}

/// A key, and its value in both forms.
#[repr(C)]
pub(super) struct Slot<K, V: Moved> {
    key: K,
    now: V,
    before: V::Before,
}

/// Slots for `flows` (and affinity) and for `embryonic`.
pub(super) type Slots<K, V> = PerCpuArray<Slot<K, V>, 2>;

/// A table of one layout.
struct Map<K: 'static, V: 'static, const N: usize>(&'static LruHashMap<K, V, N>);

impl<K, V, const N: usize> Store<K, V> for Map<K, V, N> {
    #[inline(always)]
    fn get(&self, key: &K) -> Option<&V> {
        // SAFETY: entries are plain data, readable under RCU.
        unsafe { self.0.get(key) }
    }

    #[inline(always)]
    fn insert(&self, key: &K, value: &V, only_new: bool) -> Result<(), InsertError> {
        match self.0.insert(key, value, if only_new { NOEXIST } else { ANY }) {
            Ok(()) => Ok(()),
            Err(EEXIST) => Err(InsertError::Exists),
            Err(_) => Err(InsertError::Full),
        }
    }

    #[inline(always)]
    fn remove(&self, key: &K) {
        let _ = self.0.remove(key);
    }

    #[inline(always)]
    fn update(&self, key: &K, change: impl FnOnce(&mut V)) -> bool {
        let Some(entry) = self.0.get_ptr_mut(key) else { return false };
        // SAFETY: the entry is there under RCU. A concurrent writer may win: both bring it up to
        // date.
        change(unsafe { &mut *entry });
        true
    }
}

/// The layout that the programs of this round write.
struct OfRound;

impl Written for OfRound {
    #[inline(always)]
    fn is_current(&self) -> bool {
        is_round(Round::WritesCurrent)
    }
}

/// A table in both layouts.
type BothMaps<K, V, const N: usize> = Both<Map<K, V, N>, Map<K, <V as Moved>::Before, N>, OfRound>;

/// Returns a table in both layouts.
#[inline(always)]
fn both<K, V: Moved, const N: usize>(
    now: &'static LruHashMap<K, V, N>,
    before: &'static LruHashMap<K, V::Before, N>,
) -> BothMaps<K, V, N> {
    Both { now: Map(now), before: Map(before), written: OfRound }
}

/// Fills the slot with the value of its key.
#[inline(always)]
fn find<K, V: Moved, const N: usize>(both: &BothMaps<K, V, N>, slot: &mut Slot<K, V>) -> bool {
    both.find(&slot.key, &mut slot.now)
}

/// Writes the slot's value. Returns an error as the map's helpers do.
#[inline(always)]
fn put<K, V: Moved, const N: usize>(
    both: &BothMaps<K, V, N>,
    slot: &mut Slot<K, V>,
    only_new: bool,
) -> i32 {
    match both.put(&slot.key, &slot.now, &mut slot.before, only_new) {
        Ok(()) => 0,
        Err(InsertError::Exists) => EEXIST,
        Err(InsertError::Full) => E2BIG,
    }
}

type FlowSlot<F> = Slot<Tuple<<F as Family>::Address>, Flow<<F as Family>::Address>>;
type Now<F, const N: usize> =
    LruHashMap<Tuple<<F as Family>::Address>, Flow<<F as Family>::Address>, N>;

/// A family whose flows are in both layouts.
pub(super) trait Moving: Family {
    fn now_flows() -> &'static Now<Self, { FLOWS_MAX as usize }>;
    fn now_embryonic() -> &'static Now<Self, { EMBRYONIC_MAX as usize }>;
    fn slot(index: u32) -> Option<*mut FlowSlot<Self>>;
    fn find(index: u32) -> u32;
    fn put(index: u32, is_new: u32) -> i32;
    fn take(index: u32);
    fn renew(index: u32, renewal: u32) -> u32;
}

macro_rules! moving {
    ($family:ident, $find:ident, $put:ident, $take:ident, $renew:ident, $flows:ident, $embryonic:ident, $old_flows:ident, $old_embryonic:ident, $slots:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $find(index: u32) -> u32 {
            let Some(slot) = old::$slots.get_ptr_mut(index) else { return 0 };
            // SAFETY: this CPU's own; callers hold no reference to it.
            let slot = unsafe { &mut *slot };
            u32::from(if index == 0 {
                find(&both(&super::maps::$flows, &old::$old_flows), slot)
            } else {
                find(&both(&super::maps::$embryonic, &old::$old_embryonic), slot)
            })
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $put(index: u32, is_new: u32) -> i32 {
            let Some(slot) = old::$slots.get_ptr_mut(index) else { return EEXIST };
            // SAFETY: as above.
            let slot = unsafe { &mut *slot };
            let only_new = is_new != 0;
            if index == 0 {
                put(&both(&super::maps::$flows, &old::$old_flows), slot, only_new)
            } else {
                put(&both(&super::maps::$embryonic, &old::$old_embryonic), slot, only_new)
            }
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $take(index: u32) -> u32 {
            let Some(slot) = old::$slots.get_ptr_mut(index) else { return 0 };
            // SAFETY: as above.
            let slot = unsafe { &*slot };
            if index == 0 {
                both(&super::maps::$flows, &old::$old_flows).take(&slot.key);
            } else {
                both(&super::maps::$embryonic, &old::$old_embryonic).take(&slot.key);
            }
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $renew(index: u32, renewal: u32) -> u32 {
            let renewal = Renewal {
                is_reply: renewal & IS_REPLY != 0,
                clears_state: renewal & CLEARS_STATE != 0,
            };
            let Some(slot) = old::$slots.get_ptr_mut(index) else { return 0 };
            // SAFETY: as above.
            let slot = unsafe { &*slot };
            u32::from(if index == 0 {
                both(&super::maps::$flows, &old::$old_flows).renew(&slot.key, &slot.now, renewal)
            } else {
                both(&super::maps::$embryonic, &old::$old_embryonic)
                    .renew(&slot.key, &slot.now, renewal)
            })
        }

        impl Moving for $family {
            #[inline(always)]
            fn now_flows() -> &'static Now<Self, { FLOWS_MAX as usize }> {
                &super::maps::$flows
            }
            #[inline(always)]
            fn now_embryonic() -> &'static Now<Self, { EMBRYONIC_MAX as usize }> {
                &super::maps::$embryonic
            }
            #[inline(always)]
            fn slot(index: u32) -> Option<*mut FlowSlot<Self>> {
                old::$slots.get_ptr_mut(index)
            }
            #[inline(always)]
            fn find(index: u32) -> u32 {
                $find(index)
            }
            #[inline(always)]
            fn put(index: u32, is_new: u32) -> i32 {
                $put(index, is_new)
            }
            #[inline(always)]
            fn take(index: u32) {
                let _ = $take(index);
            }
            #[inline(always)]
            fn renew(index: u32, renewal: u32) -> u32 {
                $renew(index, renewal)
            }
        }
    };
}

moving!(
    V4,
    find_v4,
    put_v4,
    take_v4,
    renew_v4,
    flows_v4,
    embryonic_v4,
    old_flows_v4,
    old_embryonic_v4,
    moving_flows_v4
);
moving!(
    V6,
    find_v6,
    put_v6,
    take_v6,
    renew_v6,
    flows_v6,
    embryonic_v6,
    old_flows_v6,
    old_embryonic_v6,
    moving_flows_v6
);

/// `flows` (0) or `embryonic` (1) of a family. A result is valid until the next lookup.
pub(super) struct FlowTable<F, const INDEX: u32>(pub(super) PhantomData<F>);

#[allow(clippy::unused_self, reason = "it stands where a map does")]
impl<F: Moving, const INDEX: u32> FlowTable<F, INDEX> {
    #[inline(always)]
    fn slot_for(key: &Tuple<F::Address>) -> Option<*mut FlowSlot<F>> {
        let slot = F::slot(INDEX)?;
        // SAFETY: this CPU's own, and nobody's answer any more.
        unsafe { (*slot).key = *key };
        Some(slot)
    }

    /// The entry of a key.
    ///
    /// # Safety
    ///
    /// The entry may change or be another's meanwhile.
    #[inline(always)]
    pub(super) unsafe fn get(&self, key: &Tuple<F::Address>) -> Option<&'static Flow<F::Address>> {
        if is_round(Round::Settled) {
            // SAFETY: the caller's.
            return unsafe {
                if INDEX == 0 { F::now_flows().get(key) } else { F::now_embryonic().get(key) }
            };
        }
        let slot = Self::slot_for(key)?;
        // SAFETY: this CPU's own.
        if F::find(INDEX) != 0 { Some(unsafe { &(*slot).now }) } else { None }
    }

    /// Writes an entry.
    #[inline(always)]
    pub(super) fn insert(
        &self,
        key: &Tuple<F::Address>,
        flow: &Flow<F::Address>,
        flags: u64,
    ) -> Result<(), i32> {
        if is_round(Round::Settled) {
            return if INDEX == 0 {
                F::now_flows().insert(key, flow, flags)
            } else {
                F::now_embryonic().insert(key, flow, flags)
            };
        }
        let Some(slot) = Self::slot_for(key) else { return Err(EEXIST) };
        // SAFETY: this CPU's own.
        unsafe { (*slot).now = *flow };
        match F::put(INDEX, u32::from(flags == NOEXIST)) {
            0 => Ok(()),
            error => Err(error),
        }
    }

    /// Removes an entry.
    #[inline(always)]
    pub(super) fn remove(&self, key: &Tuple<F::Address>) -> Result<(), i32> {
        if is_round(Round::Settled) {
            return if INDEX == 0 {
                F::now_flows().remove(key)
            } else {
                F::now_embryonic().remove(key)
            };
        }
        if Self::slot_for(key).is_some() {
            F::take(INDEX);
        }
        Ok(())
    }

    /// Updates an entry in place if it leads the same way. Returns false if it is missing.
    #[inline(always)]
    pub(super) fn renew(
        &self,
        key: &Tuple<F::Address>,
        to: &Flow<F::Address>,
        renewal: Renewal,
    ) -> bool {
        if is_round(Round::Settled) {
            let entry = if INDEX == 0 {
                F::now_flows().get_ptr_mut(key)
            } else {
                F::now_embryonic().get_ptr_mut(key)
            };
            let Some(entry) = entry else { return false };
            // SAFETY: the entry is there under RCU. A concurrent writer may win: both bring it up
            // to date.
            let entry = unsafe { &mut *entry };
            if leads_to(entry, to) {
                renewal.apply(entry, to);
            }
            return true;
        }
        let Some(slot) = Self::slot_for(key) else { return false };
        // SAFETY: this CPU's own.
        unsafe { (*slot).now = *to };
        let is_reply = if renewal.is_reply { IS_REPLY } else { 0 };
        F::renew(INDEX, is_reply | if renewal.clears_state { CLEARS_STATE } else { 0 }) != 0
    }
}

/// The affinity table of a family.
pub(super) struct AffinityTable<A: Copy + 'static> {
    pub(super) now: &'static LruHashMap<AffinityKey<A>, Affinity, AFFINITIES>,
    pub(super) before: &'static LruHashMap<AffinityKey<A>, previous::Affinity, AFFINITIES>,
    pub(super) slots: &'static Slots<AffinityKey<A>, Affinity>,
}

impl<A: Copy + 'static> AffinityTable<A> {
    /// The entry of a key.
    ///
    /// # Safety
    ///
    /// The entry may change or be another's meanwhile.
    #[inline(always)]
    pub(super) unsafe fn get(&self, key: &AffinityKey<A>) -> Option<&'static Affinity> {
        if is_round(Round::Settled) {
            // SAFETY: the caller's.
            return unsafe { self.now.get(key) };
        }
        let slot = self.slots.get_ptr_mut(0)?;
        // SAFETY: this CPU's own.
        unsafe {
            (*slot).key = *key;
            if find(&both(self.now, self.before), &mut *slot) { Some(&(*slot).now) } else { None }
        }
    }

    /// Writes an entry.
    #[inline(always)]
    pub(super) fn insert(
        &self,
        key: &AffinityKey<A>,
        value: &Affinity,
        flags: u64,
    ) -> Result<(), i32> {
        if is_round(Round::Settled) {
            return self.now.insert(key, value, flags);
        }
        let Some(slot) = self.slots.get_ptr_mut(0) else { return Err(EEXIST) };
        // SAFETY: this CPU's own.
        unsafe {
            (*slot).key = *key;
            (*slot).now = *value;
            match put(&both(self.now, self.before), &mut *slot, flags == NOEXIST) {
                0 => Ok(()),
                error => Err(error),
            }
        }
    }
}
