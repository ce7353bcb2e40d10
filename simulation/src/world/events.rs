//! The events of a scenario, and what they may cost a connection.

use std::net::SocketAddr;

use sluice_common::abi::{Flow, Tuple, flow};
use sluice_common::engine::record::FlowMap;
use sluice_common::{V4, V6};
use sluice_core::model::event::Change;

use super::{CHANGE, PATIENCE, What, World, sizes};
use crate::agent::Agent;
use crate::cluster::{self, Readiness, SERVICES, Target};
use crate::connection::lost;
use crate::layouts::Version;
use crate::maps::Entry;
use crate::node::{Node, Side};
use crate::scenario::{Act, SECOND};
use crate::view::has_partner;

impl World<'_> {
    pub(super) fn start(&self, node: &Node) {
        self.tell(|| format!("node{}: an agent starts", node.index));
        let objects = self.objects.borrow().all();
        let name = cluster::node_name(node.index);
        let agent = Agent::start(&node.maps, &name, &node.addresses, sizes(), objects);
        *node.agent.borrow_mut() = Some(agent);
        self.begin_rounds(node);
    }

    /// Lets an agent write; returns whether some writes are left.
    pub(super) fn write(node: &Node, writes: usize) -> bool {
        node.agent.borrow_mut().as_mut().is_some_and(|agent| agent.write(writes))
    }

    pub(super) fn hear(&self, changes: &[Change]) {
        for node in &self.nodes {
            if let Some(agent) = node.agent.borrow_mut().as_mut() {
                agent.hear(changes.to_vec());
            }
            self.after(1_000, What::Write(node.index, node.killed.get()));
        }
    }

    pub(super) fn event(&self, index: usize) {
        let event = &self.events[index];
        if !matches!(event.act, Act::Connect(_)) {
            self.tell(|| format!("event {index}: {:?}", event.act));
        }
        match &event.act {
            Act::Connect(connect) => self.connect(index as u32, connect),
            Act::Evict { connection, choice, all } => {
                self.evict::<V4>(*connection as u32, *choice, *all);
                self.evict::<V6>(*connection as u32, *choice, *all);
            }
            Act::Endpoint(host, readiness) => {
                let changes: Vec<_> = {
                    let mut objects = self.objects.borrow_mut();
                    objects.endpoints[*host] = *readiness;
                    (0..SERVICES).flat_map(|service| objects.slices(service)).collect()
                };
                self.disturbed(|target| target.service().is_some());
                self.hear(&changes);
            }
            Act::Service(service, is_there) => {
                // An agent that started meanwhile has not received the slices.
                let changes: Vec<_> = {
                    let mut objects = self.objects.borrow_mut();
                    objects.services[*service] = *is_there;
                    let slices = if *is_there { objects.slices(*service) } else { Vec::new() };
                    [objects.service(*service)].into_iter().chain(slices).collect()
                };
                self.disturbed(|target| target.service() == Some(*service));
                self.hear(&changes);
            }
            Act::Kill { node, pause } => {
                let node = &self.nodes[*node];
                let _ = node.agent.borrow_mut().take();
                node.killed.set(node.killed.get() + 1);
                self.sums.borrow_mut().killed += 1;
                self.after(*pause, What::Start(node.index));
            }
            Act::Upgrade(node) => self.replace_agent(&self.nodes[*node], Version::Current),
            Act::Downgrade(node) => self.replace_agent(&self.nodes[*node], Version::Returning),
            Act::Die(host) => self.die(*host),
            Act::Flood { .. } => self.flood(index, 0),
            Act::Forge { connection, claim, flags, from, sequence } => {
                self.forge(index, *connection as u32, *claim, *flags, *from, *sequence);
            }
        }
    }

    /// Reports whether agents may still be at work on a change.
    #[must_use]
    pub fn is_changing(&self) -> bool {
        self.now.get() < self.changing_until.get()
    }

    /// Reports whether a target's Service exists with all its endpoints.
    #[must_use]
    pub fn is_served(&self, target: Target) -> bool {
        let objects = self.objects.borrow();
        target.service().is_none_or(|service| objects.is_whole(service))
    }

    /// Records for connections that their target has changed meanwhile.
    pub(super) fn disturbed(&self, concerns: impl Fn(Target) -> bool) {
        self.changing_until.set(self.now.get() + CHANGE);
        for connection in self.connections.borrow_mut().values_mut() {
            if concerns(connection.connect.target) {
                connection.lost |= lost::DISTURBED;
            }
        }
    }

    pub(super) fn evict<F: Side>(&self, connection: u32, choice: u64, all: bool) {
        let mut found = Vec::new();
        for node in &self.nodes {
            let memory = F::memory(node).borrow();
            for (layer, table, entries) in memory.tables() {
                let own = entries.iter().filter(|(_, entry)| entry.owner == connection);
                found.extend(own.map(|(key, entry)| (node, layer, table, *key, *entry)));
            }
        }
        if found.is_empty() {
            return;
        }
        let one = choice as usize % found.len();
        for (index, (node, layer, table, key, entry)) in found.into_iter().enumerate() {
            if all || index == one {
                let mut memory = F::memory(node).borrow_mut();
                let _ = memory.layers[layer].table_mut(table).remove(&key);
                drop(memory);
                self.sums.borrow_mut().evicted += 1;
                self.evicted::<F>(node, table, &key, &entry, true);
            }
        }
    }

    /// Records what an eviction may cost a connection.
    pub fn evicted<F: Side>(
        &self,
        node: &Node,
        table: FlowMap,
        key: &Tuple<F::Address>,
        entry: &Entry<F::Address>,
        by_event: bool,
    ) {
        let mut connections = self.connections.borrow_mut();
        let Some(connection) = connections.get_mut(&entry.owner) else { return };
        let is_both = !has_partner::<F>(node, key, &entry.flow);
        connection.lost |= match (by_event, table) {
            (true, _) if is_both => lost::ONE | lost::BOTH,
            (true, _) => lost::ONE,
            (false, FlowMap::Embryonic) => lost::UNPROVEN,
            (false, FlowMap::Flows) => lost::PUSHED_OUT,
        };
        let is_outside = cluster::place(connection.connect.client).is_none();
        let is_node_port = matches!(connection.connect.target, Target::NodePort(..));
        if by_event && (is_node_port || is_beyond_recovery(&entry.flow, key, is_outside)) {
            connection.lost |= lost::UNRECOVERED;
        }
        self.tell(|| {
            let end = |address, port| SocketAddr::new(F::ip(address), port);
            let whole = if is_both { ", and its partner is gone" } else { "" };
            let how = if by_event { "an event" } else { "lack of room" };
            format!(
                "node{}: {table:?} loses {} > {} of #{} by {how}{whole}",
                node.index,
                end(key.source, key.source_port),
                end(key.destination, key.destination_port),
                entry.owner
            )
        });
    }

    pub(super) fn close_all(&self) {
        self.tell(|| "what stayed open comes to its end".to_owned());
        let late: Vec<u32> = self
            .connections
            .borrow_mut()
            .iter_mut()
            .filter(|(_, connection)| connection.stays)
            .map(|(index, connection)| {
                connection.stays = false;
                *index
            })
            .collect();
        for index in late {
            self.after(u64::from(index) * 1_000, What::GoOn(index));
        }
        for node in &self.nodes {
            self.after(0, What::Start(node.index));
        }
        self.after(PATIENCE - 20 * SECOND, What::Clear);
    }

    /// Deletes all Services, so that all they had must return.
    pub(super) fn clear(&self) {
        self.check_connections();
        let changes: Vec<_> = {
            let mut objects = self.objects.borrow_mut();
            objects.services = [false; SERVICES];
            objects.endpoints.fill(Readiness::Gone);
            (0..SERVICES)
                .flat_map(|service| {
                    [objects.service(service)].into_iter().chain(objects.slices(service))
                })
                .collect()
        };
        self.hear(&changes);
    }
}

/// Reports whether a lost entry goes unnoticed although its partner is there (docs/recovery.md
/// lists the cases):
///
/// - A hairpin flow's reply goes to a frontend's address, and is taken for a client's.
/// - Where a client has another port at the endpoint, its reset comes from that port.
/// - A reply of the client's side of a masqueraded flow goes to an address of the node, whose stack
///   resets what it does not know.
/// - The reset of a masqueraded client outside goes to the endpoint's node.
fn is_beyond_recovery<A: Copy>(entry: &Flow<A>, key: &Tuple<A>, is_outside: bool) -> bool {
    entry.flags & flow::DIRECT != 0
        || entry.flags & flow::REPLY != 0
            && (entry.flags & (flow::HAIRPIN | flow::SOURCE) != 0
                || entry.flags & flow::MASQUERADED != 0 && is_outside
                || entry.destination_port != key.destination_port)
}
