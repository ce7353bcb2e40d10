//! Converts a world to one family's addresses and to times, and back. A world has addresses of any
//! family, and ages.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Datagram, DatagramPorts, Flow, Networks, Origin, OriginKey,
    Origins, PREFIXES, Prefix, ServiceKey, Ticks, Tuple, state,
};

use super::ip::Ip;
use super::world::{self, Affinities, Datagrams, Exhausted, Flows, World};

/// Converts a key to a family's addresses.
pub(crate) fn service_key<F: Ip>(key: &ServiceKey<IpAddr>) -> Option<ServiceKey<F::Address>> {
    Some(ServiceKey {
        address: F::of(key.address)?,
        port: key.port,
        protocol: key.protocol,
        reserved: 0,
    })
}

/// Converts a backend to a family's address.
pub(crate) fn backend<F: Ip>(backend: &Backend<IpAddr>) -> Option<Backend<F::Address>> {
    let Backend { address, port, generation, service_port, flags } = *backend;
    Some(Backend { address: F::of(address)?, port, generation, service_port, flags })
}

/// Converts origins to a family's addresses.
pub(crate) fn origins<F: Ip>(
    world: &World,
) -> BTreeMap<OriginKey<F::Address>, Origins<F::Address>> {
    let fill = |ends: &Vec<std::net::SocketAddr>| {
        let mut origins = Origins::default();
        for (origin, end) in origins.frontends.iter_mut().zip(ends) {
            *origin = Origin { address: F::of(end.ip())?, port: end.port(), reserved: 0 };
        }
        Some(origins)
    };
    world
        .origins
        .iter()
        .filter_map(|(key, ends)| Some((service_key::<F>(key)?, fill(ends)?)))
        .collect()
}

/// Converts a tuple to a family's addresses.
pub(crate) fn tuple<F: Ip>(tuple: &Tuple<IpAddr>) -> Option<Tuple<F::Address>> {
    Some(Tuple {
        source: F::of(tuple.source)?,
        destination: F::of(tuple.destination)?,
        source_port: tuple.source_port,
        destination_port: tuple.destination_port,
        protocol: tuple.protocol,
        side: tuple.side,
        reserved: [0; 2],
    })
}

/// Converts a tuple back.
pub(crate) fn tuple_told<F: Ip>(tuple: &Tuple<F::Address>) -> Tuple<IpAddr> {
    Tuple {
        source: F::ip(tuple.source),
        destination: F::ip(tuple.destination),
        source_port: tuple.source_port,
        destination_port: tuple.destination_port,
        protocol: tuple.protocol,
        side: tuple.side,
        reserved: tuple.reserved,
    }
}

/// Returns a mask of this many bits, as far as the family has them.
fn mask<F: Ip>(bits: u8) -> F::Address {
    let mask = !u128::MAX.checked_shr(u32::from(bits)).unwrap_or(0);
    let mask = Ipv6Addr::from(mask);
    let [a, b, c, d, ..] = mask.octets();
    F::of(mask.into()).or(F::of(Ipv4Addr::new(a, b, c, d).into())).unwrap_or_default()
}

/// Returns the family's prefixes of a kind, filled up with prefixes that match nothing.
pub(crate) fn prefixes<F: Ip>(nets: &[(IpAddr, u8)]) -> [Prefix<F::Address>; PREFIXES] {
    let mut prefixes = [Prefix { network: mask::<F>(128), mask: mask::<F>(0) }; PREFIXES];
    let own = nets.iter().filter_map(|(network, bits)| {
        Some(Prefix { network: F::of(*network)?, mask: mask::<F>(*bits) })
    });
    for (prefix, own) in prefixes.iter_mut().zip(own) {
        *prefix = own;
    }
    prefixes
}

/// Converts the networks of the cluster to a family's addresses.
pub(crate) fn networks<F: Ip>(world: &World) -> Networks<F::Address> {
    Networks { pods: prefixes::<F>(&world.pods), services: prefixes::<F>(&world.service_nets) }
}

/// Converts clients to a family's addresses, and ages to times.
pub(crate) fn affinities<F: Ip>(
    world: &World,
    now: Ticks,
) -> BTreeMap<AffinityKey<F::Address>, Affinity> {
    let convert = |(key, entry): (&AffinityKey<IpAddr>, &Affinity)| {
        let key = AffinityKey { service_port: key.service_port, client: F::of(key.client)? };
        Some((key, Affinity { seen: now.wrapping_sub(entry.seen), ..*entry }))
    };
    world.affinity.iter().filter_map(convert).collect()
}

/// Converts clients back.
pub(crate) fn affinities_told<F: Ip>(
    entries: impl IntoIterator<Item = (AffinityKey<F::Address>, Affinity)>,
    now: Ticks,
) -> Affinities {
    let convert = |(key, entry): (AffinityKey<F::Address>, Affinity)| {
        let key = AffinityKey { service_port: key.service_port, client: F::ip(key.client) };
        (key, Affinity { seen: now.wrapping_sub(entry.seen), ..entry })
    };
    entries.into_iter().map(convert).collect()
}

/// Converts searches that found nothing to a family's addresses, and ages to times.
pub(crate) fn exhausted<F: Ip>(world: &World, now: Ticks) -> BTreeMap<Tuple<F::Address>, Ticks> {
    world
        .exhausted
        .iter()
        .filter_map(|(key, age)| Some((tuple::<F>(key)?, now.wrapping_sub(*age))))
        .collect()
}

/// Converts such searches back.
pub(crate) fn exhausted_told<F: Ip>(
    entries: impl IntoIterator<Item = (Tuple<F::Address>, Ticks)>,
    now: Ticks,
) -> Exhausted {
    entries.into_iter().map(|(key, tick)| (tuple_told::<F>(&key), now.wrapping_sub(tick))).collect()
}

/// Converts netfilter's packets to a family's addresses.
pub(crate) fn imported<F: Ip>(world: &World) -> BTreeMap<Tuple<F::Address>, u32> {
    world.imported.iter().filter_map(|(key, bits)| Some((tuple::<F>(key)?, *bits))).collect()
}

/// Converts datagrams to a family's addresses, and ages to times.
pub(crate) fn datagrams<F: Ip>(
    world: &World,
    now: Ticks,
) -> BTreeMap<Datagram<F::Address>, DatagramPorts> {
    let convert = |(key, told): (&Datagram<IpAddr>, &DatagramPorts)| {
        let &Datagram { id, protocol, reserved, .. } = key;
        let (source, destination) = (F::of(key.source)?, F::of(key.destination)?);
        let key = Datagram { source, destination, id, protocol, reserved };
        Some((key, DatagramPorts { seen: now.wrapping_sub(told.seen), ..*told }))
    };
    world.fragments.iter().filter_map(convert).collect()
}

/// Converts datagrams back.
pub(crate) fn datagrams_told<F: Ip>(
    entries: impl IntoIterator<Item = (Datagram<F::Address>, DatagramPorts)>,
    now: Ticks,
) -> Datagrams {
    let convert = |(key, told): (Datagram<F::Address>, DatagramPorts)| {
        let Datagram { id, protocol, reserved, .. } = key;
        let (source, destination) = (F::ip(key.source), F::ip(key.destination));
        let key = Datagram { source, destination, id, protocol, reserved };
        (key, DatagramPorts { seen: now.wrapping_sub(told.seen), ..told })
    };
    entries.into_iter().map(convert).collect()
}

/// Converts entries to a family's addresses, and ages to times.
pub(crate) fn entries<F: Ip>(
    flows: &Flows,
    now: Ticks,
) -> BTreeMap<Tuple<F::Address>, Flow<F::Address>> {
    let convert = |key: &Tuple<IpAddr>, entry: &Flow<IpAddr>| {
        let key = tuple::<F>(key)?;
        let &Flow {
            source_port,
            destination_port,
            backend,
            service_port,
            seen,
            replied,
            generation,
            state,
            flags,
            ..
        } = entry;
        let flow = Flow {
            source: F::of(entry.source)?,
            destination: F::of(entry.destination)?,
            source_port,
            destination_port,
            backend,
            service_port,
            seen: now.wrapping_sub(seen),
            replied: match replied {
                _ if state & (state::GUESS | state::ANSWERED) != 0 => replied,
                world::UNSAID if state & state::ESTABLISHED == 0 => 0,
                world::UNSAID => now.wrapping_sub(seen),
                // Tick 0 means that the endpoint of an unproven flow was never heard.
                age if state & state::ESTABLISHED == 0 => now.wrapping_sub(age).max(1),
                age => now.wrapping_sub(age),
            },
            generation,
            state,
            flags,
        };
        Some((key, flow))
    };
    flows.iter().filter_map(|(key, entry)| convert(key, entry)).collect()
}

/// Converts entries back.
pub(crate) fn told<F: Ip>(
    entries: impl IntoIterator<Item = (Tuple<F::Address>, Flow<F::Address>)>,
    now: Ticks,
) -> Flows {
    let convert = |(key, entry): (Tuple<F::Address>, Flow<F::Address>)| {
        let key = tuple_told::<F>(&key);
        let Flow {
            source_port,
            destination_port,
            backend,
            service_port,
            seen,
            replied,
            generation,
            state,
            flags,
            ..
        } = entry;
        let flow = Flow {
            source: F::ip(entry.source),
            destination: F::ip(entry.destination),
            source_port,
            destination_port,
            backend,
            service_port,
            seen: now.wrapping_sub(seen),
            replied: match replied {
                _ if state & (state::GUESS | state::ANSWERED) != 0 => replied,
                // The endpoint of a proven flow was heard at some tick, whichever it was.
                0 if state & state::ESTABLISHED == 0 => world::UNSAID,
                // Heard a tick after the maps were filled. The difference would say "never", and
                // the maps would look unchanged.
                tick if now.wrapping_sub(tick) == world::UNSAID => 0,
                tick => now.wrapping_sub(tick),
            },
            generation,
            state,
            flags,
        };
        (key, flow)
    };
    entries.into_iter().map(convert).collect()
}
