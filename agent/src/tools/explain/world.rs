//! The maps in memory, with their surroundings: the tables of the packet path.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Flow, Networks,
    OriginKey, Origins, Range, RejectBucket, Service, ServiceKey, ServicePort, Settings, Ticks,
    Tuple, device, socket_path,
};
use sluice_common::event::Wide;
use sluice_common::packet::answer::Answer;
use sluice_common::path::mark;
use sluice_common::tables::Routes;
use sluice_common::{Family, Tables, V4, V6};
use sluice_core::image::{Image, Stack};

use super::objects::Objects;
use super::question::Question;

/// The ifindex of every network namespace's loopback device.
pub(super) const LOOPBACK: u32 = 1;

/// A device with programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedDevice {
    /// The device's name; empty for an assumed one.
    pub name: String,
    /// The device's entry in the maps.
    pub entry: Device,
}

/// The kernel's routing.
pub trait Routing {
    /// Returns the device by which packets to an address leave, or [`None`] if there is none or the
    /// address is this host's.
    fn leaves_by(&self, destination: IpAddr) -> Option<u32>;
    /// Returns the largest packet to an address, with its IP header, or [`None`] if it is unknown.
    fn mtu(&self, destination: IpAddr) -> Option<u32>;
    /// Whether an address is this host's own.
    fn is_local(&self, address: IpAddr) -> bool;
    /// Returns the device on which the client's packets arrive.
    fn comes_in_by(&self, question: &Question, devices: &BTreeMap<u32, NamedDevice>)
    -> Option<u32>;
    /// Returns the assumptions, for people; empty if the kernel was queried.
    fn supposes(&self) -> &'static str;
}

/// Everything that decides about a packet.
#[derive(Clone, Debug)]
pub struct World {
    /// The maps that the plan writes.
    pub image: Image,
    /// The settings of the programs.
    pub settings: Settings,
    /// The other maps of IPv4.
    pub v4: Around<V4>,
    /// The other maps of IPv6.
    pub v6: Around<V6>,
    /// The devices, by ifindex.
    pub devices: BTreeMap<u32, NamedDevice>,
    /// The present time.
    pub now: Ticks,
    /// The time in milliseconds, which limits ICMP errors.
    pub now_ms: u32,
    /// The ICMP errors that clients and devices may still get.
    pub rejects: BTreeMap<[u8; 16], RejectBucket>,
    /// Service addresses that are left to a process on this node.
    pub left: BTreeSet<IpAddr>,
    /// The objects behind the numbers.
    pub objects: Objects,
}

/// The maps of a family that the plan does not write.
#[derive(Clone, Debug)]
pub struct Around<F: Family> {
    /// Address ranges of the cluster.
    pub networks: Networks<F::Address>,
    /// Proven flows.
    pub flows: BTreeMap<Tuple<F::Address>, Flow<F::Address>>,
    /// Flows that are not proven yet.
    pub embryonic: BTreeMap<Tuple<F::Address>, Flow<F::Address>>,
    /// The affinity of clients.
    pub affinity: BTreeMap<AffinityKey<F::Address>, Affinity>,
    /// Packets that netfilter translates.
    pub imported: BTreeMap<Tuple<F::Address>, u32>,
}

/// A family with its maps in the world.
pub(super) trait Side: Stack + Answer + Wide {
    /// Returns the family's maps that the plan does not write.
    fn around(world: &World) -> &Around<Self>;
}

impl Side for V4 {
    fn around(world: &World) -> &Around<Self> {
        &world.v4
    }
}

impl Side for V6 {
    fn around(world: &World) -> &Around<Self> {
        &world.v6
    }
}

/// The tables, seen from a device.
#[derive(Clone, Copy)]
pub(super) struct Seen<'w> {
    pub(super) world: &'w World,
    /// The device that the packet arrives on; 0 for calls of sockets.
    pub(super) ifindex: u32,
}

impl<F: Side> Tables<F> for Seen<'_> {
    fn listing(&self, address: &F::Address) -> u8 {
        self.world.image.listing::<F>(address)
    }

    fn flow(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        F::around(self.world).flows.get(tuple)
    }

    fn embryonic(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        F::around(self.world).embryonic.get(tuple)
    }

    fn imported(&self, tuple: &Tuple<F::Address>) -> Option<u32> {
        F::around(self.world).imported.get(tuple).copied()
    }

    fn datagram(&self, _: &Datagram<F::Address>) -> Option<&DatagramPorts> {
        // Questions are about whole packets only.
        None
    }

    fn service(&self, key: &ServiceKey<F::Address>) -> Option<&Service> {
        F::of(&self.world.image).services.get(key)
    }

    fn port(&self, service_port: u32) -> Option<&ServicePort> {
        self.world.image.ports.get(&service_port)
    }

    fn range(&self, service_port: u32, class: Class) -> Option<Range> {
        self.world.image.range(service_port, class)
    }

    fn slot(&self, slot: u32) -> Option<u32> {
        self.world.image.slot(slot)
    }

    fn backend(&self, id: u32) -> Option<&Backend<F::Address>> {
        F::of(&self.world.image).backends.get(&id)
    }

    fn affinity(&self, key: &AffinityKey<F::Address>) -> Option<&Affinity> {
        F::around(self.world).affinity.get(key)
    }

    fn in_source_ranges(&self, service_port: u32, address: &F::Address) -> bool {
        self.world.image.in_source_ranges::<F>(service_port, address)
    }

    fn is_node_port(&self, port: u16) -> bool {
        self.world.image.is_node_port(port)
    }

    fn is_node_address(&self, address: &F::Address) -> bool {
        self.world.image.is_node_address::<F>(address)
    }

    fn serves_node_ports(&self, address: &F::Address) -> bool {
        self.world.image.serves_node_ports::<F>(address)
    }

    fn origins(&self, key: &OriginKey<F::Address>) -> Option<&Origins<F::Address>> {
        F::of(&self.world.image).origins.get(key)
    }

    fn marks(&self) -> u32 {
        // The marks spare the kernel lookups that find nothing. Here those lookups are harmless.
        mark::DIRECT | mark::HOST | mark::MASQUERADED
    }

    fn settings(&self) -> Option<&Settings> {
        Some(&self.world.settings)
    }

    fn networks(&self) -> Option<&Networks<F::Address>> {
        Some(&F::around(self.world).networks)
    }

    fn device(&self, ifindex: u32) -> Option<&Device> {
        self.world.devices.get(&ifindex).map(|device| &device.entry)
    }

    fn hook_device(&self) -> Option<&Device> {
        <Self as Tables<F>>::device(self, self.ifindex)
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn routes(&self) -> Option<Routes> {
        None
    }

    fn translated_at_socket(&self) -> bool {
        matches!(self.world.settings.socket_path, socket_path::ALL | socket_path::MACHINE)
            && <Self as Tables<F>>::hook_device(self).is_some_and(|here| here.role == device::EDGE)
    }

    fn now(&self) -> Ticks {
        self.world.now
    }
}
