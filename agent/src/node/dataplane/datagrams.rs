//! Reads and writes `fragments_v4` and `fragments_v6`, the ports of datagrams whose first fragment
//! was seen, for the process that holds fragments that came before it.

use std::path::Path;

use sluice_common::abi::{Datagram, DatagramPorts, Ipv4Address, Ipv6Address, Ticks};
use sluice_common::path::fragment::{heartbeat_key, is_fresh};

use super::bpf::Table;
use super::error::Error;
use super::maps::table;

/// A datagram of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramKey {
    /// Of IPv4.
    V4(Datagram<Ipv4Address>),
    /// Of IPv6.
    V6(Datagram<Ipv6Address>),
}

/// The datagrams whose first fragment was seen.
#[derive(Debug)]
pub struct Datagrams {
    v4: Table<Datagram<Ipv4Address>, DatagramPorts>,
    v6: Table<Datagram<Ipv6Address>, DatagramPorts>,
}

impl Datagrams {
    /// Opens the maps pinned in a folder.
    ///
    /// # Errors
    ///
    /// Fails if one is missing or has another layout.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        Ok(Self { v4: table(folder, "fragments_v4")?, v6: table(folder, "fragments_v6")? })
    }

    fn get(&self, key: &DatagramKey) -> Result<Option<DatagramPorts>, Error> {
        let told = match key {
            DatagramKey::V4(key) => self.v4.get(key),
            DatagramKey::V6(key) => self.v6.get(key),
        };
        told.map_err(|cause| Error::map("read", "fragments", cause))
    }

    /// Whether the datagram's first fragment was seen recently.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn is_known(&self, key: &DatagramKey, now: Ticks) -> Result<bool, Error> {
        Ok(self.get(key)?.is_some_and(|told| is_fresh(&told, now)))
    }

    /// Requests for the next seconds that the programs send early fragments to this process.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be written.
    pub fn request(&self, now: Ticks) -> Result<(), Error> {
        let said = DatagramPorts { seen: now, ..DatagramPorts::default() };
        self.v4
            .insert(&heartbeat_key(), &said)
            .and_then(|()| self.v6.insert(&heartbeat_key(), &said))
            .map_err(|cause| Error::map("write", "fragments", cause))
    }

    /// Lets the datagram's fragments pass untouched, unless its first one has arrived meanwhile.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read or written.
    pub fn give_up(&self, key: &DatagramKey, now: Ticks) -> Result<(), Error> {
        if self.is_known(key, now)? {
            return Ok(());
        }
        let untouched = DatagramPorts { seen: now, ..DatagramPorts::default() };
        match key {
            DatagramKey::V4(key) => self.v4.insert(key, &untouched),
            DatagramKey::V6(key) => self.v6.insert(key, &untouched),
        }
        .map_err(|cause| Error::map("write", "fragments", cause))
    }
}
