//! The maps in memory, with what lies around them: the packet path's tables.

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

/// A device that programs are attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedDevice {
    /// Its name; empty for one that is only supposed.
    pub name: String,
    /// What the maps hold.
    pub entry: Device,
}

/// What the kernel's routing says.
pub trait Routing {
    /// The device that packets to an address leave by; [`None`] where there is none, or where the
    /// address is this host's.
    fn leaves_by(&self, destination: IpAddr) -> Option<u32>;
    /// The largest packet that goes to an address, with its IP header; [`None`]: nobody knows.
    fn mtu(&self, destination: IpAddr) -> Option<u32>;
    /// Whether an address is this host's own.
    fn is_local(&self, address: IpAddr) -> bool;
    /// The device on which this client's packets come in.
    fn comes_in_by(&self, question: &Question, devices: &BTreeMap<u32, NamedDevice>)
    -> Option<u32>;
    /// What was taken for granted, for people; empty if the kernel was asked.
    fn supposes(&self) -> &'static str;
}

/// Everything that decides about a packet.
#[derive(Clone, Debug)]
pub struct World {
    /// What the plan writes.
    pub image: Image,
    /// What the agent tells every program.
    pub settings: Settings,
    /// IPv4 ranges and memory.
    pub v4: Around<V4>,
    /// IPv6 ranges and memory.
    pub v6: Around<V6>,
    /// ifindex -> device.
    pub devices: BTreeMap<u32, NamedDevice>,
    /// The time.
    pub now: Ticks,
    /// The time in milliseconds, by which ICMP errors are limited.
    pub now_ms: u32,
    /// What clients and devices may still be sent of ICMP errors.
    pub rejects: BTreeMap<[u8; 16], RejectBucket>,
    /// Addresses that are left to whoever has them on a device of this node.
    pub left: BTreeSet<IpAddr>,
    /// Whose the numbers are.
    pub objects: Objects,
}

/// What a family's maps hold that the plan does not write.
#[derive(Clone, Debug)]
pub struct Around<F: Family> {
    /// Address ranges of the cluster.
    pub networks: Networks<F::Address>,
    /// Proven flows.
    pub flows: BTreeMap<Tuple<F::Address>, Flow<F::Address>>,
    /// Flows that nothing has proven so far.
    pub embryonic: BTreeMap<Tuple<F::Address>, Flow<F::Address>>,
    /// Where clients have been.
    pub affinity: BTreeMap<AffinityKey<F::Address>, Affinity>,
    /// Packets that are netfilter's to translate.
    pub imported: BTreeMap<Tuple<F::Address>, u32>,
}

/// A family that the world has tables of.
pub(super) trait Side: Stack + Answer + Wide {
    /// What lies around the family's maps.
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
    /// The device that the packet is met on; 0 for calls of sockets.
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
        // Only whole packets are asked about.
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
        // They spare the kernel lookups that find nothing; here nothing is lost by them.
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
