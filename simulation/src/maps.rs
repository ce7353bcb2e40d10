//! The maps of a node: what the agent writes, and what programs keep in tables with a bound.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use sluice_common::abi::{
    Affinity, AffinityKey, Datagram, DatagramPorts, Flow, Range, SLOTS_PER_BLOCK, Ticks, Tuple,
};
use sluice_common::family::Family;
use sluice_core::image::{ApplyError, Dataplane, Image, ReadError, Write};

/// What the agent writes.
#[derive(Clone, Debug, Default)]
pub struct Maps {
    /// All but the slots.
    pub image: Image,
    /// The arena: what nobody refers to any more stays there, as in the kernel's array.
    pub slots: Vec<u32>,
}

impl Maps {
    /// Empty maps with so many blocks of slots.
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

    /// What an agent finds in them that starts.
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

/// Maps that an agent writes to, a few writes at a time.
#[derive(Clone, Debug)]
pub struct Handle {
    /// The maps.
    pub maps: Rc<RefCell<Maps>>,
    /// How many writes are carried out before the next one waits.
    pub budget: Rc<Cell<usize>>,
    /// How many programs are at work on this node: a grace waits for their end.
    pub at_work: Rc<Cell<u32>>,
}

/// Why a write waits: it is not its turn, or programs are at work.
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

/// A flow entry, and whose packet made it.
#[derive(Clone, Copy, Debug)]
pub struct Entry<A: Copy> {
    /// The entry.
    pub flow: Flow<A>,
    /// Index of the connection.
    pub owner: u32,
}

/// A table that loses what was used longest ago where it is full.
#[derive(Clone, Debug)]
pub struct Lru<K, V> {
    capacity: usize,
    clock: u64,
    entries: BTreeMap<K, (V, u64)>,
    order: BTreeMap<u64, K>,
}

impl<K: Copy + Ord, V: Copy> Lru<K, V> {
    /// An empty table.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity, clock: 0, entries: BTreeMap::new(), order: BTreeMap::new() }
    }

    /// The value of a key, which counts as used.
    pub fn get(&mut self, key: &K) -> Option<V> {
        let (value, used) = self.entries.get_mut(key)?;
        self.clock += 1;
        let _ = self.order.remove(used);
        *used = self.clock;
        let _ = self.order.insert(self.clock, *key);
        Some(*value)
    }

    /// The value of a key, for whoever only looks.
    #[must_use]
    pub fn peek(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|(value, _)| value)
    }

    /// Changes the value of a key in place.
    pub fn change<R>(&mut self, key: &K, how: impl FnOnce(&mut V) -> R) -> Option<R> {
        self.entries.get_mut(key).map(|(value, _)| how(value))
    }

    /// Inserts a value; returns what had to go for it.
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

    /// All keys and values.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, (value, _))| (key, value))
    }
}

/// How much the tables of flows hold.
#[derive(Clone, Copy, Debug)]
pub struct Capacities {
    /// Entries of `flows`.
    pub flows: usize,
    /// Entries of `embryonic`.
    pub embryonic: usize,
}

/// What the programs of a family keep.
#[derive(Debug)]
pub struct Memory<F: Family> {
    /// Proven flows.
    pub flows: Lru<Tuple<F::Address>, Entry<F::Address>>,
    /// Flows that nothing has proven.
    pub embryonic: Lru<Tuple<F::Address>, Entry<F::Address>>,
    /// Where clients have been.
    pub affinity: Lru<AffinityKey<F::Address>, Affinity>,
    /// What first fragments have told.
    pub fragments: Lru<Datagram<F::Address>, DatagramPorts>,
    /// Searches in vain.
    pub exhausted: BTreeMap<Tuple<F::Address>, Ticks>,
}

impl<F: Family> Memory<F> {
    /// Empty tables.
    #[must_use]
    pub fn new(capacities: Capacities) -> Self {
        Self {
            flows: Lru::new(capacities.flows),
            embryonic: Lru::new(capacities.embryonic),
            affinity: Lru::new(4_096),
            fragments: Lru::new(256),
            exhausted: BTreeMap::new(),
        }
    }
}
