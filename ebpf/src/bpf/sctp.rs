//! SCTP's checksum.

use sluice_common::packet::crc32c;

/// Performs [`crc32c::updated`] as a global function (see `decide`), so that its steps are verified
/// once.
#[unsafe(no_mangle)]
#[inline(never)]
pub(super) extern "C" fn sctp_updated(checksum: u32, change: u32, length: u32) -> u32 {
    crc32c::updated(checksum, change, length)
}
