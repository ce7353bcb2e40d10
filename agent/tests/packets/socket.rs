//! Sockets of this host that stand in the way of masqueraded clients.

use std::io::Error;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::from_ref;

use anyhow::{Context, Result};

use super::frame::UDP;

/// A socket that is connected, or is about to be: nobody answers.
pub(crate) fn connected(protocol: u8, at: SocketAddr, to: SocketAddr) -> Result<OwnedFd> {
    if protocol == UDP {
        let socket = UdpSocket::bind(at).with_context(|| format!("cannot bind to {at}"))?;
        socket.connect(to).with_context(|| format!("cannot connect to {to}"))?;
        return Ok(socket.into());
    }
    let family = if at.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(Error::last_os_error()).context("cannot make a socket");
    }
    // SAFETY: the descriptor is ours.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    call(at, |address, length| {
        // SAFETY: the address is live and has this length.
        unsafe { libc::bind(socket.as_raw_fd(), address, length) }
    })
    .with_context(|| format!("cannot bind to {at}"))?;
    let connecting = call(to, |address, length| {
        // SAFETY: as above.
        unsafe { libc::connect(socket.as_raw_fd(), address, length) }
    });
    match connecting {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
            Err(error).with_context(|| format!("cannot connect to {to}"))
        }
        _ => Ok(socket),
    }
}

/// A socket that listens, or receives from everybody.
pub(crate) fn listening(protocol: u8, at: SocketAddr) -> Result<OwnedFd> {
    let socket = if protocol == UDP {
        UdpSocket::bind(at).map(OwnedFd::from)
    } else {
        TcpListener::bind(at).map(OwnedFd::from)
    };
    socket.with_context(|| format!("cannot listen on {at}"))
}

/// Calls with an address as the kernel has it.
fn call(
    address: SocketAddr,
    function: impl Fn(*const libc::sockaddr, libc::socklen_t) -> libc::c_int,
) -> Result<(), Error> {
    let status = match address {
        SocketAddr::V4(address) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                sin_zero: [0; 8],
            };
            function(from_ref(&raw).cast(), size_of_val(&raw) as libc::socklen_t)
        }
        SocketAddr::V6(address) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: 0,
            };
            function(from_ref(&raw).cast(), size_of_val(&raw) as libc::socklen_t)
        }
    };
    if status == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}
