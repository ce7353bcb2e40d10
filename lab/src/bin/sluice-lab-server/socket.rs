//! Sockets with a chosen source port, and functions that both sides of a conversation share.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sluice_lab::{Event, Reply};

/// Reports an event.
pub(crate) fn report(event: &Event) {
    // Stdout is line-buffered; an event always serialises.
    println!("{}", serde_json::to_string(event).unwrap_or_default());
}

/// Returns a v4-mapped address as the v4 address it is.
pub(crate) fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Returns a v4 address as a v6 socket names it.
pub(crate) fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => {
            SocketAddr::V6(SocketAddrV6::new(ip.to_ipv6_mapped(), address.port(), 0, 0))
        }
        IpAddr::V6(_) => address,
    }
}

/// Returns the milliseconds since `start`.
pub(crate) fn ms_since(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Returns the answer `<name> <client> <data>`, and its data.
pub(crate) fn parse_reply(
    text: &str,
    seq: u64,
    from: SocketAddr,
    asked: Instant,
    start: Instant,
) -> Option<(Reply, &str)> {
    let mut words = text.splitn(3, ' ');
    let (name, seen) = (words.next()?.to_owned(), words.next()?.parse().ok()?);
    let took_us = u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX);
    Some((
        Reply { seq, name, seen, from, at_ms: ms_since(start), took_us },
        words.next().unwrap_or_default(),
    ))
}

/// Returns the unspecified address and port of a destination's family.
pub(crate) fn any(to: SocketAddr) -> SocketAddr {
    let ip: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
    SocketAddr::new(ip, 0)
}

/// Returns a UDP socket with the given address and port, or any.
pub(crate) fn udp(source: SocketAddr) -> Result<UdpSocket> {
    Ok(UdpSocket::from(bound(libc::SOCK_DGRAM, source)?))
}

/// Returns a TCP connection from the given address and port, or any.
pub(crate) fn connect(to: SocketAddr, source: SocketAddr, timeout: Duration) -> Result<TcpStream> {
    let socket = bound(libc::SOCK_STREAM, source)?;
    let stream = TcpStream::from(socket);
    // The write timeout bounds connect(2) too.
    stream.set_write_timeout(Some(timeout))?;
    let (address, length) = raw(to);
    // SAFETY: `address` is at least as long as the given length.
    if unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot connect to {to}"));
    }
    stream.set_read_timeout(Some(timeout))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn bound(kind: libc::c_int, source: SocketAddr) -> Result<OwnedFd> {
    let family = if source.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let (address, length) = raw(source);
    let on: libc::c_int = 1;
    // SAFETY: plain numbers and structures on this stack with their sizes; the descriptor is new.
    unsafe {
        let socket = libc::socket(family, kind | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(io::Error::last_os_error()).context("cannot make a socket");
        }
        let owned = OwnedFd::from_raw_fd(socket);
        let set =
            |level, option| libc::setsockopt(socket, level, option, (&raw const on).cast(), 4) == 0;
        // Lets one port connect to several destinations, one socket each; without one, connect(2)
        // picks it.
        let is_set = if source.port() != 0 {
            set(libc::SOL_SOCKET, libc::SO_REUSEADDR)
        } else {
            kind == libc::SOCK_DGRAM || set(libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT)
        };
        let is_any =
            source.port() == 0 && source.ip().is_unspecified() && kind == libc::SOCK_STREAM;
        if !is_set || !is_any && libc::bind(socket, (&raw const address).cast(), length) != 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("cannot bind to {source}"));
        }
        Ok(owned)
    }
}

/// Returns the kernel's form of an address: zeroed storage, which is large enough for both
/// families, and the length that counts.
fn raw(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all zeroes is a valid sockaddr_storage, and each family's structure fits into it with
    // its alignment.
    unsafe {
        let mut storage: libc::sockaddr_storage = std::mem::zeroed();
        let length = match address {
            SocketAddr::V4(address) => {
                let raw = &mut *(&raw mut storage).cast::<libc::sockaddr_in>();
                raw.sin_family = libc::AF_INET as libc::sa_family_t;
                raw.sin_port = address.port().to_be();
                raw.sin_addr.s_addr = u32::from_ne_bytes(address.ip().octets());
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(address) => {
                let raw = &mut *(&raw mut storage).cast::<libc::sockaddr_in6>();
                raw.sin6_family = libc::AF_INET6 as libc::sa_family_t;
                raw.sin6_port = address.port().to_be();
                raw.sin6_addr.s6_addr = address.ip().octets();
                raw.sin6_scope_id = address.scope_id();
                size_of::<libc::sockaddr_in6>()
            }
        };
        (storage, length as libc::socklen_t)
    }
}
