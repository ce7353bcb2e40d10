//! Reads counters, flows, devices, settings and fill levels from the maps.

use std::collections::BTreeMap;

use sluice_common::abi::previous::{self, Moved};
use sluice_common::abi::{
    self, Address, BackendCounters, Flow, Ipv4Address, Ipv6Address, Networks, ReasonCounters,
    ReasonKey, RejectBucket, SLOTS_PER_BLOCK, Settings, SocketCounters, Tuple,
};
use sluice_common::{Failure, V4, V6};
use sluice_core::cluster::Programmed;
use sluice_core::image::Image;
use sluice_core::image::map::{self, PlanMap};
use sluice_core::plan::Sizes;

use super::bpf::Table;
use super::error::Error;
use super::maps::Maps;

/// An entry of a flow, with the map that it was found in.
#[derive(Clone, Copy, Debug)]
pub struct FlowEntry<A: Copy> {
    /// The packet's tuple.
    pub tuple: Tuple<A>,
    /// The translation.
    pub flow: Flow<A>,
    /// Whether the flow is embryonic: nothing has proven it yet.
    pub embryonic: bool,
}

/// The fill level of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct Fill {
    /// The map.
    pub map: &'static str,
    /// Entries, or used elements of an array.
    pub entries: u64,
    /// Capacity.
    pub max: u64,
}

/// Flows and connections that failed to begin, by how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct Failures {
    /// Flows whose first packet was answered with a reset.
    pub refused: u64,
    /// Flows whose SYN was not answered.
    pub unanswered: u64,
    /// Flows that an ICMP error ended before an answer.
    pub unreachable: u64,
    /// [`Failure::SocketRefused`].
    #[serde(skip)]
    pub socket_refused: u64,
    /// [`Failure::SocketUnanswered`].
    #[serde(skip)]
    pub socket_unanswered: u64,
}

impl Failures {
    /// Returns the counter of a failure.
    fn of(&mut self, failure: Failure) -> &mut u64 {
        match failure {
            Failure::Refused => &mut self.refused,
            Failure::Unanswered => &mut self.unanswered,
            Failure::Unreachable => &mut self.unreachable,
            Failure::SocketRefused => &mut self.socket_refused,
            Failure::SocketUnanswered => &mut self.socket_unanswered,
        }
    }

    /// Adds another backend's.
    pub fn add(&mut self, more: &Self) {
        self.refused += more.refused;
        self.unanswered += more.unanswered;
        self.unreachable += more.unreachable;
        self.socket_refused += more.socket_refused;
        self.socket_unanswered += more.socket_unanswered;
    }

    /// Returns what was added since.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            refused: self.refused.saturating_sub(before.refused),
            unanswered: self.unanswered.saturating_sub(before.unanswered),
            unreachable: self.unreachable.saturating_sub(before.unreachable),
            socket_refused: self.socket_refused.saturating_sub(before.socket_refused),
            socket_unanswered: self.socket_unanswered.saturating_sub(before.socket_unanswered),
        }
    }

    /// Returns the number of all, on either path.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.flows() + self.socket_refused + self.socket_unanswered
    }

    /// Returns how many there are of each kind, on either path, in words.
    #[must_use]
    pub fn words(&self) -> String {
        let counts = [
            (self.refused + self.socket_refused, "refused"),
            (self.unanswered + self.socket_unanswered, "unanswered"),
            (self.unreachable, "unreachable"),
        ];
        let words = counts.into_iter().filter(|(count, _)| *count > 0);
        let words: Vec<String> = words.map(|(count, word)| format!("{count} {word}")).collect();
        words.join(", ")
    }

    /// Returns the number of flows that failed: those of the path per packet.
    #[must_use]
    pub fn flows(&self) -> u64 {
        self.refused + self.unanswered + self.unreachable
    }
}

fn read<T>(map: &str, result: std::io::Result<T>) -> Result<T, Error> {
    result.map_err(|cause| Error::map("read", map, cause))
}

impl Maps {
    /// Reads `backend_counts`, summed over all CPUs.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn backend_counters(&self) -> Result<BTreeMap<u32, BackendCounters>, Error> {
        let entries = read("backend_counts", self.backend_counts.entries_all())?;
        let sum = |values: Vec<BackendCounters>| {
            let mut sum = BackendCounters::default();
            for one in &values {
                sum.add(one);
            }
            sum
        };
        Ok(entries.into_iter().map(|(key, values)| (key, sum(values))).collect())
    }

    /// Reads `socket_counts`, summed over all CPUs.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn socket_counters(&self) -> Result<BTreeMap<u32, SocketCounters>, Error> {
        let entries = read("socket_counts", self.socket_counts.entries_all())?;
        let sum = |values: Vec<SocketCounters>| {
            let mut sum = SocketCounters::default();
            for one in &values {
                sum.add(one);
            }
            sum
        };
        Ok(entries.into_iter().map(|(key, values)| (key, sum(values))).collect())
    }

    /// Reads `failure_counts`: the failures of each backend, a key of `backend_counts`.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn failures(&self) -> Result<BTreeMap<u32, Failures>, Error> {
        let mut failures: BTreeMap<u32, Failures> = BTreeMap::new();
        for (key, count) in read("failure_counts", self.failure_counts.entries())? {
            // A program of a later version may know more of them.
            if let Some(failure) = Failure::from_number(key.failure) {
                *failures.entry(key.backend).or_default().of(failure) += count;
            }
        }
        Ok(failures)
    }

    /// Reads the names of service ports by their ids.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn service_port_names(&self) -> Result<BTreeMap<u32, abi::Name>, Error> {
        Ok(read("names", self.names.entries())?.into_iter().collect())
    }

    /// Reads the counters of each reason and service port, summed over all CPUs.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn reason_counters(&self) -> Result<BTreeMap<ReasonKey, ReasonCounters>, Error> {
        let entries = read("reason_counts", self.reason_counts.entries_all())?;
        let sum = |values: Vec<ReasonCounters>| {
            values.into_iter().fold(ReasonCounters::default(), |sum, one| ReasonCounters {
                packets: sum.packets.wrapping_add(one.packets),
                bytes: sum.bytes.wrapping_add(one.bytes),
            })
        };
        Ok(entries.into_iter().map(|(key, values)| (key, sum(values))).collect())
    }

    /// Reads the devices by their ifindexes.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn device_entries(&self) -> Result<BTreeMap<u32, abi::Device>, Error> {
        Ok(read("devices", self.devices.entries())?.into_iter().collect())
    }

    /// Reads the settings of all programs.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn read_settings(&self) -> Result<Settings, Error> {
        Ok(read("settings", self.settings.get(&0))?.unwrap_or_default())
    }

    /// Reads the token buckets that limit ICMP errors, by their keys' addresses.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be read.
    pub fn rejects(&self) -> Result<BTreeMap<[u8; 16], RejectBucket>, Error> {
        let entries = read("rejects", self.rejects.entries())?;
        Ok(entries.into_iter().map(|(key, bucket)| (key.address, bucket)).collect())
    }

    /// Writes the settings of all programs.
    ///
    /// # Errors
    ///
    /// Fails if the map cannot be written.
    pub fn write_settings(&self, settings: &Settings) -> Result<(), Error> {
        self.settings.insert(&0, settings).map_err(|cause| Error::map("write", "settings", cause))
    }

    /// Reads the cluster's networks.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read.
    pub fn read_networks(&self) -> Result<(Networks<Ipv4Address>, Networks<Ipv6Address>), Error> {
        let v4 = read("networks_v4", self.v4.networks.get(&0))?;
        let v6 = read("networks_v6", self.v6.networks.get(&0))?;
        Ok((v4.unwrap_or_default(), v6.unwrap_or_default()))
    }

    /// Writes the cluster's networks.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be written.
    pub fn write_networks(
        &self,
        v4: &Networks<Ipv4Address>,
        v6: &Networks<Ipv6Address>,
    ) -> Result<(), Error> {
        self.v4
            .networks
            .insert(&0, v4)
            .map_err(|cause| Error::map("write", "networks_v4", cause))?;
        self.v6.networks.insert(&0, v6).map_err(|cause| Error::map("write", "networks_v6", cause))
    }

    /// Reads the settings and networks, or returns [`None`] if the maps are new and have none.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read.
    pub(crate) fn read_programmed(&self) -> Result<Option<Programmed>, Error> {
        let settings = self.read_settings()?;
        let (v4, v6) = self.read_networks()?;
        // Not even the unused prefixes are all zeros.
        let written = v4 != Networks::default() && v6 != Networks::default();
        Ok(written.then_some(Programmed { settings, v4, v6 }))
    }

    /// Writes networks and settings, in this order since the settings say whether there are any
    /// networks.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be written.
    pub(crate) fn write_programmed(&self, programmed: &Programmed) -> Result<(), Error> {
        self.write_networks(&programmed.v4, &programmed.v6)?;
        self.write_settings(&programmed.settings)
    }

    /// Returns how much the plan may put into the maps.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        // As in `Sizes::default`, new entries need room before old ones are removed.
        let left = |v4: u32, v6: u32| v4.min(v6) - v4.min(v6) / 16;
        Sizes {
            ports: self.ports.len(),
            backends: self.v4.backends.len().min(self.v6.backends.len()),
            services: left(self.v4.services.max_entries(), self.v6.services.max_entries()),
            slot_blocks: self.slots.len(),
            source_ranges: left(
                self.v4.source_ranges.max_entries(),
                self.v6.source_ranges.max_entries(),
            ),
            node_addresses: left(
                self.v4.node_addresses.max_entries(),
                self.v6.node_addresses.max_entries(),
            ),
            ..Sizes::default()
        }
    }

    /// Returns how full each map is, given the plan's image.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read.
    pub fn fill(&self, image: &Image) -> Result<Vec<Fill>, Error> {
        let blocks: u64 = image
            .slots
            .values()
            .map(|slots| slots.len().div_ceil(SLOTS_PER_BLOCK as usize) as u64)
            .sum();
        let (v4, v6) = (&self.v4, &self.v6);
        Ok(vec![
            filled::<map::Services<V4>>(image, v4.services.max_entries()),
            filled::<map::Services<V6>>(image, v6.services.max_entries()),
            filled::<map::Ports>(image, self.ports.len() - 1),
            Fill { map: map::Slots::NAME, entries: blocks, max: u64::from(self.slots.len()) },
            filled::<map::Backends<V4>>(image, v4.backends.len() - 1),
            filled::<map::Backends<V6>>(image, v6.backends.len() - 1),
            filled::<map::SourceRanges<V4>>(image, v4.source_ranges.max_entries()),
            filled::<map::SourceRanges<V6>>(image, v6.source_ranges.max_entries()),
            filled::<map::NodeAddresses<V4>>(image, v4.node_addresses.max_entries()),
            filled::<map::NodeAddresses<V6>>(image, v6.node_addresses.max_entries()),
            counted("affinity_v4", &self.v4.affinity)?,
            counted("affinity_v6", &self.v6.affinity)?,
            counted("flows_v4", &self.v4.flows)?,
            counted("flows_v6", &self.v6.flows)?,
            counted("embryonic_v4", &self.v4.embryonic)?,
            counted("embryonic_v6", &self.v6.embryonic)?,
            counted("devices", &self.devices)?,
            counted("backend_counts", &self.backend_counts)?,
            counted("failure_counts", &self.failure_counts)?,
            counted("reason_counts", &self.reason_counts)?,
            counted("socket_counts", &self.socket_counts)?,
            counted("rejects", &self.rejects)?,
            counted("callers", &self.callers)?,
            counted("route_mtus_v4", &self.v4.route_mtus)?,
            counted("route_mtus_v6", &self.v6.route_mtus)?,
        ])
    }
}

/// Reads all entries of a family's `flows` and `embryonic`.
pub(super) fn flows<A: Address>(
    flows: &Table<Tuple<A>, Flow<A>>,
    embryonic: &Table<Tuple<A>, Flow<A>>,
) -> Result<Vec<FlowEntry<A>>, Error> {
    let flows = read("flows", flows.entries())?.into_iter().map(|entry| (entry, false));
    let embryonic = read("embryonic", embryonic.entries())?.into_iter().map(|entry| (entry, true));
    Ok(flows
        .chain(embryonic)
        .map(|((tuple, flow), embryonic)| FlowEntry { tuple, flow, embryonic })
        .collect())
}

/// Reads all entries of a table of flows in the previous layout.
pub(super) fn previous_flows<A: Address>(
    table: &Table<Tuple<A>, previous::Flow<A>>,
    embryonic: bool,
) -> Result<Vec<FlowEntry<A>>, Error> {
    let entries = read("the previous layout's flows", table.entries())?.into_iter();
    Ok(entries
        .map(|(tuple, flow)| FlowEntry { tuple, flow: Flow::after(&flow), embryonic })
        .collect())
}

/// Returns how full a map of the plan is.
fn filled<M: PlanMap>(image: &Image, max: u32) -> Fill {
    Fill { map: M::NAME, entries: M::of(image).len() as u64, max: u64::from(max) }
}

fn counted<K: aya::Pod, V: aya::Pod>(
    map: &'static str,
    table: &Table<K, V>,
) -> Result<Fill, Error> {
    let entries = read(map, table.count())?;
    Ok(Fill { map, entries, max: u64::from(table.max_entries()) })
}
