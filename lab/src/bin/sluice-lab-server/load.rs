//! A steady load: connections that stay and carry requests, and new ones at a fixed rate, all
//! counted.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use sluice_lab::{Event, Load};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use tokio::time::{self, MissedTickBehavior};

use crate::socket::{plain, report};

/// The time after which a packet must have been lost: the kernel sends a SYN again after a second.
const SLOW: Duration = Duration::from_millis(900);
/// Number of failures that are described.
const TOLD: usize = 8;
/// The pause between the openings of two connections that stay.
const APART: Duration = Duration::from_millis(1);

#[derive(Args, Clone)]
pub(crate) struct Loading {
    /// `tcp-echo` servers to ask, in turns.
    #[arg(long, required = true)]
    to: Vec<SocketAddr>,
    /// Connections that stay.
    #[arg(long, default_value_t = 0)]
    hold: u32,
    /// Pause between the requests of each of them.
    #[arg(long, default_value_t = 1000)]
    interval_ms: u64,
    /// New connections a second, each for one request.
    #[arg(long, default_value_t = 0)]
    rate: u32,
    /// Milliseconds to wait for a connection or an answer.
    #[arg(long, default_value_t = 8000)]
    timeout_ms: u64,
    /// Milliseconds between two reports.
    #[arg(long, default_value_t = 100)]
    report_ms: u64,
    /// Duration in seconds; without it, until the end.
    #[arg(long)]
    seconds: Option<u64>,
}

type Counts = Rc<RefCell<Load>>;

pub(crate) fn run(loading: &Loading) -> Result<bool> {
    more_descriptors()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let counts = Counts::default();
    LocalSet::new().block_on(&runtime, drive(loading, &counts))?;
    Ok(counts.borrow().failures() == 0)
}

/// Raises the limit of descriptors to what the kernel lets this process have.
pub(crate) fn more_descriptors() -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is live.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    if raised {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).context("cannot have more descriptors")
    }
}

async fn drive(loading: &Loading, counts: &Counts) -> Result<()> {
    let begun = Instant::now();
    let at = |number: u32| loading.to.get(number as usize % loading.to.len()).copied();
    for number in 0..loading.hold {
        let to = at(number).context("nobody to ask")?;
        drop(tokio::task::spawn_local(hold(loading.clone(), to, number, Rc::clone(counts))));
        time::sleep(APART).await;
    }
    let mut next = time::interval(Duration::from_secs(1) / loading.rate.max(1));
    // Requests that a busy machine could not send in time are sent late, not left out.
    next.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut told = time::interval(Duration::from_millis(loading.report_ms.max(1)));
    told.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut number = 0;
    loop {
        tokio::select! {
            _ = next.tick(), if loading.rate > 0 => {
                let to = at(number).context("nobody to ask")?;
                drop(tokio::task::spawn_local(ask_once(loading.clone(), to, number, Rc::clone(counts))));
                number = number.wrapping_add(1);
            }
            _ = told.tick() => {
                report(&Event::Load(counts.borrow().clone()));
                if loading.seconds.is_some_and(|seconds| begun.elapsed() >= Duration::from_secs(seconds)) {
                    return Ok(());
                }
            }
        }
    }
}

/// Keeps a connection with requests until it fails.
async fn hold(loading: Loading, to: SocketAddr, number: u32, counts: Counts) {
    let mut is_open = false;
    let result = async {
        let mut line = Line::open(&loading, to, &counts).await?;
        counts.borrow_mut().held += 1;
        is_open = true;
        for seq in 0_u64.. {
            line.ask(&format!("held-{number}-{seq}"), &counts).await?;
            counts.borrow_mut().answered += 1;
            time::sleep(Duration::from_millis(loading.interval_ms)).await;
        }
        Ok(())
    };
    let failure: Result<(), io::Error> = result.await;
    let mut counts = counts.borrow_mut();
    if is_open {
        counts.held -= 1;
    }
    count(&mut counts, &format!("held connection {number} to {to}"), failure);
}

/// Opens a connection for one request.
async fn ask_once(loading: Loading, to: SocketAddr, number: u32, counts: Counts) {
    counts.borrow_mut().tried += 1;
    let result = async {
        let mut line = Line::open(&loading, to, &counts).await?;
        line.ask(&format!("new-{number}"), &counts).await
    };
    let result = result.await;
    let mut counts = counts.borrow_mut();
    if result.is_ok() {
        counts.opened += 1;
    }
    count(&mut counts, &format!("new connection {number} to {to}"), result);
}

fn count(counts: &mut Load, what: &str, result: io::Result<()>) {
    let Err(error) = result else { return };
    let is = |kinds: &[ErrorKind]| kinds.contains(&error.kind());
    let kind = if is(&[ErrorKind::ConnectionRefused]) {
        &mut counts.refused
    } else if is(&[ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::ConnectionAborted])
    {
        &mut counts.reset
    } else if is(&[ErrorKind::TimedOut]) {
        &mut counts.lost
    } else if is(&[ErrorKind::InvalidData]) {
        &mut counts.wrong
    } else {
        &mut counts.other
    };
    *kind += 1;
    if counts.told.len() < TOLD {
        counts.told.push(format!("{what}: {error}"));
    }
}

/// A connection to a `tcp-echo`.
struct Line {
    stream: BufReader<TcpStream>,
    name: String,
    timeout: Duration,
}

impl Line {
    async fn open(loading: &Loading, to: SocketAddr, counts: &Counts) -> io::Result<Self> {
        let timeout = Duration::from_millis(loading.timeout_ms);
        let begun = Instant::now();
        let stream = in_time(timeout, TcpStream::connect(to)).await?;
        stream.set_nodelay(true)?;
        let mut line = Self { stream: BufReader::new(stream), name: String::new(), timeout };
        let greeting = line.read().await?;
        greeting.split(' ').next().unwrap_or_default().clone_into(&mut line.name);
        let own = plain(line.stream.get_ref().local_addr()?);
        if line.name.is_empty() {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                format!("greeted {own} with `{greeting}`"),
            ));
        }
        took(counts, begun);
        Ok(line)
    }

    /// Sends a line, and checks that the same server answers with it.
    async fn ask(&mut self, text: &str, counts: &Counts) -> io::Result<()> {
        let begun = Instant::now();
        self.stream.get_mut().write_all(format!("{text}\n").as_bytes()).await?;
        let answer = self.read().await?;
        let mut words = answer.splitn(3, ' ');
        let (name, data) = (words.next().unwrap_or_default(), words.nth(1).unwrap_or_default());
        if name != self.name || data != text {
            let wrong = format!("asked {} for `{text}`, answered `{answer}`", self.name);
            return Err(io::Error::new(ErrorKind::InvalidData, wrong));
        }
        took(counts, begun);
        Ok(())
    }

    async fn read(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if in_time(self.timeout, self.stream.read_line(&mut line)).await? == 0 {
            return Err(io::Error::new(
                ErrorKind::ConnectionReset,
                "the server ended the connection",
            ));
        }
        Ok(line.trim_end().to_owned())
    }
}

fn took(counts: &Counts, begun: Instant) {
    let took = begun.elapsed();
    let mut counts = counts.borrow_mut();
    counts.slow += u64::from(took > SLOW);
    counts.worst_ms = counts.worst_ms.max(took.as_millis() as u64);
}

async fn in_time<T>(timeout: Duration, act: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match time::timeout(timeout, act).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(ErrorKind::TimedOut, format!("nothing within {timeout:?}"))),
    }
}
