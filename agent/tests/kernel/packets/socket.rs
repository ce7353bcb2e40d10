//! Sockets that hold the tuple that a flow would get.

use std::io::Error;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::from_ref;
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};

use super::frame::UDP;

/// Creates a socket that is connected, or is about to be, since nobody answers. Its address may be
/// anybody's, and other sockets may have it too.
pub(crate) fn connected(protocol: u8, at: SocketAddr, to: SocketAddr) -> Result<OwnedFd> {
    let kind = if protocol == UDP { Type::DGRAM } else { Type::STREAM };
    let socket = Socket::new(Domain::for_address(at), kind.nonblocking(), None)
        .context("cannot make a socket")?;
    make_transparent(&socket, at).context("cannot make a socket transparent")?;
    socket.set_reuse_address(true).context("cannot share a socket's address")?;
    // A process that another test has just forked holds the sockets of the preceding case until it
    // executes a program.
    let mut bound = socket.bind(&at.into());
    for _ in 0..100 {
        if bound.as_ref().err().and_then(Error::raw_os_error) != Some(libc::EADDRINUSE) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        bound = socket.bind(&at.into());
    }
    bound.with_context(|| format!("cannot bind to {at}"))?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
            Err(error).with_context(|| format!("cannot connect to {to}"))
        }
        _ => Ok(socket.into()),
    }
}

/// Lets a socket bind to addresses that are not this host's; socket2 can for IPv4 alone.
fn make_transparent(socket: &Socket, at: SocketAddr) -> Result<(), Error> {
    let (level, option) = match at {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
    };
    let (on, length) = (1, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the option is a live integer of this length.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            from_ref::<libc::c_int>(&on).cast(),
            length,
        )
    };
    if status == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// Creates a socket that listens, or receives from everybody.
pub(crate) fn listening(protocol: u8, at: SocketAddr) -> Result<OwnedFd> {
    let socket = if protocol == UDP {
        UdpSocket::bind(at).map(OwnedFd::from)
    } else {
        TcpListener::bind(at).map(OwnedFd::from)
    };
    socket.with_context(|| format!("cannot listen on {at}"))
}
