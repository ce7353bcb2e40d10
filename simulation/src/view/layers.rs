//! The tables of one layout of the maps, as a program or the agent uses them.

use std::convert::Infallible;
use std::net::SocketAddr;

use sluice_common::abi::previous::{self, Moved};
use sluice_common::abi::{Affinity, AffinityKey, Flow, Tuple, flow};
use sluice_common::engine::layouts::{SharedStore, Store};
use sluice_common::engine::record::{FlowMap, InsertError};
use sluice_common::path::{Record, leads_to};

use super::View;
use crate::fault::Fault;
use crate::maps::{Entry, Lru};
use crate::node::{Node, Side};

/// Index of the tables of this layout.
pub const NOW: usize = 0;
/// Index of the tables of the previous layout.
pub const BEFORE: usize = 1;

/// A table of flows in one layout, as a program uses it.
#[derive(Clone, Copy)]
pub(super) struct Flows<'v, 'w, F: Side, const LAYER: usize> {
    pub view: &'v View<'w, F>,
    pub map: FlowMap,
}

impl<F: Side, const LAYER: usize> Flows<'_, '_, F, LAYER> {
    /// Returns the entry of a key.
    pub(super) fn read(&self, key: &Tuple<F::Address>) -> Option<Flow<F::Address>> {
        self.view.race();
        let mut memory = F::memory(self.view.node).borrow_mut();
        memory.layers[LAYER].table_mut(self.map).get(key).map(|entry| entry.flow)
    }

    fn write(
        &self,
        key: &Tuple<F::Address>,
        flow: Flow<F::Address>,
        only_new: bool,
    ) -> Result<(), InsertError> {
        let View { world, node, tag, recorded, .. } = *self.view;
        self.view.race();
        let maker = maker::<F>(node, key, &flow);
        let owner = maker.filter(|_| recorded != Record::Open).unwrap_or(tag.connection);
        let gone = {
            let mut memory = F::memory(node).borrow_mut();
            let table = memory.layers[LAYER].table_mut(self.map);
            if only_new && table.peek(key).is_some() {
                return Err(InsertError::Exists);
            }
            table.insert(*key, Entry { flow, owner })
        };
        if let Some((key, entry)) = gone {
            world.evicted::<F>(node, self.map, &key, &entry, false);
        }
        Ok(())
    }

    fn erase(&self, key: &Tuple<F::Address>) {
        self.view.race();
        let mut memory = F::memory(self.view.node).borrow_mut();
        let _ = memory.layers[LAYER].table_mut(self.map).remove(key);
    }

    fn alter(&self, key: &Tuple<F::Address>, change: impl FnOnce(&mut Flow<F::Address>)) -> bool {
        self.view.race();
        let changed = {
            let mut memory = F::memory(self.view.node).borrow_mut();
            let table = memory.layers[LAYER].table_mut(self.map);
            if table.get(key).is_none() {
                return false;
            }
            table.change(key, |entry| {
                let before = entry.flow;
                change(&mut entry.flow);
                // The client's side of a masqueraded flow is that of all its client's connections
                // to the endpoint from one port.
                let frontend: SocketAddr = if before.flags & flow::REPLY != 0 {
                    (F::ip(before.source), before.source_port).into()
                } else {
                    (F::ip(key.destination), key.destination_port).into()
                };
                let is_own = before.flags & flow::SOURCE == 0 && before != entry.flow;
                is_own.then_some((entry.owner, frontend))
            })
        };
        if let Some(Some((owner, frontend))) = changed {
            self.view.world.check_owner(self.view.tag, self.view.asked, owner, frontend);
        }
        true
    }
}

/// Returns the owner of an entry that leads the same way, in whichever table it is.
fn maker<F: Side>(node: &Node, key: &Tuple<F::Address>, flow: &Flow<F::Address>) -> Option<u32> {
    let memory = F::memory(node).borrow();
    memory.tables().find_map(|(_, _, table)| {
        table.peek(key).filter(|entry| leads_to(&entry.flow, flow)).map(|entry| entry.owner)
    })
}

impl<F: Side> Store<Tuple<F::Address>, Flow<F::Address>> for Flows<'_, '_, F, NOW> {
    fn get(&self, key: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        self.read(key).map(|flow| self.view.flows.keep(flow))
    }

    fn insert(
        &self,
        key: &Tuple<F::Address>,
        value: &Flow<F::Address>,
        only_new: bool,
    ) -> Result<(), InsertError> {
        self.write(key, *value, only_new)
    }

    fn remove(&self, key: &Tuple<F::Address>) {
        self.erase(key);
    }

    fn update(&self, key: &Tuple<F::Address>, change: impl FnOnce(&mut Flow<F::Address>)) -> bool {
        self.alter(key, change)
    }
}

impl<F: Side> Store<Tuple<F::Address>, previous::Flow<F::Address>> for Flows<'_, '_, F, BEFORE> {
    fn get(&self, key: &Tuple<F::Address>) -> Option<&previous::Flow<F::Address>> {
        self.read(key).map(|flow| self.view.previous_flows.keep(flow.before()))
    }

    fn insert(
        &self,
        key: &Tuple<F::Address>,
        value: &previous::Flow<F::Address>,
        only_new: bool,
    ) -> Result<(), InsertError> {
        self.write(key, Flow::after(value), only_new)
    }

    fn remove(&self, key: &Tuple<F::Address>) {
        if self.view.world.fault != Some(Fault::LeavesPrevious) {
            self.erase(key);
        }
    }

    fn update(
        &self,
        key: &Tuple<F::Address>,
        change: impl FnOnce(&mut previous::Flow<F::Address>),
    ) -> bool {
        self.alter(key, |flow| {
            let mut before = flow.before();
            change(&mut before);
            *flow = Flow::after(&before);
        })
    }
}

/// The table of affinities in one layout, as a program uses it.
#[derive(Clone, Copy)]
pub(super) struct Affinities<'v, 'w, F: Side, const LAYER: usize> {
    pub view: &'v View<'w, F>,
}

impl<F: Side, const LAYER: usize> Affinities<'_, '_, F, LAYER> {
    fn read(self, key: &AffinityKey<F::Address>) -> Option<Affinity> {
        self.view.race();
        F::memory(self.view.node).borrow_mut().layers[LAYER].affinity.get(key)
    }

    fn write(self, key: &AffinityKey<F::Address>, value: Affinity) {
        self.view.race();
        let mut memory = F::memory(self.view.node).borrow_mut();
        let _ = memory.layers[LAYER].affinity.insert(*key, value);
    }

    fn erase(self, key: &AffinityKey<F::Address>) {
        self.view.race();
        let _ = F::memory(self.view.node).borrow_mut().layers[LAYER].affinity.remove(key);
    }
}

impl<F: Side> Store<AffinityKey<F::Address>, Affinity> for Affinities<'_, '_, F, NOW> {
    fn get(&self, key: &AffinityKey<F::Address>) -> Option<&Affinity> {
        self.read(key).map(|affinity| self.view.affinity.keep(affinity))
    }

    fn insert(
        &self,
        key: &AffinityKey<F::Address>,
        value: &Affinity,
        _: bool,
    ) -> Result<(), InsertError> {
        self.write(key, *value);
        Ok(())
    }

    fn remove(&self, key: &AffinityKey<F::Address>) {
        self.erase(key);
    }

    fn update(&self, _: &AffinityKey<F::Address>, _: impl FnOnce(&mut Affinity)) -> bool {
        false
    }
}

impl<F: Side> Store<AffinityKey<F::Address>, previous::Affinity> for Affinities<'_, '_, F, BEFORE> {
    fn get(&self, key: &AffinityKey<F::Address>) -> Option<&previous::Affinity> {
        self.read(key).map(|affinity| self.view.previous_affinity.keep(affinity.before()))
    }

    fn insert(
        &self,
        key: &AffinityKey<F::Address>,
        value: &previous::Affinity,
        _: bool,
    ) -> Result<(), InsertError> {
        self.write(key, Affinity::after(value));
        Ok(())
    }

    fn remove(&self, key: &AffinityKey<F::Address>) {
        self.erase(key);
    }

    fn update(&self, _: &AffinityKey<F::Address>, _: impl FnOnce(&mut previous::Affinity)) -> bool {
        false
    }
}

/// Lends a table to a closure.
type Lend<'w, K, S> = &'w dyn Fn(&mut dyn FnMut(&mut Lru<K, S>));

/// A table of one layout, as the agent uses it while programs do. It stores values as `S`, and the
/// layout knows them as `V`.
pub struct AgentTable<'w, K, S, V> {
    /// Lends the table.
    pub lend: Lend<'w, K, S>,
    /// Lets another CPU have its turn.
    pub race: &'w dyn Fn(),
    /// Returns a stored value as the layout knows it.
    pub read: &'w dyn Fn(&S) -> V,
    /// Returns what is stored of a value.
    pub store: &'w dyn Fn(&V) -> S,
    /// Takes what is evicted.
    pub evict: &'w dyn Fn(&K, &S),
}

impl<K: Copy + Ord, S: Copy, V> SharedStore<K, V> for AgentTable<'_, K, S, V> {
    type Error = Infallible;

    fn get(&self, key: &K) -> Result<Option<V>, Infallible> {
        (self.race)();
        let mut found = None;
        (self.lend)(&mut |table| found = table.get(key));
        Ok(found.as_ref().map(self.read))
    }

    fn insert_new(&self, key: &K, value: &V) -> Result<bool, Infallible> {
        (self.race)();
        let (mut is_new, mut gone) = (false, None);
        (self.lend)(&mut |table| {
            is_new = table.peek(key).is_none();
            if is_new {
                gone = table.insert(*key, (self.store)(value));
            }
        });
        if let Some((key, value)) = gone {
            (self.evict)(&key, &value);
        }
        Ok(is_new)
    }

    fn take(&self, key: &K) -> Result<bool, Infallible> {
        (self.race)();
        let mut gone = None;
        (self.lend)(&mut |table| gone = table.remove(key));
        Ok(gone.is_some())
    }
}
