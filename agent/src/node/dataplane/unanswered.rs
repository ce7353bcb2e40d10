//! Reads the flows that are waiting for an endpoint's first answer, and counts those that get none.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;

use sluice_common::abi::{COUNTER_V6, FailureKey, Flow, Ticks, Tuple};
use sluice_common::packet::header::protocol;
use sluice_common::{Failure, V4, V6, failure};
use sluice_core::image::Stack;

use super::bpf::Table;
use super::error::Error;
use super::maps::Maps;

/// A flow that a client's SYN has opened, and that its endpoint has not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Pending {
    /// The client.
    pub(crate) client: SocketAddr,
    /// The frontend.
    pub(crate) frontend: SocketAddr,
    /// The backend, as a key of `backend_counts`.
    pub(crate) backend: u32,
    /// The backend's generation.
    pub(crate) generation: u16,
}

impl Maps {
    /// Reads all flows that wait for an answer, and when each was renewed.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read.
    pub(crate) fn pending_flows(&self) -> Result<BTreeMap<Pending, Ticks>, Error> {
        let mut all = BTreeMap::new();
        pending::<V4>(&self.v4.embryonic, 0, &mut all)
            .map_err(|cause| Error::map("read", "embryonic_v4", cause))?;
        pending::<V6>(&self.v6.embryonic, COUNTER_V6, &mut all)
            .map_err(|cause| Error::map("read", "embryonic_v6", cause))?;
        Ok(all)
    }

    /// Adds to the number of unanswered flows of each backend. Nobody else may write it.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be written. A map without room is no error: it counts no other
    /// backends.
    pub(crate) fn count_unanswered(&self, flows: &BTreeMap<u32, u64>) -> Result<(), Error> {
        for (backend, more) in flows {
            let key = FailureKey { backend: *backend, failure: Failure::Unanswered as u32 };
            let failed = |cause| Error::map("write", "failure_counts", cause);
            let count = self.failure_counts.get(&key).map_err(failed)?.unwrap_or_default();
            match self.failure_counts.insert(&key, &(count + more)) {
                Err(error) if error.raw_os_error() == Some(libc::E2BIG) => {}
                result => result.map_err(failed)?,
            }
        }
        Ok(())
    }
}

fn pending<F: Stack>(
    table: &Table<Tuple<F::Address>, Flow<F::Address>>,
    family: u32,
    all: &mut BTreeMap<Pending, Ticks>,
) -> io::Result<()> {
    for (tuple, flow) in table.entries()? {
        // An SCTP endpoint's answer changes nothing about an unproven flow, and a datagram need not
        // be answered.
        if tuple.protocol == protocol::TCP && !flow.is_reply() && failure::is_pending(&flow) {
            let pending = Pending {
                client: (F::ip(tuple.source), tuple.source_port).into(),
                frontend: (F::ip(tuple.destination), tuple.destination_port).into(),
                backend: flow.backend | family,
                generation: flow.generation,
            };
            let _ = all.insert(pending, flow.seen);
        }
    }
    Ok(())
}
