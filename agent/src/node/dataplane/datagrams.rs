//! What first fragments have told: `fragments_v4` and `fragments_v6`, for the keeper of those that
//! came before them.

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

/// The datagrams whose first fragment has been seen.
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
    /// When one is missing or has another layout.
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

    /// Whether the datagram's first fragment has been seen lately.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn is_told(&self, key: &DatagramKey, now: Ticks) -> Result<bool, Error> {
        Ok(self.get(key)?.is_some_and(|told| is_fresh(&told, now)))
    }

    /// Has the programs send fragments that come early to this process, for the next seconds.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn attend(&self, now: Ticks) -> Result<(), Error> {
        let said = DatagramPorts { seen: now, ..DatagramPorts::default() };
        self.v4
            .insert(&heartbeat_key(), &said)
            .and_then(|()| self.v6.insert(&heartbeat_key(), &said))
            .map_err(|cause| Error::map("write", "fragments", cause))
    }

    /// Lets the datagram's fragments go on untouched, unless its first one has come meanwhile.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written.
    pub fn give_up(&self, key: &DatagramKey, now: Ticks) -> Result<(), Error> {
        if self.is_told(key, now)? {
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
