//! Counters as the programs keep them, and what the wire shows: at the end both must agree.

use std::collections::BTreeMap;

use sluice_common::Reason;
use sluice_common::abi::{BackendCounters, COUNTER_V6, ReasonCounters};
use sluice_common::engine::count::Count;
use sluice_common::family::Family;
use sluice_common::packet::parse::Headers;

use crate::cluster;
use crate::packet::{Packet, Read, Segment};

/// The counters of a node.
#[derive(Debug, Default)]
pub struct Counters {
    /// Index of the backend, with [`COUNTER_V6`] for IPv6 -> its counters.
    pub backends: BTreeMap<u32, BackendCounters>,
    /// Reason and service port -> packets and bytes.
    pub reasons: BTreeMap<(Reason, u32), ReasonCounters>,
}

/// Packets and their bytes, link headers left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Packets.
    pub packets: u64,
    /// Bytes from the IP header on.
    pub bytes: u64,
    /// Resets among the packets.
    pub resets: u64,
}

/// The packets of a node's programs as the wire shows them, before and after.
#[derive(Debug, Default)]
pub struct Observed {
    /// Packets whose destination changed from a frontend to an endpoint.
    pub forward: Sum,
    /// Packets whose source changed from an endpoint to a frontend.
    pub reply: Sum,
    /// Packets that were dropped, or answered instead of their destination.
    pub refused: Sum,
}

impl Counters {
    /// Counts a packet as the kernel's adapter does.
    pub fn add<F: Family>(&mut self, count: Count, headers: &Headers<F>) {
        match count {
            Count::Nowhere => {}
            Count::Backend { id, direction } => {
                let id = id | if F::VERSION == 6 { COUNTER_V6 } else { 0 };
                let none = BackendCounters {
                    forward_packets: 0,
                    forward_bytes: 0,
                    reply_packets: 0,
                    reply_bytes: 0,
                    flows: 0,
                    calls: 0,
                    forward_resets: 0,
                    reply_resets: 0,
                };
                direction.add(headers, self.backends.entry(id).or_insert(none));
            }
            Count::Reason { reason, service_port } => {
                let none = ReasonCounters { packets: 0, bytes: 0 };
                let counters = self.reasons.entry((reason, service_port)).or_insert(none);
                counters.packets += 1;
                counters.bytes += u64::from(headers.length);
            }
        }
    }

    /// Returns the flows that were opened to all backends.
    #[must_use]
    pub fn flows(&self) -> u64 {
        self.backends.values().map(|counters| counters.flows).sum()
    }

    /// Returns the sums of the counters, in the order of [`Observed::sums`].
    ///
    /// A packet in the middle of a connection whose entries were lost is translated, but counted
    /// by its reason. Reasons do not count resets, so that those towards backends are left out.
    #[must_use]
    pub fn sums(&self) -> [(&'static str, Sum); 3] {
        let (mut forward, mut reply, mut refused) =
            (Sum::default(), Sum::default(), Sum::default());
        for counters in self.backends.values() {
            forward.packets += counters.forward_packets;
            forward.bytes += counters.forward_bytes;
            reply.packets += counters.reply_packets;
            reply.bytes += counters.reply_bytes;
            reply.resets += counters.reply_resets;
        }
        for ((reason, _), counters) in &self.reasons {
            let sum = if *reason == Reason::Recovered {
                &mut forward
            } else if refuses(*reason) {
                &mut refused
            } else {
                continue;
            };
            sum.packets += counters.packets;
            sum.bytes += counters.bytes;
        }
        [("forward", forward), ("reply", reply), ("refused", refused)]
    }
}

/// Reports whether packets with a reason are dropped or answered.
#[must_use]
pub fn refuses(reason: Reason) -> bool {
    match reason {
        Reason::ReplyRecovered
        | Reason::NoBackendReset
        | Reason::NoBackendUnreachable
        | Reason::NoBackendDropped
        | Reason::RejectLimited
        | Reason::PortsExhausted
        | Reason::ClashRace
        | Reason::FlowsFull
        | Reason::TtlExceeded
        | Reason::NoRoute
        | Reason::TooBig
        | Reason::RewriteFailed
        | Reason::SourceRange
        | Reason::NoLocalBackend
        | Reason::UndefinedPort
        | Reason::UnassignedAddress => true,
        Reason::Stranger
        | Reason::Forward
        | Reason::Reply
        | Reason::Recovered
        | Reason::IcmpError
        | Reason::DirectRemapped
        | Reason::Fragment
        | Reason::Truncated
        | Reason::Malformed
        | Reason::SocketConnect
        | Reason::SocketSend
        | Reason::SocketRefused
        | Reason::FragmentHeld
        | Reason::NetfilterFlow
        | Reason::NotTaken => false,
    }
}

impl Sum {
    fn add(&mut self, packet: &Packet, is_reset: bool) {
        self.packets += 1;
        self.bytes += packet.bytes.len() as u64;
        self.resets += u64::from(is_reset);
    }
}

impl Observed {
    /// Adds a packet; `is_refused` if it was dropped or answered.
    pub fn add(&mut self, before: &Packet, after: &Packet, is_refused: bool, nodes: usize) {
        if is_refused {
            self.refused.add(before, false);
            return;
        }
        match (before.contents(), after.contents()) {
            (Some(Read::Whole(was)), Some(Read::Whole(is))) => {
                let is_reset = was.is_reset();
                if is_reply(&was, &is, nodes) {
                    self.reply.add(before, is_reset);
                } else if was.destination != is.destination
                    && cluster::is_frontend(was.destination, nodes)
                {
                    self.forward.add(before, false);
                }
            }
            // Clients alone send fragments.
            (Some(Read::Part(_, was, ..)), Some(Read::Part(_, is, ..))) if was != is => {
                self.forward.add(before, false);
            }
            _ => {}
        }
    }

    /// Returns the sums in the order of [`Counters::sums`].
    #[must_use]
    pub fn sums(&self) -> [Sum; 3] {
        [self.forward, self.reply, self.refused]
    }
}

fn is_reply(was: &Segment, is: &Segment, nodes: usize) -> bool {
    was.source != is.source
        && was.source.port() == cluster::port(was.protocol)
        && !cluster::is_frontend(was.source, nodes)
        && cluster::is_frontend(is.source, nodes)
}
