//! A packet in memory, for the path to read and rewrite.

#[cfg(not(target_arch = "bpf"))]
use alloc::{vec, vec::Vec};

use crate::packet::checksum::Delta;
use crate::packet::crc32c;
use crate::packet::header::Wire;
use crate::packet::parse::Packet;
#[cfg(not(target_arch = "bpf"))]
use crate::packet::rewrite::Resize;
use crate::packet::rewrite::{Checksum, Edit};

/// A frame in memory.
#[derive(Clone, Debug)]
pub struct Bytes<B> {
    /// The bytes from the first header on.
    pub bytes: B,
    /// Whether the transport checksum is the pseudo-header's sum alone, to be completed by the
    /// device.
    pub partial: bool,
}

impl<B: AsRef<[u8]>> Packet for Bytes<B> {
    fn length(&self) -> u32 {
        self.bytes.as_ref().len() as u32
    }

    fn read<T: Wire>(&self, offset: u32) -> Option<T> {
        let bytes = self.bytes.as_ref().get(offset as usize..)?.get(..size_of::<T>())?;
        // SAFETY: the slice has the size of the type, and any bytes are a value of it.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> Edit for Bytes<B> {
    fn store<T: Wire>(&mut self, offset: u32, value: T) -> bool {
        let rest = AsMut::<[u8]>::as_mut(&mut self.bytes).get_mut(offset as usize..);
        let Some(bytes) = rest.and_then(|rest| rest.get_mut(..size_of::<T>())) else {
            return false;
        };
        // SAFETY: the slice has the size of the type, which has no padding.
        unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
        true
    }

    fn store_unbalanced<T: Wire>(&mut self, offset: u32, value: T) -> bool {
        self.store(offset, value)
    }

    fn network_checksum(&mut self, offset: u32, delta: Delta) -> bool {
        self.read::<u16>(offset).is_some_and(|old| self.store(offset, delta.apply(old)))
    }

    fn transport_checksum(
        &mut self,
        offset: u32,
        addresses: Delta,
        data: Delta,
        kind: Checksum,
    ) -> bool {
        let Some(old) = self.read::<u16>(offset) else { return false };
        let new = match (self.partial, kind) {
            (true, _) => !addresses.apply(!old),
            (false, Checksum::Plain) => addresses.and(data).apply(old),
            (false, Checksum::Udp) => addresses.and(data).apply_udp(old),
        };
        self.store(offset, new)
    }

    fn sctp_checksum(&mut self, offset: u32, change: u32, length: u32) -> bool {
        let Some(old) = self.read::<u32>(offset) else { return false };
        self.store_unbalanced(offset, crc32c::updated(old, change, length))
    }
}

#[cfg(not(target_arch = "bpf"))]
impl<B: AsRef<[u8]> + AsMut<[u8]> + AsMut<Vec<u8>>> Resize for Bytes<B> {
    type Quote = Vec<u8>;

    fn grow_head(&mut self, bytes: u32) -> bool {
        let frame: &mut Vec<u8> = self.bytes.as_mut();
        let _ = frame.splice(..0, vec![0; bytes as usize]);
        true
    }

    fn set_length(&mut self, bytes: u32) -> bool {
        let frame: &mut Vec<u8> = self.bytes.as_mut();
        frame.resize(bytes as usize, 0);
        true
    }

    fn room_for_quote() -> Vec<u8> {
        Vec::new()
    }

    fn quote(&self, offset: u32, length: u32, into: &mut Vec<u8>) -> Option<u64> {
        let quote = self.bytes.as_ref().get(offset as usize..)?.get(..length as usize)?;
        into.extend(quote);
        let halves = quote.chunks_exact(2).map(|half| match half {
            [a, b] => u64::from(u16::from_ne_bytes([*a, *b])),
            _ => 0,
        });
        Some(halves.sum())
    }

    fn store_quote(&mut self, offset: u32, length: u32, quote: &Vec<u8>) -> bool {
        let frame: &mut [u8] = self.bytes.as_mut();
        let place = frame.get_mut(offset as usize..);
        let place = place.and_then(|rest| rest.get_mut(..length as usize));
        match place {
            Some(place) if place.len() == quote.len() => place.copy_from_slice(quote),
            _ => return false,
        }
        true
    }
}
