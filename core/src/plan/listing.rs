//! Counts what each bit of `addresses` and `node_ports` stands for, so that a bit is cleared with
//! its last reason. The bits of removed frontends linger for a while.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;

use sluice_common::abi::listing;
use sluice_common::{V4, V6};

use crate::image::lane;

/// The number of removed frontends that keep their bit, so that their connections drain.
const LINGERING: usize = 1_024;

/// Removed frontends that keep their bit, oldest first.
#[derive(Clone, Debug)]
pub(super) struct Lingering<T>(VecDeque<T>);

impl<T> Default for Lingering<T> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<T: PartialEq> Lingering<T> {
    /// Adds one that has just been removed, and returns the one whose time is over.
    pub(super) fn add(&mut self, gone: T) -> Option<T> {
        self.0.push_back(gone);
        if self.0.len() > LINGERING { self.0.pop_front() } else { None }
    }

    /// Drops one that exists again.
    pub(super) fn forget(&mut self, back: &T) {
        self.0.retain(|gone| gone != back);
    }

    /// Whether one has been removed and lingers.
    pub(super) fn has(&self, one: &T) -> bool {
        self.0.contains(one)
    }
}

/// The reason for which an address is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// A frontend has the address.
    Frontend,
    /// A backend has the address.
    Backend,
    /// The node has the address.
    Node,
    /// The node has the address and serves node ports there.
    NodePorts,
}

/// Lane -> the number of addresses that are listed there, for each reason.
#[derive(Clone, Debug, Default)]
pub(super) struct Listing {
    counts: BTreeMap<u32, [u32; 4]>,
    /// The lanes of removed frontends, as often as `counts` still counts them.
    lingering: Lingering<u32>,
}

/// Returns the lane of an address.
fn lane_of(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => lane::<V4>(&address.into()),
        IpAddr::V6(address) => lane::<V6>(&address.into()),
    }
}

impl Listing {
    /// Lists an address, and returns its lane with the lane's bits.
    pub(super) fn add(&mut self, address: IpAddr, why: Why) -> (u32, u8) {
        let lane = lane_of(address);
        let counts = self.counts.entry(lane).or_default();
        counts[why as usize] += 1;
        (lane, bits(*counts))
    }

    /// Undoes one [`Self::add`].
    pub(super) fn remove(&mut self, address: IpAddr, why: Why) -> (u32, u8) {
        self.remove_from(lane_of(address), why)
    }

    fn remove_from(&mut self, lane: u32, why: Why) -> (u32, u8) {
        let Some(counts) = self.counts.get_mut(&lane) else { return (lane, 0) };
        counts[why as usize] = counts[why as usize].saturating_sub(1);
        let bits = bits(*counts);
        if bits == 0 {
            let _ = self.counts.remove(&lane);
        }
        (lane, bits)
    }

    /// Undoes one [`Self::add`] of a frontend later, and returns the lane whose time is over now.
    pub(super) fn linger(&mut self, address: IpAddr) -> Option<(u32, u8)> {
        let oldest = self.lingering.add(lane_of(address))?;
        Some(self.remove_from(oldest, Why::Frontend))
    }

    /// Adopts the bits that a lane has in the maps. A frontend's bit that nothing accounts for is
    /// that of a removed frontend, and lingers.
    pub(super) fn adopt(&mut self, lane: u32, found: u8) {
        if found & !self.bits(lane) & listing::FRONTEND != 0 {
            self.counts.entry(lane).or_default()[Why::Frontend as usize] += 1;
            if let Some(oldest) = self.lingering.add(lane) {
                let _ = self.remove_from(oldest, Why::Frontend);
            }
        }
    }

    /// Returns the lanes in which an address is listed.
    pub(super) fn lanes(&self) -> impl Iterator<Item = u32> {
        self.counts.keys().copied()
    }

    /// Returns the bits of a lane.
    pub(super) fn bits(&self, lane: u32) -> u8 {
        self.counts.get(&lane).map_or(0, |counts| bits(*counts))
    }
}

fn bits(counts: [u32; 4]) -> u8 {
    let bit = [listing::FRONTEND, listing::BACKEND, listing::NODE, listing::NODE_PORTS];
    counts.into_iter().zip(bit).filter(|(count, _)| *count > 0).fold(0, |bits, (_, bit)| bits | bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frontends_that_are_gone_stay_over_a_change_of_agents() {
        let (gone, here) = (IpAddr::from([10, 96, 0, 1]), IpAddr::from([10, 96, 0, 2]));
        let mut before = Listing::default();
        let _ = before.add(gone, Why::Frontend);
        let _ = before.add(here, Why::Frontend);
        assert_eq!(before.linger(gone), None);
        let mut after = Listing::default();
        let _ = after.add(here, Why::Frontend);
        for lane in before.lanes() {
            after.adopt(lane, before.bits(lane));
        }
        assert!(before.lanes().eq(after.lanes()) && before.lanes().count() == 2);
        // A backend's bit that nobody accounts for is not taken over.
        let (lane, _) = Listing::default().add(IpAddr::from([10, 1, 0, 1]), Why::Backend);
        after.adopt(lane, listing::BACKEND);
        assert_eq!(after.bits(lane), 0);
        // It goes when many others have gone after it.
        for other in 0..LINGERING {
            let [a, b] = (other as u16).to_be_bytes();
            let other = IpAddr::from([10, 97, a, b]);
            let _ = after.add(other, Why::Frontend);
            let _ = after.linger(other);
        }
        assert_eq!(after.bits(lane_of(gone)), 0);
        assert_eq!(after.bits(lane_of(here)), listing::FRONTEND);
    }

    #[test]
    fn what_is_gone_stays_until_many_others_have_gone() {
        let mut lingering = Lingering::default();
        assert_eq!(lingering.add(7), None);
        assert!(lingering.has(&7));
        for other in 100..100 + LINGERING - 1 {
            assert_eq!(lingering.add(other), None);
        }
        assert_eq!(lingering.add(8), Some(7));
        assert!(!lingering.has(&7) && lingering.has(&8));
        lingering.forget(&8);
        assert!(!lingering.has(&8));
    }
}
