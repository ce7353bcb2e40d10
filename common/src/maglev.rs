//! Maglev hashing: maps tuples to slots, and slots to backends.
//!
//! Each backend has its own order of preference over the slots, derived from a hash of its address
//! and port. It starts at an offset and advances by a stride; since the number of slots is prime,
//! it reaches each slot once. The backends take turns, in order of their hashes, and each takes the
//! next free slot of its preference, until no slot is free. Hence:
//!
//! - Two backends' shares differ by at most one slot.
//! - A backend that leaves frees its own slots. Few others move: those that it had taken from
//!   another backend's earlier preference.
//! - The table follows from the set of backends alone, so every node builds the same one.
//!
//! Worked example with 5 slots. A starts at 3 with stride 4 and prefers 3 2 1 0 4; B starts at 0
//! with stride 2: 0 2 4 1 3; C starts at 3 with stride 1: 3 4 0 1 2. In turn: A takes 3, B 0, C 4
//! (3 is taken), A 2, B 1 (2 and 4 are taken): `B B A A C`. Without B: A 3, C 4, A 2, C 0, A 1:
//! `C A A A C`; only B's slots moved.
//!
//! Source: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI
//! 2016, section 3.4.

use crate::abi::Tuple;
use crate::family::{Family, mix};

/// Returns the slot of a tuple in a range of `size` slots: below `size`, or 0 if `size` is 0.
///
/// The hash has no seed, so that a tuple has the same slot on every node.
#[inline(always)]
pub fn slot<F: Family>(tuple: &Tuple<F::Address>, size: u32) -> u32 {
    scale(hash::<F>(tuple), size)
}

/// Hashes a tuple to 32 bits.
#[inline(always)]
pub fn hash<F: Family>(tuple: &Tuple<F::Address>) -> u32 {
    let ports = u32::from(tuple.source_port) << 16 | u32::from(tuple.destination_port);
    let hash = mix(F::hash(&tuple.source) ^ ports);
    mix(hash ^ F::hash(&tuple.destination).rotate_left(8) ^ u32::from(tuple.protocol))
}

/// Returns a client's hash in a round of its affinity. The steps are a golden section of the
/// circle, so that any few rounds are spread over all of it.
#[inline(always)]
pub fn in_round(hash: u32, round: u16) -> u32 {
    hash.wrapping_add(u32::from(round).wrapping_mul(0x9e37_79b9))
}

/// Maps 32 uniform bits to `0..size` by multiplication, without a division.
#[inline(always)]
pub fn scale(hash: u32, size: u32) -> u32 {
    (u64::from(hash).wrapping_mul(u64::from(size)) >> 32) as u32
}

/// Minimum number of slots of a range that has backends.
pub const SIZE_MIN: u32 = 61;
/// Maximum number of slots of a range: the largest prime below 2^16.
pub const SIZE_MAX: u32 = 65_521;
/// Minimum number of slots for each backend of a range.
pub const SLOTS_PER_BACKEND: u32 = 16;

/// Returns the number of slots for a number of backends: a prime, at least [`SLOTS_PER_BACKEND`]
/// for each backend as far as [`SIZE_MAX`] allows.
///
/// Sizes are the largest primes below 64, 96, 128, 192, 256, ..., 65 536. If each number of
/// backends had a size of its own, each change would move most slots, since a tuple's slot and a
/// backend's preference both depend on the size. Besides, such primes leave no gap between ranges
/// of whole blocks.
pub fn size(backends: u32) -> u32 {
    let wanted = backends.saturating_mul(SLOTS_PER_BACKEND);
    let mut bound: u32 = 64;
    while bound < 1 << 16 {
        let half = bound.wrapping_add(bound >> 1);
        for bound in [bound, half] {
            let size = prime_below(bound);
            if size >= wanted {
                return size;
            }
        }
        bound = bound.wrapping_shl(1);
    }
    SIZE_MAX
}

/// Returns the next smaller size that [`size`] may return, or 0 below [`SIZE_MIN`].
pub fn smaller(size: u32) -> u32 {
    let mut smaller = 0;
    let mut bound: u32 = 64;
    while bound <= 1 << 16 {
        for bound in [bound, bound.wrapping_add(bound >> 1)] {
            let candidate = prime_below(bound);
            if candidate >= size {
                return smaller;
            }
            smaller = candidate;
        }
        bound = bound.wrapping_shl(1);
    }
    smaller
}

/// Returns the largest prime below an even bound of at least 4.
fn prime_below(bound: u32) -> u32 {
    let mut candidate = bound.wrapping_sub(1);
    while candidate > 2 && !is_prime(candidate) {
        candidate = candidate.wrapping_sub(2);
    }
    candidate
}

/// Trial division: at most 128 divisors for the numbers that occur here.
fn is_prime(odd: u32) -> bool {
    let mut divisor: u32 = 3;
    while divisor.wrapping_mul(divisor) <= odd {
        if odd.checked_rem(divisor) == Some(0) {
            return false;
        }
        divisor = divisor.wrapping_add(2);
    }
    true
}

/// A backend while a table is built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    hash: u64,
    id: u32,
    position: u32,
    stride: u32,
}

impl Turn {
    /// Returns the turn of a backend whose slots will hold `id` (not 0). The id has no influence on
    /// the table.
    pub fn new<F: Family>(address: &F::Address, port: u16, id: u32) -> Self {
        let (mut high, mut low) = (mix(u32::from(port)), mix(!u32::from(port)));
        for word in F::words(address) {
            let word = u32::from_be(word);
            high = mix(high ^ word);
            low = mix(low.wrapping_add(word).wrapping_mul(0x9e37_79b1));
        }
        Self { hash: u64::from(high) << 32 | u64::from(low), id, position: 0, stride: 0 }
    }
}

/// Fills a table with the ids of backends, or with 0 if there are none.
///
/// The number of slots must be prime. The order of the turns has no influence. If there are more
/// backends than slots, the last ones in order of their hashes get none.
pub fn fill(turns: &mut [Turn], slots: &mut [u32]) {
    slots.fill(0);
    let size = slots.len() as u32;
    turns.sort_unstable_by_key(|turn| turn.hash);
    for turn in &mut *turns {
        turn.position = scale((turn.hash >> 32) as u32, size);
        turn.stride = scale(turn.hash as u32, size.saturating_sub(1)).wrapping_add(1);
    }
    let mut free = if turns.is_empty() { 0 } else { size };
    while free > 0 {
        for turn in &mut *turns {
            if free == 0 {
                return;
            }
            // A free slot exists and the walk reaches every slot, so it ends.
            loop {
                let Some(slot) = slots.get_mut(turn.position as usize) else { return };
                turn.position = turn.position.wrapping_add(turn.stride);
                if turn.position >= size {
                    turn.position = turn.position.wrapping_sub(size);
                }
                if *slot == 0 {
                    *slot = turn.id;
                    break;
                }
            }
            free = free.wrapping_sub(1);
        }
    }
}
