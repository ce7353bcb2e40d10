//! Agents that replace those of another version, and change the layout of the maps while packets
//! flow.
//!
//! The rounds, the programs that read two layouts and the move of an entry are the product's code.
//! Simulated are what stands for the kernel (which program is where, which maps are pinned) and the
//! previous version's programs: this version's engine on the previous layout's tables.

use std::cell::Cell;

use sluice_common::abi::previous::{Moved, Round, Step};
use sluice_common::abi::{Affinity, AffinityKey, Flow, Tuple};
use sluice_common::engine::layouts::move_entry;
use sluice_common::engine::record::FlowMap;
use sluice_common::{V4, V6};

use super::{What, World};
use crate::layouts::Version;
use crate::maps::{Entry, Lru};
use crate::node::{Node, Side};
use crate::packet::{By, Tag};
use crate::random::mix;
use crate::view::layers::{AgentTable, BEFORE, NOW};

/// Microseconds within which the next program is replaced.
const PROGRAM_US: u64 = 400_000;
/// Microseconds within which the next entry is moved.
const MOVE_US: u64 = 2_000;

/// A table to be moved, and the keys that it had when its turn came.
#[derive(Clone, Debug)]
pub enum Moving {
    /// IPv4's flows.
    V4(FlowMap, Vec<Tuple<<V4 as sluice_common::Family>::Address>>),
    /// IPv6's flows.
    V6(FlowMap, Vec<Tuple<<V6 as sluice_common::Family>::Address>>),
    /// IPv4's affinities.
    AffinityV4(Vec<AffinityKey<<V4 as sluice_common::Family>::Address>>),
    /// IPv6's affinities.
    AffinityV6(Vec<AffinityKey<<V6 as sluice_common::Family>::Address>>),
}

impl World<'_> {
    /// Replaces a node's agent by one of a version.
    pub(super) fn replace_agent(&self, node: &Node, version: Version) {
        self.tell(|| format!("node{}: {version:?}", node.index));
        let _ = node.agent.borrow_mut().take();
        node.killed.set(node.killed.get() + 1);
        node.layouts.borrow_mut().version = version;
        self.start(node);
        self.after(0, What::Write(node.index, node.killed.get()));
    }

    /// Begins the rounds of a node's agent, which has started.
    pub(super) fn begin_rounds(&self, node: &Node) {
        if self.setting.layouts {
            node.layouts.borrow_mut().begin();
            self.after(0, What::Program(node.index, node.killed.get(), 0));
        }
    }

    /// Replaces one program by that of the agent's round.
    pub(super) fn replace_program(&self, node: &Node, program: usize) {
        let is_left = node.layouts.borrow_mut().replace(program);
        let killed = node.killed.get();
        if is_left {
            let after = self.chance(PROGRAM_US);
            self.after(after, What::Program(node.index, killed, program + 1));
            return;
        }
        let mut layouts = node.layouts.borrow_mut();
        let is_returning = match layouts.version {
            Version::Previous => return,
            Version::Current => false,
            Version::Returning => true,
        };
        let step = layouts.round.step(is_returning);
        self.tell(|| format!("node{}: after {:?}, {step:?}", node.index, layouts.round));
        match step {
            Step::Load(round) => {
                layouts.round = round;
                layouts.has_previous |= round == Round::WritesPrevious;
                self.after(0, What::Program(node.index, killed, 0));
            }
            Step::MoveUp | Step::MoveDown => {
                drop(layouts);
                self.after(0, What::Move(node.index, killed, 0, None));
            }
            Step::Done => {}
        }
    }

    /// Moves one entry, or takes the next table's turn.
    pub(super) fn move_next(&self, node: &Node, table: u32, moving: Option<Moving>, depth: u32) {
        let up = node.layouts.borrow().version == Version::Current;
        let from = if up { BEFORE } else { NOW };
        let mut moving = match (moving, table) {
            (Some(moving), _) => moving,
            (None, 0) => Moving::V4(FlowMap::Flows, keys::<V4>(node, from, FlowMap::Flows)),
            (None, 1) => Moving::V4(FlowMap::Embryonic, keys::<V4>(node, from, FlowMap::Embryonic)),
            (None, 2) => Moving::V6(FlowMap::Flows, keys::<V6>(node, from, FlowMap::Flows)),
            (None, 3) => Moving::V6(FlowMap::Embryonic, keys::<V6>(node, from, FlowMap::Embryonic)),
            (None, 4) => Moving::AffinityV4(clients::<V4>(node, from)),
            (None, 5) => Moving::AffinityV6(clients::<V6>(node, from)),
            (None, _) => {
                self.end_move(node, up);
                return;
            }
        };
        let has_moved = match &mut moving {
            Moving::V4(map, keys) => {
                keys.pop().map(|key| self.move_flow::<V4>(node, *map, &key, up, depth)).is_some()
            }
            Moving::V6(map, keys) => {
                keys.pop().map(|key| self.move_flow::<V6>(node, *map, &key, up, depth)).is_some()
            }
            Moving::AffinityV4(keys) => {
                keys.pop().map(|key| self.move_affinity::<V4>(node, &key, up, depth)).is_some()
            }
            Moving::AffinityV6(keys) => {
                keys.pop().map(|key| self.move_affinity::<V6>(node, &key, up, depth)).is_some()
            }
        };
        let (table, moving) = if has_moved { (table, Some(moving)) } else { (table + 1, None) };
        let after = self.chance(MOVE_US);
        self.after(after, What::Move(node.index, node.killed.get(), table, moving));
    }

    /// Goes on once all entries are moved: with settled programs, or with the previous version.
    fn end_move(&self, node: &Node, up: bool) {
        self.check_moved::<V4>(node, up);
        self.check_moved::<V6>(node, up);
        if up {
            let mut layouts = node.layouts.borrow_mut();
            layouts.round = Round::Settled;
            layouts.has_previous = false;
            self.after(0, What::Program(node.index, node.killed.get(), 0));
        } else {
            self.replace_agent(node, Version::Previous);
        }
    }

    /// Checks that nothing is left in the layout that is given up.
    fn check_moved<F: Side>(&self, node: &Node, up: bool) {
        let memory = F::memory(node).borrow();
        let left = &memory.layers[if up { BEFORE } else { NOW }];
        let flows = left.flows.iter().count() + left.embryonic.iter().count();
        let affinities = left.affinity.iter().count();
        if flows + affinities != 0 {
            self.violate("a layout that is given up is empty", || {
                format!("node{}: {flows} flows and {affinities} affinities are left", node.index)
            });
        }
    }

    fn move_flow<F: Side>(
        &self,
        node: &Node,
        map: FlowMap,
        key: &Tuple<F::Address>,
        up: bool,
        depth: u32,
    ) {
        let owner = {
            let memory = F::memory(node).borrow();
            let entries = memory.tables().find_map(|(_, _, table)| table.peek(key).copied());
            entries.map_or(u32::MAX, |entry| entry.owner)
        };
        let race = self.racing(node, depth);
        let evict = |key: &_, entry: &_| self.evicted::<F>(node, map, key, entry, false);
        let lend = |layer: usize| {
            move |lent: &mut dyn FnMut(&mut Lru<_, _>)| {
                lent(F::memory(node).borrow_mut().layers[layer].table_mut(map));
            }
        };
        let now = AgentTable {
            lend: &lend(NOW),
            race: &race,
            read: &|entry: &Entry<F::Address>| entry.flow,
            store: &|flow| Entry { flow: *flow, owner },
            evict: &evict,
        };
        let before = AgentTable {
            lend: &lend(BEFORE),
            race: &race,
            read: &|entry: &Entry<F::Address>| entry.flow.before(),
            store: &|flow| Entry { flow: Flow::after(flow), owner },
            evict: &evict,
        };
        let Ok(is_moved) = if up {
            move_entry(&before, &now, key, Flow::after)
        } else {
            move_entry(&now, &before, key, Flow::before)
        };
        self.sums.borrow_mut().moved += u64::from(is_moved);
    }

    fn move_affinity<F: Side>(
        &self,
        node: &Node,
        key: &AffinityKey<F::Address>,
        up: bool,
        depth: u32,
    ) {
        let race = self.racing(node, depth);
        let lend = |layer: usize| {
            move |lent: &mut dyn FnMut(&mut Lru<_, _>)| {
                lent(&mut F::memory(node).borrow_mut().layers[layer].affinity);
            }
        };
        let now = AgentTable {
            lend: &lend(NOW),
            race: &race,
            read: &|affinity: &Affinity| *affinity,
            store: &|affinity| *affinity,
            evict: &|_, _| {},
        };
        let before = AgentTable {
            lend: &lend(BEFORE),
            race: &race,
            read: &|affinity: &Affinity| affinity.before(),
            store: &|affinity| Affinity::after(affinity),
            evict: &|_, _| {},
        };
        let Ok(is_moved) = if up {
            move_entry(&before, &now, key, Affinity::after)
        } else {
            move_entry(&now, &before, key, Affinity::before)
        };
        self.sums.borrow_mut().moved += u64::from(is_moved);
    }

    /// Returns what lets a CPU of a node have its turn between two operations of the agent.
    fn racing<'n>(&'n self, node: &'n Node, depth: u32) -> impl Fn() + 'n {
        let number = self.order.get() as u32;
        let operations = Cell::new(0);
        move || {
            operations.set(operations.get() + 1);
            let tag = Tag { connection: u32::MAX, by: By::Node, number, copy: 0 };
            self.race(node, tag, operations.get(), depth);
        }
    }

    fn chance(&self, below: u64) -> u64 {
        mix(&[self.setting.seed, self.order.get()]) % below
    }
}

fn keys<F: Side>(node: &Node, layer: usize, map: FlowMap) -> Vec<Tuple<F::Address>> {
    let memory = F::memory(node).borrow();
    memory.layers[layer].table(map).iter().map(|(key, _)| *key).collect()
}

fn clients<F: Side>(node: &Node, layer: usize) -> Vec<AffinityKey<F::Address>> {
    let memory = F::memory(node).borrow();
    memory.layers[layer].affinity.iter().map(|(key, _)| *key).collect()
}
