//! Reads legacy iptables, which netlink does not show.

use std::io;

/// Reads the bytes of legacy iptables' IPv4 nat table, which include the names of chains.
pub(crate) fn legacy_rules() -> io::Result<Vec<u8>> {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    const GET_INFO: libc::c_int = 64;
    const GET_ENTRIES: libc::c_int = 65;
    /// The sizes of `struct ipt_getinfo` and of the name in it, and the offset of the rules' size.
    const INFO: usize = 84;
    const NAME: usize = 32;
    const SIZE_AT: usize = 80;
    // SAFETY: no pointers.
    let fd = unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh and ours.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let ask = |option: libc::c_int, buffer: &mut [u8]| {
        let mut length = buffer.len() as libc::socklen_t;
        // SAFETY: the buffer is live and of the length given.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_IP,
                option,
                buffer.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    let mut info = vec![0_u8; INFO];
    info[..3].copy_from_slice(b"nat");
    ask(GET_INFO, &mut info)?;
    let size = u32::from_ne_bytes(info[SIZE_AT..SIZE_AT + 4].try_into().unwrap_or_default());
    // `struct ipt_get_entries`: name, size, padding to eight bytes, rules.
    let mut rules = vec![0_u8; NAME + 8 + size as usize];
    rules[..3].copy_from_slice(b"nat");
    rules[NAME..NAME + 4].copy_from_slice(&size.to_ne_bytes());
    ask(GET_ENTRIES, &mut rules)?;
    Ok(rules)
}
