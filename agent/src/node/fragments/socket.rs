//! A packet socket on our own device.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use sluice_common::path::fragment::HELD_PRIORITY;

use super::frame::Frame;
use super::outcome;

/// The room for a frame, more than any that is held.
const FRAME_MAX: usize = 2_048;

/// A socket that receives what leaves by the device, and sends there.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    device: i32,
    buffer: Vec<u8>,
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Socket {
    /// Opens the socket. Frames without room in its queue, some 200 KiB, are dropped.
    pub(super) fn open(device: u32) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        check(fd)?;
        // SAFETY: the kernel has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let socket = Self { fd, device: device.cast_signed(), buffer: vec![0; FRAME_MAX] };
        socket.set(libc::SO_PRIORITY, HELD_PRIORITY)?;
        // Only sockets of all protocols receive what leaves.
        let address = socket.address(libc::ETH_P_ALL as u16);
        // SAFETY: the address is live and of the length given.
        check(unsafe {
            libc::bind(
                socket.fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        })?;
        Ok(socket)
    }

    fn address(&self, protocol: u16) -> libc::sockaddr_ll {
        libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: protocol.to_be(),
            sll_ifindex: self.device,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        }
    }

    fn set(&self, option: libc::c_int, value: u32) -> io::Result<()> {
        // SAFETY: the value is live and of the length given.
        check(unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const value).cast(),
                size_of_val(&value) as u32,
            )
        })
    }

    /// Waits until there is something to receive. Returns false if there is nothing for this long.
    pub(super) fn wait(&self, patience: Duration) -> io::Result<bool> {
        let mut ready = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let patience = patience.as_millis() as libc::c_int;
        // SAFETY: one live struct.
        let count = unsafe { libc::poll(&raw mut ready, 1, patience) };
        Ok(outcome(count as isize)?.is_some_and(|count| count > 0))
    }

    /// Receives the next frame, if there is one.
    pub(super) fn receive(&mut self) -> io::Result<Option<&[u8]>> {
        // SAFETY: the buffer is live and of the length given.
        let result = unsafe {
            libc::recv(self.fd.as_raw_fd(), self.buffer.as_mut_ptr().cast(), self.buffer.len(), 0)
        };
        Ok(outcome(result)?.and_then(|length| self.buffer.get(..length)))
    }

    /// Whether the device no longer exists. Another device of its name is a different one.
    pub(super) fn is_device_gone(&self) -> bool {
        let mut name = [0; libc::IF_NAMESIZE];
        // SAFETY: the buffer is live and has room for any name.
        let found = unsafe { libc::if_indextoname(self.device.cast_unsigned(), name.as_mut_ptr()) };
        found.is_null()
    }

    /// Sends a frame back to where it came from.
    pub(super) fn send(&self, frame: &Frame) -> io::Result<()> {
        self.set(libc::SO_MARK, frame.mark)?;
        let address = self.address(frame.ethertype);
        // SAFETY: frame and address are live and of the lengths given.
        let result = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                frame.bytes.as_ptr().cast(),
                frame.bytes.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        };
        // A full queue drops the frame, as any queue does.
        outcome(result).map(drop)
    }
}
