//! What the packet path looks up in the maps, looked up in an image.

use std::net::IpAddr;

use sluice_common::abi::{Class, Range};
use sluice_common::{Family, family};

use super::{Image, SourceKey, Stack};

/// Returns the lane of an address in the map `addresses`.
pub fn lane<F: Family>(address: &F::Address) -> u32 {
    let (word, shift) = family::lane::<F>(address);
    word * 16 + shift / 4
}

/// Returns the word and the bit of a port number in the map `node_ports`.
pub fn node_port_bit(port: u16) -> (u32, u64) {
    (u32::from(port / 64), 1 << (port % 64))
}

impl Image {
    /// Returns the bits of [`listing`](sluice_common::abi::listing) in the lane of an address.
    pub fn listing<F: Family>(&self, address: &F::Address) -> u8 {
        self.lanes.get(&lane::<F>(address)).copied().unwrap_or_default()
    }

    /// Returns the range of slots in which a class of clients finds its backends.
    pub fn range(&self, service_port: u32, class: Class) -> Option<Range> {
        let port = self.ports.get(&service_port)?;
        port.ranges.get(class as usize).copied().map(Range)
    }

    /// Returns the ranges of a service port that have slots.
    pub fn ranges(&self, service_port: u32) -> impl Iterator<Item = Range> {
        let ranges = self.ports.get(&service_port).map_or([0; 3], |port| port.ranges);
        ranges.into_iter().map(Range).filter(|range| range.size() != 0)
    }

    /// Returns the ranges that service ports refer to, as often as they do.
    pub fn used_ranges(&self) -> impl Iterator<Item = Range> {
        let ranges = self.ports.values().flat_map(|port| port.ranges.map(Range));
        ranges.filter(|range| range.size() != 0)
    }

    /// Returns the backend id in each slot of a range: none for a range without slots.
    pub fn backends_in(&self, range: Range) -> &[u32] {
        match self.slots.get(&range.start()) {
            Some(slots) if range.size() != 0 => slots,
            _ => &[],
        }
    }

    /// Returns the backend id that a slot of a range in use holds.
    pub fn slot(&self, slot: u32) -> Option<u32> {
        let (start, ids) = self.slots.range(..=slot).next_back()?;
        ids.get((slot - start) as usize).copied()
    }

    /// Returns the source ranges of a service port.
    pub fn source_ranges<F: Stack>(
        &self,
        service_port: u32,
    ) -> impl Iterator<Item = SourceKey<F::Address>> {
        let first = SourceKey { service_port, length: 0, network: F::Address::default() };
        let keys = F::of(self).source_ranges.range(first..).map(|(key, _)| *key);
        keys.take_while(move |key| key.service_port == service_port)
    }

    /// Whether an address lies in one of a service port's source ranges.
    pub fn in_source_ranges<F: Stack>(&self, service_port: u32, address: &F::Address) -> bool {
        self.source_ranges::<F>(service_port)
            .any(|key| common_bits(F::ip(key.network), F::ip(*address)) >= u32::from(key.length))
    }

    /// Whether a port number has its bit in the map `node_ports`.
    pub fn is_node_port(&self, port: u16) -> bool {
        let (word, bit) = node_port_bit(port);
        self.node_ports.get(&word).is_some_and(|bits| bits & bit != 0)
    }

    /// Whether an address is one of this node's.
    pub fn is_node_address<F: Stack>(&self, address: &F::Address) -> bool {
        F::of(self).node_addresses.contains_key(address)
    }

    /// Whether node ports are served at an address.
    pub fn serves_node_ports<F: Stack>(&self, address: &F::Address) -> bool {
        F::of(self).node_addresses.get(address).is_some_and(|node| node.serves_node_ports())
    }
}

/// Returns the number of leading bits that two addresses of one family share.
fn common_bits(one: IpAddr, other: IpAddr) -> u32 {
    match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => 0,
    }
}
