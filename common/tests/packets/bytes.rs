//! A packet in memory, for the path to read and rewrite.

use sluice_common::Packet;
use sluice_common::packet::checksum::Delta;
use sluice_common::packet::crc32c;
use sluice_common::packet::header::Wire;
use sluice_common::packet::rewrite::{Checksum, Edit};

/// A frame in memory.
#[derive(Clone, Debug)]
pub(crate) struct Bytes {
    pub(crate) bytes: Vec<u8>,
    /// The transport checksum is the pseudo-header's sum, the device does the rest.
    pub(crate) partial: bool,
}

impl Packet for Bytes {
    fn length(&self) -> u32 {
        self.bytes.len() as u32
    }

    fn read<T: Wire>(&self, offset: u32) -> Option<T> {
        let bytes = self.bytes.get(offset as usize..)?.get(..size_of::<T>())?;
        // SAFETY: the slice has the size of the type, and any bytes are a value of it.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }
}

impl Edit for Bytes {
    fn store<T: Wire>(&mut self, offset: u32, value: T) -> bool {
        let Some(bytes) =
            self.bytes.get_mut(offset as usize..).and_then(|bytes| bytes.get_mut(..size_of::<T>()))
        else {
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
