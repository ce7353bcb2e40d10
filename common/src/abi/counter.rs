//! Counters, and credit for ICMP errors.

abi! {
    /// Traffic of one backend, both ways; the per-CPU value of `backend_counts`, keyed by backend
    /// id.
    ///
    /// IPv6 backends have bit 31 of the key set. Everything counts packets, except `calls`, which
    /// counts a socket's calls.
    #[derive(Default)]
    pub struct BackendCounters {
        /// Packets from clients.
        pub forward_packets: u64,
        /// Bytes of those packets, IP header included.
        pub forward_bytes: u64,
        /// Packets to clients.
        pub reply_packets: u64,
        /// Bytes of those packets, IP header included.
        pub reply_bytes: u64,
        /// Flows that chose this backend.
        pub flows: u64,
        /// Calls that the socket path sent to this backend.
        pub calls: u64,
        /// Resets from clients: TCP's RST, SCTP's ABORT.
        pub forward_resets: u64,
        /// Resets to clients.
        pub reply_resets: u64,
    } size 64
}

impl BackendCounters {
    /// Adds another CPU's or another backend's counts.
    pub fn add(&mut self, more: &Self) {
        for (sum, more) in [
            (&mut self.forward_packets, more.forward_packets),
            (&mut self.forward_bytes, more.forward_bytes),
            (&mut self.reply_packets, more.reply_packets),
            (&mut self.reply_bytes, more.reply_bytes),
            (&mut self.flows, more.flows),
            (&mut self.calls, more.calls),
            (&mut self.forward_resets, more.forward_resets),
            (&mut self.reply_resets, more.reply_resets),
        ] {
            *sum = sum.wrapping_add(more);
        }
    }
}

abi! {
    /// Connections that were translated at connect(), by backend; the per-CPU value of
    /// `socket_counts`, with the keys of `backend_counts`.
    ///
    /// The figures are the kernel's own for a connection (those of `TCP_INFO`: SYN and FIN count as
    /// a byte each), added when it closes, and every few seconds while what it sends is
    /// acknowledged.
    #[derive(Default)]
    pub struct SocketCounters {
        /// Connections that were established.
        pub connections: u64,
        /// Established connections that have ended.
        pub closed: u64,
        /// Connections that were never established: refused, or without an answer.
        pub failed: u64,
        /// Connections that ended without a FIN of both sides: by a reset, or because the peer no
        /// longer answered.
        pub resets: u64,
        /// Bytes that clients sent and that were acknowledged.
        pub sent_bytes: u64,
        /// Bytes that clients received.
        pub received_bytes: u64,
        /// Segments from clients.
        pub sent_segments: u64,
        /// Segments to clients.
        pub received_segments: u64,
        /// Segments from clients that were retransmitted; part of `sent_segments`.
        pub retransmitted_segments: u64,
        /// Sum of the last smoothed round-trip times of connections that ended, microseconds.
        pub rtt_us: u64,
        /// Number of round-trip times in `rtt_us`.
        pub rtt_count: u64,
    } size 88
}

impl SocketCounters {
    /// Adds another CPU's or another backend's counts.
    pub fn add(&mut self, more: &Self) {
        for (sum, more) in [
            (&mut self.connections, more.connections),
            (&mut self.closed, more.closed),
            (&mut self.failed, more.failed),
            (&mut self.resets, more.resets),
            (&mut self.sent_bytes, more.sent_bytes),
            (&mut self.received_bytes, more.received_bytes),
            (&mut self.sent_segments, more.sent_segments),
            (&mut self.received_segments, more.received_segments),
            (&mut self.retransmitted_segments, more.retransmitted_segments),
            (&mut self.rtt_us, more.rtt_us),
            (&mut self.rtt_count, more.rtt_count),
        ] {
            *sum = sum.wrapping_add(more);
        }
    }
}

abi! {
    /// The key of `failure_counts`, whose values are numbers of flows and connections.
    ///
    /// The programs count every failure but [`Failure::Unanswered`](crate::Failure::Unanswered),
    /// which the agent alone writes.
    #[derive(Default)]
    pub struct FailureKey {
        /// The backend, as in the keys of `backend_counts`.
        pub backend: u32,
        /// A [`crate::Failure`] as a number.
        pub failure: u32,
    } size 8
}

/// Bit that marks IPv6 backends in the keys of `backend_counts`, `socket_counts` and
/// `failure_counts`.
pub const COUNTER_V6: u32 = 1 << 31;

abi! {
    /// The key of `reason_counts`.
    #[derive(Default)]
    pub struct ReasonKey {
        /// A [`crate::Reason`] as a number.
        pub reason: u32,
        /// Index into `ports`; 0: none.
        pub service_port: u32,
    } size 8
}

abi! {
    /// Per-CPU value of `reason_counts`.
    #[derive(Default)]
    pub struct ReasonCounters {
        /// Packets, or calls for the reasons of the socket path.
        pub packets: u64,
        /// Bytes, IP header included; 0 for calls.
        pub bytes: u64,
    } size 16
}

abi! {
    /// The key of `rejects`: the client that an ICMP error would be sent to (IPv4 as
    /// `::ffff:a.b.c.d`).
    #[derive(Default)]
    pub struct RejectKey {
        /// The client's address.
        pub address: [u8; 16],
    } size 16
}

abi! {
    /// A token bucket; the value of `rejects`.
    #[derive(Default)]
    pub struct RejectBucket {
        /// The time of the last refill, milliseconds since boot.
        pub refilled_ms: u32,
        /// Milliseconds of credit; one ICMP error costs [`crate::engine::limit::REJECT_COST_MS`].
        pub credit_ms: u32,
    } size 8
}
