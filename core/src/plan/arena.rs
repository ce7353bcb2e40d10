//! Allocates ranges of slots as runs of blocks, and joins free runs that touch.

use std::collections::{BTreeMap, BTreeSet};

/// Free runs of blocks.
#[derive(Clone, Debug, Default)]
pub(super) struct Arena {
    /// First block -> number of blocks. No two runs touch.
    by_start: BTreeMap<u32, u32>,
    /// The same, ordered by number of blocks.
    by_length: BTreeSet<(u32, u32)>,
    /// The number of free blocks.
    free: u32,
}

impl Arena {
    /// Creates an arena whose free blocks are `start..end`.
    pub(super) fn new(start: u32, end: u32) -> Self {
        let mut arena = Self::default();
        if end > start {
            arena.insert(start, end - start);
        }
        arena
    }

    /// Takes a run of blocks from the shortest free run that is long enough, the first of equals.
    pub(super) fn take(&mut self, blocks: u32) -> Option<u32> {
        let (length, start) = *self.by_length.range((blocks, 0)..).next()?;
        self.remove(start, length);
        if length > blocks {
            self.insert(start + blocks, length - blocks);
        }
        Some(start)
    }

    /// Takes those of the blocks `start..start + blocks` that are free.
    pub(super) fn occupy(&mut self, start: u32, blocks: u32) {
        let end = start.saturating_add(blocks);
        let touched: Vec<(u32, u32)> = self
            .by_start
            .range(..end)
            .rev()
            .map(|(start, length)| (*start, *length))
            .take_while(|(free, length)| free + length > start)
            .collect();
        for (free, length) in touched {
            self.remove(free, length);
            if free < start {
                self.insert(free, start - free);
            }
            if free + length > end {
                self.insert(end, free + length - end);
            }
        }
    }

    /// Returns a run of blocks to the arena.
    pub(super) fn give(&mut self, mut start: u32, mut blocks: u32) {
        if let Some((before, length)) =
            self.by_start.range(..start).next_back().map(|(s, l)| (*s, *l))
            && before + length == start
        {
            self.remove(before, length);
            start = before;
            blocks += length;
        }
        if let Some(length) = self.by_start.get(&(start + blocks)).copied() {
            self.remove(start + blocks, length);
            blocks += length;
        }
        self.insert(start, blocks);
    }

    /// Returns the number of free blocks.
    pub(super) fn free(&self) -> u32 {
        self.free
    }

    fn insert(&mut self, start: u32, length: u32) {
        self.free += length;
        let _ = self.by_start.insert(start, length);
        let _ = self.by_length.insert((length, start));
    }

    fn remove(&mut self, start: u32, length: u32) {
        self.free -= length;
        let _ = self.by_start.remove(&start);
        let _ = self.by_length.remove(&(length, start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_from_the_tightest_gap_and_join_when_they_come_back() {
        let mut arena = Arena::new(0, 100);
        let a = arena.take(10).expect("room");
        let b = arena.take(5).expect("room");
        let c = arena.take(20).expect("room");
        assert_eq!((a, b, c), (0, 10, 15));
        arena.give(b, 5);
        assert_eq!(arena.take(4), Some(10), "the gap of five, not the rest of the arena");
        arena.give(10, 4);
        arena.give(a, 10);
        arena.give(c, 20);
        assert_eq!(arena.free(), 100);
        assert_eq!(arena.take(100), Some(0));
        assert_eq!(arena.free(), 0);
        assert_eq!(arena.take(1), None);
    }

    #[test]
    fn occupied_blocks_are_not_given_out() {
        let mut arena = Arena::new(0, 16);
        arena.occupy(4, 4);
        arena.occupy(6, 4);
        assert_eq!(arena.take(6), Some(10));
        assert_eq!(arena.take(4), Some(0));
        assert_eq!(arena.take(1), None);
    }
}
