//! A small SCTP: one chunk a packet, one DATA chunk at a time, retransmitted until it is
//! acknowledged (RFC 9260).
//!
//! An endpoint keeps nothing of an INIT: its cookie has all that the association needs. Initial
//! sequence numbers are the initiate tags. There are no heartbeats, streams or second addresses.

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;

pub use sluice_common::packet::header::sctp::*;

use crate::packet::Segment;
use crate::tcp::{Happened, State, Tries};

/// Carries bytes.
pub const DATA: u8 = 0;
/// Acknowledges bytes.
pub const SACK: u8 = 3;
/// Ends a connection once all bytes are acknowledged.
pub const SHUTDOWN: u8 = 7;
/// Returns the cookie of an INIT ACK.
pub const COOKIE_ECHO: u8 = 10;
/// Confirms a connection.
pub const COOKIE_ACK: u8 = 11;

/// The verification tag and chunk of a packet. Every chunk begins with a number, some of which SCTP
/// does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// The verification tag: the receiver's, but for an INIT and for answers to unknown packets.
    pub tag: u32,
    /// The chunk's type.
    pub kind: u8,
    /// The chunk's flags.
    pub flags: u8,
    /// The initiate tag, the bytes' sequence number, or the next one that is expected.
    pub number: u32,
}

impl Chunk {
    /// Creates a chunk without flags.
    #[must_use]
    pub fn new(tag: u32, kind: u8, number: u32) -> Self {
        Self { tag, kind, flags: 0, number }
    }

    /// Writes everything of an SCTP packet that follows its ports.
    pub fn write(&self, data: &[u8], bytes: &mut Vec<u8>) {
        let length = data.len() as u16 + 8;
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend([self.kind, self.flags]);
        bytes.extend(length.to_be_bytes());
        bytes.extend(self.number.to_be_bytes());
        bytes.extend(data);
        let sum = crc32c(bytes);
        bytes[8..12].copy_from_slice(&sum.to_le_bytes());
    }

    /// Reads an SCTP packet's chunk and its data; returns [`None`] if the checksum or a length is
    /// wrong.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<(Self, Vec<u8>)> {
        let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let sum = u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?);
        let mut plain = bytes.to_vec();
        plain.get_mut(8..12)?.fill(0);
        let length = u16::from_be_bytes(bytes.get(14..16)?.try_into().ok()?);
        if crc32c(&plain) != sum || usize::from(length) + 12 != bytes.len() {
            return None;
        }
        let chunk = Self { tag: word(4)?, kind: bytes[12], flags: bytes[13], number: word(16)? };
        Some((chunk, bytes.get(20..)?.to_vec()))
    }
}

impl fmt::Display for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.kind {
            DATA => "DATA",
            INIT => "INIT",
            INIT_ACK => "INIT-ACK",
            SACK => "SACK",
            ABORT => "ABORT",
            SHUTDOWN => "SHUTDOWN",
            SHUTDOWN_ACK => "SHUTDOWN-ACK",
            COOKIE_ECHO => "COOKIE-ECHO",
            COOKIE_ACK => "COOKIE-ACK",
            SHUTDOWN_COMPLETE => "SHUTDOWN-COMPLETE",
            _ => "chunk",
        };
        let flag = if self.flags & T != 0 { "(T)" } else { "" };
        write!(f, "{name}{flag} {:08x} {:08x}", self.tag, self.number)
    }
}

/// Returns the CRC32c of bytes by its definition, a bit at a time.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0x82f6_3b78 };
        }
    }
    !crc
}

/// The cookie of an INIT ACK: whose it is, and both sides' tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cookie {
    host: u32,
    client: u32,
    server: u32,
}

impl Cookie {
    fn bytes(self) -> Vec<u8> {
        [self.host, self.client, self.server].into_iter().flat_map(u32::to_be_bytes).collect()
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        Some(Self { host: word(0)?, client: word(4)?, server: word(8)? })
    }
}

/// Returns an endpoint's answer to an INIT. `host` signs the cookie.
#[must_use]
pub fn answer(init: &Segment, host: usize, tag: u32) -> Segment {
    let client = init.chunk.number;
    let cookie = Cookie { host: host as u32, client, server: tag };
    let chunk = Chunk::new(client, INIT_ACK, tag);
    Segment::sctp(init.destination, init.source, chunk, cookie.bytes())
}

/// Returns the answer to a packet without an association (RFC 9260, 8.4), or [`None`] if it is
/// discarded.
#[must_use]
pub fn unknown(segment: &Segment) -> Option<Segment> {
    let Chunk { tag, kind, number, .. } = segment.chunk;
    let chunk = match kind {
        ABORT | SHUTDOWN_COMPLETE | COOKIE_ECHO | COOKIE_ACK => return None,
        INIT => Chunk::new(number, ABORT, 0),
        SHUTDOWN_ACK => Chunk { flags: T, ..Chunk::new(tag, SHUTDOWN_COMPLETE, 0) },
        _ => Chunk { flags: T, ..Chunk::new(tag, ABORT, 0) },
    };
    Some(Segment::sctp(segment.destination, segment.source, chunk, Vec::new()))
}

/// A chunk that waits for its acknowledgment.
#[derive(Clone, Debug)]
struct Outgoing {
    kind: u8,
    number: u32,
    data: Vec<u8>,
}

/// One end of an association.
#[derive(Clone, Debug)]
pub struct Association {
    local: SocketAddr,
    remote: SocketAddr,
    /// The state.
    pub state: State,
    own_tag: u32,
    peer_tag: u32,
    next: u32,
    expected: u32,
    under_way: Option<Outgoing>,
    waiting: VecDeque<Vec<u8>>,
    tries: Tries,
    /// Number of packets sent, by which a timer recognises its chunk.
    pub sent: u32,
    is_closing: bool,
    is_peer_closing: bool,
}

impl Association {
    /// Opens a client's end, and sends its INIT.
    pub fn open(local: SocketAddr, remote: SocketAddr, tag: u32, out: &mut Vec<Segment>) -> Self {
        let mut association = Self::new(local, remote, State::Opening, [tag, 0]);
        association.start(INIT, tag, Vec::new(), out);
        association
    }

    /// Opens an endpoint's end by a cookie that comes back, and confirms it. Returns [`None`] for
    /// a cookie of another host, or of an association that is there already (`known`).
    pub fn accept(
        echo: &Segment,
        host: usize,
        known: Option<&mut Self>,
        out: &mut Vec<Segment>,
    ) -> Option<Self> {
        let cookie = Cookie::read(&echo.data)?;
        if cookie.host != host as u32 || cookie.server != echo.chunk.tag {
            return None;
        }
        let tags = [cookie.server, cookie.client];
        if let Some(known) = known
            && [known.own_tag, known.peer_tag] == tags
        {
            if known.state != State::Closed {
                known.say(COOKIE_ACK, 0, out);
            }
            return None;
        }
        let new = Self::new(echo.destination, echo.source, State::Open, tags);
        new.say(COOKIE_ACK, 0, out);
        Some(new)
    }

    fn new(local: SocketAddr, remote: SocketAddr, state: State, tags: [u32; 2]) -> Self {
        let [own_tag, peer_tag] = tags;
        Self {
            local,
            remote,
            state,
            own_tag,
            peer_tag,
            next: own_tag,
            expected: peer_tag,
            under_way: None,
            waiting: VecDeque::new(),
            tries: Tries::default(),
            sent: 0,
            is_closing: false,
            is_peer_closing: false,
        }
    }

    /// Reports whether a chunk waits for its acknowledgment.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.under_way.is_some()
    }

    /// Sends bytes.
    pub fn send(&mut self, data: Vec<u8>, out: &mut Vec<Segment>) {
        if !self.is_closing && !self.is_peer_closing && self.state == State::Open {
            self.waiting.push_back(data);
            self.go_on(out);
        }
    }

    /// Closes the association; the peer need not do so too.
    pub fn close(&mut self, out: &mut Vec<Segment>) {
        if !self.is_closing && self.state == State::Open {
            self.is_closing = true;
            self.go_on(out);
        }
    }

    /// Aborts the association.
    pub fn abort(&mut self, out: &mut Vec<Segment>) {
        if self.state != State::Closed {
            self.say(ABORT, 0, out);
            self.end();
        }
    }

    fn end(&mut self) {
        self.state = State::Closed;
        self.under_way = None;
        self.waiting.clear();
    }

    /// Sends a chunk that nobody acknowledges.
    fn say(&self, kind: u8, number: u32, out: &mut Vec<Segment>) {
        let chunk = Chunk::new(self.peer_tag, kind, number);
        out.push(Segment::sctp(self.local, self.remote, chunk, Vec::new()));
    }

    fn start(&mut self, kind: u8, number: u32, data: Vec<u8>, out: &mut Vec<Segment>) {
        self.under_way = Some(Outgoing { kind, number, data });
        self.tries = Tries::default();
        self.transmit(out);
    }

    /// Sends the next chunk: bytes that wait, or the end.
    fn go_on(&mut self, out: &mut Vec<Segment>) {
        if self.under_way.is_some() || self.state != State::Open {
            return;
        }
        if let Some(data) = self.waiting.pop_front() {
            self.start(DATA, self.next, data, out);
            self.next = self.next.wrapping_add(1);
        } else if self.is_peer_closing {
            self.start(SHUTDOWN_ACK, 0, Vec::new(), out);
        } else if self.is_closing {
            self.start(SHUTDOWN, self.expected, Vec::new(), out);
        }
    }

    fn transmit(&mut self, out: &mut Vec<Segment>) {
        let Some(Outgoing { kind, number, data }) = &self.under_way else { return };
        self.tries.add();
        self.sent += 1;
        let chunk = Chunk::new(self.peer_tag, *kind, *number);
        out.push(Segment::sctp(self.local, self.remote, chunk, data.clone()));
    }

    /// Returns the microseconds until the chunk under way is retransmitted.
    #[must_use]
    pub fn patience(&self) -> u64 {
        self.tries.patience()
    }

    /// Retransmits the chunk under way, whose acknowledgment is overdue.
    pub fn retry(&mut self, out: &mut Vec<Segment>) -> Option<Happened> {
        let _ = self.under_way.as_ref()?;
        if self.tries.are_over() {
            self.end();
            return Some(Happened::GivenUp);
        }
        self.transmit(out);
        None
    }

    fn is_under_way(&self, kind: u8) -> bool {
        self.under_way.as_ref().is_some_and(|outgoing| outgoing.kind == kind)
    }

    /// Receives a packet; what has a wrong tag is discarded (RFC 9260, 8.5).
    pub fn receive(&mut self, segment: &Segment, out: &mut Vec<Segment>) -> Vec<Happened> {
        let Chunk { tag, kind, flags, number } = segment.chunk;
        let is_reflected = flags & T != 0 && matches!(kind, ABORT | SHUTDOWN_COMPLETE);
        let wanted = if is_reflected { self.peer_tag } else { self.own_tag };
        if tag != wanted || self.state == State::Closed {
            return Vec::new();
        }
        let mut happened = Vec::new();
        match kind {
            INIT_ACK if self.is_under_way(INIT) => {
                (self.peer_tag, self.expected) = (number, number);
                self.start(COOKIE_ECHO, 0, segment.data.clone(), out);
            }
            COOKIE_ACK if self.is_under_way(COOKIE_ECHO) => {
                self.under_way = None;
                self.state = State::Open;
                happened.push(Happened::Opened);
            }
            ABORT => {
                self.end();
                happened.push(Happened::Reset);
            }
            _ if self.state != State::Open => {}
            DATA => {
                if number == self.expected {
                    self.expected = number.wrapping_add(1);
                    happened.push(Happened::Data(segment.data.clone()));
                }
                self.say(SACK, self.expected, out);
            }
            SACK => self.acknowledge(number, out),
            SHUTDOWN => {
                self.acknowledge(number, out);
                if !self.is_peer_closing {
                    self.is_peer_closing = true;
                    happened.push(Happened::PeerClosed);
                }
                if self.is_under_way(SHUTDOWN) {
                    self.under_way = None;
                }
                self.go_on(out);
            }
            SHUTDOWN_ACK if self.is_under_way(SHUTDOWN) || self.is_under_way(SHUTDOWN_ACK) => {
                self.say(SHUTDOWN_COMPLETE, 0, out);
                self.end();
                happened.push(Happened::Closed);
            }
            SHUTDOWN_COMPLETE if self.is_under_way(SHUTDOWN_ACK) => {
                self.end();
                happened.push(Happened::Closed);
            }
            _ => {}
        }
        happened
    }

    /// Takes the next number that the peer expects.
    fn acknowledge(&mut self, number: u32, out: &mut Vec<Segment>) {
        if self.is_under_way(DATA) && number == self.next {
            self.under_way = None;
            self.go_on(out);
        }
    }
}
