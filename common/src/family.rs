//! The two address families, so that everything else is written only once.

use core::fmt::Debug;
use core::net::{Ipv4Addr, Ipv6Addr};

use crate::abi::{Address, Device, Ipv4Address, Ipv6Address};

/// An address family. Implemented by [`V4`] and [`V6`] alone.
pub trait Family: Copy + Debug + Eq + 'static {
    /// The address type.
    type Address: Address;

    /// 4 or 6.
    const VERSION: u8;
    /// Ethertype in host order.
    const ETHERTYPE: u16;
    /// Protocol number of the family's ICMP.
    const ICMP: u8;
    /// Length of the IP header without options or extensions, bytes.
    const HEADER: u32;
    /// Offset of the source address in the IP header; the destination follows it.
    const SOURCE: u32;

    /// Hashes an address to 32 bits.
    fn hash(address: &Self::Address) -> u32;
    /// Returns the address's 32-bit words in memory order (one, or four).
    fn words(address: &Self::Address) -> [u32; 4];
    /// Returns the address that backends behind a device see in place of masqueraded clients'; zero
    /// if there is none.
    fn masquerade(device: &Device) -> Self::Address;
    /// Reports whether an address is a loopback one, which no other host may send to or from.
    fn is_loopback(address: &Self::Address) -> bool;
    /// Reports whether an address belongs to one link alone. IPv4's link-local ones do not: the
    /// kernel serves them on all devices.
    fn is_of_link(address: &Self::Address) -> bool;
}

/// IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V6;

/// Finalizer of MurmurHash3: every input bit reaches every output bit.
#[inline(always)]
pub(crate) fn mix(word: u32) -> u32 {
    let word = (word ^ word >> 16).wrapping_mul(0x85eb_ca6b);
    let word = (word ^ word >> 13).wrapping_mul(0xc2b2_ae35);
    word ^ word >> 16
}

impl Family for V4 {
    type Address = Ipv4Address;
    const VERSION: u8 = 4;
    const ETHERTYPE: u16 = 0x0800;
    const ICMP: u8 = 1;
    const HEADER: u32 = 20;
    const SOURCE: u32 = 12;

    #[inline(always)]
    fn hash(address: &Ipv4Address) -> u32 {
        mix(u32::from_be_bytes(address.octets))
    }

    #[inline(always)]
    fn words(address: &Ipv4Address) -> [u32; 4] {
        [u32::from_ne_bytes(address.octets), 0, 0, 0]
    }

    #[inline(always)]
    fn masquerade(device: &Device) -> Ipv4Address {
        device.masquerade_v4
    }

    #[inline(always)]
    fn is_loopback(address: &Ipv4Address) -> bool {
        let [first, ..] = address.octets;
        first == 127
    }

    #[inline(always)]
    fn is_of_link(_: &Ipv4Address) -> bool {
        false
    }
}

impl Family for V6 {
    type Address = Ipv6Address;
    const VERSION: u8 = 6;
    const ETHERTYPE: u16 = 0x86dd;
    const ICMP: u8 = 58;
    const HEADER: u32 = 40;
    const SOURCE: u32 = 8;

    #[inline(always)]
    fn hash(address: &Ipv6Address) -> u32 {
        let [a, b, c, d] = Self::words(address);
        let hash = mix(u32::from_be(a));
        let hash = mix(hash ^ u32::from_be(b));
        let hash = mix(hash ^ u32::from_be(c));
        mix(hash ^ u32::from_be(d))
    }

    #[inline(always)]
    fn words(address: &Ipv6Address) -> [u32; 4] {
        // SAFETY: same size, and any bytes are a value of either type.
        unsafe { core::mem::transmute::<[u8; 16], [u32; 4]>(address.octets) }
    }

    #[inline(always)]
    fn masquerade(device: &Device) -> Ipv6Address {
        device.masquerade_v6
    }

    #[inline(always)]
    fn is_loopback(address: &Ipv6Address) -> bool {
        let [a, b, c, d] = Self::words(address);
        a | b | c == 0 && d == 1_u32.to_be()
    }

    #[inline(always)]
    fn is_of_link(address: &Ipv6Address) -> bool {
        let [first, second, ..] = address.octets;
        first == 0xfe && second & 0xc0 == 0x80
    }
}

/// Returns the lane of `addresses` with an address's bits: word index and shift.
#[inline(always)]
pub fn lane<F: Family>(address: &F::Address) -> (u32, u32) {
    let lanes = crate::abi::ADDRESS_WORDS * 16;
    let lane = F::hash(address) & (lanes - 1);
    (lane >> 4, (lane & 15) << 2)
}

impl From<Ipv4Addr> for Ipv4Address {
    fn from(address: Ipv4Addr) -> Self {
        Self { octets: address.octets() }
    }
}

impl From<Ipv4Address> for Ipv4Addr {
    fn from(address: Ipv4Address) -> Self {
        Self::from(address.octets)
    }
}

impl From<Ipv6Addr> for Ipv6Address {
    fn from(address: Ipv6Addr) -> Self {
        Self { octets: address.octets() }
    }
}

impl From<Ipv6Address> for Ipv6Addr {
    fn from(address: Ipv6Address) -> Self {
        Self::from(address.octets)
    }
}
