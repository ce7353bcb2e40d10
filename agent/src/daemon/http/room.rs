//! A bounded number of connections, shared out by kind and by source.
//!
//! A connection is always accepted. If its share is full, another connection is closed. So nobody
//! can keep others out by holding connections open, and a request that is sent immediately is
//! answered, since its connection is the newest. The connection to close is the oldest idle one of
//! the source that holds the most.
//!
//! All listeners have one room, because it bounds descriptors and memory of the process. The node's
//! own connections (the kubelet's probes, a scraper on the host network) have a share that others
//! cannot touch.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

/// The most open connections from elsewhere. Each takes up to 16 KiB of buffers: 7 MiB in all.
const OTHERS: usize = 448;
/// The most open connections of the node itself: 1 MiB.
const NODE: usize = 64;

/// The bits of an IPv6 address that identify a source: whoever has one address of a /64 has all of
/// them.
const SOURCE_V6: u32 = 64;

/// The kind of client of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A process of the node: its source address is a loopback address, or the address that it
    /// connects to. The kernel accepts such a source from nobody else.
    Node,
    Others,
}

impl Kind {
    fn of(peer: SocketAddr, local: SocketAddr) -> Self {
        if peer.ip().is_loopback() || peer.ip() == local.ip() { Self::Node } else { Self::Others }
    }
}

/// Returns the part of an address that identifies a source.
fn source(peer: SocketAddr) -> IpAddr {
    match peer.ip() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            Ipv6Addr::from_bits(address.to_bits() >> SOURCE_V6 << SOURCE_V6).into()
        }
    }
}

/// An open connection.
struct Open {
    answering: Answering,
    task: AbortHandle,
}

/// The connections of a kind, by source and then by age: numbers grow from one to the next. No
/// source is empty.
struct Share {
    max: usize,
    count: usize,
    open: BTreeMap<IpAddr, BTreeMap<u64, Open>>,
}

impl Share {
    fn of(max: usize) -> Self {
        Self { max, count: 0, open: BTreeMap::new() }
    }

    fn add(&mut self, source: IpAddr, number: u64, open: Open) {
        let added = self.open.entry(source).or_default().insert(number, open).is_none();
        self.count += usize::from(added);
    }

    fn remove(&mut self, source: IpAddr, number: u64) -> Option<Open> {
        let held = self.open.get_mut(&source)?;
        let removed = held.remove(&number)?;
        if held.is_empty() {
            let _ = self.open.remove(&source);
        }
        self.count -= 1;
        Some(removed)
    }

    /// Returns the connection to close first. A flood from one source costs no search.
    fn first_to_go(&self) -> Option<(IpAddr, u64)> {
        let most = self.open.values().map(BTreeMap::len).max()?;
        let of_source = |(source, held): (&IpAddr, &BTreeMap<u64, Open>)| {
            let waiting = held.iter().find(|(_, open)| !open.answering.is_so());
            let (number, open) = waiting.or_else(|| held.first_key_value())?;
            Some((open.answering.is_so(), *number, *source))
        };
        let candidates =
            self.open.iter().filter(|(_, held)| held.len() == most).filter_map(of_source);
        candidates.min().map(|(_, number, source)| (source, number))
    }

    fn take_first_to_go(&mut self) -> Option<AbortHandle> {
        let (source, number) = self.first_to_go()?;
        self.remove(source, number).map(|open| open.task)
    }
}

struct Shares {
    node: Share,
    others: Share,
    /// The next connection's number.
    next: u64,
}

impl Shares {
    fn of(&mut self, kind: Kind) -> &mut Share {
        match kind {
            Kind::Node => &mut self.node,
            Kind::Others => &mut self.others,
        }
    }
}

/// Whether a request on a connection is being answered, shared between the connection and the room.
#[derive(Clone, Debug, Default)]
pub(super) struct Answering(Arc<AtomicBool>);

impl Answering {
    pub(super) fn set(&self, answering: bool) {
        self.0.store(answering, Ordering::Relaxed);
    }

    fn is_so(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A connection's place in the room, which is given up when it is dropped.
struct Place {
    room: Room,
    kind: Kind,
    source: IpAddr,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.room.shares().of(self.kind).remove(self.source, self.number);
    }
}

/// The room that all listeners share.
#[derive(Clone)]
pub(crate) struct Room(Arc<Mutex<Shares>>);

impl Default for Room {
    fn default() -> Self {
        let (node, others) = (Share::of(NODE), Share::of(OTHERS));
        Self(Arc::new(Mutex::new(Shares { node, others, next: 0 })))
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Room").finish_non_exhaustive()
    }
}

impl Room {
    fn shares(&self) -> MutexGuard<'_, Shares> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a conversation in a task of its own. If the room is full, another one is closed.
    pub(super) fn hold<C>(
        &self,
        peer: SocketAddr,
        local: SocketAddr,
        conversation: impl FnOnce(Answering) -> C,
    ) where
        C: Future<Output = ()> + Send + 'static,
    {
        let (kind, source, answering) = (Kind::of(peer, local), source(peer), Answering::default());
        let closed = {
            let mut shares = self.shares();
            let number = shares.next;
            shares.next += 1;
            let share = shares.of(kind);
            let closed = if share.count >= share.max { share.take_first_to_go() } else { None };
            let place = Place { room: self.clone(), kind, source, number };
            let conversation = conversation(answering.clone());
            let task = tokio::spawn(async move {
                let _place = place;
                conversation.await;
            });
            share.add(source, number, Open { answering, task: task.abort_handle() });
            closed
        };
        if let Some(closed) = closed {
            closed.abort();
        }
    }

    /// Closes one connection from elsewhere, or one of the node's if there is no other. Descriptors
    /// or memory are short.
    pub(super) fn close_one(&self) {
        let closed = {
            let mut shares = self.shares();
            shares.others.take_first_to_go().or_else(|| shares.node.take_first_to_go())
        };
        if let Some(closed) = closed {
            closed.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    const LOCAL: SocketAddr =
        SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)), 10256);

    /// Opens a connection that sends nothing, and returns its number.
    fn open(room: &Room, peer: &str) -> u64 {
        let number = room.shares().next;
        room.hold(SocketAddr::new(peer.parse().expect("an address"), 1), LOCAL, |_| pending());
        number
    }

    fn are_open(room: &Room, kind: Kind) -> Vec<u64> {
        let mut shares = room.shares();
        let share = shares.of(kind);
        let mut all: Vec<u64> = share.open.values().flat_map(BTreeMap::keys).copied().collect();
        all.sort_unstable();
        assert_eq!(all.len(), share.count);
        all
    }

    /// Makes a room for a few connections.
    fn small(node: usize, others: usize) -> Room {
        let room = Room::default();
        (room.shares().node.max, room.shares().others.max) = (node, others);
        room
    }

    #[tokio::test]
    async fn the_source_that_holds_most_gives_way() {
        let room = small(1, 4);
        let first = open(&room, "198.51.100.1");
        let flood: Vec<u64> = (0..20).map(|_| open(&room, "198.51.100.2")).collect();
        let last = open(&room, "198.51.100.3");
        assert_eq!(are_open(&room, Kind::Others), [first, flood[18], flood[19], last]);
    }

    #[tokio::test]
    async fn among_equals_the_oldest_that_waits_for_a_request_gives_way() {
        let room = small(1, 3);
        let all: Vec<u64> =
            (1..=3).map(|host| open(&room, &format!("198.51.100.{host}"))).collect();
        let first = IpAddr::from([198, 51, 100, 1]);
        if let Some(held) = room.shares().others.open.get(&first) {
            held[&all[0]].answering.set(true);
        }
        let next = open(&room, "198.51.100.4");
        assert_eq!(are_open(&room, Kind::Others), [all[0], all[2], next]);
    }

    #[tokio::test]
    async fn a_64_is_one_source() {
        let room = small(1, 3);
        let other = open(&room, "2001:db8:1::1");
        let same: Vec<u64> =
            (1..=9).map(|host| open(&room, &format!("2001:db8:2::{host}"))).collect();
        assert_eq!(are_open(&room, Kind::Others), [other, same[7], same[8]]);
    }

    #[tokio::test]
    async fn others_do_not_touch_the_nodes_own() {
        let room = small(2, 2);
        let own = [open(&room, "127.0.0.1"), open(&room, "192.0.2.1")];
        for host in 1..=9 {
            let _ = open(&room, &format!("198.51.100.{host}"));
        }
        assert_eq!(are_open(&room, Kind::Node), own);
        assert_eq!(are_open(&room, Kind::Others).len(), 2);
    }

    #[tokio::test]
    async fn what_has_ended_takes_no_room() {
        let room = Room::default();
        for _ in 0..1_000 {
            room.hold(LOCAL, LOCAL, |_| async {});
            tokio::task::yield_now().await;
        }
        let _ = open(&room, "198.51.100.1");
        room.close_one();
        while !are_open(&room, Kind::Node).is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(are_open(&room, Kind::Others).is_empty());
    }
}
