//! Reads what became of flows and connections to a few backends, without reading whole maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use sluice_common::abi::{
    BackendCounters, COUNTER_V6, Name, Range, SLOTS_PER_BLOCK, SocketCounters,
};
use sluice_core::image::Stack;

use super::error::Error;
use super::maps::{FamilyMaps, Maps};

/// What was counted of attempts to reach a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attempts {
    /// Packets of the endpoint that are no resets: some attempt succeeded.
    pub(crate) answers: u64,
    /// Connections that were established at the socket.
    pub(crate) connections: u64,
}

impl Maps {
    /// Returns the service port of a backend, a key of `backend_counts`, and its endpoint.
    pub(crate) fn backend_at(&self, key: u32) -> Option<(u32, SocketAddr)> {
        let id = key & !COUNTER_V6;
        if key & COUNTER_V6 == 0 { endpoint(&self.v4, id) } else { endpoint(&self.v6, id) }
    }

    /// Returns the backends of a service port that get new flows of any class of clients.
    pub(crate) fn selected(&self, service_port: u32) -> BTreeSet<u32> {
        let ranges = self.ports.get(service_port).map(|port| port.ranges).unwrap_or_default();
        let slots = ranges.map(Range).into_iter().flat_map(|range| {
            (range.start()..range.start().saturating_add(range.size()))
                .map(|slot| (slot / SLOTS_PER_BLOCK, slot % SLOTS_PER_BLOCK))
        });
        let id = |(block, place): (u32, u32)| {
            self.slots.get(block)?.backends.get(place as usize).copied().filter(|id| *id != 0)
        };
        slots.filter_map(id).collect()
    }

    /// Returns the name of a service port.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub(crate) fn service_port_name(&self, service_port: u32) -> Result<Option<Name>, Error> {
        self.names.get(&service_port).map_err(|cause| Error::map("read", "names", cause))
    }

    /// Reads what was counted of attempts to reach some backends, keys of `backend_counts`.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read.
    pub(crate) fn attempts(
        &self,
        backends: impl IntoIterator<Item = u32>,
    ) -> Result<BTreeMap<u32, Attempts>, Error> {
        let mut all = BTreeMap::new();
        for key in backends {
            let packets = self
                .backend_counts
                .get_all(&key)
                .map_err(|cause| Error::map("read", "backend_counts", cause))?;
            let sockets = self
                .socket_counts
                .get_all(&key)
                .map_err(|cause| Error::map("read", "socket_counts", cause))?;
            let mut sums = (BackendCounters::default(), SocketCounters::default());
            packets.iter().flatten().for_each(|one| sums.0.add(one));
            sockets.iter().flatten().for_each(|one| sums.1.add(one));
            let attempts = Attempts {
                answers: sums.0.reply_packets.wrapping_sub(sums.0.reply_resets),
                connections: sums.1.connections,
            };
            let _ = all.insert(key, attempts);
        }
        Ok(all)
    }
}

fn endpoint<F: Stack>(maps: &FamilyMaps<F>, id: u32) -> Option<(u32, SocketAddr)> {
    let backend = maps.backends.get(id)?;
    Some((backend.service_port, (F::ip(backend.address), backend.port).into()))
}
