//! Allocates the ids of service ports and backends, and reuses them as late as possible.

use std::collections::{BTreeMap, VecDeque};

/// Allocates ids from 1 on: unused ones first, then the one that has been free longest.
#[derive(Clone, Debug)]
pub(super) struct PortIds {
    next: u32,
    end: u32,
    free: VecDeque<u32>,
}

impl PortIds {
    /// Creates an allocator of ids below `end`, of which those in `used` (ascending) are taken.
    pub(super) fn new(end: u32, used: impl Iterator<Item = u32>) -> Self {
        let mut ids = Self { next: 1, end, free: VecDeque::new() };
        for id in used {
            ids.free.extend(ids.next..id);
            ids.next = ids.next.max(id + 1);
        }
        ids
    }

    /// Takes an id.
    pub(super) fn take(&mut self) -> Option<u32> {
        if self.next < self.end {
            self.next += 1;
            return Some(self.next - 1);
        }
        self.free.pop_front()
    }

    /// Returns the number of free ids.
    pub(super) fn free(&self) -> u32 {
        self.end.saturating_sub(self.next) + self.free.len() as u32
    }

    /// Returns an id to the allocator.
    pub(super) fn give(&mut self, id: u32) {
        self.free.push_back(id);
    }
}

/// The number of retired backends that keep their ids while unused ids are left. A backend that was
/// replaced that many pods ago has drained.
const RETIRED_KEPT: usize = 16_384;

/// Identifies a backend within its family: service port, address, port.
type Owner<A> = (u32, A, u16);

/// Allocates the backend ids of a family.
///
/// A backend that leaves retires. If the same endpoint of the same service port returns, it gets
/// its old id and generation, and its flows continue.
#[derive(Clone, Debug)]
pub(super) struct BackendIds<A> {
    next: u32,
    end: u32,
    clock: u64,
    retired: BTreeMap<u64, (u32, Option<Owner<A>>)>,
    owners: BTreeMap<Owner<A>, u64>,
}

impl<A: Copy + Ord> BackendIds<A> {
    /// Creates an allocator of ids below `end`, of which those below `next` are taken.
    pub(super) fn new(end: u32, next: u32) -> Self {
        Self { next, end, clock: 0, retired: BTreeMap::new(), owners: BTreeMap::new() }
    }

    /// Takes the id that an endpoint had before.
    pub(super) fn revive(&mut self, owner: Owner<A>) -> Option<u32> {
        let clock = self.owners.remove(&owner)?;
        self.retired.remove(&clock).map(|(id, _)| id)
    }

    /// Returns the number of free ids.
    pub(super) fn free(&self) -> u32 {
        self.end.saturating_sub(self.next) + self.retired.len() as u32
    }

    /// Takes an id for a new endpoint.
    pub(super) fn take(&mut self) -> Option<u32> {
        if self.next < self.end && self.retired.len() < RETIRED_KEPT {
            self.next += 1;
            return Some(self.next - 1);
        }
        if let Some((clock, (id, owner))) = self.retired.pop_first() {
            if let Some(owner) = owner
                && self.owners.get(&owner) == Some(&clock)
            {
                let _ = self.owners.remove(&owner);
            }
            return Some(id);
        }
        (self.next < self.end).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Retires an id.
    pub(super) fn retire(&mut self, id: u32, owner: Option<Owner<A>>) {
        self.clock += 1;
        if let Some(owner) = owner {
            let _ = self.owners.insert(owner, self.clock);
        }
        let _ = self.retired.insert(self.clock, (id, owner));
    }

    /// Forgets the endpoints of a service port's retired backends, since its id changes hands.
    pub(super) fn disown(&mut self, service_port: u32, least: A) {
        let owned: Vec<(Owner<A>, u64)> = self
            .owners
            .range((service_port, least, 0)..)
            .take_while(|((other, ..), _)| *other == service_port)
            .map(|(owner, clock)| (*owner, *clock))
            .collect();
        for (owner, clock) in owned {
            let _ = self.owners.remove(&owner);
            if let Some((_, owner)) = self.retired.get_mut(&clock) {
                *owner = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_ports_id_is_used_again_last() {
        let mut ids = PortIds::new(5, [2].into_iter());
        assert_eq!([ids.take(), ids.take()], [Some(3), Some(4)]);
        ids.give(3);
        assert_eq!([ids.take(), ids.take(), ids.take()], [Some(1), Some(3), None]);
    }

    #[test]
    fn an_endpoint_that_returns_gets_its_id_back_until_it_is_given_away() {
        let mut ids = BackendIds::new(3, 1);
        let (a, b) = ((1, 10, 80), (1, 11, 80));
        assert_eq!([ids.take(), ids.take(), ids.take()], [Some(1), Some(2), None]);
        ids.retire(1, Some(a));
        ids.retire(2, Some(b));
        assert_eq!(ids.revive(b), Some(2));
        assert_eq!(ids.take(), Some(1));
        assert_eq!(ids.revive(a), None);
        ids.retire(1, Some(a));
        ids.disown(1, 0);
        assert_eq!(ids.revive(a), None);
        assert_eq!(ids.take(), Some(1));
    }
}
