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
use crate::count::{Counters, Observed};
use crate::maps::{Capacities, Handle, Maps, Memory};

/// The loopback device.
pub const LOOPBACK: u32 = 1;
/// The device towards the network.
pub const UPLINK: u32 = 2;
/// The first pod's device; those of the other pods follow.
pub const EDGES: u32 = 10;

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Index of the node.
    pub index: usize,
    /// Addresses, one of each family.
    pub addresses: [IpAddr; 2],
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
    /// What the wire shows of the same packets.
    pub observed: RefCell<Observed>,
    /// The agent, or [`None`] between two of them.
    pub agent: RefCell<Option<Agent>>,
    /// Number of agents that were killed.
    pub killed: Cell<u32>,
}

impl Node {
    /// Creates a node with pods and without an agent.
    #[must_use]
    pub fn new(
        index: usize,
        addresses: [IpAddr; 2],
        pods: &[[IpAddr; 2]],
        masquerade: u32,
        accelerate: bool,
        slot_blocks: u32,
        capacities: Capacities,
    ) -> Self {
        let [v4, v6] = addresses;
        let entry = |role, flags, netns| Device {
            role,
            link_header: 0,
            mtu: 1_500,
            masquerade_v4: V4::address(v4).unwrap_or_default(),
            masquerade_v6: V6::address(v6).unwrap_or_default(),
            flags,
            netns,
            ..Device::default()
        };
        let mut devices = BTreeMap::from([
            (LOOPBACK, entry(device::LOOPBACK, 0, 0)),
            (UPLINK, entry(device::UPLINK, 0, 0)),
        ]);
        let mut by_address = BTreeMap::new();
        for (ifindex, addresses) in (EDGES..).zip(pods) {
            let edge = entry(device::EDGE, device_flags::LOCAL_PODS, ifindex);
            let _ = devices.insert(ifindex, edge);
            by_address.extend(addresses.iter().map(|address| (*address, ifindex)));
        }
        let maps = Handle {
            maps: Rc::new(RefCell::new(Maps::new(slot_blocks))),
            budget: Rc::new(Cell::new(0)),
            at_work: Rc::new(Cell::new(0)),
        };
        Self {
            index,
            addresses,
            devices,
            pods: by_address,
            settings: Settings {
                masquerade,
                detect_local: detect_local::DEVICE,
                networks: if accelerate { networks::ACCELERATE } else { 0 },
                ..Settings::default()
            },
            maps,
            v4: RefCell::new(Memory::new(capacities)),
            v6: RefCell::new(Memory::new(capacities)),
            marks: Cell::new(0),
            rejects: RefCell::new(BTreeMap::new()),
            counters: RefCell::default(),
            observed: RefCell::default(),
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
        Some(self.pods.get(&destination).copied().unwrap_or(UPLINK))
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
