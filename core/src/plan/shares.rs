//! Limits how much of a map one namespace may take, so that it leaves room for the others.
//!
//! The rule is that of shared buffers in switches (Choudhury and Hahne, "Dynamic queue length
//! thresholds", 1998): a namespace keeps what it has, and gets more only while it holds less than
//! [`SHARE`] times what is free. The rule does not depend on the number of namespaces, and little
//! room stays unused:
//!
//! ```text
//! namespaces that want all of 61 440      each holds        free
//!                                   1      59 520          1 920
//!                                   2      30 232            975
//!                                  10       6 124            200
//! ```
//!
//! A namespace that holds nothing finds room as long as anything is free, and a cluster with a
//! single namespace can use 31 parts of 32.

use std::collections::BTreeMap;
use std::sync::Arc;

/// A namespace gets more while it holds less than this many times what is free.
const SHARE: u64 = 31;

/// Each namespace's share of one resource.
#[derive(Clone, Debug, Default)]
pub(super) struct Shares(BTreeMap<Arc<str>, u32>);

impl Shares {
    /// Returns how much a namespace holds.
    pub(super) fn held(&self, namespace: &str) -> u32 {
        self.0.get(namespace).copied().unwrap_or(0)
    }

    /// Records that a namespace has `after` where it had `before`.
    pub(super) fn change(&mut self, namespace: &Arc<str>, before: u32, after: u32) {
        if before == after {
            return;
        }
        let held = self.held(namespace).saturating_sub(before).saturating_add(after);
        let _ = match held {
            0 => self.0.remove(namespace),
            _ => self.0.insert(namespace.clone(), held),
        };
    }
}

/// Returns how many of `wanted` a namespace is granted that holds `held` while `free` are free.
pub(super) fn grant(held: u32, free: u32, wanted: u32) -> u32 {
    let (held, free) = (u64::from(held), u64::from(free));
    // The n-th is granted if held + n - 1 < SHARE * (free - n + 1).
    let most = (SHARE * free).saturating_sub(held).div_ceil(SHARE + 1).min(free);
    wanted.min(u32::try_from(most).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets namespaces that hold nothing take in turn whatever they get.
    fn filled(namespaces: usize, capacity: u32) -> (Vec<u32>, u32) {
        let mut held = vec![0; namespaces];
        let mut free = capacity;
        loop {
            let before = free;
            for held in &mut held {
                let granted = grant(*held, free, 1);
                *held += granted;
                free -= granted;
            }
            if free == before {
                return (held, free);
            }
        }
    }

    #[test]
    fn what_is_granted_at_once_is_what_is_granted_one_by_one() {
        for (held, free) in [(0, 0), (0, 1), (5, 3), (61, 2), (62, 2), (1_000, 40), (100_000, 40)] {
            let (mut mine, mut left) = (held, free);
            while grant(mine, left, 1) == 1 {
                (mine, left) = (mine + 1, left - 1);
            }
            assert_eq!(grant(held, free, u32::MAX), mine - held, "{held} held, {free} free");
        }
    }

    #[test]
    fn one_namespace_has_nearly_all_and_something_is_left_for_one_that_has_nothing() {
        assert_eq!(filled(1, 61_440), (vec![59_520], 1_920));
        assert_eq!(filled(2, 61_440), (vec![30_233, 30_232], 975));
        let (held, free) = filled(10, 61_440);
        assert!(
            held.iter().all(|held| (6_123..=6_125).contains(held)) && free >= 190,
            "{held:?} {free}"
        );
        assert!(filled(100, 61_440).1 >= 15);
    }

    #[test]
    fn shares_forget_whoever_holds_nothing() {
        let mut shares = Shares::default();
        let namespace: Arc<str> = "a".into();
        shares.change(&namespace, 0, 3);
        shares.change(&namespace, 1, 0);
        assert_eq!(shares.held("a"), 2);
        shares.change(&namespace, 2, 0);
        assert!(shares.0.is_empty());
    }
}
