//! `sluice trace`: prints flows that open and close, and packets and calls that are counted by a
//! reason, as it happens.

use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use clap::Args;
use ipnet::IpNet;
use sluice_common::Reason;
use sluice_common::abi::Event;
use sluice_common::event::{At, Fate, Kind};
use sluice_core::model::object::Protocol;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use super::conntrack::time;
use super::{Outcome, runtime};
use crate::node::dataplane::{Events, Kernel, Pins, now_ns};
use crate::node::view::{self, PortName};
use crate::tools::trace::{Filter, Line, Names};

/// The interval at which the request for events is renewed: a third of the time after which the
/// programs stop.
const RENEW: Duration = Duration::from_secs(1);
/// The most events that are read before signals and timers are handled.
const AT_ONCE: usize = 1_024;

#[derive(Debug, Args)]
pub(super) struct TraceArgs {
    /// Print only events of this service: name, namespace/name or either with :port.
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,
    /// Print only packets from or to this address or CIDR, before or after translation.
    #[arg(long, value_name = "ADDRESS", value_parser = network)]
    address: Option<IpNet>,
    /// Print only packets from or to this port, before or after translation.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Print only this protocol: tcp, udp or sctp.
    #[arg(long, value_name = "PROTOCOL", value_parser = protocol)]
    protocol: Option<u8>,
    /// Print only these reasons. `sluice status` lists those that have been counted, and
    /// docs/operate.md all of them.
    #[arg(long, value_name = "REASON", value_delimiter = ',', value_parser = reason)]
    reason: Vec<Reason>,
    /// Print only events at these hooks: ingress, egress, xdp, connect, send.
    #[arg(long, value_name = "HOOK", value_delimiter = ',', value_parser = place)]
    hook: Vec<At>,
    /// Print only events of these kinds: opened, proven, closing, counted, call.
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = kind)]
    kind: Vec<Kind>,
    /// Print only what was dropped or rejected.
    #[arg(long)]
    drops: bool,
    /// Exit after this many events.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Exit after this time, such as 10s or 5m.
    #[arg(long, value_name = "TIME", value_parser = time)]
    duration: Option<Duration>,
    /// The output format.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Form,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// A table.
    #[default]
    Table,
    /// One JSON object per line.
    Json,
}

impl TraceArgs {
    fn filter(self) -> Filter {
        Filter {
            service: self.service,
            network: self.address,
            port: self.port,
            protocol: self.protocol,
            reasons: self.reason,
            places: self.hook,
            kinds: self.kind,
            fates: if self.drops { vec![Fate::Dropped, Fate::Rejected] } else { Vec::new() },
        }
    }
}

fn network(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| "expected an address or a CIDR, such as 10.96.0.10 or fd00::/8".to_owned())
}

fn protocol(text: &str) -> Result<u8, String> {
    Protocol::from_word(&text.to_ascii_uppercase())
        .map(Protocol::number)
        .ok_or_else(|| "expected tcp, udp or sctp".to_owned())
}

/// Returns the value with this name.
fn named<T: Copy>(all: &[T], name: fn(T) -> &'static str, text: &str) -> Result<T, String> {
    all.iter().copied().find(|one| name(*one) == text).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|one| name(*one)).collect();
        format!("expected one of: {}", names.join(", "))
    })
}

fn reason(text: &str) -> Result<Reason, String> {
    // No event reports a stranger.
    named(Reason::ALL.get(1..).unwrap_or_default(), Reason::as_str, text)
}

fn place(text: &str) -> Result<At, String> {
    named(At::ALL, At::as_str, text)
}

fn kind(text: &str) -> Result<Kind, String> {
    named(Kind::ALL, Kind::as_str, text)
}

/// The names of service ports, read again when an event has an unknown one.
#[derive(Debug)]
struct Directory {
    names: Names,
    read: Option<Instant>,
}

impl Directory {
    fn new(kernel: &Kernel) -> anyhow::Result<Self> {
        let mut directory = Self { names: Names::new(), read: None };
        directory.refresh(kernel)?;
        Ok(directory)
    }

    fn refresh(&mut self, kernel: &Kernel) -> anyhow::Result<()> {
        self.names = kernel
            .maps()
            .service_port_names()?
            .iter()
            .map(|(id, name)| (*id, PortName::from(name)))
            .collect();
        self.read = Some(Instant::now());
        Ok(())
    }

    /// Reads the names again if this one is missing, at most once in [`RENEW`].
    fn ensure(&mut self, service_port: u32, kernel: &Kernel) -> anyhow::Result<()> {
        let is_missing = service_port != 0 && !self.names.contains_key(&service_port);
        if is_missing && self.read.is_none_or(|read| read.elapsed() >= RENEW) {
            self.refresh(kernel)?;
        }
        Ok(())
    }
}

/// Prints events until a limit is reached or a signal arrives.
///
/// # Errors
///
/// Fails if another process listens, or the maps cannot be used.
pub(super) fn run(args: TraceArgs, pin_path: &Path) -> anyhow::Result<Outcome> {
    runtime()?.block_on(trace(args, pin_path)).map(|()| Outcome::default())
}

async fn trace(args: TraceArgs, pin_path: &Path) -> anyhow::Result<()> {
    let deadline = args.duration.map(|time| Instant::now() + time);
    let output = Output { form: args.output, left: args.count, printed: 0, has_header: false };
    let filter = args.filter();
    let kernel = view::open(pin_path)?;
    let directory = Directory::new(&kernel)?;
    if let Some(word) = &filter.service
        && filter.service_ports(&directory.names).is_empty()
    {
        bail!(
            "no service {word:?} in the maps; `sluice services` lists them (name, namespace/name, name:port)"
        );
    }
    let events = Events::open(&Pins::new(pin_path))?;
    // SAFETY: the events own their descriptor, and keep it as long as they live.
    let mut ring = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }
        .context("cannot wait for events")?;
    let before = ring.get_ref().lost()?;
    ring.get_ref().listen(&filter.sieve(&directory.names))?;

    let mut listener = Listener { kernel, directory, filter, output, lost: before };
    let ended = listener.listen(&mut ring, deadline).await;
    let lost = ring.get_ref().lost().unwrap_or(listener.lost);
    eprintln!("{} events, {} lost", listener.output.printed, lost.wrapping_sub(before));
    ended
}

/// A listener to the programs' events.
struct Listener {
    kernel: Kernel,
    directory: Directory,
    filter: Filter,
    output: Output,
    /// The number of lost events that has been reported.
    lost: u64,
}

impl Listener {
    async fn listen(
        &mut self,
        ring: &mut AsyncFd<Events>,
        deadline: Option<Instant>,
    ) -> anyhow::Result<()> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let end = deadline.unwrap_or_else(Instant::now);
        let mut renew = tokio::time::interval(RENEW);
        loop {
            tokio::select! {
                ready = ring.readable_mut() => {
                    let mut ready = ready.context("cannot wait for events")?;
                    let is_drained = self.drain(ready.get_inner_mut())?;
                    if self.output.is_done() {
                        return Ok(());
                    }
                    if is_drained {
                        ready.clear_ready();
                    }
                }
                _ = renew.tick() => self.renew(ring.get_ref())?,
                _ = interrupt.recv() => return Ok(()),
                _ = terminate.recv() => return Ok(()),
                () = tokio::time::sleep_until(end), if deadline.is_some() => return Ok(()),
            }
        }
    }

    /// Prints waiting events, at most [`AT_ONCE`]. Returns whether none is left.
    fn drain(&mut self, events: &mut Events) -> anyhow::Result<bool> {
        for _ in 0..AT_ONCE {
            let Some(event) = events.next() else { return Ok(true) };
            self.directory.ensure(event.service_port, &self.kernel)?;
            let names = &self.directory.names;
            if self.filter.takes(&event, names) && !self.output.print(&event, names)? {
                break;
            }
        }
        Ok(false)
    }

    /// Lets the programs know that somebody still listens, and reports lost events.
    fn renew(&mut self, events: &Events) -> anyhow::Result<()> {
        events.listen(&self.filter.sieve(&self.directory.names))?;
        let lost = events.lost()?;
        if lost != self.lost {
            eprintln!(
                "warning: lost {} events because the ring was full; use a narrower filter",
                lost.wrapping_sub(self.lost)
            );
            self.lost = lost;
        }
        Ok(())
    }
}

/// The output of events.
#[derive(Debug)]
struct Output {
    form: Form,
    left: Option<u64>,
    printed: u64,
    has_header: bool,
}

impl Output {
    fn is_done(&self) -> bool {
        self.left == Some(0)
    }

    /// Prints an event. Returns false if it was the last one.
    fn print(&mut self, event: &Event, names: &Names) -> anyhow::Result<bool> {
        let line = Line::new(event, names, (now_ns(), SystemTime::now()), device);
        let mut text = match self.form {
            Form::Json => serde_json::to_string(&line)? + "\n",
            Form::Table => row(&line.cells()),
        };
        if self.form == Form::Table && !self.has_header {
            self.has_header = true;
            text = row(&Line::COLUMNS.map(|(name, _)| name.to_owned())) + &text;
        }
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            // A reader that has closed the pipe (`| head`) has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.left = Some(0),
            result => {
                result.context("cannot print")?;
                self.printed += 1;
                self.left = self.left.map(|left| left.saturating_sub(1));
            }
        }
        Ok(!self.is_done())
    }
}

/// Returns a row of the table. Columns have typical widths, since later rows are not known.
fn row(cells: &[String; 10]) -> String {
    let mut line = String::new();
    for (cell, (_, width)) in cells.iter().zip(Line::COLUMNS) {
        let cell = if cell.is_empty() { "-" } else { cell };
        // Writing to a string cannot fail.
        let _ = write!(line, "{cell:width$}   ");
    }
    line.trim_end().to_owned() + "\n"
}

/// Returns a device's name, or its number if the device is gone.
fn device(index: u32) -> String {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: the buffer has as many bytes as the call may write.
    if unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) }.is_null() {
        return index.to_string();
    }
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(name.get(..end).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_words_that_the_output_uses() {
        assert_eq!(reason("no_route"), Ok(Reason::NoRoute));
        assert_eq!(place("connect"), Ok(At::Connect));
        assert_eq!(kind("opened"), Ok(Kind::Opened));
        assert_eq!(protocol("tcp"), Ok(6));
        assert_eq!(network("10.0.0.1").map(|net| net.to_string()), Ok("10.0.0.1/32".to_owned()));
        assert!(reason("stranger").is_err() && place("tc").is_err() && protocol("icmp").is_err());
    }
}
