//! The properties that Maglev promises.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use sluice_common::V4;
use sluice_common::abi::Ipv4Address;
use sluice_common::maglev::{self, SIZE_MAX, SIZE_MIN, SLOTS_PER_BACKEND, Turn};

fn table(backends: &BTreeSet<(u32, u16)>, size: u32) -> Vec<u32> {
    let mut turns: Vec<Turn> = backends
        .iter()
        .map(|(address, port)| {
            Turn::new::<V4>(
                &Ipv4Address { octets: address.to_be_bytes() },
                *port,
                id(*address, *port),
            )
        })
        .collect();
    let mut slots = vec![0; size as usize];
    maglev::fill(&mut turns, &mut slots);
    slots
}

/// Returns an id that identifies the backend.
fn id(address: u32, port: u16) -> u32 {
    address.wrapping_mul(31) ^ u32::from(port) | 1 << 31
}

fn shares(slots: &[u32]) -> BTreeMap<u32, u32> {
    let mut shares = BTreeMap::new();
    for id in slots {
        *shares.entry(*id).or_insert(0) += 1;
    }
    shares
}

fn is_prime(number: u32) -> bool {
    number > 1 && (2..256).all(|divisor| divisor >= number || !number.is_multiple_of(divisor))
}

#[test]
fn every_size_is_a_prime_that_is_large_enough() {
    let mut last = 0;
    for backends in 1..6_000 {
        let size = maglev::size(backends);
        assert!(is_prime(size), "{size}");
        assert!((SIZE_MIN..=SIZE_MAX).contains(&size), "{size}");
        assert!(size >= (backends * SLOTS_PER_BACKEND).min(SIZE_MAX), "{size} for {backends}");
        assert!(size >= last, "sizes grow");
        if size != last {
            assert_eq!(maglev::smaller(size), last, "{size}");
        }
        last = size;
    }
    assert_eq!(last, SIZE_MAX);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn shares_differ_by_one_slot_at_most(backends in prop::collection::btree_set((any::<u32>(), 1_u16..9), 1..50)) {
        let slots = table(&backends, maglev::size(backends.len() as u32));
        let shares = shares(&slots);
        prop_assert_eq!(shares.len(), backends.len());
        let (least, most) = (shares.values().min(), shares.values().max());
        prop_assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1));
    }

    #[test]
    fn a_backend_that_leaves_takes_few_slots_of_others_with_it(
        backends in prop::collection::btree_set((any::<u32>(), 1_u16..9), 2..40),
        which in any::<prop::sample::Index>(),
    ) {
        let size = 1_021;
        let leaving = *which.get(&backends.iter().copied().collect::<Vec<_>>());
        let mut remaining = backends.clone();
        let _ = remaining.remove(&leaving);
        let (before, after) = (table(&backends, size), table(&remaining, size));
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(before, after)| before != after && **before != id(leaving.0, leaving.1))
            .count();
        // The paper's figures for 1 % of 1000 backends are lower; small sets move more.
        prop_assert!(moved <= size as usize / 4, "{moved} of {size} slots moved");
    }

    #[test]
    fn a_hash_is_scaled_into_its_range(hash in any::<u32>(), size in 1_u32..=SIZE_MAX) {
        prop_assert!(maglev::scale(hash, size) < size);
    }
}

#[test]
fn without_backends_every_slot_is_empty() {
    assert_eq!(table(&BTreeSet::new(), 61), vec![0; 61]);
}

#[test]
fn clients_spread_evenly_over_slots() {
    let mut counts = [0_u32; 61];
    for host in 0..4_u8 {
        for port in 32_768..60_999_u16 {
            let tuple = sluice_common::abi::Tuple {
                source: Ipv4Address { octets: [10, 0, 0, host] },
                destination: Ipv4Address { octets: [10, 96, 0, 10] },
                source_port: port,
                destination_port: 80,
                protocol: 6,
                side: 0,
                reserved: [0; 2],
            };
            counts[maglev::slot::<V4>(&tuple, 61) as usize] += 1;
        }
    }
    // 112 924 clients over 61 slots: 1851 each, with a standard deviation of 43.
    assert!(counts.iter().all(|count| count.abs_diff(1_851) < 5 * 43), "{counts:?}");
}
