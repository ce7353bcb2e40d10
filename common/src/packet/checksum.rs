//! One's complement checksums (RFC 1071) and their incremental update (RFC 1624).
//!
//! # Why a delta, and why two
//!
//! A translator knows which fields it changes and must not read the payload, so it carries the
//! *difference*: for every 16-bit field that goes from `m` to `m'`, the checksum `C` becomes
//! `C' = ~(~C + ~m + m')`, all in one's complement. Byte order does not matter as long as sum and
//! fields share it, so everything here is in memory order.
//!
//! Worked example: destination `10.96.0.10` -> `10.244.1.2`, checksum `0x1c46`.
//! Words `0x0a60 0x000a` -> `0x0af4 0x0102`: `~0x0a60 + ~0x000a + 0x0af4 + 0x0102`
//! `= 0xf59f + 0xfff5 + 0x0af4 + 0x0102 = 0x2018a`, folded `0x018c`.
//! `~0x1c46 + 0x018c = 0xe3b9 + 0x018c = 0xe545`, so the new checksum is `0x1aba`.
//!
//! A segment whose checksum a local sender leaves to the device has a *partial* checksum: the field
//! holds the sum of the pseudo-header alone, not complemented. Then addresses count, as they are in
//! the pseudo-header, and ports do not. A rewrite therefore keeps two deltas, and only the kernel's
//! helpers, which know the kind of segment, apply them to an skb.
//!
//! UDP over IPv4 may carry no checksum: zero stays zero, and a computed zero is sent as `0xffff`,
//! which is equivalent.

/// A change of summed bytes: the unfolded one's complement sum of `~old + new`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(u64);

impl Delta {
    /// No change.
    pub const ZERO: Self = Self(0);

    /// Adds a change of a 32-bit word, in memory order, from `old` to `new`.
    #[inline(always)]
    #[must_use]
    pub fn word(self, old: u32, new: u32) -> Self {
        Self(self.0.wrapping_add(u64::from(!old)).wrapping_add(u64::from(new)))
    }

    /// Adds a change of a 16-bit field, in memory order, from `old` to `new`.
    #[inline(always)]
    #[must_use]
    pub fn half(self, old: u16, new: u16) -> Self {
        Self(self.0.wrapping_add(u64::from(!old)).wrapping_add(u64::from(new)))
    }

    /// Combines two changes.
    #[inline(always)]
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }

    /// Reports whether the change leaves every checksum as it is. Bytes may have changed all the
    /// same: all ones became zero.
    #[inline(always)]
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Folds the change to 32 bits, the form that the kernel's checksum helpers take.
    #[inline(always)]
    pub fn fold32(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff).wrapping_add(self.0 >> 32);
        (sum & 0xffff_ffff).wrapping_add(sum >> 32) as u32
    }

    /// Returns the checksum field after the change, for a full checksum.
    #[inline(always)]
    pub fn apply(self, checksum: u16) -> u16 {
        !fold16(self.0.wrapping_add(u64::from(!checksum)))
    }

    /// As [`Delta::apply`], by UDP's rules for zero.
    #[inline(always)]
    pub fn apply_udp(self, checksum: u16) -> u16 {
        if checksum == 0 {
            return 0;
        }
        match self.apply(checksum) {
            0 => 0xffff,
            new => new,
        }
    }
}

/// Folds a sum to 16 bits.
#[inline(always)]
pub fn fold16(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff).wrapping_add(sum >> 32);
    let sum = (sum & 0xffff).wrapping_add(sum >> 16 & 0xffff).wrapping_add(sum >> 32);
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    (sum & 0xffff).wrapping_add(sum >> 16) as u16
}

/// Returns the unfolded sum of words in memory order.
#[inline(always)]
pub fn sum_words<const N: usize>(words: &[u32; N]) -> u64 {
    let mut sum = 0_u64;
    for word in words {
        sum = sum.wrapping_add(u64::from(*word));
    }
    sum
}

/// Returns the unfolded sum of a pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1).
#[inline(always)]
pub fn pseudo_header(source: &[u32; 4], destination: &[u32; 4], protocol: u8, length: u32) -> u64 {
    sum_words(source)
        .wrapping_add(sum_words(destination))
        .wrapping_add(u64::from(u32::from(protocol).to_be()))
        .wrapping_add(u64::from(length.to_be()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worked_example_holds() {
        let delta = Delta::ZERO
            .word(u32::from_ne_bytes([10, 96, 0, 10]), u32::from_ne_bytes([10, 244, 1, 2]));
        assert_eq!(u16::from_be(delta.apply(0x1c46_u16.to_be())), 0x1aba);
    }

    #[test]
    fn a_missing_udp_checksum_stays_missing_and_a_computed_zero_is_sent_as_ffff() {
        assert_eq!(Delta::ZERO.half(1, 2).apply_udp(0), 0);
        // ~C + ~m + m' = 0xffff: the new checksum would be zero.
        let delta = Delta::ZERO.half(0, 0x1234);
        assert_eq!(delta.apply(0x1234), 0);
        assert_eq!(delta.apply_udp(0x1234), 0xffff);
    }
}
