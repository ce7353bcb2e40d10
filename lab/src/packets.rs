//! Packets on a device: captured as text by tcpdump, or sent and received raw.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::namespace::Namespace;
use crate::running::Running;

/// A running tcpdump and its output.
pub struct Capture {
    tcpdump: Running,
}

impl Capture {
    pub(crate) fn start(namespace: &Namespace, device: &str, filter: &str) -> Result<Self> {
        // -e: Ethernet headers, -vv: checksums, TTL and options, -l and --immediate-mode: every
        // packet at once.
        let mut args = vec!["-n", "-e", "-vv", "-l", "--immediate-mode", "-i", device];
        if !filter.is_empty() {
            args.push(filter);
        }
        let mut tcpdump = namespace.spawn("tcpdump", args)?;
        tcpdump.wait_until("`listening on`", Duration::from_secs(5), |this| {
            this.stderr().contains("listening on").then_some(())
        })?;
        Ok(Self { tcpdump })
    }

    /// Returns the output so far (`tcpdump -n -e -vv`, more than one line per packet).
    pub fn text(&self) -> String {
        self.tcpdump.stdout()
    }

    /// Waits until the output contains a string, and returns the output.
    pub fn wait_for(&mut self, wanted: &str, timeout: Duration) -> Result<String> {
        self.tcpdump.wait_until(&format!("a packet with `{wanted}`"), timeout, |this| {
            let text = this.stdout();
            text.contains(wanted).then_some(text)
        })
    }

    /// Lets packets in flight arrive, ends the capture, and returns its output.
    pub fn finish(mut self) -> Result<String> {
        sleep(Duration::from_millis(50));
        self.tcpdump.signal(libc::SIGINT)?;
        let _ = self.tcpdump.wait(Duration::from_secs(3))?;
        Ok(self.tcpdump.stdout())
    }
}

/// An `AF_PACKET` socket on one device. It receives the device's incoming frames, not those that
/// this host sends.
pub struct PacketSocket {
    socket: OwnedFd,
    what: String,
}

impl PacketSocket {
    pub(crate) fn open(namespace: &Namespace, device: &str) -> Result<Self> {
        let what = format!("{device} in the namespace {}", namespace.name());
        let socket = namespace
            .enter(|| open(device))?
            .with_context(|| format!("cannot open a packet socket on {what}"))?;
        Ok(Self { socket, what })
    }

    /// Sends one frame, from its Ethernet header on.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: the buffer has the length that is passed.
        let sent =
            unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("cannot send {} bytes on {}", frame.len(), self.what));
        }
        Ok(())
    }

    /// Receives frames until one is the wanted one.
    ///
    /// # Errors
    /// If none arrives in time.
    pub fn receive(&self, timeout: Duration, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        let deadline = Instant::now() + timeout;
        let mut buffer = vec![0u8; 65_536];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut poll =
                libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd is passed, and its number.
            let ready = unsafe {
                libc::poll(&raw mut poll, 1, i32::try_from(left.as_millis()).unwrap_or(i32::MAX))
            };
            if ready == 0 {
                bail!("waited {timeout:?} in vain for a frame on {}", self.what);
            }
            // SAFETY: the buffer has the length that is passed.
            let length = unsafe {
                libc::recv(
                    self.socket.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    libc::MSG_DONTWAIT,
                )
            };
            let Ok(length) = usize::try_from(length) else {
                let error = io::Error::last_os_error();
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) {
                    continue;
                }
                return Err(error).with_context(|| format!("cannot receive on {}", self.what));
            };
            if let Some(frame) = buffer.get(..length).filter(|frame| wanted(frame)) {
                return Ok(frame.to_vec());
            }
        }
    }
}

fn open(device: &str) -> Result<OwnedFd> {
    let name = CString::new(device)?;
    let protocol = u16::try_from(libc::ETH_P_ALL).context("ETH_P_ALL")?.to_be();
    // SAFETY: plain numbers and structures on this stack with their sizes; the descriptor is new.
    unsafe {
        let index = libc::if_nametoindex(name.as_ptr());
        if index == 0 {
            bail!("there is no such device");
        }
        // No protocol yet: nothing is received before the socket is bound to its device.
        let raw = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if raw < 0 {
            return Err(io::Error::last_os_error().into());
        }
        let socket = OwnedFd::from_raw_fd(raw);
        let on: libc::c_int = 1;
        if libc::setsockopt(
            raw,
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            (&raw const on).cast(),
            4,
        ) != 0
        {
            return Err(io::Error::last_os_error().into());
        }
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = u16::try_from(libc::AF_PACKET)?;
        address.sll_protocol = protocol;
        address.sll_ifindex = index.cast_signed();
        if libc::bind(raw, (&raw const address).cast(), u32::try_from(size_of_val(&address))?) != 0
        {
            return Err(io::Error::last_os_error().into());
        }
        Ok(socket)
    }
}
