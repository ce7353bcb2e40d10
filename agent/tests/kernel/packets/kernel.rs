//! Runs a case in the kernel: the object's programs by `BPF_PROG_TEST_RUN`, in a network namespace
//! of this thread.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, MapData, PerCpuHashMap, PerCpuValues, RingBuf};
use aya::programs::{ProgramError, SchedClassifier, TestRun, TestRunOptions, TestRunResult, Xdp};
use aya::{Ebpf, EbpfLoader, Pod};
use futures::StreamExt;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::nsid::{NsidAttribute, NsidMessage};
use sluice_common::abi::{
    Affinity, AffinityKey, Backend, BackendCounters, COUNTER_V6, Datagram, DatagramPorts, Device,
    Event, FailureKey, Flow, Listening, NodeAddress, OriginKey, Origins, ReasonCounters, ReasonKey,
    RejectBucket, RejectKey, RouteMtu, Service, ServiceKey, ServicePort, Settings, SlotBlock,
    SourceRange, TICK_SHIFT, Ticks, Tuple,
};
use sluice_common::family::lane;
use sluice_common::{Failure, Reason, V4, V6};
use sluice_lab::skipped;

use super::case::{Case, Counted, End, Outcome, Program};
use super::convert;
use super::ip::Ip;
use super::socket;
use super::world::{
    self, Affinities, BACKEND_MAC, BRIDGE, Datagrams, EDGE, Exhausted, FOREIGN, Flows, MARK,
    NARROW, NARROW_MTU, NET_BACKENDS, NET_CLIENTS, NET_FORGED, NET_FRONTENDS, NET_MARKED, NET_NODE,
    NET_SHORT, OWN, OWN_NETNS, ROUTES, TUNNEL, UPLINK, Version, World,
};

/// The table with routes to clients behind [`EDGE`].
const CLIENTS: u32 = 100;
/// Elements of the hash maps and arrays: far more than most cases fill.
const SMALL: u32 = 4096;
/// Entries for the flows of cases that take every port there is: an LRU map evicts before it is
/// full.
const LARGE: u32 = 131_072;
/// Bytes that a packet can grow to.
const FRAME_MAX: usize = 4096;
/// Bytes of `struct __sk_buff`, and the offset of its `ifindex`.
const SKB: (usize, usize) = (192, 40);
/// Offset of its `ingress_ifindex`.
const SKB_CAME_BY: usize = 36;
/// Offset of its `mark`.
const SKB_MARK: usize = 8;
/// Offset of its `cb`.
const CARRIED: usize = 48;
/// Marks in an skb that tc has translated at ingress, and at egress.
pub(crate) const TC_DONE: [u32; 2] = [0x5c1c_e001, 0x5c1c_e002];

/// The word that XDP puts before a frame that it has translated, so that tc leaves the frame alone.
const XDP_DONE: [u8; 4] = 0x5c1c_e003_u32.to_ne_bytes();

/// The loaded object.
pub(crate) struct Kernel {
    ebpf: Ebpf,
    ring: RingBuf<MapData>,
    clock: Clock,
    /// The firewall mark of packets.
    pub(crate) mark: u32,
    /// The content of the maps, and the time of filling them.
    filled: Option<(World, Ticks)>,
    /// Descriptors that keep sockets of this host open.
    sockets: Vec<OwnedFd>,
    /// The first word of the control block of tc's packets.
    carried: u32,
}

/// Reports whether the kernel's half of the table is skipped, as [`skipped`] says. Fails if it
/// cannot run and nobody asked to skip it.
pub(crate) fn is_skipped() -> bool {
    // SAFETY: no arguments.
    let obstacle = if unsafe { libc::geteuid() } != 0 {
        Some("loading BPF programs needs root".to_owned())
    } else {
        let object = object();
        (!object.exists()).then(|| {
            format!("no BPF object at {}: build it with `cargo xtask build-ebpf`", object.display())
        })
    };
    obstacle.is_some_and(|obstacle| skipped(&obstacle))
}

fn object() -> PathBuf {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/sluice.o");
    std::env::var_os("SLUICE_BPF_OBJECT").map_or_else(built, PathBuf::from)
}

/// Runs `ip` with words separated by blanks.
fn ip(words: &str) -> Result<()> {
    let output =
        Command::new("ip").args(words.split_whitespace()).output().context("cannot run `ip`")?;
    ensure!(
        output.status.success(),
        "`ip {words}`: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Loads a program again if a signal has interrupted its verification.
fn verify(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    let mut result = load();
    for _ in 0..4 {
        match &result {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.raw_os_error() == Some(libc::EAGAIN) => {}
            _ => break,
        }
        result = load();
    }
    result
}

/// Gives the network namespace the id [`OWN_NETNS`] for itself.
fn give_own_netns_an_id() -> Result<()> {
    let netns =
        File::open("/proc/thread-self/ns/net").context("cannot open the network namespace")?;
    let mut message = NsidMessage::default();
    message.attributes = vec![
        NsidAttribute::Id(OWN_NETNS.cast_signed()),
        NsidAttribute::Fd(netns.as_raw_fd().cast_unsigned()),
    ];
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewNsId(message));
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, mut handle, _) = rtnetlink::new_connection()?;
        let _requests = tokio::spawn(connection);
        let mut answers = handle.request(message)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(refused) = answer.payload {
                bail!("cannot give the network namespace an id: {refused}");
            }
        }
        Ok(())
    })
}

fn network() -> Result<()> {
    // SAFETY: no memory is passed.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(std::io::Error::last_os_error()).context("cannot make a network namespace");
    }
    for family in ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/default/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{family}"), "1")
            .with_context(|| format!("cannot set {family}"))?;
    }
    ip("link set lo up")?;
    give_own_netns_an_id()?;
    for ifindex in [EDGE, UPLINK, TUNNEL, OWN, NARROW, BRIDGE, FOREIGN] {
        let mac = world::mac(ifindex).map(|byte| format!("{byte:02x}")).join(":");
        let mtu = if ifindex == NARROW { NARROW_MTU } else { 1500 };
        // One end of a pair: every supported kernel has them, and not every one has dummies.
        ip(&format!(
            "link add name d{ifindex} index {ifindex} address {mac} mtu {mtu} type veth peer name e{ifindex}"
        ))?;
        ip(&format!("link set d{ifindex} up"))?;
        ip(&format!("link set e{ifindex} up"))?;
    }
    for version in [Version::V4, Version::V6] {
        let (flag, bits) = if version == Version::V4 { ("-4", 24) } else { ("-6", 64) };
        for (net, ifindex) in ROUTES {
            let mtu = if net == NET_SHORT { format!(" mtu {NARROW_MTU}") } else { String::new() };
            ip(&format!(
                "{flag} route add {}/{bits} dev d{ifindex}{mtu}",
                world::address(version, net, 0)
            ))?;
        }
        let marked = world::address(version, NET_MARKED, 0);
        ip(&format!("{flag} rule add fwmark {MARK} lookup {MARK}"))?;
        // What comes in by a pod's device is the pod's, unless a case says otherwise.
        for net in [NET_FRONTENDS, NET_NODE] {
            let to = world::address(version, net, 0);
            ip(&format!("{flag} rule add from {to}/{bits} iif d{EDGE} lookup {EDGE}"))?;
        }
        ip(&format!("{flag} rule add from all iif d{EDGE} lookup {CLIENTS}"))?;
        let clients = world::address(version, NET_CLIENTS, 0);
        ip(&format!("{flag} route add {clients}/{bits} dev d{EDGE} table {CLIENTS}"))?;
        let forged = world::address(version, NET_FORGED, 0);
        ip(&format!("{flag} route add default dev d{EDGE} table {EDGE}"))?;
        ip(&format!("{flag} route add {forged}/{bits} dev d{UPLINK} table {EDGE}"))?;
        ip(&format!("{flag} route add {marked}/{bits} dev d{UPLINK} table {MARK}"))?;
        for ifindex in [EDGE, UPLINK, TUNNEL, NARROW] {
            let nodad = if version == Version::V4 { "" } else { "nodad" };
            ip(&format!(
                "{flag} addr add {} dev d{ifindex} {nodad}",
                world::node(version, ifindex)
            ))?;
        }
        let backend = world::address(version, NET_BACKENDS, 3);
        let mac = BACKEND_MAC.map(|byte| format!("{byte:02x}")).join(":");
        ip(&format!("{flag} neigh add {backend} lladdr {mac} dev d{BRIDGE} nud permanent"))?;
    }
    Ok(())
}

/// The time as the programs read it.
#[derive(Clone, Copy, Debug, Default)]
struct Clock {
    /// Nanoseconds that are added to the time since boot.
    offset_ns: u64,
}

impl Clock {
    /// Creates a clock that shows a tick now.
    fn at(tick: Ticks) -> Self {
        Self { offset_ns: (u64::from(tick) << TICK_SHIFT).wrapping_sub(Self::default().now_ns()) }
    }

    fn now_ns(self) -> u64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the struct is live.
        let _ = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
        let since_boot = time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned();
        since_boot.wrapping_add(self.offset_ns)
    }

    fn now(self) -> Ticks {
        (self.now_ns() >> TICK_SHIFT) as Ticks
    }
}

/// A map's key or value.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Raw<T>(T);

// SAFETY: used with the ABI's types alone, which are plain integers without padding.
unsafe impl<T: Copy + 'static> Pod for Raw<T> {}

type Hash<'a, K, V> = HashMap<&'a mut MapData, Raw<K>, Raw<V>>;

fn hash<'a, K: Copy + 'static, V: Copy + 'static>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<Hash<'a, K, V>> {
    let map = ebpf.map_mut(name).with_context(|| format!("the object has no map {name}"))?;
    HashMap::try_from(map).with_context(|| format!("map {name}"))
}

fn array<'a, V: Copy + 'static>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<Array<&'a mut MapData, Raw<V>>> {
    let map = ebpf.map_mut(name).with_context(|| format!("the object has no map {name}"))?;
    Array::try_from(map).with_context(|| format!("map {name}"))
}

fn clear<K: Copy + 'static, V: Copy + 'static>(ebpf: &mut Ebpf, name: &str) -> Result<()> {
    let mut map = hash::<K, V>(ebpf, name)?;
    let keys: Vec<Raw<K>> = map.keys().collect::<Result<_, _>>()?;
    for key in keys {
        map.remove(&key)?;
    }
    Ok(())
}

fn counters<'a, K: Copy + 'static, V: Copy + 'static>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<PerCpuHashMap<&'a mut MapData, Raw<K>, Raw<V>>> {
    let map = ebpf.map_mut(name).with_context(|| format!("the object has no map {name}"))?;
    PerCpuHashMap::try_from(map).with_context(|| format!("map {name}"))
}

/// Removes every counter from a map, and returns those that were not zero.
fn drain<K: Copy + 'static, V: Copy + 'static>(
    ebpf: &mut Ebpf,
    name: &str,
) -> Result<Vec<(K, Vec<V>)>> {
    let mut map = counters::<K, V>(ebpf, name)?;
    let found: Vec<(Raw<K>, PerCpuValues<Raw<V>>)> = map.iter().collect::<Result<_, _>>()?;
    for (key, _) in &found {
        map.remove(key)?;
    }
    Ok(found
        .into_iter()
        .map(|(key, values)| (key.0, values.iter().map(|value| value.0).collect()))
        .collect())
}

type Ranges<'a, A> = LpmTrie<&'a mut MapData, Raw<SourceRange<A>>, u32>;

fn source_ranges<F: Ip>(ebpf: &mut Ebpf) -> Result<Ranges<'_, F::Address>> {
    let name = suffixed::<F>("source_ranges");
    let map = ebpf.map_mut(&name).with_context(|| format!("the object has no map {name}"))?;
    LpmTrie::try_from(map).with_context(|| format!("map {name}"))
}

/// Writes what the kernel's answers leave out: the MTU of the route that has one, and of one by a
/// device that no packet leaves by.
fn route_mtus<F: Ip>(ebpf: &mut Ebpf, version: Version, bits: u32) -> Result<()> {
    let name = suffixed::<F>("route_mtus");
    let map = ebpf.map_mut(&name).with_context(|| format!("the object has no map {name}"))?;
    let mut map: LpmTrie<&mut MapData, Raw<F::Address>, Raw<RouteMtu>> = LpmTrie::try_from(map)?;
    let (_, device) =
        ROUTES.into_iter().find(|(net, _)| *net == NET_SHORT).context("a short route")?;
    let network = F::of(world::address(version, NET_SHORT, 0)).context("of the family")?;
    map.insert(&Key::new(bits, Raw(network)), Raw(RouteMtu { device, mtu: NARROW_MTU }), 0)?;
    map.insert(&Key::new(0, Raw(network)), Raw(RouteMtu { device: u32::MAX, mtu: 68 }), 0)?;
    Ok(())
}

fn suffixed<F: Ip>(map: &str) -> String {
    format!("{map}_v{}", F::VERSION)
}

fn clear_family<F: Ip>(ebpf: &mut Ebpf, world: &World) -> Result<()> {
    clear::<ServiceKey<F::Address>, Service>(ebpf, &suffixed::<F>("services"))?;
    clear::<OriginKey<F::Address>, Origins<F::Address>>(ebpf, &suffixed::<F>("origins"))?;
    for map in ["flows", "embryonic"] {
        clear::<Tuple<F::Address>, Flow<F::Address>>(ebpf, &suffixed::<F>(map))?;
    }
    for map in ["exhausted", "imported"] {
        clear::<Tuple<F::Address>, u32>(ebpf, &suffixed::<F>(map))?;
    }
    clear::<Datagram<F::Address>, DatagramPorts>(ebpf, &suffixed::<F>("fragments"))?;
    clear::<AffinityKey<F::Address>, Affinity>(ebpf, &suffixed::<F>("affinity"))?;
    clear::<F::Address, NodeAddress>(ebpf, &suffixed::<F>("node_addresses"))?;
    let mut ranges = source_ranges::<F>(ebpf)?;
    let keys: Vec<Key<_>> = ranges.keys().collect::<Result<_, _>>()?;
    for key in keys {
        ranges.remove(&key)?;
    }
    let mut backends = array(ebpf, &suffixed::<F>("backends"))?;
    for id in world.backends.keys() {
        backends.set(*id, Raw(Backend::<F::Address>::default()), 0)?;
    }
    let mut lanes = array(ebpf, "addresses")?;
    for address in world.listing.keys() {
        if let Some(address) = F::of(*address) {
            lanes.set(lane::<F>(&address).0, Raw(0_u64), 0)?;
        }
    }
    Ok(())
}

fn fill_family<F: Ip>(ebpf: &mut Ebpf, world: &World, now: Ticks) -> Result<()> {
    let mut services = hash(ebpf, &suffixed::<F>("services"))?;
    for (key, service) in &world.services {
        if let Some(key) = convert::service_key::<F>(key) {
            services.insert(Raw(key), Raw(*service), 0)?;
        }
    }
    let mut backends = array(ebpf, &suffixed::<F>("backends"))?;
    for (id, found) in &world.backends {
        if let Some(found) = convert::backend::<F>(found) {
            backends.set(*id, Raw(found), 0)?;
        }
    }
    let mut origins = hash(ebpf, &suffixed::<F>("origins"))?;
    for (key, found) in convert::origins::<F>(world) {
        origins.insert(Raw(key), Raw(found), 0)?;
    }
    for (map, flows) in [("flows", &world.flows), ("embryonic", &world.embryonic)] {
        let mut map = hash(ebpf, &suffixed::<F>(map))?;
        for (key, flow) in convert::entries::<F>(flows, now) {
            map.insert(Raw(key), Raw(flow), 0)?;
        }
    }
    let mut affinity = hash(ebpf, &suffixed::<F>("affinity"))?;
    for (key, entry) in convert::affinities::<F>(world, now) {
        affinity.insert(Raw(key), Raw(entry), 0)?;
    }
    let mut fragments = hash(ebpf, &suffixed::<F>("fragments"))?;
    for (key, told) in convert::datagrams::<F>(world, now) {
        fragments.insert(Raw(key), Raw(told), 0)?;
    }
    let mut imported = hash(ebpf, &suffixed::<F>("imported"))?;
    for (key, bits) in convert::imported::<F>(world) {
        imported.insert(Raw(key), Raw(bits), 0)?;
    }
    let mut exhausted = hash(ebpf, &suffixed::<F>("exhausted"))?;
    for (key, tick) in convert::exhausted::<F>(world, now) {
        exhausted.insert(Raw(key), Raw(tick), 0)?;
    }
    let mut nodes = hash(ebpf, &suffixed::<F>("node_addresses"))?;
    for (address, flags) in &world.node_addresses {
        if let Some(address) = F::of(*address) {
            nodes.insert(Raw(address), Raw(NodeAddress { flags: *flags }), 0)?;
        }
    }
    let mut ranges = source_ranges::<F>(ebpf)?;
    for (service_port, net, bits) in &world.source_ranges {
        if let Some(address) = F::of(*net) {
            let data = SourceRange { service_port: service_port.to_be_bytes(), address };
            ranges.insert(&Key::new(32 + u32::from(*bits), Raw(data)), 1, 0)?;
        }
    }
    array(ebpf, &suffixed::<F>("networks"))?.set(0, Raw(convert::networks::<F>(world)), 0)?;
    let mut lanes = array(ebpf, "addresses")?;
    for (address, bits) in &world.listing {
        if let Some(address) = F::of(*address) {
            let (word, shift) = lane::<F>(&address);
            let Raw(old) = lanes.get(&word, 0)?;
            lanes.set(word, Raw::<u64>(old | u64::from(*bits) << shift), 0)?;
        }
    }
    Ok(())
}

fn read_family<F: Ip>(ebpf: &mut Ebpf, map: &str, now: Ticks) -> Result<Flows> {
    let map = hash::<Tuple<F::Address>, Flow<F::Address>>(ebpf, &suffixed::<F>(map))?;
    let entries: Vec<(Raw<_>, Raw<_>)> = map.iter().collect::<Result<_, _>>()?;
    Ok(convert::told::<F>(entries.into_iter().map(|(key, flow)| (key.0, flow.0)), now))
}

fn read_affinities<F: Ip>(ebpf: &mut Ebpf, now: Ticks) -> Result<Affinities> {
    let map = hash::<AffinityKey<F::Address>, Affinity>(ebpf, &suffixed::<F>("affinity"))?;
    let entries: Vec<(Raw<_>, Raw<_>)> = map.iter().collect::<Result<_, _>>()?;
    Ok(convert::affinities_told::<F>(entries.into_iter().map(|(key, entry)| (key.0, entry.0)), now))
}

fn read_exhausted<F: Ip>(ebpf: &mut Ebpf, now: Ticks) -> Result<Exhausted> {
    let map = hash::<Tuple<F::Address>, Ticks>(ebpf, &suffixed::<F>("exhausted"))?;
    let entries: Vec<(Raw<_>, Raw<_>)> = map.iter().collect::<Result<_, _>>()?;
    Ok(convert::exhausted_told::<F>(entries.into_iter().map(|(key, tick)| (key.0, tick.0)), now))
}

fn read_datagrams<F: Ip>(ebpf: &mut Ebpf, now: Ticks) -> Result<Datagrams> {
    let map = hash::<Datagram<F::Address>, DatagramPorts>(ebpf, &suffixed::<F>("fragments"))?;
    let entries: Vec<(Raw<_>, Raw<_>)> = map.iter().collect::<Result<_, _>>()?;
    Ok(convert::datagrams_told::<F>(entries.into_iter().map(|(key, told)| (key.0, told.0)), now))
}

impl Kernel {
    /// Loads the object into a new network namespace, which this thread enters.
    pub(crate) fn load() -> Result<Self> {
        Self::load_sized(SMALL, Clock::default())
    }

    /// As [`Kernel::load`], with the programs' clock at a tick.
    pub(crate) fn load_at(tick: Ticks) -> Result<Self> {
        Self::load_sized(SMALL, Clock::at(tick))
    }

    /// As [`Kernel::load`], for cases with more flows than others.
    pub(crate) fn load_large() -> Result<Self> {
        Self::load_sized(LARGE, Clock::default())
    }

    fn load_sized(flows: u32, clock: Clock) -> Result<Self> {
        network()?;
        let bytes = std::fs::read(object())?;
        let mut loader = EbpfLoader::new();
        let _ = loader.override_global("clock_offset_ns", &clock.offset_ns, true);
        for map in [
            "services_v4",
            "services_v6",
            "backends_v4",
            "backends_v6",
            "flows_v4",
            "flows_v6",
            "origins_v4",
            "origins_v6",
            "affinity_v4",
            "affinity_v6",
            "source_ranges_v4",
            "source_ranges_v6",
            "fragments_v4",
            "fragments_v6",
            "imported_v4",
            "imported_v6",
            "ports",
            "slots",
            "names",
            "backend_counts",
            "failure_counts",
            "reason_counts",
        ] {
            let _ = loader.map_max_entries(map, SMALL);
        }
        for map in ["embryonic_v4", "embryonic_v6"] {
            let _ = loader.map_max_entries(map, flows);
        }
        let mut ebpf = loader.load(&bytes).context("cannot load the object")?;
        for program in [Program::Ingress, Program::Egress, Program::IngressL3, Program::EgressL3] {
            let loaded = tc(&mut ebpf, program)?;
            verify(|| loaded.load()).with_context(|| format!("cannot load {}", program.name()))?;
        }
        let loaded = xdp(&mut ebpf)?;
        verify(|| loaded.load()).context("cannot load the XDP program")?;
        let ring =
            RingBuf::try_from(ebpf.take_map("events").context("the object has no map events")?)?;
        let mut kernel =
            Self { ebpf, ring, clock, mark: 0, carried: 0, filled: None, sockets: Vec::new() };
        kernel.listen(&Listening { until_ns: u64::MAX, ..Listening::default() })?;
        Ok(kernel)
    }

    fn fill(&mut self, world: &World, now: Ticks) -> Result<()> {
        let ebpf = &mut self.ebpf;
        fill_family::<V4>(ebpf, world, now)?;
        fill_family::<V6>(ebpf, world, now)?;
        let mut ports = array(ebpf, "ports")?;
        for (id, port) in &world.ports {
            ports.set(*id, Raw(port.told()), 0)?;
        }
        let mut words = array::<u64>(ebpf, "node_ports")?;
        for port in &world.node_ports {
            let Raw(word) = words.get(&u32::from(port / 64), 0)?;
            words.set(u32::from(port / 64), Raw(word | 1 << (port % 64)), 0)?;
        }
        array(ebpf, "settings")?.set(0, Raw::<Settings>(world.settings), 0)?;
        let mut slots = array::<SlotBlock>(ebpf, "slots")?;
        for (slot, id) in &world.slots {
            let Raw(mut block) = slots.get(&(slot / 16), 0)?;
            block.backends[*slot as usize % 16] = *id;
            slots.set(slot / 16, Raw(block), 0)?;
        }
        let mut devices = hash::<u32, Device>(ebpf, "devices")?;
        for (ifindex, device) in &world.devices {
            devices.insert(Raw(*ifindex), Raw(*device), 0)?;
        }
        let mut rejects = hash::<RejectKey, RejectBucket>(ebpf, "rejects")?;
        for (client, credit_ms) in &world.rejects {
            let bucket = RejectBucket {
                refilled_ms: (self.clock.now_ns() / 1_000_000) as u32,
                credit_ms: *credit_ms,
            };
            rejects.insert(Raw(world::reject_key(*client)), Raw(bucket), 0)?;
        }
        array(ebpf, "marks")?.set(0, Raw(world.marks), 0)?;
        route_mtus::<V4>(ebpf, Version::V4, 24)?;
        route_mtus::<V6>(ebpf, Version::V6, 64)?;
        for held in &world.held {
            let at = SocketAddr::new(held.destination, held.destination_port);
            let to = SocketAddr::new(held.source, held.source_port);
            self.sockets.push(socket::connected(held.protocol, at, to)?);
        }
        for (protocol, at) in &world.listeners {
            self.sockets.push(socket::listening(*protocol, *at)?);
        }
        Ok(())
    }

    fn clear(&mut self, world: &World) -> Result<()> {
        for socket in self.sockets.drain(..) {
            // A process that was just forked and holds the socket too would keep it in the lookup.
            // SAFETY: the descriptor is live.
            let _ = unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
        }
        let ebpf = &mut self.ebpf;
        clear_family::<V4>(ebpf, world)?;
        clear_family::<V6>(ebpf, world)?;
        let mut ports = array(ebpf, "ports")?;
        for id in world.ports.keys() {
            ports.set(*id, Raw(ServicePort::default()), 0)?;
        }
        let mut slots = array(ebpf, "slots")?;
        for slot in world.slots.keys() {
            slots.set(slot / 16, Raw(SlotBlock::default()), 0)?;
        }
        let mut words = array(ebpf, "node_ports")?;
        for port in &world.node_ports {
            words.set(u32::from(port / 64), Raw(0_u64), 0)?;
        }
        clear::<u32, Device>(ebpf, "devices")?;
        clear::<RejectKey, RejectBucket>(ebpf, "rejects")
    }

    /// Runs a case. Returns [`None`] if the kernel refuses to run a program on such a frame.
    pub(crate) fn run(&mut self, case: &Case) -> Result<Option<Outcome>> {
        loop {
            let tick = self.clock.now();
            let outcome = self.run_once(case)?;
            // A search that found nothing counts within its tick alone.
            if case.world.exhausted.is_empty() || tick == self.clock.now() {
                return Ok(outcome);
            }
        }
    }

    /// As [`Self::run`], for an skb with this word in its control block.
    pub(crate) fn run_carrying(&mut self, case: &Case, word: u32) -> Result<Option<Outcome>> {
        self.carried = word;
        let outcome = self.run(case);
        self.carried = 0;
        outcome
    }

    fn run_once(&mut self, case: &Case) -> Result<Option<Outcome>> {
        let now = self.clock.now();
        let since = match self.filled.take() {
            Some((world, since))
                if world == case.world && since == now && world.rejects.is_empty() =>
            {
                since
            }
            other => {
                if let Some((world, _)) = other {
                    self.clear(&world)?;
                }
                self.fill(&case.world, now)?;
                now
            }
        };
        let outcome = self.run_filled(case, since);
        let _ = (self.counted()?, self.failed()?);
        match &outcome {
            // The next case may find them unchanged.
            Ok(Some(Outcome {
                end: End::Next | End::XdpPass,
                flows,
                embryonic,
                affinity,
                exhausted,
                fragments,
                marks,
                ..
            })) if *flows == case.world.flows
                && *embryonic == case.world.embryonic
                && *affinity == case.world.affinity
                && *exhausted == case.world.exhausted
                && *fragments == case.world.fragments
                && *marks == case.world.marks =>
            {
                self.filled = Some((case.world.clone(), since));
            }
            _ => self.clear(&case.world)?,
        }
        outcome
    }

    fn run_filled(&mut self, case: &Case, now: Ticks) -> Result<Option<Outcome>> {
        let mut frame = vec![0; FRAME_MAX];
        let Some(result) = self.test_run(case, &mut frame)? else { return Ok(None) };
        frame.truncate(result.data_size_out as usize);
        if case.program == Program::Xdp {
            let is_marked = frame.starts_with(&XDP_DONE);
            if is_marked {
                let _ = frame.drain(..XDP_DONE.len());
            }
            ensure!(
                is_marked == (frame != case.input),
                "XDP marks what it has translated, and nothing else"
            );
        }
        let end = match (case.program, result.return_value.cast_signed()) {
            (Program::Xdp, 1) => End::XdpDrop,
            (Program::Xdp, 2) => End::XdpPass,
            (Program::Xdp, other) => bail!("XDP answers {other}"),
            (_, -1) => End::Next,
            (_, 2) => End::Drop,
            (_, 7) => End::Redirect,
            (_, other) => bail!("tc answers {other}"),
        };
        let mut flows = read_family::<V4>(&mut self.ebpf, "flows", now)?;
        flows.extend(read_family::<V6>(&mut self.ebpf, "flows", now)?);
        let mut embryonic = read_family::<V4>(&mut self.ebpf, "embryonic", now)?;
        embryonic.extend(read_family::<V6>(&mut self.ebpf, "embryonic", now)?);
        let mut affinity = read_affinities::<V4>(&mut self.ebpf, now)?;
        affinity.extend(read_affinities::<V6>(&mut self.ebpf, now)?);
        let mut exhausted = read_exhausted::<V4>(&mut self.ebpf, now)?;
        exhausted.extend(read_exhausted::<V6>(&mut self.ebpf, now)?);
        let mut fragments = read_datagrams::<V4>(&mut self.ebpf, now)?;
        fragments.extend(read_datagrams::<V6>(&mut self.ebpf, now)?);
        let Raw(marks) = array::<u32>(&mut self.ebpf, "marks")?.get(&0, 0)?;
        let (counted, failed) = (Some(self.counted()?), self.failed()?);
        let events = Some(self.events()?);
        Ok(Some(Outcome {
            end,
            frame,
            counted,
            failed,
            events,
            flows,
            embryonic,
            affinity,
            exhausted,
            fragments,
            marks,
        }))
    }

    fn test_run(&mut self, case: &Case, frame: &mut [u8]) -> Result<Option<TestRunResult>> {
        self.repeated(case, frame, 1)
    }

    fn repeated(
        &mut self,
        case: &Case,
        frame: &mut [u8],
        repeat: u32,
    ) -> Result<Option<TestRunResult>> {
        let context = if case.program == Program::Xdp {
            // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
            // egress_ifindex.
            [0, case.input.len() as u32, 0, case.ifindex, 0, 0].map(u32::to_ne_bytes).concat()
        } else {
            let (length, ifindex) = SKB;
            let mut context = vec![0; length];
            context[ifindex..ifindex + 4].copy_from_slice(&case.ifindex.to_ne_bytes());
            context[SKB_CAME_BY..SKB_CAME_BY + 4].copy_from_slice(&case.came_by.to_ne_bytes());
            context[SKB_MARK..SKB_MARK + 4].copy_from_slice(&self.mark.to_ne_bytes());
            context[CARRIED..CARRIED + 4].copy_from_slice(&self.carried.to_ne_bytes());
            context
        };
        let options = TestRunOptions {
            data_in: Some(&case.input),
            data_out: Some(frame),
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::default()
        };
        let result = if case.program == Program::Xdp {
            xdp(&mut self.ebpf)?.test_run(options)
        } else {
            tc(&mut self.ebpf, case.program)?.test_run(options)
        };
        match result {
            Ok(result) => Ok(Some(result)),
            Err(_) if case.input.len() < shortest(&case.input) => Ok(None),
            Err(error) => Err(error).context("the kernel refuses to run the program"),
        }
    }

    /// Requests the events that pass a filter from the programs.
    pub(crate) fn listen(&mut self, sieve: &Listening) -> Result<()> {
        Ok(array(&mut self.ebpf, "listening")?.set(0, Raw::<Listening>(*sieve), 0)?)
    }

    /// Takes all events out of the ring, without their times, which cannot be predicted.
    pub(crate) fn events(&mut self) -> Result<Vec<Event>> {
        let mut all = Vec::new();
        while let Some(item) = self.ring.next() {
            ensure!(item.len() == size_of::<Event>(), "an event of {} bytes", item.len());
            // SAFETY: there are as many bytes as an event has, and any bytes are an event.
            let event = unsafe { item.as_ptr().cast::<Event>().read_unaligned() };
            ensure!(event.time_ns != 0, "an event without a time: {event:?}");
            all.push(Event { time_ns: 0, ..event });
        }
        Ok(all)
    }

    /// Runs a case many times over its own packet. Returns the mean time of one run in nanoseconds.
    pub(crate) fn time(&mut self, case: &Case, repeat: u32) -> Result<u32> {
        let mut frame = vec![0; FRAME_MAX];
        Ok(self
            .repeated(case, &mut frame, repeat)?
            .context("the frame is too short")?
            .duration
            .as_nanos() as u32)
    }

    /// Runs some packets, each on what the previous one left behind. Returns how many were
    /// redirected, including the answered ones, and the time that all of them took.
    pub(crate) fn redirected(&mut self, cases: &[Case]) -> Result<(u32, Duration)> {
        let (mut count, mut frame) = (0, vec![0; FRAME_MAX]);
        let started = Instant::now();
        for case in cases {
            let result = self.test_run(case, &mut frame)?.context("the frame is too short")?;
            count += u32::from(result.return_value == 7);
        }
        Ok((count, started.elapsed()))
    }

    /// Fills the maps for [`Self::time`].
    pub(crate) fn prepare(&mut self, world: &World) -> Result<()> {
        if let Some((world, _)) = self.filled.take() {
            self.clear(&world)?;
        }
        let now = self.clock.now();
        self.fill(world, now)?;
        self.filled = Some((world.clone(), now));
        Ok(())
    }

    /// Returns the failures that were counted since the last call.
    fn failed(&mut self) -> Result<Vec<(u32, Failure)>> {
        let mut map = hash::<FailureKey, u64>(&mut self.ebpf, "failure_counts")?;
        let all: Vec<(Raw<FailureKey>, Raw<u64>)> = map.iter().collect::<Result<_, _>>()?;
        let mut failed = Vec::new();
        for (Raw(key), Raw(count)) in all {
            map.remove(&Raw(key))?;
            let failure = Failure::from_number(key.failure)
                .with_context(|| format!("no failure {}", key.failure))?;
            ensure!(count == 1, "one packet was {count} failures");
            failed.push((key.backend & !COUNTER_V6, failure));
        }
        Ok(failed)
    }

    /// Returns the counters that have changed since the last call.
    fn counted(&mut self) -> Result<Vec<Counted>> {
        let mut all = Vec::new();
        for (key, values) in drain::<ReasonKey, ReasonCounters>(&mut self.ebpf, "reason_counts")? {
            let packets: u64 = values.iter().map(|value| value.packets).sum();
            ensure!(packets == 1, "one packet was counted {packets} times");
            let reason = Reason::from_number(key.reason)
                .with_context(|| format!("no reason {}", key.reason))?;
            let bytes = values.iter().map(|value| value.bytes).sum::<u64>() as u32;
            all.push(Counted::Reason { reason, service_port: key.service_port, bytes });
        }
        for (key, values) in drain::<u32, BackendCounters>(&mut self.ebpf, "backend_counts")? {
            let backend = key & !COUNTER_V6;
            let sum = |field: fn(&BackendCounters) -> u64| values.iter().map(field).sum::<u64>();
            let (forward, reply) =
                (sum(|value| value.forward_packets), sum(|value| value.reply_packets));
            ensure!(
                forward + reply == 1,
                "one packet was counted {forward} times forward, {reply} times back"
            );
            let (forward_bytes, reply_bytes) =
                (sum(|value| value.forward_bytes) as u32, sum(|value| value.reply_bytes) as u32);
            let opened = sum(|value| value.flows) == 1;
            all.push(match forward {
                1 => Counted::Forward { backend, bytes: forward_bytes, opened },
                _ => Counted::Reply { backend, bytes: reply_bytes },
            });
        }
        Ok(all)
    }
}

/// Returns the least bytes that a test run takes: an Ethernet header and, for an skb, the IP header
/// behind it.
fn shortest(frame: &[u8]) -> usize {
    match frame.get(12..14) {
        Some([0x08, 0x00]) => 14 + 20,
        Some([0x86, 0xdd]) => 14 + 40,
        _ => 15,
    }
}

fn tc(ebpf: &mut Ebpf, program: Program) -> Result<&mut SchedClassifier> {
    let name = program.name();
    let program =
        ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}

fn xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp> {
    let name = Program::Xdp.name();
    let program =
        ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}
