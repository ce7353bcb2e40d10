//! The packets at a node: its programs, its stack and its bridge.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::engine::adapter::Action;
use sluice_common::engine::open::FlowEnd;
use sluice_common::engine::xdp::Fate;
use sluice_common::path::Hook;

use super::{NEAR_US, Place, What, World};
use crate::act::{Counted, Met, run, run_translated, run_xdp};
use crate::cluster;
use crate::count::refuses;
use crate::node::{BRIDGE, EDGES, Node, UPLINK};
use crate::packet::{By, Link, Packet, Read, Tag};
use crate::socket::unknown;

/// Times that a packet may leave a node's programs by another device.
const TURNS: u32 = 4;

impl World<'_> {
    /// Receives a packet on a device.
    pub(super) fn arrive(&self, node: &Node, device: u32, mut packet: Packet, depth: u32) {
        let met = Met { hook: Hook::Ingress, ifindex: device, came_by: device, depth };
        let is_translated = self.setting.xdp && device == UPLINK && {
            let met = Met { hook: Hook::Xdp, ..met };
            match self.xdp(node, met, &mut packet) {
                Some(is_translated) => is_translated,
                None => return,
            }
        };
        let action = match is_translated {
            false => self.program(node, met, &mut packet, run),
            // tc leaves alone what XDP has translated.
            true if !self.setting.accelerate => Action::Next,
            true => self.program(node, met, &mut packet, run_translated),
        };
        match action {
            Action::Drop => {}
            Action::Send(out) | Action::Forward(out) => {
                self.leave(node, out, 0, packet, depth, 0);
            }
            Action::ForwardTo(out) => self.leave(node, out, device, packet, depth, 0),
            Action::Next => self.enter(node, device, packet, depth, 0),
            Action::Receive(by) => self.enter(node, by, packet, depth, 0),
        }
    }

    /// Hands a packet that came in by a device to the stack, or to the bridge that the device is a
    /// port of.
    fn enter(&self, node: &Node, device: u32, packet: Packet, depth: u32, turns: u32) {
        if !node.has_link_header(device) {
            self.stack(node, device, packet, depth);
            return;
        }
        let Link { destination, .. } = packet.link;
        let own = node.devices.get(&device).map(|device| device.mac);
        if destination == cluster::bridge_mac(node.index) || Some(destination) == own {
            self.stack(node, BRIDGE, packet, depth);
            return;
        }
        match node.port(destination) {
            // A bridge sends nothing back to where it came from.
            Some(port) if port != device => {
                self.sums.borrow_mut().bridged += 1;
                self.leave(node, port, device, packet, depth, turns);
            }
            Some(_) => {}
            None => self.violate("a packet reaches whom it is for", || {
                format!("node{}: {packet} at a port, to {destination:x?}", node.index)
            }),
        }
    }

    /// Does what the node's stack does: delivers packets for the node, and forwards all others.
    fn stack(&self, node: &Node, device: u32, mut packet: Packet, depth: u32) {
        let (_, destination) = packet.addresses();
        if let Some(out) = node.route(destination) {
            if packet.forward() {
                self.leave(node, out, device, packet, depth, 0);
            }
            return;
        }
        let Some(Read::Whole(segment)) = packet.contents() else { return };
        let host = cluster::processes(node.index);
        if self.hosts.borrow()[host].knows(&segment) {
            self.after(0, What::Arrives(Place::Host(host), packet));
            return;
        }
        // Nobody listens there.
        let Some(reset) = unknown(&segment) else { return };
        let packet = reset.packet(Tag { by: By::Node, ..packet.tag });
        self.tell(|| format!("node{} knows no such connection: {packet}", node.index));
        if let Some(out) = node.route(reset.destination.ip()) {
            self.leave(node, out, 0, packet, depth, 0);
        }
    }

    /// Sends a packet out by a device.
    pub(super) fn leave(
        &self,
        node: &Node,
        device: u32,
        came_by: u32,
        mut packet: Packet,
        depth: u32,
        turns: u32,
    ) {
        let device = if device == BRIDGE {
            let (_, destination) = packet.addresses();
            let Some(neighbour) = node.neighbour(destination) else { return };
            let source = cluster::bridge_mac(node.index);
            packet.link = Link { destination: neighbour, source };
            let Some(port) = node.port(neighbour) else { return };
            port
        } else {
            device
        };
        let met = Met { hook: Hook::Egress, ifindex: device, came_by, depth };
        match self.program(node, met, &mut packet, run) {
            Action::Drop => {}
            Action::Send(out) | Action::Forward(out) | Action::ForwardTo(out) if turns < TURNS => {
                self.leave(node, out, came_by, packet, depth, turns + 1);
            }
            Action::Receive(by) if turns < TURNS => {
                self.enter(node, by, packet, depth, turns + 1);
            }
            Action::Send(_) | Action::Forward(_) | Action::ForwardTo(_) | Action::Receive(_) => {
                self.violate("no packet goes round in a node", || packet.to_string());
            }
            Action::Next if device == UPLINK => self.network(Some(node.index), packet),
            Action::Next => {
                let host = cluster::pod(node.index, (device - EDGES) as usize);
                self.transmit(Place::Host(host), NEAR_US, packet);
            }
        }
    }

    /// Checks that a pod behind a bridge gets no frame of another's.
    pub fn check_link(&self, host: usize, packet: &Packet) {
        let Some((node, number)) = cluster::place(host) else { return };
        let is_behind_bridge = self.setting.bridged[node] && number < cluster::PODS;
        if is_behind_bridge && packet.link.destination != cluster::pod_mac(node, number) {
            self.violate("a packet reaches whom it is for", || {
                format!("host{host}: {packet}, a frame to {:x?}", packet.link.destination)
            });
        }
    }

    /// Runs the XDP program of an uplink. Returns whether it has translated the packet, or [`None`]
    /// if it has dropped it.
    fn xdp(&self, node: &Node, met: Met, packet: &mut Packet) -> Option<bool> {
        let (mut is_marked, mut reason) = (false, Counted::No);
        let before = packet.clone();
        let action = self.program(node, met, packet, |world, node, met, packet| {
            let (fate, counted, marked) = run_xdp(world, node, met, packet);
            (is_marked, reason) = (marked, counted);
            (if fate == Fate::Drop { Action::Drop } else { Action::Next }, counted)
        });
        let is_changed = packet.bytes != before.bytes;
        if !is_finished(action, reason, is_marked, is_changed) {
            self.violate("XDP finishes a packet or leaves it alone", || {
                format!("node{}: {before} became {packet}, {reason:?}, {action:?}", node.index)
            });
        }
        self.sums.borrow_mut().by_xdp += u64::from(is_marked);
        (action != Action::Drop).then_some(is_marked)
    }

    fn program(
        &self,
        node: &Node,
        met: Met,
        packet: &mut Packet,
        runs: impl FnOnce(&Self, &Node, Met, &mut Packet) -> (Action, Counted),
    ) -> Action {
        self.sums.borrow_mut().programs += 1;
        let before = packet.clone();
        let (end, counted) = runs(self, node, met, packet);
        self.sums.borrow_mut().around += u64::from(matches!(end, Action::ForwardTo(_)));
        self.tell(|| {
            let side = match met.hook {
                Hook::Xdp => "XDP",
                Hook::Ingress => "in",
                Hook::Egress => "out",
            };
            let device = match met.ifindex {
                UPLINK => "uplink".to_owned(),
                edge => format!("pod{}", edge.wrapping_sub(EDGES)),
            };
            let what =
                if packet.bytes == before.bytes { String::new() } else { format!(" => {packet}") };
            format!("node{} {device} {side}: {before}{what} [{counted:?}, {end:?}]", node.index)
        });
        let is_refused = end == Action::Drop || packet.is_answer_to(&before);
        node.observed.borrow_mut().add(&before, packet, is_refused, self.nodes.len());
        self.check_count(&before, packet, end, counted);
        end
    }

    /// Reports whether a socket of a pod has the tuple of a new flow, at one of its ends.
    pub fn holds_socket(
        &self,
        node: &Node,
        ifindex: u32,
        number: u8,
        end: FlowEnd,
        client: SocketAddr,
        backend: SocketAddr,
    ) -> bool {
        let Some(pod) = ifindex.checked_sub(EDGES) else { return false };
        let host = cluster::pod(node.index, pod as usize);
        let hosts = self.hosts.borrow();
        hosts.get(host).is_some_and(|host| host.holds(number, end, client, backend))
    }

    /// Reports whether a socket of a process of a node has the tuple of a new flow.
    pub fn holds_own_socket(
        &self,
        node: &Node,
        number: u8,
        end: FlowEnd,
        client: SocketAddr,
        backend: SocketAddr,
    ) -> bool {
        let host = cluster::processes(node.index);
        self.hosts.borrow()[host].holds(number, end, client, backend)
    }
}

/// Reports whether XDP has done one of the three things that it may do: translate a packet and mark
/// it, leave it alone, or drop it for a reason that the packet itself gives. A rewrite that fails
/// is none: no packet is beyond XDP's reach here.
fn is_finished(action: Action, counted: Counted, is_marked: bool, is_changed: bool) -> bool {
    if action == Action::Drop {
        return matches!(counted, Counted::Reason(reason)
            if refuses(reason) && reason != Reason::RewriteFailed);
    }
    is_marked || !is_changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xdp_drops_a_packet_only_for_a_reason_that_is_counted() {
        let drops = |counted| is_finished(Action::Drop, counted, false, false);
        assert!(drops(Counted::Reason(Reason::SourceRange)));
        assert!(drops(Counted::Reason(Reason::NoBackendDropped)));
        assert!(!drops(Counted::No));
        assert!(!drops(Counted::Forward));
        assert!(!drops(Counted::Twice));
        assert!(!drops(Counted::Reason(Reason::Stranger)));
        assert!(!drops(Counted::Reason(Reason::RewriteFailed)));
    }

    #[test]
    fn xdp_marks_what_it_translates() {
        let goes_on = |is_marked, is_changed| {
            is_finished(Action::Next, Counted::Forward, is_marked, is_changed)
        };
        assert!(goes_on(true, true));
        assert!(goes_on(false, false));
        assert!(!goes_on(false, true));
    }
}
