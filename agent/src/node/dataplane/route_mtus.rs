//! Writes the MTUs of routes to the maps.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ipnet::IpNet;
use sluice_common::abi::{Address, Ipv4Address, Ipv6Address, RouteMtu};

use super::bpf::Table;
use super::error::Error;
use super::maps::{RouteKey, table};

/// The maps `route_mtus_v4` and `route_mtus_v6`.
#[derive(Debug)]
pub struct RouteMtus {
    v4: Trie<Ipv4Address>,
    v6: Trie<Ipv6Address>,
}

/// The map of one family, and its content.
#[derive(Debug)]
struct Trie<A: Address> {
    name: &'static str,
    table: Table<RouteKey<A>, RouteMtu>,
    held: BTreeMap<RouteKey<A>, RouteMtu>,
}

impl<A: Address> Trie<A> {
    fn open(folder: &Path, name: &'static str) -> Result<Self, Error> {
        let table: Table<RouteKey<A>, RouteMtu> = table(folder, name)?;
        let held = table.entries().map_err(|cause| Error::map("read", name, cause))?;
        Ok(Self { name, table, held: held.into_iter().collect() })
    }

    /// Reads the map again. Returns the number of entries that are not as written.
    fn reread(&mut self) -> Result<usize, Error> {
        let found = self.table.entries().map_err(|cause| Error::map("read", self.name, cause))?;
        let found: BTreeMap<RouteKey<A>, RouteMtu> = found.into_iter().collect();
        let keys: BTreeSet<&RouteKey<A>> = self.held.keys().chain(found.keys()).collect();
        let differ = keys.into_iter().filter(|key| self.held.get(key) != found.get(key)).count();
        self.held = found;
        Ok(differ)
    }

    fn write(&mut self, wanted: &BTreeMap<RouteKey<A>, RouteMtu>) -> Result<(), Error> {
        let failed = |cause| Error::map("write", self.name, cause);
        let gone: Vec<_> =
            self.held.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        for key in gone {
            self.table.remove(&key).map_err(failed)?;
            let _ = self.held.remove(&key);
        }
        // Keys sort by length. The longest prefixes are inserted first and removed last, so that no
        // part of a network matches an MTU that is not its own.
        for (key, route) in wanted.iter().rev() {
            if self.held.get(key) != Some(route) {
                self.table.insert(key, route).map_err(failed)?;
                let _ = self.held.insert(*key, *route);
            }
        }
        Ok(())
    }
}

impl RouteMtus {
    /// Opens the maps pinned in a folder, with the content that an earlier agent has left.
    ///
    /// # Errors
    ///
    /// Fails if one is missing, has another layout, or cannot be read.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        Ok(Self {
            v4: Trie::open(folder, "route_mtus_v4")?,
            v6: Trie::open(folder, "route_mtus_v6")?,
        })
    }

    /// Reads the maps again, so that the next write repairs what somebody else has changed.
    /// Returns the maps that differ, each with the number of entries.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read.
    pub fn audit(&mut self) -> Result<Vec<(&'static str, usize)>, Error> {
        let found = [(self.v4.name, self.v4.reread()?), (self.v6.name, self.v6.reread()?)];
        Ok(found.into_iter().filter(|(_, differ)| *differ > 0).collect())
    }

    /// Makes the maps hold these routes and no others.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be written, for instance for lack of room; calling again continues.
    pub fn write(&mut self, routes: &BTreeMap<IpNet, RouteMtu>) -> Result<(), Error> {
        let (mut v4, mut v6) = (BTreeMap::new(), BTreeMap::new());
        for (network, route) in routes {
            let length = u32::from(network.prefix_len());
            let _ = match network {
                IpNet::V4(routed) => {
                    let network = Ipv4Address { octets: routed.network().octets() };
                    v4.insert(RouteKey { length, network }, *route)
                }
                IpNet::V6(routed) => {
                    let network = Ipv6Address { octets: routed.network().octets() };
                    v6.insert(RouteKey { length, network }, *route)
                }
            };
        }
        let written = self.v4.write(&v4);
        self.v6.write(&v6)?;
        written
    }
}
