//! A line to the API server that can be slow, or break.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{sleep, spawn};
use std::time::Duration;

use anyhow::Result;

use super::control_plane::{ControlPlane, PORT};

/// A relay before the API server, on its host.
pub(crate) struct Line {
    port: u16,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Bytes of the server that pass per millisecond, or 0 for no limit.
    rate: AtomicU64,
    /// Bytes of the server after which each connection breaks; 0: never.
    span: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
    made: AtomicU64,
}

impl Line {
    /// Returns a line without delay or loss; its threads end with the process.
    pub(crate) fn new(plane: &ControlPlane) -> Result<Self> {
        plane.host().enter(|| {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            let port = listener.local_addr()?.port();
            let state = Arc::new(State::default());
            let accepting = Arc::clone(&state);
            // A thread inherits the namespace of the one that starts it.
            drop(spawn(move || {
                for near in listener.incoming().flatten() {
                    let server = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
                    if let Ok(far) = TcpStream::connect_timeout(&server, Duration::from_secs(5)) {
                        let _ = accepting.connect(near, far);
                    }
                }
            }));
            Ok(Self { port, state })
        })?
    }

    /// Returns the port that it listens on.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Lets so many of the server's bytes through in a second; 0: all.
    pub(crate) fn set_rate(&self, bytes_per_second: u64) {
        self.state.rate.store(bytes_per_second / 1000, Ordering::Relaxed);
    }

    /// Breaks each new connection after so many of the server's bytes; 0: none.
    pub(crate) fn set_span(&self, bytes: u64) {
        self.state.span.store(bytes, Ordering::Relaxed);
    }

    /// Breaks all connections.
    pub(crate) fn cut(&self) {
        for stream in self.state.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // The other side may have closed it already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Returns the number of connections made so far.
    pub(crate) fn made(&self) -> u64 {
        self.state.made.load(Ordering::Relaxed)
    }
}

impl State {
    fn connect(self: &Arc<Self>, near: TcpStream, far: TcpStream) -> io::Result<()> {
        let _ = self.made.fetch_add(1, Ordering::Relaxed);
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend([near.try_clone()?, far.try_clone()?]);
        let (requests, answers) = ((near.try_clone()?, far.try_clone()?), (far, near));
        let (rate, span) = (Arc::clone(self), self.span.load(Ordering::Relaxed));
        drop(spawn(move || carry(requests.0, requests.1, 0, || 0)));
        drop(spawn(move || {
            carry(answers.0, answers.1, span, || rate.rate.load(Ordering::Relaxed));
        }));
        Ok(())
    }
}

/// Copies until either side ends or `span` bytes (if not 0) are through, at most `rate` (if not 0)
/// in a millisecond.
fn carry(mut from: TcpStream, mut to: TcpStream, span: u64, rate: impl Fn() -> u64) {
    let mut buffer = [0; 2048];
    let mut carried = 0;
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let piece = buffer.get(..count).unwrap_or_default();
        if to.write_all(piece).is_err() {
            break;
        }
        carried += count as u64;
        if span != 0 && carried >= span {
            break;
        }
        if let Some(pause) = (count as u64).checked_div(rate()) {
            sleep(Duration::from_millis(pause));
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
