//! The maps, and those of each address family.

#![allow(non_upper_case_globals, reason = "a map's name is what `bpftool map` shows")]

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuHashMap, SkStorage};
use aya_ebpf::macros::btf_map;
use sluice_common::abi::{
    ADDRESS_WORDS, AFFINITY_MAX, Affinity, AffinityKey, BACKEND_COUNTERS_MAX, BACKENDS_MAX,
    Backend, BackendCounters, CALLERS_MAX, CallerKey, DEVICES_MAX, Datagram, DatagramPorts, Device,
    EMBRYONIC_MAX, EXHAUSTED_MAX, FAILURE_COUNTERS_MAX, FLOWS_MAX, FRAGMENTS_MAX, FailureKey, Flow,
    IMPORTED_MAX, Ipv4Address, Ipv6Address, NAMES_MAX, NODE_ADDRESSES_MAX, NODE_PORT_WORDS, Name,
    Networks, NodeAddress, ORIGINS_MAX, OriginKey, Origins, PORTS_MAX, Peer, Peers,
    REASON_COUNTERS_MAX, REJECTS_MAX, ROUTE_MTUS_MAX, ReasonCounters, ReasonKey, RejectBucket,
    RejectKey, RouteMtu, SERVICES_MAX, SLOT_BLOCKS_MAX, SOURCE_RANGES_MAX, Service, ServiceKey,
    ServicePort, Settings, SlotBlock, SourceRange, Tuple,
};
use sluice_common::{Family, V4, V6};

const MMAP: usize = BPF_F_MMAPABLE as usize;
/// Entries of each affinity map.
pub(super) const AFFINITIES: usize = AFFINITY_MAX as usize;
const LAZY: usize = BPF_F_NO_PREALLOC as usize;

type Services<A> = HashMap<ServiceKey<A>, Service, { SERVICES_MAX as usize }, LAZY>;
type Backends<A> = Array<Backend<A>, { BACKENDS_MAX as usize }, MMAP>;
type Flows<A> = LruHashMap<Tuple<A>, Flow<A>, { FLOWS_MAX as usize }>;
type Embryonic<A> = LruHashMap<Tuple<A>, Flow<A>, { EMBRYONIC_MAX as usize }>;
type OriginTable<A> = HashMap<OriginKey<A>, Origins<A>, { ORIGINS_MAX as usize }, LAZY>;
type Affinities<A> = LruHashMap<AffinityKey<A>, Affinity, AFFINITIES>;
type SourceRanges<A> = LpmTrie<SourceRange<A>, u32, { SOURCE_RANGES_MAX as usize }>;
type RouteMtus<A> = LpmTrie<A, RouteMtu, { ROUTE_MTUS_MAX as usize }>;
type NodeAddresses<A> = HashMap<A, NodeAddress, { NODE_ADDRESSES_MAX as usize }, LAZY>;
type Datagrams<A> = LruHashMap<Datagram<A>, DatagramPorts, { FRAGMENTS_MAX as usize }>;
type Imported<A> = HashMap<Tuple<A>, u32, { IMPORTED_MAX as usize }, LAZY>;
type Exhausted<A> = LruHashMap<Tuple<A>, u32, { EXHAUSTED_MAX as usize }>;

#[cfg(not(feature = "both-layouts"))]
type FlowTable<F> = &'static Flows<<F as Family>::Address>;
#[cfg(not(feature = "both-layouts"))]
type EmbryonicTable<F> = &'static Embryonic<<F as Family>::Address>;
#[cfg(not(feature = "both-layouts"))]
type AffinityTable<F> = &'static Affinities<<F as Family>::Address>;
#[cfg(feature = "both-layouts")]
type FlowTable<F> = super::layouts::FlowTable<F, 0>;
#[cfg(feature = "both-layouts")]
type EmbryonicTable<F> = super::layouts::FlowTable<F, 1>;
#[cfg(feature = "both-layouts")]
type AffinityTable<F> = super::layouts::AffinityTable<<F as Family>::Address>;

#[btf_map]
pub(super) static settings: Array<Settings, 1> = Array::new();
#[btf_map]
pub(super) static ports: Array<ServicePort, { PORTS_MAX as usize }, MMAP> = Array::new();
#[btf_map]
pub(super) static slots: Array<SlotBlock, { SLOT_BLOCKS_MAX as usize }, MMAP> = Array::new();
#[btf_map]
pub(super) static addresses: Array<u64, { ADDRESS_WORDS as usize }, MMAP> = Array::new();
#[btf_map]
pub(super) static marks: Array<u32, 1> = Array::new();
#[btf_map]
pub(super) static node_ports: Array<u64, { NODE_PORT_WORDS as usize }, MMAP> = Array::new();
#[btf_map]
pub(super) static devices: HashMap<u32, Device, { DEVICES_MAX as usize }> = HashMap::new();
#[btf_map]
pub(super) static names: HashMap<u32, Name, { NAMES_MAX as usize }, LAZY> = HashMap::new();
#[btf_map]
pub(super) static rejects: LruHashMap<RejectKey, RejectBucket, { REJECTS_MAX as usize }> =
    LruHashMap::new();
#[btf_map]
pub(super) static backend_counts: PerCpuHashMap<
    u32,
    BackendCounters,
    { BACKEND_COUNTERS_MAX as usize },
    LAZY,
> = PerCpuHashMap::new();
#[btf_map]
pub(super) static failure_counts: HashMap<
    FailureKey,
    u64,
    { FAILURE_COUNTERS_MAX as usize },
    LAZY,
> = HashMap::new();
#[btf_map]
pub(super) static reason_counts: PerCpuHashMap<
    ReasonKey,
    ReasonCounters,
    { REASON_COUNTERS_MAX as usize },
    LAZY,
> = PerCpuHashMap::new();

#[btf_map]
pub(super) static callers: LruHashMap<CallerKey, u32, { CALLERS_MAX as usize }> = LruHashMap::new();
/// Kept with a socket whose calls are left to packets: the cookie of its network namespace.
#[btf_map]
pub(super) static left_to_packets: SkStorage<u64> = SkStorage::new();

#[btf_map]
pub(super) static route_mtus_v4: RouteMtus<Ipv4Address> = LpmTrie::new();
#[btf_map]
pub(super) static route_mtus_v6: RouteMtus<Ipv6Address> = LpmTrie::new();

#[btf_map]
static services_v4: Services<Ipv4Address> = HashMap::new();
#[btf_map]
static services_v6: Services<Ipv6Address> = HashMap::new();
#[btf_map]
static backends_v4: Backends<Ipv4Address> = Array::new();
#[btf_map]
static backends_v6: Backends<Ipv6Address> = Array::new();
#[btf_map]
pub(super) static flows_v4: Flows<Ipv4Address> = LruHashMap::new();
#[btf_map]
pub(super) static flows_v6: Flows<Ipv6Address> = LruHashMap::new();
#[btf_map]
pub(super) static embryonic_v4: Embryonic<Ipv4Address> = LruHashMap::new();
#[btf_map]
pub(super) static embryonic_v6: Embryonic<Ipv6Address> = LruHashMap::new();
#[btf_map]
static origins_v4: OriginTable<Ipv4Address> = HashMap::new();
#[btf_map]
static origins_v6: OriginTable<Ipv6Address> = HashMap::new();
#[btf_map]
static peer_v4: SkStorage<Peer<Ipv4Address>> = SkStorage::new();
#[btf_map]
static peer_v6: SkStorage<Peer<Ipv6Address>> = SkStorage::new();
#[btf_map]
static peers_v4: SkStorage<Peers<Ipv4Address>> = SkStorage::new();
#[btf_map]
static peers_v6: SkStorage<Peers<Ipv6Address>> = SkStorage::new();
#[btf_map]
static networks_v4: Array<Networks<Ipv4Address>, 1> = Array::new();
#[btf_map]
static networks_v6: Array<Networks<Ipv6Address>, 1> = Array::new();
#[btf_map]
static affinity_v4: Affinities<Ipv4Address> = LruHashMap::new();
#[btf_map]
static affinity_v6: Affinities<Ipv6Address> = LruHashMap::new();
#[btf_map]
static source_ranges_v4: SourceRanges<Ipv4Address> = LpmTrie::new();
#[btf_map]
static source_ranges_v6: SourceRanges<Ipv6Address> = LpmTrie::new();
#[btf_map]
static node_addresses_v4: NodeAddresses<Ipv4Address> = HashMap::new();
#[btf_map]
static node_addresses_v6: NodeAddresses<Ipv6Address> = HashMap::new();
#[btf_map]
static fragments_v4: Datagrams<Ipv4Address> = LruHashMap::new();
#[btf_map]
static fragments_v6: Datagrams<Ipv6Address> = LruHashMap::new();
#[btf_map]
static exhausted_v4: Exhausted<Ipv4Address> = LruHashMap::new();
#[btf_map]
static exhausted_v6: Exhausted<Ipv6Address> = LruHashMap::new();
#[btf_map]
static imported_v4: Imported<Ipv4Address> = HashMap::new();
#[btf_map]
static imported_v6: Imported<Ipv6Address> = HashMap::new();

/// The tables of the previous layout, and slots for converting their values.
#[cfg(feature = "both-layouts")]
pub(super) mod old {
    use sluice_common::abi::previous;

    use super::super::layouts::Slots;
    use super::{
        AFFINITIES, Affinity, AffinityKey, EMBRYONIC_MAX, FLOWS_MAX, Flow, Ipv4Address,
        Ipv6Address, LruHashMap, Tuple, btf_map,
    };

    type Flows<A> = LruHashMap<Tuple<A>, previous::Flow<A>, { FLOWS_MAX as usize }>;
    type Embryonic<A> = LruHashMap<Tuple<A>, previous::Flow<A>, { EMBRYONIC_MAX as usize }>;
    type Affinities<A> = LruHashMap<AffinityKey<A>, previous::Affinity, AFFINITIES>;

    #[btf_map]
    pub(in super::super) static old_flows_v4: Flows<Ipv4Address> = LruHashMap::new();
    #[btf_map]
    pub(in super::super) static old_flows_v6: Flows<Ipv6Address> = LruHashMap::new();
    #[btf_map]
    pub(in super::super) static old_embryonic_v4: Embryonic<Ipv4Address> = LruHashMap::new();
    #[btf_map]
    pub(in super::super) static old_embryonic_v6: Embryonic<Ipv6Address> = LruHashMap::new();
    #[btf_map]
    pub(in super::super) static old_affinity_v4: Affinities<Ipv4Address> = LruHashMap::new();
    #[btf_map]
    pub(in super::super) static old_affinity_v6: Affinities<Ipv6Address> = LruHashMap::new();
    #[btf_map]
    pub(in super::super) static moving_flows_v4: Slots<Tuple<Ipv4Address>, Flow<Ipv4Address>> =
        Slots::new();
    #[btf_map]
    pub(in super::super) static moving_flows_v6: Slots<Tuple<Ipv6Address>, Flow<Ipv6Address>> =
        Slots::new();
    #[btf_map]
    pub(in super::super) static moving_affinity_v4: Slots<AffinityKey<Ipv4Address>, Affinity> =
        Slots::new();
    #[btf_map]
    pub(in super::super) static moving_affinity_v6: Slots<AffinityKey<Ipv6Address>, Affinity> =
        Slots::new();
}

#[cfg(not(feature = "both-layouts"))]
pub(super) use sluice_common::Family as Flowing;

#[cfg(feature = "both-layouts")]
pub(super) use super::layouts::Moving as Flowing;

/// A family's maps.
pub(super) trait Maps: Flowing {
    /// The bit of this family's ids in [`crate::bpf::maps::backend_counts`].
    const COUNTER: u32;
    fn services() -> &'static Services<Self::Address>;
    fn backends() -> &'static Backends<Self::Address>;
    fn flows() -> FlowTable<Self>;
    fn embryonic() -> EmbryonicTable<Self>;
    fn origins() -> &'static OriginTable<Self::Address>;
    fn peer() -> &'static SkStorage<Peer<Self::Address>>;
    fn peers() -> &'static SkStorage<Peers<Self::Address>>;
    fn networks() -> &'static Array<Networks<Self::Address>, 1>;
    fn affinity() -> AffinityTable<Self>;
    fn source_ranges() -> &'static SourceRanges<Self::Address>;
    fn node_addresses() -> &'static NodeAddresses<Self::Address>;
    fn fragments() -> &'static Datagrams<Self::Address>;
    fn exhausted() -> &'static Exhausted<Self::Address>;
    fn imported() -> &'static Imported<Self::Address>;
}

macro_rules! maps {
    ($family:ident, $counter:expr, $services:ident, $backends:ident, $flows:ident, $embryonic:ident, $origins:ident, $peer:ident, $peers:ident, $networks:ident, $affinity:ident, $source_ranges:ident, $node_addresses:ident, $fragments:ident, $exhausted:ident, $imported:ident, $old_affinity:ident, $moving_affinity:ident) => {
        impl Maps for $family {
            const COUNTER: u32 = $counter;
            #[inline(always)]
            fn services() -> &'static Services<Self::Address> {
                &$services
            }
            #[inline(always)]
            fn backends() -> &'static Backends<Self::Address> {
                &$backends
            }
            #[inline(always)]
            fn flows() -> FlowTable<Self> {
                #[cfg(not(feature = "both-layouts"))]
                return &$flows;
                #[cfg(feature = "both-layouts")]
                super::layouts::FlowTable(core::marker::PhantomData)
            }
            #[inline(always)]
            fn embryonic() -> EmbryonicTable<Self> {
                #[cfg(not(feature = "both-layouts"))]
                return &$embryonic;
                #[cfg(feature = "both-layouts")]
                super::layouts::FlowTable(core::marker::PhantomData)
            }
            #[inline(always)]
            fn origins() -> &'static OriginTable<Self::Address> {
                &$origins
            }
            #[inline(always)]
            fn peer() -> &'static SkStorage<Peer<Self::Address>> {
                &$peer
            }
            #[inline(always)]
            fn peers() -> &'static SkStorage<Peers<Self::Address>> {
                &$peers
            }
            #[inline(always)]
            fn networks() -> &'static Array<Networks<Self::Address>, 1> {
                &$networks
            }
            #[inline(always)]
            fn affinity() -> AffinityTable<Self> {
                #[cfg(not(feature = "both-layouts"))]
                return &$affinity;
                #[cfg(feature = "both-layouts")]
                super::layouts::AffinityTable {
                    now: &$affinity,
                    before: &old::$old_affinity,
                    slots: &old::$moving_affinity,
                }
            }
            #[inline(always)]
            fn source_ranges() -> &'static SourceRanges<Self::Address> {
                &$source_ranges
            }
            #[inline(always)]
            fn node_addresses() -> &'static NodeAddresses<Self::Address> {
                &$node_addresses
            }
            #[inline(always)]
            fn fragments() -> &'static Datagrams<Self::Address> {
                &$fragments
            }
            #[inline(always)]
            fn exhausted() -> &'static Exhausted<Self::Address> {
                &$exhausted
            }
            #[inline(always)]
            fn imported() -> &'static Imported<Self::Address> {
                &$imported
            }
        }
    };
}

maps!(
    V4,
    0,
    services_v4,
    backends_v4,
    flows_v4,
    embryonic_v4,
    origins_v4,
    peer_v4,
    peers_v4,
    networks_v4,
    affinity_v4,
    source_ranges_v4,
    node_addresses_v4,
    fragments_v4,
    exhausted_v4,
    imported_v4,
    old_affinity_v4,
    moving_affinity_v4
);
maps!(
    V6,
    sluice_common::abi::COUNTER_V6,
    services_v6,
    backends_v6,
    flows_v6,
    embryonic_v6,
    origins_v6,
    peer_v6,
    peers_v6,
    networks_v6,
    affinity_v6,
    source_ranges_v6,
    node_addresses_v6,
    fragments_v6,
    exhausted_v6,
    imported_v6,
    old_affinity_v6,
    moving_affinity_v6
);

/// Returns a device that programs are attached to.
#[inline(always)]
pub(super) fn device(ifindex: u32) -> Option<&'static Device> {
    // SAFETY: entries are plain data, readable under RCU.
    unsafe { devices.get(ifindex) }
}

/// Returns the index of our own device, which accepts packets whose source is an address of this
/// node, or 0 if there is none.
#[inline(always)]
pub(super) fn own_device() -> u32 {
    match settings.get(0) {
        Some(found) => found.own_device,
        None => 0,
    }
}
