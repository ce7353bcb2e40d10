//! Randomness that depends on a seed alone.
//!
//! The fate of one packet must not depend on the other packets, because a trace is shortened by
//! leaving out events. Most random numbers are therefore not drawn from a stream, but [mixed](mix)
//! from the seed and the packet's identity.

/// Mixes numbers into one.
#[must_use]
pub fn mix(words: &[u64]) -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in words {
        state = finish(state ^ *word).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
    finish(state)
}

/// Applies the finalizer of splitmix64.
fn finish(word: u64) -> u64 {
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    /// Creates the stream for a seed of several numbers.
    #[must_use]
    pub fn new(words: &[u64]) -> Self {
        Self { seed: mix(words), drawn: 0 }
    }

    /// Returns the next number.
    pub fn draw(&mut self) -> u64 {
        self.drawn += 1;
        mix(&[self.seed, self.drawn])
    }

    /// Returns a number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.draw() % end.max(1)
    }

    /// Returns a number from a range, its end excluded.
    pub fn between(&mut self, start: u64, end: u64) -> u64 {
        start + self.below(end.saturating_sub(start))
    }

    /// Returns true in `per_mille` of a thousand cases.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1_000) < per_mille
    }

    /// Returns one of several values.
    ///
    /// # Panics
    ///
    /// Panics if there is none.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}
