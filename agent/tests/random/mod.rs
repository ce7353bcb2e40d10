//! Random manifests and packets, reproducible by a number.

use anyhow::{Context, Result};

pub(crate) mod frame;
pub(crate) mod scene;

/// A source of randomness: SplitMix64, whose one number determines all that follow.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number in 0..sides.
    pub(crate) fn roll(&mut self, sides: u16) -> u16 {
        (self.next() % u64::from(sides)) as u16
    }

    /// Returns true once in this many times.
    pub(crate) fn one_in(&mut self, times: u16) -> bool {
        self.roll(times) == 0
    }

    /// Returns one of several values with equal probability.
    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.roll(of.len() as u16))]
    }
}

/// Returns the number in an environment variable.
pub(crate) fn number_from(variable: &str) -> Result<Option<u64>> {
    let Some(text) = std::env::var_os(variable) else { return Ok(None) };
    let number = text.to_str().and_then(|text| text.parse().ok());
    Ok(Some(number.with_context(|| format!("{variable} is no number"))?))
}
