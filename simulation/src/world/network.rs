//! The network: a hop between two machines, or between a pod and its node.

use super::{FAR_US, NEAR_US, Place, What, World};
use crate::cluster::{self, OUTSIDE, PODS};
use crate::node::{EDGES, UPLINK};
use crate::packet::{Link, Packet};
use crate::random::mix;
use crate::scenario::Setting;

impl World<'_> {
    /// Sends a host's packet.
    pub fn send(&self, host: usize, mut packet: Packet) {
        match cluster::place(host) {
            Some((node, PODS)) => self.after(NEAR_US, What::Sends(node, packet)),
            Some((node, pod)) => {
                // The pods of a bridge are neighbours; its address is the way to all others.
                let (_, destination) = packet.addresses();
                let neighbour = self.nodes[node].neighbour(destination);
                packet.link = Link {
                    destination: neighbour.unwrap_or(cluster::bridge_mac(node)),
                    source: cluster::pod_mac(node, pod),
                };
                self.transmit(Place::Node(node, EDGES + pod as u32), NEAR_US, packet);
            }
            None => self.network(None, packet),
        }
    }

    /// Carries a packet across the network between nodes and hosts outside.
    pub(super) fn network(&self, from: Option<usize>, packet: Packet) {
        let (source, destination) = packet.addresses();
        let to_node = self.nodes.iter().position(|node| {
            node.addresses.contains(&destination) || node.pods.contains_key(&destination)
        });
        if let Some(node) = to_node {
            self.transmit(Place::Node(node, UPLINK), FAR_US, packet);
            return;
        }
        if let Some(host) = (0..OUTSIDE).find(|host| cluster::host(*host).contains(&destination)) {
            self.transmit(Place::Host(host), FAR_US, packet);
            return;
        }
        if from.is_none() && cluster::is_vip(destination) {
            // Whichever of the nodes routers have chosen for these two.
            let node = cluster::chosen(source, destination, self.nodes.len());
            self.transmit(Place::Node(node, UPLINK), FAR_US, packet);
        }
    }

    /// Carries a packet over one hop, where it may be lost, duplicated or delayed.
    pub(super) fn transmit(&self, to: Place, micros: u64, packet: Packet) {
        let Setting { seed, loss, doubled, delayed, .. } = *self.setting;
        let [connection, number] = packet.tag.words();
        let place = match to {
            Place::Node(node, device) => (node as u64) << 16 | u64::from(device),
            Place::Host(host) => 1 << 32 | host as u64,
        };
        let (_, destination) = packet.addresses();
        let fate = mix(&[seed, connection, number, place, cluster::number(destination)]);
        let (one, two, three) = (fate & 0xffff, fate >> 16 & 0xffff, fate >> 32 & 0xffff);
        if one % 1_000 < loss {
            self.tell(|| format!("lost: {packet}"));
            return;
        }
        let late = if two % 1_000 < delayed { fate >> 48 } else { 0 };
        if three % 1_000 < doubled {
            let mut copy = packet.clone();
            copy.tag.copy += 1;
            self.tell(|| format!("doubled: {packet}"));
            self.after(micros + (fate >> 50), What::Arrives(to, copy));
        }
        self.after(micros + late, What::Arrives(to, packet));
    }
}
