//! The waiting fragments, oldest first, within bounds.
//!
//! If there is no room, the heaviest source makes it: of the device with the most fragments, the
//! source with the most. The device is chosen first, since a pod can forge sources but has only one
//! device, and so cannot displace the fragments of others.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use super::frame::Frame;
use crate::node::dataplane::DatagramKey;

/// The most fragments that are held.
const FRAGMENTS_MAX: usize = 1_024;
/// The most bytes that are held: as many fragments that each fill a frame of 1500 bytes.
const BYTES_MAX: usize = FRAGMENTS_MAX * 1_536;

/// A held fragment, and since when it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) frame: Frame,
    pub(super) since: Instant,
}

impl Kept {
    /// Returns the place that it came from.
    fn place(&self) -> u32 {
        self.frame.mark
    }

    fn source(&self) -> IpAddr {
        match self.frame.key {
            DatagramKey::V4(key) => Ipv4Addr::from(key.source.octets).into(),
            DatagramKey::V6(key) => Ipv6Addr::from(key.source.octets).into(),
        }
    }
}

/// The waiting fragments.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    kept: VecDeque<Kept>,
    bytes: usize,
    /// Place -> source -> the number of its waiting fragments, none of them zero.
    counts: BTreeMap<u32, BTreeMap<IpAddr, usize>>,
}

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Holds a fragment. Returns the fragments for which there is no room.
    pub(super) fn hold(&mut self, kept: Kept) -> Vec<Kept> {
        let mut gone = Vec::new();
        self.count(&kept, true);
        self.bytes = self.bytes.saturating_add(kept.frame.bytes.len());
        self.kept.push_back(kept);
        while self.kept.len() > FRAGMENTS_MAX || self.bytes > BYTES_MAX {
            let Some(last) = self.heaviest().and_then(|index| self.kept.remove(index)) else {
                break;
            };
            self.forget(&last);
            gone.push(last);
        }
        gone
    }

    /// Finds the newest fragment of the source with the most at the place with the most.
    fn heaviest(&self) -> Option<usize> {
        let all = |sources: &BTreeMap<IpAddr, usize>| sources.values().sum::<usize>();
        let (place, sources) = self.counts.iter().max_by_key(|(_, sources)| all(sources))?;
        let (source, _) = sources.iter().max_by_key(|(_, count)| **count)?;
        self.kept.iter().rposition(|kept| kept.place() == *place && kept.source() == *source)
    }

    fn count(&mut self, kept: &Kept, comes: bool) {
        let (place, source) = (kept.place(), kept.source());
        let sources = self.counts.entry(place).or_default();
        let count = sources.entry(source).or_default();
        *count = if comes { count.saturating_add(1) } else { count.saturating_sub(1) };
        if *count == 0 {
            let _ = sources.remove(&source);
        }
        if sources.is_empty() {
            let _ = self.counts.remove(&place);
        }
    }

    fn forget(&mut self, kept: &Kept) {
        self.bytes = self.bytes.saturating_sub(kept.frame.bytes.len());
        self.count(kept, false);
    }

    /// Takes the fragments whose datagram's first one was seen, in the order of arrival.
    pub(super) fn take_known(
        &mut self,
        mut is_known: impl FnMut(&DatagramKey) -> bool,
    ) -> Vec<Kept> {
        self.take(|kept| is_known(&kept.frame.key))
    }

    /// Takes the fragments that have waited since before an instant.
    pub(super) fn take_older(&mut self, late: Instant) -> Vec<Kept> {
        self.take(|kept| kept.since <= late)
    }

    fn take(&mut self, mut goes: impl FnMut(&Kept) -> bool) -> Vec<Kept> {
        let mut gone = Vec::new();
        for kept in std::mem::take(&mut self.kept) {
            if goes(&kept) {
                self.forget(&kept);
                gone.push(kept);
            } else {
                self.kept.push_back(kept);
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sluice_common::abi::Datagram;

    use super::*;

    fn kept(id: u32, length: usize, since: Instant) -> Kept {
        let key = DatagramKey::V4(Datagram { id, ..Datagram::default() });
        Kept { frame: Frame { bytes: vec![0; length], mark: 2, ethertype: 0x0800, key }, since }
    }

    fn ids(gone: &[Kept]) -> Vec<u32> {
        let id = |kept: &Kept| match kept.frame.key {
            DatagramKey::V4(key) => key.id,
            DatagramKey::V6(key) => key.id,
        };
        gone.iter().map(id).collect()
    }

    #[test]
    fn fragments_go_when_their_datagram_is_told_or_they_are_old() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let mut waiting = Waiting::default();
        for (id, since) in [(1, start), (2, start), (1, later), (3, later)] {
            assert!(waiting.hold(kept(id, 100, since)).is_empty());
        }
        let told = waiting.take_known(|key| matches!(key, DatagramKey::V4(key) if key.id == 1));
        assert_eq!(ids(&told), [1, 1]);
        assert_eq!((ids(&waiting.take_older(start)), waiting.bytes), (vec![2], 100));
        assert_eq!(ids(&waiting.take_older(later)), [3]);
        assert!(waiting.is_empty() && waiting.bytes == 0 && waiting.counts.is_empty());
    }

    #[test]
    fn what_finds_no_room_goes_on_at_once() {
        let mut waiting = Waiting::default();
        let now = Instant::now();
        let gone: usize = (0..3_000).map(|id| waiting.hold(kept(id, 60, now)).len()).sum();
        assert_eq!((waiting.kept.len(), gone), (FRAGMENTS_MAX, 3_000 - FRAGMENTS_MAX));
        let _ = waiting.take_older(now);
        let gone: usize = (0..3_000).map(|id| waiting.hold(kept(id, 9_000, now)).len()).sum();
        assert!(waiting.bytes <= BYTES_MAX && waiting.bytes > BYTES_MAX - 9_000);
        assert_eq!(waiting.kept.len() + gone, 3_000);
    }

    #[test]
    fn who_has_most_makes_room() {
        let now = Instant::now();
        let from = |place: u32, source: [u8; 4], id: u32| {
            let mut kept = kept(id, 100, now);
            kept.frame.mark = place;
            if let DatagramKey::V4(key) = &mut kept.frame.key {
                key.source.octets = source;
            }
            kept
        };
        let of = |waiting: &Waiting, place: u32| {
            waiting.counts.get(&place).map_or(0, |all| all.values().sum())
        };
        let mut waiting = Waiting::default();
        // A pod with forged sources fills all of it.
        for id in 0..5_000_u32 {
            let [_, _, c, d] = id.to_be_bytes();
            let _ = waiting.hold(from(2, [10, 9, c, d], id));
        }
        assert_eq!(of(&waiting, 2), FRAGMENTS_MAX);
        // Another one has room all the same, and so have the clients of an uplink.
        for id in 0..100 {
            let gone = waiting.hold(from(4, [10, 0, 0, 4], id));
            assert!(gone.len() == 1 && gone.iter().all(|kept| kept.place() == 2), "{gone:?}");
        }
        // Of two sources behind one device, the one with most.
        for id in 0..2_000 {
            let _ = waiting.hold(from(6, [198, 51, 100, 7], id));
        }
        for id in 0..20 {
            let gone = waiting.hold(from(6, [198, 51, 100, 8], id));
            let busy = IpAddr::from([198, 51, 100, 7]);
            assert!(gone.iter().all(|kept| kept.place() == 2 || kept.source() == busy), "{gone:?}");
        }
        assert_eq!((of(&waiting, 4), waiting.kept.len()), (100, FRAGMENTS_MAX));
        let quiet =
            waiting.counts.get(&6).and_then(|all| all.get(&IpAddr::from([198, 51, 100, 8])));
        assert_eq!(quiet, Some(&20));
    }
}
