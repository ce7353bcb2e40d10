//! Sockets that hold what a flow would have.

use std::io::Error;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::from_ref;
use std::time::Duration;

use anyhow::{Context, Result};

use super::frame::UDP;

/// A socket that is connected, or is about to be: nobody answers. Its address may be anybody's.
pub(crate) fn connected(protocol: u8, at: SocketAddr, to: SocketAddr) -> Result<OwnedFd> {
    let (family, level, transparent) = match at {
        SocketAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        SocketAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
    };
    let kind = if protocol == UDP { libc::SOCK_DGRAM } else { libc::SOCK_STREAM };
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(Error::last_os_error()).context("cannot make a socket");
    }
    // SAFETY: the descriptor is ours.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let (on, length) = (1, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the option is a live integer of this length.
    if unsafe {
        libc::setsockopt(fd, level, transparent, from_ref::<libc::c_int>(&on).cast(), length)
    } != 0
    {
        return Err(Error::last_os_error()).context("cannot make a socket transparent");
    }
    let bind = || {
        call(at, |address, length| {
            // SAFETY: the address is live and has this length.
            unsafe { libc::bind(socket.as_raw_fd(), address, length) }
        })
    };
    // A process that another test has just forked holds the sockets of the case before, until it
    // runs a program.
    let mut bound = bind();
    for _ in 0..100 {
        if bound.as_ref().err().and_then(Error::raw_os_error) != Some(libc::EADDRINUSE) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        bound = bind();
    }
    bound.with_context(|| format!("cannot bind to {at}"))?;
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
