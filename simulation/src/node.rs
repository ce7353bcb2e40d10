//! A node: its devices, maps and agent.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;

use sluice_common::abi::{
    Device, Networks, Prefix, RejectBucket, RejectKey, Settings, detect_local, device,
    device_flags, networks,
};
use sluice_common::event::Wide;
use sluice_common::family::Family;
use sluice_common::packet::answer::Answer;
use sluice_common::{V4, V6};
use sluice_core::image::Stack;

use crate::agent::Agent;
use crate::cluster::{self, PODS};
use crate::count::{Counters, Observed};
use crate::layouts::{Layouts, Version};
use crate::maps::{Handle, Maps, Memory};
use crate::packet::Mac;
use crate::scenario::Setting;

/// The loopback device.
pub const LOOPBACK: u32 = 1;
/// The device towards the network.
pub const UPLINK: u32 = 2;
/// The bridge of a node whose pods are behind one.
pub const BRIDGE: u32 = 3;
/// The first pod's device; those of the other pods follow.
pub const EDGES: u32 = 10;

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Index of the node.
    pub index: usize,
    /// Addresses: one of each family, and those of its bridge.
    pub addresses: Vec<IpAddr>,
    /// Whether its pods are behind a bridge.
    pub is_bridged: bool,
    /// Ifindex -> device.
    pub devices: BTreeMap<u32, Device>,
    /// Address of a pod on this node -> its device.
    pub pods: BTreeMap<IpAddr, u32>,
    /// Settings that the programs read.
    pub settings: Settings,
    /// Maps that the agent writes.
    pub maps: Handle,
    /// IPv4's tables.
    pub v4: RefCell<Memory<V4>>,
    /// IPv6's tables.
    pub v6: RefCell<Memory<V6>>,
    /// Bits of [`sluice_common::path::mark`].
    pub marks: Cell<u32>,
    /// Rate limits of ICMP errors.
    pub rejects: RefCell<BTreeMap<RejectKey, RejectBucket>>,
    /// Counters of the programs.
    pub counters: RefCell<Counters>,
    /// The wire's view of the same packets.
    pub observed: RefCell<Observed>,
    /// The layouts that programs and agent use.
    pub layouts: RefCell<Layouts>,
    /// The agent, or [`None`] between two of them.
    pub agent: RefCell<Option<Agent>>,
    /// Number of agents that were killed.
    pub killed: Cell<u32>,
}

impl Node {
    /// Creates a node with pods and without an agent.
    #[must_use]
    pub fn new(index: usize, slot_blocks: u32, setting: &Setting) -> Self {
        let is_bridged = setting.bridged[index];
        let entry = |role, flags, [v4, v6]: [IpAddr; 2]| Device {
            role,
            link_header: 0,
            mtu: 1_500,
            masquerade_v4: V4::address(v4).unwrap_or_default(),
            masquerade_v6: V6::address(v6).unwrap_or_default(),
            flags,
            ..Device::default()
        };
        let own = cluster::node(index);
        let loopback = Device { link_header: 14, ..entry(device::LOOPBACK, 0, own) };
        let mut devices =
            BTreeMap::from([(LOOPBACK, loopback), (UPLINK, entry(device::UPLINK, 0, own))]);
        let mut pods = BTreeMap::new();
        for (number, ifindex) in (0..PODS).zip(EDGES..) {
            let flags = device_flags::LOCAL_PODS;
            let edge = Device { netns: ifindex, ..entry(device::EDGE, flags, own) };
            let bits = device_flags::bridge_mac(cluster::bridge_mac(index));
            let edge = if is_bridged {
                Device {
                    link_header: 14,
                    bridge: BRIDGE,
                    mac: cluster::port_mac(index, number),
                    netns: ifindex,
                    ..entry(
                        device::EDGE,
                        flags | bits << device_flags::BRIDGE_MAC_SHIFT,
                        cluster::gateway(index),
                    )
                }
            } else {
                edge
            };
            let _ = devices.insert(ifindex, edge);
            let addresses = cluster::host(cluster::pod(index, number));
            pods.extend(addresses.map(|address| (address, ifindex)));
        }
        let version = if setting.layouts { Version::Previous } else { Version::Current };
        let bridge = is_bridged.then(|| cluster::gateway(index)).into_iter().flatten();
        let maps = Handle {
            maps: Rc::new(RefCell::new(Maps::new(slot_blocks))),
            budget: Rc::new(Cell::new(0)),
            at_work: Rc::new(Cell::new(0)),
        };
        let layouts = Layouts::new(devices.keys().copied(), version);
        Self {
            index,
            addresses: own.into_iter().chain(bridge).collect(),
            is_bridged,
            devices,
            pods,
            settings: Settings {
                masquerade: setting.masquerade,
                detect_local: detect_local::DEVICE,
                networks: if setting.accelerate { networks::ACCELERATE } else { 0 },
                ..Settings::default()
            },
            maps,
            v4: RefCell::new(Memory::new(setting.capacities)),
            v6: RefCell::new(Memory::new(setting.capacities)),
            marks: Cell::new(0),
            rejects: RefCell::new(BTreeMap::new()),
            counters: RefCell::default(),
            observed: RefCell::default(),
            layouts: RefCell::new(layouts),
            agent: RefCell::new(None),
            killed: Cell::new(0),
        }
    }

    /// Returns the device by which packets to an address leave, or [`None`] if the address is the
    /// node's own.
    #[must_use]
    pub fn route(&self, destination: IpAddr) -> Option<u32> {
        if self.addresses.contains(&destination) {
            return None;
        }
        Some(match self.pods.get(&destination) {
            Some(_) if self.is_bridged => BRIDGE,
            Some(device) => *device,
            None => UPLINK,
        })
    }

    /// Returns the link-layer address of a neighbour on the bridge.
    #[must_use]
    pub fn neighbour(&self, address: IpAddr) -> Option<Mac> {
        let device = self.pods.get(&address).filter(|_| self.is_bridged)?;
        Some(cluster::pod_mac(self.index, (device - EDGES) as usize))
    }

    /// Returns the port by which the bridge reaches a link-layer address, or [`None`] if the
    /// address is its own.
    #[must_use]
    pub fn port(&self, mac: Mac) -> Option<u32> {
        let mut ports = (0..PODS).zip(EDGES..);
        let port = ports.find(|(number, _)| cluster::pod_mac(self.index, *number) == mac);
        port.map(|(_, port)| port)
    }

    /// Reports whether frames at a device have an Ethernet header.
    #[must_use]
    pub fn has_link_header(&self, ifindex: u32) -> bool {
        self.is_bridged && ifindex >= EDGES
    }
}

/// An address family with the node's tables of it.
pub trait Side: Stack + Answer + Wide {
    /// Returns the family's tables.
    fn memory(node: &Node) -> &RefCell<Memory<Self>>;
    /// Returns the cluster's networks, of which none is known.
    fn networks() -> &'static Networks<Self::Address>;
}

impl Side for V4 {
    fn memory(node: &Node) -> &RefCell<Memory<Self>> {
        &node.v4
    }

    fn networks() -> &'static Networks<<V4 as Family>::Address> {
        type Address = <V4 as Family>::Address;
        const NONE: Prefix<Address> =
            Prefix { network: Address { octets: [0xff; 4] }, mask: Address { octets: [0; 4] } };
        const NETWORKS: Networks<Address> = Networks { pods: [NONE; 4], services: [NONE; 4] };
        &NETWORKS
    }
}

impl Side for V6 {
    fn memory(node: &Node) -> &RefCell<Memory<Self>> {
        &node.v6
    }

    fn networks() -> &'static Networks<<V6 as Family>::Address> {
        type Address = <V6 as Family>::Address;
        const NONE: Prefix<Address> =
            Prefix { network: Address { octets: [0xff; 16] }, mask: Address { octets: [0; 16] } };
        const NETWORKS: Networks<Address> = Networks { pods: [NONE; 4], services: [NONE; 4] };
        &NETWORKS
    }
}
