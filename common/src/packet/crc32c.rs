//! Updates SCTP's checksum for a change of its ports, without reading the packet.
//!
//! # Why two multiplications are enough
//!
//! SCTP's checksum (RFC 9260 section 6.8 and appendix A) is CRC32c over the whole packet, so a
//! translator that changes a port would have to read every byte of it. But a CRC is affine over
//! GF(2): the CRCs of two messages of the same length differ by the remainder of the *difference*
//! of the messages; initial value and final complement cancel out. Read the bytes as a polynomial,
//! the first byte first and the lowest bit of each byte first. A packet of `L` bytes whose first
//! four change by `d` (old XOR new, 32 coefficients) differs by `d * x^(8 (L - 4))`; a CRC is the
//! remainder of the message times `x^32`. Hence
//!
//! ```text
//! new = old XOR (d * x^(8 L) mod P),   P = x^32 + x^28 + x^27 + x^26 + x^25 + x^23 + x^22 + x^20
//!                                        + x^19 + x^18 + x^14 + x^13 + x^11 + x^10 + x^9 + x^8 + x^6 + 1
//! ```
//!
//! An IP packet is shorter than 65 536 bytes, so `L = 256 h + l` with two digits of a byte each,
//! and `x^(8 L) = x^(8 l) * x^(2048 h)`: two constants from two tables of 256, and two
//! multiplications modulo `P` of 32 steps of shift and XOR each, however long the packet is.
//!
//! A polynomial of degree below 32 is kept *reflected*, as the CRC itself is: bit `31 - k` is the
//! coefficient of `x^k`, so 1 is `0x8000_0000`, `P` without `x^32` is `0x82f6_3b78`, and
//! multiplying by `x` is a shift to the right. Bytes read as a little-endian word are then already
//! in place, and so is the checksum in its field.
//!
//! Worked example: a COOKIE ACK, the shortest packet, goes from port 80 to port 208 instead:
//!
//! ```text
//! 9c40 0050 01020304 00000000 0b000004    CRC32c 0xfd61_faa9 (its own field counts as zero)
//! 9c40 00d0 01020304 00000000 0b000004    CRC32c 0xe5d9_10b1
//! ```
//!
//! The change is bit 7 of byte 3, the last of 32 coefficients: `d = 1`. So the CRCs must differ by
//! `x^(8 * 16) = x^128 mod P`, and `0xfd61_faa9 XOR 0xe5d9_10b1 = 0x18b8_ea18`. To check, square
//! three times: `x^16 = 0x0000_8000`, `x^32 = 0x82f6_3b78`, `x^64 = 0x6ea2_d55c`,
//! `x^128 = 0x18b8_ea18`.
//!
//! Addresses are not part of the checksum: SCTP has no pseudo-header.

/// `P` without `x^32`.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// The polynomial 1.
const ONE: u32 = 1 << 31;

/// `x^(8 l)` for every low digit of a length.
static LOW: [u32; 256] = powers(byte(ONE));
/// `x^(2048 h)` for every high digit of a length.
static HIGH: [u32; 256] = powers(power(byte(ONE), 256));

/// Returns the product modulo `P`.
#[inline(always)]
const fn product(one: u32, other: u32) -> u32 {
    // Behind the black box the compiler does not know that this is a single bit, and cannot turn it
    // into a branch: that would be 64 random branches, for the processor and for the verifier.
    let bit = core::hint::black_box(1);
    let mut other = other;
    let mut sum = 0_u32;
    let mut coefficient = 0_u32;
    // Horner's scheme, from the highest coefficient down: the sum times x, plus `one` if the
    // coefficient is 1.
    while coefficient < 32 {
        let carry = 0_u32.wrapping_sub(sum & bit);
        let term = 0_u32.wrapping_sub(other & bit);
        sum = sum >> 1 ^ POLYNOMIAL & carry ^ one & term;
        other >>= 1;
        coefficient = coefficient.wrapping_add(1);
    }
    sum
}

/// Returns the product with `x^8`.
const fn byte(polynomial: u32) -> u32 {
    product(polynomial, ONE >> 8)
}

/// Returns a polynomial to the power of `exponent`.
const fn power(polynomial: u32, exponent: u32) -> u32 {
    let mut power = ONE;
    let mut count = 0_u32;
    while count < exponent {
        power = product(power, polynomial);
        count = count.wrapping_add(1);
    }
    power
}

/// Returns the powers of a polynomial, starting with the zeroth.
#[expect(clippy::indexing_slicing, reason = "runs in the compiler alone, which checks the index")]
const fn powers(polynomial: u32) -> [u32; 256] {
    let mut powers = [ONE; 256];
    let mut exponent = 1_usize;
    while exponent < 256 {
        powers[exponent] = product(powers[exponent.wrapping_sub(1)], polynomial);
        exponent = exponent.wrapping_add(1);
    }
    powers
}

/// Returns what is to be added (XOR) to the CRC32c of `length` bytes if `change` is added to the
/// first four.
///
/// Both are little-endian words. The length counts modulo 65 536: no SCTP packet is longer.
#[inline(always)]
pub fn carried(change: u32, length: u32) -> u32 {
    let [low, high, ..] = length.to_le_bytes();
    match (LOW.get(usize::from(low)), HIGH.get(usize::from(high))) {
        (Some(low), Some(high)) => product(product(change, *low), *high),
        // A byte is below 256.
        _ => 0,
    }
}

/// Returns the checksum field of an SCTP packet of `length` bytes after `change` is added to its
/// ports, all in memory order.
///
/// Zero stays zero: either the device is yet to compute the checksum, or both ends do without (RFC
/// 9653). One packet in 2^32 has zero for its real checksum, and is lost if its ports change.
#[inline(always)]
pub fn updated(checksum: u32, change: u32, length: u32) -> u32 {
    if checksum == 0 { 0 } else { checksum ^ carried(u32::from_le(change), length).to_le() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computes the definition, a bit at a time.
    fn crc32c(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ POLYNOMIAL };
            }
        }
        !crc
    }

    /// Bytes without a pattern.
    fn noise(length: u32, seed: u32) -> Vec<u8> {
        let mut state = seed | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        };
        std::iter::repeat_with(next).take(length as usize).collect()
    }

    #[test]
    fn the_definition_gives_the_known_checksums() {
        // RFC 3720, B.4.
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
        assert_eq!(crc32c(&descending), 0x113f_db5c);
    }

    #[test]
    fn the_worked_example_holds() {
        let packet = |port| [0x9c, 0x40, 0, port, 1, 2, 3, 4, 0, 0, 0, 0, 0xb, 0, 0, 4];
        assert_eq!(crc32c(&packet(0x50)), 0xfd61_faa9);
        assert_eq!(crc32c(&packet(0xd0)), 0xe5d9_10b1);
        assert_eq!(carried(ONE, 16), 0x18b8_ea18);
        let squares: Vec<u32> =
            std::iter::successors(Some(ONE >> 16), |power| Some(product(*power, *power)))
                .take(4)
                .collect();
        assert_eq!(squares, [0x0000_8000, 0x82f6_3b78, 0x6ea2_d55c, 0x18b8_ea18]);
    }

    #[test]
    fn a_carried_change_is_that_of_a_checksum_made_anew() {
        for length in
            (16..600).chain((600..9_001).step_by(61)).chain([65_279, 65_280, 65_515, 65_535])
        {
            let old = noise(length, length.wrapping_mul(0x9e37_79b9));
            let new = [noise(4, !length), old.iter().skip(4).copied().collect()].concat();
            let word = |bytes: &[u8]| {
                bytes.iter().take(4).rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
            };
            let expected = crc32c(&old) ^ crc32c(&new);
            assert_eq!(carried(word(&old) ^ word(&new), length), expected, "{length} bytes");
        }
    }
}
