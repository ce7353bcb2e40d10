//! The invariants: of each packet, and at the end of a run.

use std::net::SocketAddr;

use sluice_common::engine::adapter::Action;
use sluice_common::engine::record::FlowMap;
use sluice_common::packet::header::protocol;
use sluice_common::path::{CLOSING_TICKS, Record, gives_way};
use sluice_common::{Reason, V4, V6};

use super::World;
use crate::act::Counted;
use crate::cluster;
use crate::connection::{Connecting, Outcome, lost};
use crate::node::{Node, Side};
use crate::packet::{By, Packet, Read, Tag};

impl World<'_> {
    /// Checks that a packet is counted as what was done with it.
    pub(super) fn check_count(
        &self,
        before: &Packet,
        after: &Packet,
        end: Action,
        counted: Counted,
    ) {
        let rule = "a packet is counted as what becomes of it";
        let is_answer = after.is_answer_to(before);
        let by_reason = matches!(counted, Counted::Reason(reason) if reason != Reason::Stranger);
        if (end == Action::Drop || is_answer) && !by_reason {
            self.violate(rule, || format!("{counted:?}: {before} is {end:?}"));
            return;
        }
        let (Some(Read::Whole(was)), Some(Read::Whole(is))) = (before.contents(), after.contents())
        else {
            return;
        };
        if end == Action::Drop || is_answer {
            return;
        }
        let nodes = self.nodes.len();
        let to_backend = was.destination != is.destination
            && cluster::is_frontend(was.destination, nodes)
            && !cluster::is_frontend(is.destination, nodes);
        let to_client = was.source != is.source
            && cluster::is_frontend(is.source, nodes)
            && !cluster::is_frontend(was.source, nodes);
        let is_right = match counted {
            Counted::Twice => false,
            Counted::Forward => was.destination != is.destination,
            Counted::Reply => was.source != is.source,
            Counted::Reason(_) => true,
            Counted::No => !to_backend && !to_client,
        };
        if !is_right {
            self.violate(rule, || format!("{counted:?}: {before} became {after}"));
        }
    }

    /// Checks that a client's packet changes no entry of another connection.
    pub fn check_owner(&self, tag: Tag, asked: SocketAddr, owner: u32, frontend: SocketAddr) {
        if tag.by != By::Client || owner == tag.connection || owner == u32::MAX {
            return;
        }
        let connections = self.connections.borrow();
        // A reset of what came in another's name goes there.
        let is_own =
            |number, end| connections.get(number).is_some_and(|own: &Connecting| own.target == end);
        // And an entry that a reset has led to may be of any frontend.
        let is_right = is_own(&tag.connection, asked) && is_own(&owner, frontend);
        if !is_right || connections.get(&owner).is_some_and(|owner| owner.lost & lost::FORGED != 0)
        {
            return;
        }
        let is_same = |one: &Connecting, other: &Connecting| {
            (one.connect.client, one.connect.port, one.target)
                == (other.connect.client, other.connect.port, other.target)
        };
        if let (Some(one), Some(other)) =
            (connections.get(&tag.connection), connections.get(&owner))
            && !is_same(one, other)
        {
            self.violate("a client's packet changes no other connection's entry", || {
                format!("a packet of #{} changes an entry of #{owner}", tag.connection)
            });
        }
    }

    pub(super) fn finish(&self) {
        for node in &self.nodes {
            let mut agent = node.agent.borrow_mut();
            let Some(agent) = agent.as_mut() else {
                self.violate("a node has an agent at the end", || format!("node{}", node.index));
                continue;
            };
            while agent.write(usize::MAX) {}
            if let Some(writes) = agent.differs() {
                self.violate("the maps are as the plan has them", || writes);
            }
            let image = &node.maps.maps.borrow().image;
            let rest = [
                ("frontends", image.v4.services.len() + image.v6.services.len()),
                ("service ports", image.names.len()),
                ("ranges of slots", agent.image().slots.len()),
                ("origins", image.v4.origins.len() + image.v6.origins.len()),
            ];
            for (what, count) in rest {
                if count != 0 {
                    self.violate("what Services had returns", || {
                        format!("node{} has {count} {what}", node.index)
                    });
                }
            }
            self.check_tables::<V4>(node);
            self.check_tables::<V6>(node);
            self.check_sums(node);
        }
        self.check_flows();
    }

    /// Checks that the counters of a node add up to what the wire shows of its programs.
    pub(super) fn check_sums(&self, node: &Node) {
        let (counters, observed) = (node.counters.borrow(), node.observed.borrow());
        for ((what, counted), seen) in counters.sums().into_iter().zip(observed.sums()) {
            if counted != seen {
                self.violate("the counters add up", || {
                    format!("node{}, {what}: {counted:?} counted, {seen:?} seen", node.index)
                });
            }
        }
    }

    /// Checks that every connection to a Service was counted as a new flow.
    pub(super) fn check_flows(&self) {
        let connections = self.connections.borrow();
        let is_served = |connection: &&Connecting| {
            connection.is_open
                && connection.connect.protocol != protocol::UDP
                && connection.connect.target.service().is_some()
        };
        let open = connections.values().filter(is_served).count() as u64;
        let flows: u64 = self.nodes.iter().map(|node| node.counters.borrow().flows()).sum();
        if flows < open {
            self.violate("the counters add up", || {
                format!("{flows} flows counted, {open} connections were open")
            });
        }
    }

    /// Checks that an ended connection's entries are embryonic, and return its source port.
    pub(super) fn check_tables<F: Side>(&self, node: &Node) {
        let connections = self.connections.borrow();
        let memory = F::memory(node).borrow();
        for (table, key, entry) in memory.tables().flat_map(|(_, table, entries)| {
            entries.iter().map(move |(key, entry)| (table, key, entry))
        }) {
            let Some(connection) = connections.get(&entry.owner) else { continue };
            let has_ended = connection.connect.protocol != protocol::UDP
                && connection.outcome == Some(Outcome::Completed)
                && connection.lost & !lost::DISTURBED == 0
                && !connections.values().any(|other| connection.shares_port(other));
            let now = self.ticks();
            let embryonic = table == FlowMap::Embryonic;
            let holds = !gives_way(&entry.flow, embryonic, key.protocol, Record::Open, now);
            let idle = now.wrapping_sub(entry.flow.seen);
            if has_ended && idle > CLOSING_TICKS && (!embryonic || holds) {
                self.violate("what has ended stands aside", || {
                    format!("node{}: {table:?} has {key:?} of #{}", node.index, entry.owner)
                });
            }
        }
    }
}
