//! The content of the maps before and after a packet, and the network around it.
//!
//! Every address begins with its family's ethertype where a source address lies in a bare IP
//! packet: the kernel's test run takes the ethertype from bytes 12 and 13, and those of a packet
//! without a link header are the source address's (IPv4: its first two, IPv6: its third pair).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Datagram, DatagramPorts, Device, Flow, OriginKey, Range,
    RejectKey, Service, ServiceKey, ServicePort, Settings, Ticks, Tuple, backend, detect_local,
    device, device_flags, flow, frontend, listing, masquerade, networks, node_address, side, state,
};

use super::case::{Draft, case};
use super::frame::{ACK, DATA, Frame, INIT, Mac, SCTP, SYN, TCP, UDP};

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    V4,
    V6,
}

/// Ifindex of the loopback device.
pub(crate) const LOOPBACK: u32 = 1;
/// Ifindex of a pod's link.
pub(crate) const EDGE: u32 = 11;
/// Ifindex of the device towards the world.
pub(crate) const UPLINK: u32 = 12;
/// Ifindex of a device without a link header.
pub(crate) const TUNNEL: u32 = 13;
/// Ifindex of the device that the route to every frontend names.
pub(crate) const OWN: u32 = 14;
/// Ifindex of a device with a small MTU.
pub(crate) const NARROW: u32 = 15;
/// Ifindex of the bridge that backends are reached by.
pub(crate) const BRIDGE: u32 = 16;
/// Ifindex of a device that none of our programs is attached to.
pub(crate) const FOREIGN: u32 = 17;
/// MTU of [`NARROW`].
pub(crate) const NARROW_MTU: u32 = 1300;
/// The backend's link-layer address as the bridge knows it.
pub(crate) const BACKEND_MAC: Mac = [2, 0, 0, 0, 2, 3];

/// Returns a device's own link-layer address.
pub(crate) fn mac(ifindex: u32) -> Mac {
    [2, 0, 0, 0, 0, ifindex as u8]
}

/// Returns the address with these last two bytes or groups.
pub(crate) fn address(version: Version, net: u8, host: u8) -> IpAddr {
    match version {
        Version::V4 => Ipv4Addr::new(8, 0, net, host).into(),
        Version::V6 => {
            Ipv6Addr::new(0x2001, 0xdb8, 0x86dd, u16::from(net), 0, 0, 0, u16::from(host)).into()
        }
    }
}

/// The id of the network namespace in which the kernel runs the table, as seen from itself.
pub(crate) const OWN_NETNS: u32 = 7;

/// The networks of [`address`], and the devices that their routes name.
pub(crate) const ROUTES: [(u8, u32); 10] = [
    (NET_CLIENTS, UPLINK),
    (NET_BACKENDS, BRIDGE),
    (NET_NARROW, NARROW),
    (NET_FOREIGN, FOREIGN),
    (NET_PODS, EDGE),
    (NET_REMOTE, UPLINK),
    (NET_OVERLAY, TUNNEL),
    (NET_SHORT, UPLINK),
    (NET_FORGED, UPLINK),
    (NET_FRONTENDS, OWN),
];
/// This node's addresses, which are delivered locally.
pub(crate) const NET_NODE: u8 = 0;
pub(crate) const NET_CLIENTS: u8 = 1;
pub(crate) const NET_BACKENDS: u8 = 2;
pub(crate) const NET_NARROW: u8 = 3;
pub(crate) const NET_UNROUTED: u8 = 4;
/// A network behind a device without programs.
pub(crate) const NET_FOREIGN: u8 = 5;
/// Pods of this node that are routed to.
pub(crate) const NET_PODS: u8 = 6;
/// Pods of other nodes, by the underlay.
pub(crate) const NET_REMOTE: u8 = 7;
/// Pods of other nodes, by the overlay.
pub(crate) const NET_OVERLAY: u8 = 8;
/// A network behind a route whose MTU is less than its device's: [`NARROW_MTU`].
pub(crate) const NET_SHORT: u8 = 9;
/// A network that is routed for packets with [`MARK`] alone.
pub(crate) const NET_MARKED: u8 = 10;
pub(crate) const MARK: u32 = 0x77;
/// A network behind the uplink, also for packets that come in by a pod's device.
pub(crate) const NET_FORGED: u8 = 11;
pub(crate) const NET_FRONTENDS: u8 = 96;

/// Returns the network of an [`address`].
fn net(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(address) => address.octets()[2],
        IpAddr::V6(address) => address.octets()[7],
    }
}

/// Returns the device that a route names, and its MTU.
pub(crate) fn route(destination: IpAddr) -> Option<(u32, u32)> {
    let net = net(destination);
    let (_, ifindex) = ROUTES.iter().find(|(routed, _)| *routed == net)?;
    Some((*ifindex, if *ifindex == NARROW || net == NET_SHORT { NARROW_MTU } else { 1500 }))
}

/// Returns the device that the route from a destination back to its packet's source names, or 0.
/// The second element is the same for a packet that came in by a device.
pub(crate) fn route_back(destination: IpAddr, source: IpAddr, came_by: Option<u32>) -> u32 {
    let is_pods = match net(source) {
        NET_FORGED => false,
        NET_CLIENTS => true,
        _ => matches!(net(destination), NET_FRONTENDS | NET_NODE),
    };
    match came_by {
        Some(EDGE) if is_pods => EDGE,
        _ => route(source).map_or(0, |(ifindex, _)| ifindex),
    }
}

/// Returns the key of a client of [`World::rejects`] in the map.
pub(crate) fn reject_key(client: IpAddr) -> RejectKey {
    let address = match client {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    };
    RejectKey { address }
}

/// Returns the node's address on a device, which clients behind it get.
pub(crate) fn node(version: Version, ifindex: u32) -> IpAddr {
    address(version, NET_NODE, if ifindex == UPLINK { 1 } else { ifindex as u8 })
}

/// Reports whether the bridge has a neighbour entry, with [`BACKEND_MAC`].
pub(crate) fn bridge_knows(destination: IpAddr) -> bool {
    [Version::V4, Version::V6]
        .iter()
        .any(|version| destination == address(*version, NET_BACKENDS, 3))
}

/// A service port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) ranges: [Range; 3],
    pub(crate) affinity_seconds: u32,
    /// Bits of [`sluice_common::abi::policy`].
    pub(crate) flags: u32,
}

impl Port {
    /// Returns the value in the map.
    pub(crate) fn told(&self) -> ServicePort {
        ServicePort {
            ranges: self.ranges.map(|range| range.0),
            affinity_seconds: self.affinity_seconds,
            flags: self.flags,
        }
    }
}

/// The content of the maps, and the sockets of this host. [`Flow::seen`], [`Flow::replied`] and
/// [`Affinity::seen`] are ages in ticks.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct World {
    pub(crate) settings: Settings,
    /// Prefixes with the number of their bits: those of local pods, and those of Services.
    pub(crate) pods: Vec<(IpAddr, u8)>,
    pub(crate) service_nets: Vec<(IpAddr, u8)>,
    pub(crate) services: BTreeMap<ServiceKey<IpAddr>, Service>,
    pub(crate) ports: BTreeMap<u32, Port>,
    pub(crate) slots: BTreeMap<u32, u32>,
    pub(crate) backends: BTreeMap<u32, Backend<IpAddr>>,
    pub(crate) origins: BTreeMap<OriginKey<IpAddr>, Vec<SocketAddr>>,
    pub(crate) listing: BTreeMap<IpAddr, u8>,
    pub(crate) devices: BTreeMap<u32, Device>,
    /// Addresses of this node, with bits of [`node_address`].
    pub(crate) node_addresses: BTreeMap<IpAddr, u32>,
    pub(crate) node_ports: BTreeSet<u16>,
    /// Service port, and a prefix with the number of its bits.
    pub(crate) source_ranges: BTreeSet<(u32, IpAddr, u8)>,
    pub(crate) affinity: Affinities,
    /// Reply tuples, without a port, for which a search found none, and how many ticks ago.
    pub(crate) exhausted: Exhausted,
    /// Connected sockets of this host, and of a pod whose device names [`OWN_NETNS`]: the tuples of
    /// the packets that they receive.
    pub(crate) held: BTreeSet<Tuple<IpAddr>>,
    /// Sockets of this host that listen, or receive from everybody, by protocol and address.
    pub(crate) listeners: BTreeSet<(u8, SocketAddr)>,
    /// Milliseconds of credit that each client has left.
    pub(crate) rejects: BTreeMap<IpAddr, u32>,
    pub(crate) flows: Flows,
    pub(crate) embryonic: Flows,
    pub(crate) fragments: Datagrams,
    /// Packets that netfilter translates, with bits of [`sluice_common::abi::imported`].
    pub(crate) imported: BTreeMap<Tuple<IpAddr>, u32>,
    pub(crate) marks: u32,
}

/// A value of [`Connection::heard`]: the endpoint was heard when the entry was renewed, and the
/// outcome is not compared.
pub(crate) const UNSAID: u32 = u32::MAX;

/// Flow entries.
pub(crate) type Flows = BTreeMap<Tuple<IpAddr>, Flow<IpAddr>>;

/// The ports of datagrams, from their first fragments; [`DatagramPorts::seen`] is an age.
pub(crate) type Datagrams = BTreeMap<Datagram<IpAddr>, DatagramPorts>;

/// The clients' last backends.
pub(crate) type Affinities = BTreeMap<AffinityKey<IpAddr>, Affinity>;

/// Searches that found no port, and their age.
pub(crate) type Exhausted = BTreeMap<Tuple<IpAddr>, u32>;

pub(crate) fn tuple(source: SocketAddr, destination: SocketAddr, protocol: u8) -> Tuple<IpAddr> {
    Tuple {
        source: source.ip(),
        destination: destination.ip(),
        source_port: source.port(),
        destination_port: destination.port(),
        protocol,
        side: 0,
        reserved: [0; 2],
    }
}

/// A flow as a person would describe it, which stands for two entries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connection {
    pub(crate) protocol: u8,
    pub(crate) client: SocketAddr,
    pub(crate) frontend: SocketAddr,
    /// The client as the backend sees it.
    pub(crate) seen_as: SocketAddr,
    pub(crate) backend: SocketAddr,
    pub(crate) id: u32,
    pub(crate) generation: u16,
    pub(crate) service_port: u32,
    pub(crate) state: u8,
    pub(crate) flags: u8,
    pub(crate) age: u32,
    /// Ticks since the endpoint was last heard, or [`UNSAID`]; in a guess, the number that the
    /// endpoint must acknowledge.
    pub(crate) heard: u32,
}

impl Connection {
    fn flow(&self, source: SocketAddr, destination: SocketAddr, flags: u8) -> Flow<IpAddr> {
        Flow {
            source: source.ip(),
            destination: destination.ip(),
            source_port: source.port(),
            destination_port: destination.port(),
            backend: self.id,
            service_port: self.service_port,
            seen: self.age,
            replied: self.heard,
            generation: self.generation,
            state: self.state,
            flags: self.flags | flags,
        }
    }

    /// Returns the entry that translates the client's packets.
    pub(crate) fn forward(&self) -> Flows {
        let mut key = tuple(self.client, self.frontend, self.protocol);
        key.side = if self.flags & flow::SOURCE == 0 { side::NEAR } else { side::FAR };
        Flows::from([(key, self.flow(self.seen_as, self.backend, 0))])
    }

    /// Returns the entry that translates the backend's packets.
    pub(crate) fn reply(&self) -> Flows {
        let key = tuple(self.backend, self.seen_as, self.protocol);
        Flows::from([(key, self.flow(self.frontend, self.client, flow::REPLY))])
    }

    /// Returns both entries.
    pub(crate) fn both(&self) -> Flows {
        let mut both = self.forward();
        both.extend(self.reply());
        both
    }

    pub(crate) fn state(self, state: u8) -> Self {
        Self { state, ..self }
    }

    pub(crate) fn flags(self, flags: u8) -> Self {
        Self { flags, ..self }
    }

    pub(crate) fn age(self, age: u32) -> Self {
        Self { age, ..self }
    }

    /// Returns the flow after the endpoint has answered the SYN with a segment of [`Frame::tcp`].
    pub(crate) fn answered(self) -> Self {
        self.state(state::ANSWERED).heard(super::frame::SEQUENCE + 1)
    }

    pub(crate) fn heard(self, heard: u32) -> Self {
        Self { heard, ..self }
    }

    pub(crate) fn seen_as(self, seen_as: SocketAddr) -> Self {
        Self { seen_as, ..self }
    }
}

/// The parties of most cases: a client, frontends with one backend, and one without.
///
/// | | IPv4 | IPv6 | TCP | UDP, SCTP |
/// |---|---|---|---|---|
/// | `client` | 8.0.1.7 | 2001:db8:86dd:1::7 | 40001 | 40001 |
/// | `frontend` | 8.0.96.10 | 2001:db8:86dd:60::a | 80 | 53 |
/// | `other_frontend` | 8.0.96.11 | 2001:db8:86dd:60::b | 80 | 53 |
/// | `empty` | 8.0.96.12 | 2001:db8:86dd:60::c | 80 | 53 |
/// | `backend` | 8.0.2.3 | 2001:db8:86dd:2::3 | 8080 | 5353 |
/// | `other_backend` | 8.0.2.4 | 2001:db8:86dd:2::4 | 8080 | 5353 |
/// | `node` | 8.0.0.1 | 2001:db8:86dd::1 | | |
/// | `router` | 8.0.0.254 | 2001:db8:86dd::fe | | |
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cast {
    pub(crate) version: Version,
    pub(crate) protocol: u8,
    pub(crate) client: SocketAddr,
    /// The frontend that leads to `backend`, through the service port [`ONE`].
    pub(crate) frontend: SocketAddr,
    /// A frontend that leads to the same endpoint as `frontend`, through the service port
    /// [`OTHER`].
    pub(crate) other_frontend: SocketAddr,
    /// A frontend without backends; its service port is [`EMPTY`].
    pub(crate) empty: SocketAddr,
    pub(crate) backend: SocketAddr,
    /// A backend in no service port's set.
    pub(crate) other_backend: SocketAddr,
    pub(crate) node: IpAddr,
    pub(crate) router: IpAddr,
}

/// Service port of [`Cast::frontend`]; its backend has the same id.
pub(crate) const ONE: u32 = 1;
/// Service port of [`Cast::other_frontend`]; its backend has the same id.
pub(crate) const OTHER: u32 = 3;
/// Service port of [`Cast::empty`].
pub(crate) const EMPTY: u32 = 5;
/// Id of [`Cast::other_backend`], of service port [`ONE`].
pub(crate) const SPARE: u32 = 7;
/// Generation of every backend.
pub(crate) const GENERATION: u16 = 9;
/// Flags of a backend that is in the set of every class.
pub(crate) const SELECTED: u32 = backend::SELECTED * 7;
/// Number of slots in every range.
pub(crate) const SLOTS: u16 = 61;

impl Cast {
    pub(crate) fn new(version: Version, protocol: u8) -> Self {
        let at = |net, host, port| SocketAddr::new(address(version, net, host), port);
        let (front, back) = if protocol == TCP { (80, 8080) } else { (53, 5353) };
        Self {
            version,
            protocol,
            client: at(NET_CLIENTS, 7, 40_001),
            frontend: at(NET_FRONTENDS, 10, front),
            other_frontend: at(NET_FRONTENDS, 11, front),
            empty: at(NET_FRONTENDS, 12, front),
            backend: at(NET_BACKENDS, 3, back),
            other_backend: at(NET_BACKENDS, 4, back),
            node: address(version, NET_NODE, 1),
            router: address(version, NET_NODE, 254),
        }
    }

    /// Returns the casts of both families, for TCP and UDP.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for version in [Version::V4, Version::V6] {
            for protocol in [TCP, UDP] {
                all.push(Self::new(version, protocol));
            }
        }
        all
    }

    /// Returns the casts of both families, for one protocol.
    pub(crate) fn of(protocol: u8) -> Vec<Self> {
        vec![Self::new(Version::V4, protocol), Self::new(Version::V6, protocol)]
    }

    /// Returns family and protocol, as in "IPv4 TCP".
    pub(crate) fn title(&self) -> String {
        let version = if self.version == Version::V4 { "IPv4" } else { "IPv6" };
        let protocol = match self.protocol {
            TCP => "TCP",
            SCTP => "SCTP",
            _ => "UDP",
        };
        format!("{version} {protocol}")
    }

    /// Begins a case whose name starts with family and protocol.
    pub(crate) fn case(&self, name: impl Display) -> Draft {
        case(format!("{}: {name}", self.title()))
    }

    /// Replaces the client.
    pub(crate) fn client(self, client: SocketAddr) -> Self {
        Self { client, ..self }
    }

    /// Moves the client to another network.
    pub(crate) fn client_in(self, net: u8) -> Self {
        self.client(SocketAddr::new(address(self.version, net, 7), self.client.port()))
    }

    /// Moves the backend to another network.
    pub(crate) fn backend_in(self, net: u8) -> Self {
        let backend = SocketAddr::new(address(self.version, net, 3), self.backend.port());
        Self { backend, ..self }
    }

    /// Replaces the frontend.
    pub(crate) fn frontend(self, frontend: SocketAddr) -> Self {
        Self { frontend, ..self }
    }

    /// Returns a network as a prefix.
    pub(crate) fn prefix(&self, net: u8) -> (IpAddr, u8) {
        (address(self.version, net, 0), if self.version == Version::V4 { 24 } else { 64 })
    }

    /// Returns the node's address on a device.
    pub(crate) fn node_on(&self, ifindex: u32) -> IpAddr {
        node(self.version, ifindex)
    }

    /// Returns the first packet of a flow.
    pub(crate) fn first(&self, source: SocketAddr, destination: SocketAddr) -> Frame {
        match self.protocol {
            TCP => Frame::tcp(source, destination, SYN, &[]),
            SCTP => Frame::sctp(source, destination, (INIT, 0), &[0x1a; 16]),
            _ => Frame::udp(source, destination, b"question"),
        }
    }

    /// Returns a packet in the middle of a flow, of odd length.
    pub(crate) fn next(&self, source: SocketAddr, destination: SocketAddr) -> Frame {
        match self.protocol {
            TCP => Frame::tcp(source, destination, ACK, b"data!"),
            SCTP => Frame::sctp(source, destination, (DATA, 3), b"numbers and some data"),
            _ => Frame::udp(source, destination, b"data!"),
        }
    }

    /// Returns the client's flow through the frontend, just opened.
    pub(crate) fn connection(&self) -> Connection {
        Connection {
            protocol: self.protocol,
            client: self.client,
            frontend: self.frontend,
            seen_as: self.client,
            backend: self.backend,
            id: ONE,
            generation: GENERATION,
            service_port: ONE,
            state: 0,
            flags: flow::LOCAL,
            age: 0,
            heard: UNSAID,
        }
    }

    /// Returns the client's flow through the other frontend.
    pub(crate) fn other_connection(&self) -> Connection {
        Connection {
            frontend: self.other_frontend,
            id: OTHER,
            service_port: OTHER,
            ..self.connection()
        }
    }

    /// Returns the maps without flows.
    pub(crate) fn world(&self) -> World {
        let settings = Settings {
            masquerade: masquerade::NEEDED,
            detect_local: detect_local::DEVICE,
            ..Settings::default()
        };
        let mut world = World { settings, ..World::default() };
        world.add_backend(self, ONE, ONE, self.backend);
        world.add_backend(self, OTHER, OTHER, self.backend);
        world.add_backend(self, SPARE, ONE, self.other_backend);
        world.add_frontend(self, ONE, self.frontend, frontend::CLUSTER_IP);
        world.add_frontend(self, OTHER, self.other_frontend, frontend::CLUSTER_IP);
        world.add_frontend(self, EMPTY, self.empty, frontend::CLUSTER_IP);
        world.fill(ONE, &[ONE]);
        world.fill(OTHER, &[OTHER]);
        let _ = world.ports.insert(EMPTY, Port::default());
        let origin = ServiceKey {
            address: self.backend.ip(),
            port: self.backend.port(),
            protocol: self.protocol,
            reserved: 0,
        };
        let _ = world.origins.insert(origin, vec![self.frontend, self.other_frontend]);
        for (ifindex, role) in [
            (EDGE, device::EDGE),
            (UPLINK, device::UPLINK),
            (TUNNEL, device::FABRIC),
            (OWN, device::OWN),
            (NARROW, device::UPLINK),
            (LOOPBACK, device::LOOPBACK),
        ] {
            let link_header = if ifindex == TUNNEL { 0 } else { 14 };
            let mtu = if ifindex == NARROW { NARROW_MTU } else { 1500 };
            let mut device =
                Device { role, mac: mac(ifindex), link_header, mtu, ..Device::default() };
            if role == device::EDGE {
                device.flags = device_flags::LOCAL_PODS;
            }
            if role != device::OWN {
                let node = node(self.version, ifindex);
                let node = if role == device::LOOPBACK { self.node } else { node };
                match node {
                    IpAddr::V4(node) => device.masquerade_v4 = node.into(),
                    IpAddr::V6(node) => device.masquerade_v6 = node.into(),
                }
                let _ = world.node_addresses.insert(node, 0);
                *world.listing.entry(node).or_default() |= listing::NODE;
            }
            let _ = world.devices.insert(ifindex, device);
        }
        world
    }
}

impl World {
    /// Adds a serving local backend.
    pub(crate) fn add_backend(&mut self, cast: &Cast, id: u32, service_port: u32, at: SocketAddr) {
        let backend = Backend {
            address: at.ip(),
            port: at.port(),
            generation: GENERATION,
            service_port,
            flags: backend::SERVING | backend::LOCAL | SELECTED,
        };
        let _ = self.backends.insert(id, backend);
        debug_assert!(
            at.is_ipv4() == (cast.version == Version::V4),
            "addresses are of the cast's family"
        );
        *self.listing.entry(at.ip()).or_default() |= listing::BACKEND;
    }

    /// Adds a frontend.
    pub(crate) fn add_frontend(
        &mut self,
        cast: &Cast,
        service_port: u32,
        at: SocketAddr,
        kind: u32,
    ) {
        let key =
            ServiceKey { address: at.ip(), port: at.port(), protocol: cast.protocol, reserved: 0 };
        let _ = self.services.insert(key, Service { service_port, kind });
        *self.listing.entry(at.ip()).or_default() |= listing::FRONTEND;
    }

    /// Gives a service port a range of its own, filled with these backends in turn.
    pub(crate) fn fill(&mut self, service_port: u32, ids: &[u32]) {
        let start = service_port * 64;
        for (slot, id) in (start..).zip(ids.iter().cycle().take(usize::from(SLOTS))) {
            let _ = self.slots.insert(slot, *id);
        }
        self.port(service_port).ranges = [Range::new(start, SLOTS); 3];
    }

    /// Returns a service port, to be changed.
    pub(crate) fn port(&mut self, service_port: u32) -> &mut Port {
        self.ports.entry(service_port).or_default()
    }

    /// Serves node ports at an address of this node.
    pub(crate) fn serve_node_ports(&mut self, at: IpAddr) {
        *self.node_addresses.entry(at).or_default() |= node_address::NODE_PORTS;
        *self.listing.entry(at).or_default() |= listing::NODE | listing::NODE_PORTS;
    }

    /// Adds entries to `flows`.
    pub(crate) fn flows(mut self, flows: Flows) -> Self {
        self.flows.extend(flows);
        self
    }

    /// Adds entries to `embryonic`.
    pub(crate) fn embryonic(mut self, flows: Flows) -> Self {
        self.embryonic.extend(flows);
        self
    }

    /// Adds entries to `fragments`.
    pub(crate) fn fragments(mut self, fragments: Datagrams) -> Self {
        self.fragments.extend(fragments);
        self
    }

    /// Adds Sluice's own device, and an agent that holds fragments.
    pub(crate) fn own_device(mut self) -> Self {
        self.settings.own_device = OWN;
        self.said_to_keep_fragments(0)
    }

    /// Adds an agent that announced at this age that it holds fragments.
    pub(crate) fn said_to_keep_fragments(mut self, age: Ticks) -> Self {
        for nobody in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
            let key = Datagram {
                source: nobody,
                destination: nobody,
                id: 0,
                protocol: 0,
                reserved: [0; 3],
            };
            let _ =
                self.fragments.insert(key, DatagramPorts { seen: age, ..DatagramPorts::default() });
        }
        self
    }

    /// Sets the kind of all frontends of a service port.
    pub(crate) fn kind(mut self, service_port: u32, kind: u32) -> Self {
        for service in
            self.services.values_mut().filter(|service| service.service_port == service_port)
        {
            service.kind = kind;
        }
        self
    }

    /// Sets how clients are masqueraded and local pods are detected.
    pub(crate) fn modes(mut self, masquerade: u32, detect_local: u32) -> Self {
        self.settings.masquerade = masquerade;
        self.settings.detect_local = detect_local;
        self
    }

    /// Sets the prefixes of local pods' addresses.
    pub(crate) fn pods(mut self, prefixes: Vec<(IpAddr, u8)>) -> Self {
        for (network, _) in &prefixes {
            self.settings.networks |=
                if network.is_ipv4() { networks::PODS_V4 } else { networks::PODS_V6 };
        }
        self.pods = prefixes;
        self
    }

    /// Sets marks.
    pub(crate) fn marks(mut self, marks: u32) -> Self {
        self.marks = marks;
        self
    }

    /// Sets the flags of a backend.
    pub(crate) fn backend_flags(mut self, id: u32, flags: u32) -> Self {
        self.backends.get_mut(&id).expect("a backend of this id").flags = flags;
        self
    }
}
