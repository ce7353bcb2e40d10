//! The maps of a node: those that the agent writes, and the bounded tables of the programs.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use sluice_common::abi::{
    Affinity, AffinityKey, Datagram, DatagramPorts, Flow, Range, SLOTS_PER_BLOCK, Ticks, Tuple,
};
use sluice_common::engine::record::FlowMap;
use sluice_common::family::Family;
use sluice_core::image::{ApplyError, Dataplane, Image, ReadError, Write};

/// The maps that the agent writes.
#[derive(Clone, Debug, Default)]
pub struct Maps {
    /// All maps but the slots.
    pub image: Image,
    /// The arena; slots that nothing refers to any more stay, as in the kernel's array.
    pub slots: Vec<u32>,
}

impl Maps {
    /// Creates empty maps with this many blocks of slots.
    #[must_use]
    pub fn new(slot_blocks: u32) -> Self {
        Self { image: Image::default(), slots: vec![0; (slot_blocks * SLOTS_PER_BLOCK) as usize] }
    }

    fn apply(&mut self, write: &Write) {
        if let Write::Slots { start, backends } = write {
            for (slot, id) in self.slots.iter_mut().skip(*start as usize).zip(backends) {
                *slot = *id;
            }
            return;
        }
        if !matches!(write, Write::ClearSlots { .. }) {
            self.image.apply(write);
        }
    }

    /// Returns what a starting agent reads.
    fn read(&self) -> Image {
        let mut image = self.image.clone();
        image.ports = image
            .names
            .keys()
            .map(|id| (*id, self.image.ports.get(id).copied().unwrap_or_default()))
            .collect();
        let used: BTreeSet<Range> = image.used_ranges().collect();
        image.slots = used
            .into_iter()
            .map(|range| {
                let ids = self.slots.iter().skip(range.start() as usize);
                (range.start(), ids.take(range.size() as usize).copied().collect())
            })
            .collect();
        image
    }
}

/// The maps as an agent's dataplane, which carries out a few writes at a time.
#[derive(Clone, Debug)]
pub struct Handle {
    /// The maps.
    pub maps: Rc<RefCell<Maps>>,
    /// Number of writes until the next one waits.
    pub budget: Rc<Cell<usize>>,
    /// Number of programs that run on this node; a grace period waits for their end.
    pub at_work: Rc<Cell<u32>>,
}

/// The reason for a write to wait: the budget is spent, or programs are running.
#[derive(Debug, thiserror::Error)]
#[error("it waits")]
struct Waits;

impl Dataplane for Handle {
    fn apply(&mut self, writes: &[Write]) -> Result<(), ApplyError> {
        for (done, write) in writes.iter().enumerate() {
            let waits = matches!(write, Write::Grace) && self.at_work.get() > 0;
            if waits || self.budget.get() == 0 {
                let (what, cause) = (format!("{write:?}"), Box::new(Waits));
                return Err(ApplyError { done, what, cause });
            }
            self.budget.set(self.budget.get() - 1);
            self.maps.borrow_mut().apply(write);
        }
        Ok(())
    }

    fn read(&self) -> Result<Image, ReadError> {
        Ok(self.maps.borrow().read())
    }
}

/// A flow entry with its owner.
#[derive(Clone, Copy, Debug)]
pub struct Entry<A: Copy> {
    /// The entry.
    pub flow: Flow<A>,
    /// Index of the connection whose packet made the entry.
    pub owner: u32,
}

/// A table that evicts the least recently used entry when it is full.
#[derive(Clone, Debug)]
pub struct Lru<K, V> {
    capacity: usize,
    clock: u64,
    entries: BTreeMap<K, (V, u64)>,
    order: BTreeMap<u64, K>,
}

impl<K: Copy + Ord, V: Copy> Lru<K, V> {
    /// Creates an empty table.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity, clock: 0, entries: BTreeMap::new(), order: BTreeMap::new() }
    }

    /// Returns the value of a key, and counts it as used.
    pub fn get(&mut self, key: &K) -> Option<V> {
        let (value, used) = self.entries.get_mut(key)?;
        self.clock += 1;
        let _ = self.order.remove(used);
        *used = self.clock;
        let _ = self.order.insert(self.clock, *key);
        Some(*value)
    }

    /// Returns the value of a key without counting it as used.
    #[must_use]
    pub fn peek(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|(value, _)| value)
    }

    /// Changes the value of a key in place.
    pub fn change<R>(&mut self, key: &K, how: impl FnOnce(&mut V) -> R) -> Option<R> {
        self.entries.get_mut(key).map(|(value, _)| how(value))
    }

    /// Inserts a value; returns the entry that was evicted for it.
    pub fn insert(&mut self, key: K, value: V) -> Option<(K, V)> {
        let mut gone = None;
        if let Some((_, used)) = self.entries.get(&key) {
            let _ = self.order.remove(used);
        } else if self.entries.len() >= self.capacity
            && let Some((_, oldest)) = self.order.pop_first()
        {
            gone = self.entries.remove(&oldest).map(|(value, _)| (oldest, value));
        }
        self.clock += 1;
        let _ = self.entries.insert(key, (value, self.clock));
        let _ = self.order.insert(self.clock, key);
        gone
    }

    /// Removes a key.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let (value, used) = self.entries.remove(key)?;
        let _ = self.order.remove(&used);
        Some(value)
    }

    /// Iterates over all keys and values.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, (value, _))| (key, value))
    }
}

/// Capacities of the flow tables.
#[derive(Clone, Copy, Debug)]
pub struct Capacities {
    /// Entries of `flows`.
    pub flows: usize,
    /// Entries of `embryonic`.
    pub embryonic: usize,
}

/// A family's flows, by tuple.
pub type FlowLru<F> = Lru<Tuple<<F as Family>::Address>, Entry<<F as Family>::Address>>;

/// The tables of one layout of the maps. Entries of the previous layout are stored in the form of
/// this one: every access converts them, as far as the two layouts differ.
#[derive(Debug)]
pub struct Layer<F: Family> {
    /// Proven flows.
    pub flows: FlowLru<F>,
    /// Flows without a proof so far.
    pub embryonic: FlowLru<F>,
    /// Session affinity of clients.
    pub affinity: Lru<AffinityKey<F::Address>, Affinity>,
}

impl<F: Family> Layer<F> {
    fn new(capacities: Capacities) -> Self {
        Self {
            flows: Lru::new(capacities.flows),
            embryonic: Lru::new(capacities.embryonic),
            affinity: Lru::new(4_096),
        }
    }

    /// Returns a table of flows.
    #[must_use]
    pub fn table(&self, map: FlowMap) -> &FlowLru<F> {
        match map {
            FlowMap::Flows => &self.flows,
            FlowMap::Embryonic => &self.embryonic,
        }
    }

    /// Returns a table of flows, to be changed.
    pub fn table_mut(&mut self, map: FlowMap) -> &mut FlowLru<F> {
        match map {
            FlowMap::Flows => &mut self.flows,
            FlowMap::Embryonic => &mut self.embryonic,
        }
    }
}

/// The tables that the programs of a family keep.
#[derive(Debug)]
pub struct Memory<F: Family> {
    /// Those whose layout changes: in this one, then in the previous one.
    pub layers: [Layer<F>; 2],
    /// Ports of datagrams, from their first fragments.
    pub fragments: Lru<Datagram<F::Address>, DatagramPorts>,
    /// Reply tuples for which no port was found, and when.
    pub exhausted: BTreeMap<Tuple<F::Address>, Ticks>,
}

impl<F: Family> Memory<F> {
    /// Creates empty tables.
    #[must_use]
    pub fn new(capacities: Capacities) -> Self {
        Self {
            layers: [Layer::new(capacities), Layer::new(capacities)],
            fragments: Lru::new(256),
            exhausted: BTreeMap::new(),
        }
    }

    /// Iterates over the tables of flows of both layouts, with the layout's index.
    pub fn tables(&self) -> impl Iterator<Item = (usize, FlowMap, &FlowLru<F>)> {
        let of = |(layer, tables): (usize, _)| {
            [FlowMap::Flows, FlowMap::Embryonic].map(|map| (layer, map, Layer::table(tables, map)))
        };
        self.layers.iter().enumerate().flat_map(of)
    }
}
