//! The translated connections in the maps.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::Serialize;
use sluice_common::abi::{TICK_SHIFT, Tuple, flow, side, state};
use sluice_common::{V4, V6};
use sluice_core::image::Stack;

use crate::daemon::source::names::Names;
use crate::node::dataplane::{FlowEntry, KernelStack};
use crate::node::view::{PortName, View, protocol};
use crate::tools::api::kinds;

/// A flow, seen from the client.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Flow {
    /// `TCP`, `UDP` or `SCTP`.
    pub(crate) protocol: String,
    /// The client's address and port.
    pub(crate) client: String,
    /// The client's pod, as `namespace/name`; null if no source names it.
    pub(crate) client_pod: Option<String>,
    /// The address and port that the client has asked for.
    pub(crate) vip: String,
    /// The client's address and port as the backend sees them, if they are not its own.
    pub(crate) seen_as: Option<String>,
    /// The backend's address and port.
    pub(crate) backend: String,
    /// The backend's pod, as `namespace/name`; null if no source names it.
    pub(crate) pod: Option<String>,
    /// The backend's node; null if no source names it.
    pub(crate) node: Option<String>,
    /// The service port; null if it is gone.
    pub(crate) service: Option<PortName>,
    /// `embryonic` or `established`, and what else is known of the flow.
    pub(crate) state: Vec<&'static str>,
    /// Seconds since the flow was last renewed (every ten seconds of use).
    pub(crate) idle_seconds: u64,
}

kinds! { Flow = "Flow"; }

/// Returns the flows, the most recently used first.
///
/// # Errors
///
/// When the maps cannot be read.
pub(crate) fn flows(view: &View, names: &Names) -> anyhow::Result<Vec<Flow>> {
    let now = monotonic_ticks();
    let mut rows = rows::<V4>(view, names, now)?;
    rows.extend(self::rows::<V6>(view, names, now)?);
    rows.sort_by(|a, b| {
        (a.idle_seconds, &a.client, &a.vip).cmp(&(b.idle_seconds, &b.client, &b.vip))
    });
    Ok(rows)
}

fn rows<F: KernelStack>(view: &View, names: &Names, now: u32) -> anyhow::Result<Vec<Flow>> {
    let entries = F::maps(view.kernel.maps()).read_flows()?;
    // The addresses of masqueraded clients are in entries of their own.
    let is_side = |entry: &&FlowEntry<F::Address>| {
        entry.flow.flags & (flow::REPLY | flow::SOURCE) == flow::SOURCE
    };
    let sides: BTreeMap<Tuple<F::Address>, String> = entries
        .iter()
        .filter(is_side)
        .map(|entry| (entry.tuple, endpoint::<F>(entry.flow.source, entry.flow.source_port)))
        .collect();
    let seen_as = |entry: &FlowEntry<F::Address>| {
        let flow = &entry.flow;
        let own = (flow.source, flow.source_port);
        if !flow.is_masqueraded() || flow.is_of_host() {
            // Only its port may have been changed.
            let is_changed = own != (entry.tuple.source, entry.tuple.source_port);
            return is_changed.then(|| endpoint::<F>(own.0, own.1));
        }
        let key = Tuple {
            source: flow.source,
            destination: flow.destination,
            source_port: flow.source_port,
            destination_port: flow.destination_port,
            side: side::FAR,
            ..entry.tuple
        };
        sides.get(&key).cloned()
    };
    // A direct connection has no VIP. A reply's entry says the same as its partner's.
    let forward = entries
        .iter()
        .filter(|entry| entry.flow.flags & (flow::REPLY | flow::DIRECT | flow::SOURCE) == 0);
    Ok(forward
        .map(|entry| Flow {
            protocol: protocol(entry.tuple.protocol),
            client: endpoint::<F>(entry.tuple.source, entry.tuple.source_port),
            client_pod: names.pod(F::ip(entry.tuple.source)).map(|pod| pod.name.to_string()),
            vip: endpoint::<F>(entry.tuple.destination, entry.tuple.destination_port),
            seen_as: seen_as(entry),
            backend: endpoint::<F>(entry.flow.destination, entry.flow.destination_port),
            pod: names.pod(F::ip(entry.flow.destination)).map(|pod| pod.name.to_string()),
            node: names.pod(F::ip(entry.flow.destination)).and_then(|pod| pod.node.clone()),
            service: view.name(entry.flow.service_port),
            state: words(entry.flow.state, entry.flow.flags, entry.embryonic),
            idle_seconds: (u64::from(now.wrapping_sub(entry.flow.seen)) << TICK_SHIFT)
                / 1_000_000_000,
        })
        .collect())
}

fn endpoint<F: Stack>(address: F::Address, port: u16) -> String {
    SocketAddr::from((F::ip(address), port)).to_string()
}

/// Returns the words for a flow's bits.
fn words(bits: u8, flags: u8, embryonic: bool) -> Vec<&'static str> {
    let mut words = vec![if embryonic { "embryonic" } else { "established" }];
    let named = [
        (bits, state::FIN_FORWARD, "client-fin"),
        (bits, state::FIN_REPLY, "backend-fin"),
        (bits, state::RESET_FORWARD, "client-reset"),
        (bits, state::RESET_REPLY, "backend-reset"),
        (bits, state::GUESS, "guess"),
        (flags, flow::HOST, "host"),
        (flags, flow::HAIRPIN, "hairpin"),
        (flags, flow::LOCAL, "local"),
    ];
    words.extend(
        named.into_iter().filter(|(bits, bit, _)| bits & bit != 0).map(|(_, _, word)| word),
    );
    words
}

/// Returns the time of the kernel programs' clock, in ticks.
fn monotonic_ticks() -> u32 {
    (monotonic_ns() >> TICK_SHIFT) as u32
}

/// Returns the time of the kernel programs' clock, in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the struct is live; this clock always exists.
    let _ = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    time.tv_sec
        .cast_unsigned()
        .wrapping_mul(1_000_000_000)
        .wrapping_add(time.tv_nsec.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flows_bits_are_words() {
        let closing = state::ESTABLISHED | state::FIN_FORWARD;
        assert_eq!(words(closing, flow::LOCAL, false), ["established", "client-fin", "local"]);
        assert_eq!(words(0, 0, true), ["embryonic"]);
    }
}
