//! A small TCP: one segment at a time, retransmitted until it is acknowledged. Resets are accepted
//! as RFC 5961 has it.

use std::collections::VecDeque;
use std::net::SocketAddr;

use crate::packet::{Segment, tcp};

/// Number of times a segment is sent before the connection is given up.
const TRIES: u32 = 12;
/// Microseconds until the first retransmission: doubled each time...
const RETRY_US: u64 = 500_000;
/// ...up to this.
const RETRY_MAX_US: u64 = 8_000_000;

/// The number of times that the segment or chunk under way was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tries(u32);

impl Tries {
    /// Counts one more.
    pub(crate) fn add(&mut self) {
        self.0 += 1;
    }

    /// Returns the microseconds until the next one.
    pub(crate) fn patience(self) -> u64 {
        (RETRY_US << self.0.saturating_sub(1).min(10)).min(RETRY_MAX_US)
    }

    /// Whether there is no other.
    pub(crate) fn are_over(self) -> bool {
        self.0 >= TRIES
    }
}
/// Distance from the next number up to which a reset is challenged.
const WINDOW: u32 = 65_535;

/// The state of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its SYN is sent.
    Opening,
    /// It has answered a SYN.
    Answered,
    /// Both ends know of it.
    Open,
    /// It is over; late segments are still answered.
    TimeWait,
    /// It is over.
    Closed,
}

/// An event of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happened {
    /// It is open.
    Opened,
    /// It has received bytes.
    Data(Vec<u8>),
    /// The peer sends no more.
    PeerClosed,
    /// Both have closed it.
    Closed,
    /// It was reset.
    Reset,
    /// No segment of it was acknowledged.
    GivenUp,
}

#[derive(Clone, Debug)]
struct Outgoing {
    flags: u8,
    data: Vec<u8>,
}

impl Outgoing {
    fn length(&self) -> u32 {
        self.data.len() as u32 + u32::from(self.flags & (tcp::SYN | tcp::FIN) != 0)
    }
}

/// One end of a connection.
#[derive(Clone, Debug)]
pub struct Connection {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// The state.
    pub state: State,
    /// The next number that the peer sends.
    expected: u32,
    /// The number of the segment under way.
    unacknowledged: u32,
    under_way: Option<Outgoing>,
    waiting: VecDeque<Outgoing>,
    tries: Tries,
    /// Number of segments sent, by which a timer recognises its segment.
    pub sent: u32,
    peer_closed: bool,
    closing: bool,
    closed: bool,
    /// Time until which segments out of order and without data are not answered.
    quiet_until: u64,
}

impl Connection {
    /// Opens a client's end, and sends its SYN.
    pub fn open(
        local: SocketAddr,
        remote: SocketAddr,
        number: u32,
        out: &mut Vec<Segment>,
    ) -> Self {
        let mut connection = Self::new(local, remote, State::Opening, number, 0);
        connection.queue(tcp::SYN, Vec::new(), out);
        connection
    }

    /// Opens a server's end, which answers a SYN.
    pub fn accept(syn: &Segment, number: u32, out: &mut Vec<Segment>) -> Self {
        let expected = syn.sequence.wrapping_add(1);
        let mut connection =
            Self::new(syn.destination, syn.source, State::Answered, number, expected);
        connection.queue(tcp::SYN | tcp::ACK, Vec::new(), out);
        connection
    }

    fn new(
        local: SocketAddr,
        remote: SocketAddr,
        state: State,
        unacknowledged: u32,
        expected: u32,
    ) -> Self {
        Self {
            local,
            remote,
            state,
            expected,
            unacknowledged,
            under_way: None,
            waiting: VecDeque::new(),
            tries: Tries::default(),
            sent: 0,
            peer_closed: false,
            closing: false,
            closed: false,
            quiet_until: 0,
        }
    }

    /// Returns the answer to a segment without a connection.
    #[must_use]
    pub fn unknown(segment: &Segment) -> Option<Segment> {
        if segment.flags & tcp::RST != 0 {
            return None;
        }
        let (source, destination) = (segment.destination, segment.source);
        Some(if segment.flags & tcp::ACK != 0 {
            Segment::tcp(source, destination, tcp::RST, segment.acknowledgment, 0)
        } else {
            let acknowledgment = segment.sequence.wrapping_add(segment.length());
            Segment::tcp(source, destination, tcp::RST | tcp::ACK, 0, acknowledgment)
        })
    }

    /// Reports whether a segment waits for its acknowledgment.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.under_way.is_some()
    }

    /// Sends bytes.
    pub fn send(&mut self, data: Vec<u8>, out: &mut Vec<Segment>) {
        if !self.closing && matches!(self.state, State::Open | State::Answered) {
            self.queue(tcp::ACK, data, out);
        }
    }

    /// Closes this end.
    pub fn close(&mut self, out: &mut Vec<Segment>) {
        if !self.closing && matches!(self.state, State::Open | State::Answered) {
            self.closing = true;
            self.queue(tcp::FIN | tcp::ACK, Vec::new(), out);
        }
    }

    /// Resets the connection.
    pub fn abort(&mut self, out: &mut Vec<Segment>) {
        if self.state != State::Closed {
            let next = self.unacknowledged.wrapping_add(self.length_under_way());
            let flags = tcp::RST | tcp::ACK;
            out.push(Segment::tcp(self.local, self.remote, flags, next, self.expected));
            self.end();
        }
    }

    fn end(&mut self) {
        self.state = State::Closed;
        self.under_way = None;
        self.waiting.clear();
    }

    fn queue(&mut self, flags: u8, data: Vec<u8>, out: &mut Vec<Segment>) {
        self.waiting.push_back(Outgoing { flags, data });
        self.go_on(out);
    }

    fn length_under_way(&self) -> u32 {
        self.under_way.as_ref().map_or(0, Outgoing::length)
    }

    /// Sends the next segment in the queue.
    fn go_on(&mut self, out: &mut Vec<Segment>) {
        if self.under_way.is_some() {
            return;
        }
        self.under_way = self.waiting.pop_front();
        self.tries = Tries::default();
        self.transmit(out);
    }

    fn transmit(&mut self, out: &mut Vec<Segment>) {
        let Some(outgoing) = &self.under_way else { return };
        self.tries.add();
        self.sent += 1;
        let acknowledges = outgoing.flags & tcp::ACK != 0;
        out.push(Segment {
            data: outgoing.data.clone(),
            ..Segment::tcp(
                self.local,
                self.remote,
                outgoing.flags,
                self.unacknowledged,
                if acknowledges { self.expected } else { 0 },
            )
        });
    }

    /// Returns the microseconds until the segment under way is retransmitted.
    #[must_use]
    pub fn patience(&self) -> u64 {
        self.tries.patience()
    }

    /// Retransmits the segment under way, whose acknowledgment is overdue.
    pub fn retry(&mut self, out: &mut Vec<Segment>) -> Option<Happened> {
        let _ = self.under_way.as_ref()?;
        if self.tries.are_over() {
            self.end();
            return Some(Happened::GivenUp);
        }
        self.transmit(out);
        None
    }

    /// Answers a segment out of order. Those without data are answered only so often: two ends that
    /// disagree would answer each other for ever (Linux' `tcp_invalid_ratelimit`).
    fn challenge(&mut self, segment: &Segment, now: u64, out: &mut Vec<Segment>) {
        if segment.data.is_empty() {
            if now < self.quiet_until {
                return;
            }
            self.quiet_until = now + RETRY_US;
        }
        self.acknowledge(out);
    }

    fn acknowledge(&self, out: &mut Vec<Segment>) {
        let next = self.unacknowledged.wrapping_add(self.length_under_way());
        out.push(Segment::tcp(self.local, self.remote, tcp::ACK, next, self.expected));
    }

    /// Receives a segment.
    pub fn receive(
        &mut self,
        segment: &Segment,
        now: u64,
        out: &mut Vec<Segment>,
    ) -> Vec<Happened> {
        let mut happened = Vec::new();
        let flags = segment.flags;
        match self.state {
            State::Closed => {
                out.extend(Self::unknown(segment));
                return happened;
            }
            State::Opening => {
                self.receive_opening(segment, out, &mut happened);
                return happened;
            }
            State::Answered | State::Open | State::TimeWait => {}
        }
        let ahead = segment.sequence.wrapping_sub(self.expected);
        if flags & tcp::RST != 0 {
            if ahead == 0 {
                self.end();
                happened.push(Happened::Reset);
            } else if ahead < WINDOW {
                self.challenge(segment, now, out);
            }
            return happened;
        }
        if flags & tcp::SYN != 0 {
            // The same SYN once more, or one to challenge.
            if self.state == State::Answered && ahead == u32::MAX {
                self.transmit(out);
            } else {
                self.challenge(segment, now, out);
            }
            return happened;
        }
        if flags & tcp::ACK == 0 {
            return happened;
        }
        let next = self.unacknowledged.wrapping_add(self.length_under_way());
        if self.state == State::Answered && segment.acknowledgment != next {
            out.push(Segment::tcp(self.local, self.remote, tcp::RST, segment.acknowledgment, 0));
            return happened;
        }
        if ahead != 0 {
            self.challenge(segment, now, out);
            return happened;
        }
        let acknowledged = segment.acknowledgment.wrapping_sub(self.unacknowledged);
        if acknowledged > next.wrapping_sub(self.unacknowledged) && acknowledged < 1 << 31 {
            self.challenge(segment, now, out);
            return happened;
        }
        if self.state == State::Answered {
            self.state = State::Open;
            happened.push(Happened::Opened);
        }
        if self.under_way.is_some() && segment.acknowledgment == next {
            self.unacknowledged = next;
            if let Some(outgoing) = self.under_way.take() {
                self.closed |= outgoing.flags & tcp::FIN != 0;
            }
        }
        if !segment.data.is_empty() {
            self.expected = self.expected.wrapping_add(segment.data.len() as u32);
            happened.push(Happened::Data(segment.data.clone()));
        }
        if flags & tcp::FIN != 0 {
            self.expected = self.expected.wrapping_add(1);
            if !self.peer_closed {
                self.peer_closed = true;
                happened.push(Happened::PeerClosed);
            }
        }
        if segment.length() != 0 {
            self.acknowledge(out);
        }
        self.go_on(out);
        if self.closed && self.peer_closed && self.state == State::Open {
            // The end that closes last receives no more.
            let is_last = flags & tcp::FIN == 0 && segment.length() == 0;
            self.state = if is_last { State::Closed } else { State::TimeWait };
            happened.push(Happened::Closed);
        }
        happened
    }

    fn receive_opening(
        &mut self,
        segment: &Segment,
        out: &mut Vec<Segment>,
        happened: &mut Vec<Happened>,
    ) {
        let next = self.unacknowledged.wrapping_add(1);
        let acknowledges = segment.flags & tcp::ACK != 0;
        if acknowledges && segment.acknowledgment != next {
            out.extend(Self::unknown(segment));
            return;
        }
        if segment.flags & tcp::RST != 0 {
            if acknowledges {
                self.end();
                happened.push(Happened::Reset);
            }
            return;
        }
        if segment.flags & tcp::SYN == 0 || !acknowledges {
            return;
        }
        self.expected = segment.sequence.wrapping_add(1);
        self.unacknowledged = next;
        self.under_way = None;
        self.state = State::Open;
        self.acknowledge(out);
        happened.push(Happened::Opened);
        self.go_on(out);
    }
}
