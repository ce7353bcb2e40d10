//! An overlay in a few lines: packets of a headerless tun device, carried as UDP payload.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use sluice_lab::Event;

use crate::socket::report;

#[derive(Args)]
pub(crate) struct Relaying {
    /// A tun device that exists.
    #[arg(long)]
    tun: String,
    /// The address that the other relays send to.
    #[arg(long)]
    bind: SocketAddr,
    /// `<n>=<address>`: the relay of the pods `10.244.<n>.0/24` and `fd00:10:244:<n>::/64`.
    #[arg(long, value_parser = parse_peer)]
    peer: Vec<(u8, SocketAddr)>,
}

fn parse_peer(text: &str) -> Result<(u8, SocketAddr)> {
    let (number, address) =
        text.split_once('=').ok_or_else(|| anyhow!("expected <n>=<address>"))?;
    Ok((number.parse()?, address.parse()?))
}

pub(crate) fn relay(relaying: &Relaying) -> Result<()> {
    let mut tun = open_tun(&relaying.tun)
        .with_context(|| format!("cannot open the tun device {}", relaying.tun))?;
    let socket = UdpSocket::bind(relaying.bind)
        .with_context(|| format!("cannot bind to {}", relaying.bind))?;
    hold_bursts(&socket)?;
    let (mut tun_in, socket_in) = (tun.try_clone()?, socket.try_clone()?);
    report(&Event::Listening { address: socket.local_addr()? });
    let _ = thread::spawn(move || {
        let mut packet = vec![0u8; 65_536];
        loop {
            if let Ok((length, _)) = socket_in.recv_from(&mut packet) {
                let _ = packet.get(..length).map(|packet| tun_in.write(packet));
            }
        }
    });
    let peers: BTreeMap<u8, SocketAddr> = relaying.peer.iter().copied().collect();
    let mut packet = vec![0u8; 65_536];
    loop {
        let length = tun.read(&mut packet).context("the tun device is gone")?;
        let packet = packet.get(..length).unwrap_or_default();
        if let Some(peer) = pod_range_of(packet).and_then(|number| peers.get(&number)) {
            // The packet is lost, as on a wire.
            let _ = socket.send_to(packet, peer);
        }
    }
}

/// Gives a socket room for more packets than TCP sends at once while this process waits for a CPU.
/// No test is about packets that a tun device loses.
fn hold_bursts(socket: &UdpSocket) -> Result<()> {
    let bytes: libc::c_int = 16 << 20;
    // SAFETY: the option takes an integer, which lives until the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    ensure!(result == 0, "cannot set SO_RCVBUFFORCE: {}", io::Error::last_os_error());
    Ok(())
}

/// Returns the `<n>` of the destination: `10.244.<n>.x` or, written alike, `fd00:10:244:<n>::`.
fn pod_range_of(packet: &[u8]) -> Option<u8> {
    if packet.first()? >> 4 == 4 {
        return packet.get(18).copied();
    }
    let group = u16::from_be_bytes([*packet.get(30)?, *packet.get(31)?]);
    format!("{group:x}").parse().ok()
}

fn open_tun(name: &str) -> Result<File> {
    ensure!(name.len() < libc::IFNAMSIZ, "the name is too long");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun")?;
    // SAFETY: an all-zero ifreq is valid; its name stays NUL-terminated by the check above; the
    // ioctl reads and writes an ifreq.
    let attached = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request)
    };
    if attached != 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(file)
}
