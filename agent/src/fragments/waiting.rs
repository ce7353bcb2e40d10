//! The fragments that wait, oldest first, within bounds.

use std::collections::VecDeque;
use std::time::Instant;

use super::frame::Frame;
use crate::dataplane::DatagramKey;

/// Fragments kept at most...
const FRAGMENTS_MAX: usize = 1_024;
/// ...and their bytes: a fragment for each of them that fills a frame of 1500 bytes.
const BYTES_MAX: usize = FRAGMENTS_MAX * 1_536;

/// A fragment, and since when it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) frame: Frame,
    pub(super) since: Instant,
}

/// What waits.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    kept: VecDeque<Kept>,
    bytes: usize,
}

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Keeps a fragment, if there is room.
    pub(super) fn take_in(&mut self, kept: Kept) {
        let bytes = self.bytes.saturating_add(kept.frame.bytes.len());
        if self.kept.len() < FRAGMENTS_MAX && bytes <= BYTES_MAX {
            self.bytes = bytes;
            self.kept.push_back(kept);
        }
    }

    /// Those whose datagram's first fragment has been seen, in the order in which they came.
    pub(super) fn take_told(&mut self, mut is_told: impl FnMut(&DatagramKey) -> bool) -> Vec<Kept> {
        self.take(|kept| is_told(&kept.frame.key))
    }

    /// Those that have waited since before an instant.
    pub(super) fn take_older(&mut self, late: Instant) -> Vec<Kept> {
        self.take(|kept| kept.since <= late)
    }

    fn take(&mut self, mut goes: impl FnMut(&Kept) -> bool) -> Vec<Kept> {
        let mut gone = Vec::new();
        for kept in std::mem::take(&mut self.kept) {
            if goes(&kept) {
                self.bytes = self.bytes.saturating_sub(kept.frame.bytes.len());
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
            waiting.take_in(kept(id, 100, since));
        }
        let told = waiting.take_told(|key| matches!(key, DatagramKey::V4(key) if key.id == 1));
        assert_eq!(ids(&told), [1, 1]);
        assert_eq!((ids(&waiting.take_older(start)), waiting.bytes), (vec![2], 100));
        assert_eq!(ids(&waiting.take_older(later)), [3]);
        assert!(waiting.is_empty() && waiting.bytes == 0);
    }

    #[test]
    fn what_finds_no_room_is_dropped() {
        let mut waiting = Waiting::default();
        let now = Instant::now();
        for id in 0..3_000 {
            waiting.take_in(kept(id, 60, now));
        }
        assert_eq!(waiting.kept.len(), FRAGMENTS_MAX);
        let _ = waiting.take_older(now);
        for id in 0..3_000 {
            waiting.take_in(kept(id, 9_000, now));
        }
        assert!(waiting.bytes <= BYTES_MAX && waiting.bytes > BYTES_MAX - 9_000);
    }
}
