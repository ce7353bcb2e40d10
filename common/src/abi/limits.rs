//! The number of entries of each map, and what it costs.

use super::Ticks;

/// Entries of `services`, per family: 64 Ki x ~64 B = 4 MiB when full.
pub const SERVICES_MAX: u32 = 65_536;
/// Elements of the `ports` array: 64 Ki x 32 B = 2 MiB.
pub const PORTS_MAX: u32 = 65_536;
/// Elements of the `slots` array, [`SLOTS_PER_BLOCK`] ids each: 512 Ki x 64 B = 32 MiB.
pub const SLOT_BLOCKS_MAX: u32 = 524_288;
/// Backend ids in one element of `slots`.
pub const SLOTS_PER_BLOCK: u32 = 16;
/// Elements of `backends_v4` (16 B each) and `backends_v6` (28 B each): 4 and 7 MiB.
pub const BACKENDS_MAX: u32 = 262_144;
/// Entries of each `flows` map: 256 Ki x ~110 B = 28 MiB (IPv4), ~45 MiB (IPv6).
pub const FLOWS_MAX: u32 = 262_144;
/// Entries of each `embryonic` map: 32 Ki x ~110 B = 3.5 MiB (IPv4), ~6 MiB (IPv6).
///
/// There are fewer than source ports for clients ([`crate::path::PORTS`]): packets that nobody
/// answers cannot use those up, however many they are, even if their forward entries are evicted
/// first.
pub const EMBRYONIC_MAX: u32 = 32_768;
const _: () = assert!(EMBRYONIC_MAX < crate::path::PORTS);
/// Frontends that one UDP socket may use at a time. They are kept with the socket: 192 B (IPv4) or
/// 384 B (IPv6) in addition to what the kernel needs to keep anything with a socket.
pub const PEERS_MAX: usize = 8;
/// Elements of `addresses`: 128 Ki words = 1 MiB, sixteen four-bit lanes a word.
pub const ADDRESS_WORDS: u32 = 131_072;
/// Entries of `devices`.
pub const DEVICES_MAX: u32 = 4_096;
/// Entries of `origins`, per family.
pub const ORIGINS_MAX: u32 = BACKENDS_MAX;
/// Entries of `backend_counts`, filled on first use.
pub const BACKEND_COUNTERS_MAX: u32 = 131_072;
/// Entries of `reason_counts`, filled on first use.
pub const REASON_COUNTERS_MAX: u32 = 65_536;
/// Entries of `failure_counts`, filled on first use: 128 Ki x ~64 B = 8 MiB when full.
pub const FAILURE_COUNTERS_MAX: u32 = BACKEND_COUNTERS_MAX;
/// Entries of `socket_counts`, filled on first use.
pub const SOCKET_COUNTERS_MAX: u32 = BACKEND_COUNTERS_MAX;
/// Bytes of the ring buffer `events`: some 3 800 unread events.
pub const EVENTS_BYTES: u32 = 524_288;
/// Entries of `names`, filled as service ports come.
pub const NAMES_MAX: u32 = PORTS_MAX;
/// Entries of `rejects`, the rate limiter's buckets.
pub const REJECTS_MAX: u32 = 4_096;

/// Entries of `callers`: frontends that pods have called, 16 Ki x ~96 B = 1.5 MiB.
pub const CALLERS_MAX: u32 = 16_384;
/// The time for which an entry of `callers` is valid, in [`Ticks`]: about a minute. A pod may begin
/// to keep a frontend to itself, and its packets are then seen no more.
pub const CALLER_TICKS: Ticks = 60;

/// Entries of each affinity map: 64 Ki x ~70 B = 4.5 MiB (IPv4).
pub const AFFINITY_MAX: u32 = 65_536;
/// Entries of each source-range trie, filled as services come.
pub const SOURCE_RANGES_MAX: u32 = 65_536;
/// Entries of each datagram map, for datagrams whose fragments are under way.
pub const FRAGMENTS_MAX: u32 = 8_192;
/// Entries of each map of node addresses.
pub const NODE_ADDRESSES_MAX: u32 = 4_096;
/// Entries of each map of netfilter's flows, filled at a takeover; two a connection. 1 Mi x ~64 B =
/// 64 MiB when full (IPv4).
pub const IMPORTED_MAX: u32 = 1_048_576;
/// Entries of each map of routes' MTUs, allocated as they come: 16 Ki x ~64 B = 1 MiB when full.
pub const ROUTE_MTUS_MAX: u32 = 16_384;
/// Elements of `node_ports`: a bit for every port number, 64 an element.
pub const NODE_PORT_WORDS: u32 = 1_024;
/// Entries of `exhausted`, the searches of source ports that found none.
pub const EXHAUSTED_MAX: u32 = 4_096;
