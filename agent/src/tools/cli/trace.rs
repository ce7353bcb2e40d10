//! `sluice trace`: flows as they open and close, and packets and calls that were counted by a
//! reason, while it runs.

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
use crate::node::dataplane::{Events, Kernel, Pins, now_ns};
use crate::node::view::{self, PortName};
use crate::tools::trace::{Filter, Names, Told};

/// How often the programs are told that somebody still listens: a third of what they count on.
const RENEW: Duration = Duration::from_secs(1);
/// Events read before others have a turn.
const AT_ONCE: usize = 1_024;

#[derive(Debug, Args)]
pub(super) struct TraceArgs {
    /// Only what concerns this service: name, namespace/name or either with :port.
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,
    /// Only what comes from or goes to an address or CIDR, before or after translation.
    #[arg(long, value_name = "ADDRESS", value_parser = network)]
    address: Option<IpNet>,
    /// Only what comes from or goes to a port, before or after translation.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Only this protocol: tcp, udp or sctp.
    #[arg(long, value_name = "PROTOCOL", value_parser = protocol)]
    protocol: Option<u8>,
    /// Only these reasons (`sluice status` lists those that were met, docs/operate.md all).
    #[arg(long, value_name = "REASON", value_delimiter = ',', value_parser = reason)]
    reason: Vec<Reason>,
    /// Only at these hooks: ingress, egress, xdp, connect, send.
    #[arg(long, value_name = "HOOK", value_delimiter = ',', value_parser = place)]
    hook: Vec<At>,
    /// Only these kinds: opened, proven, closing, counted, call.
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = kind)]
    kind: Vec<Kind>,
    /// Only what was dropped or rejected.
    #[arg(long)]
    drops: bool,
    /// End after so many events.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after a time, as 10s or 5m.
    #[arg(long, value_name = "TIME", value_parser = time)]
    duration: Option<Duration>,
    /// The form of the output.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Form,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// For people.
    #[default]
    Table,
    /// One JSON object a line.
    Json,
}

fn network(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| "an address or a CIDR is wanted, as 10.96.0.10 or fd00::/8".to_owned())
}

fn protocol(text: &str) -> Result<u8, String> {
    Protocol::from_word(&text.to_ascii_uppercase())
        .map(Protocol::number)
        .ok_or_else(|| "tcp, udp or sctp is wanted".to_owned())
}

/// The one of a list with this word.
fn named<T: Copy>(all: &[T], word: fn(T) -> &'static str, text: &str) -> Result<T, String> {
    all.iter().copied().find(|one| word(*one) == text).ok_or_else(|| {
        format!(
            "one of these is wanted: {}",
            all.iter().map(|one| word(*one)).collect::<Vec<_>>().join(", ")
        )
    })
}

fn reason(text: &str) -> Result<Reason, String> {
    // Nothing tells of a stranger.
    named(Reason::ALL.get(1..).unwrap_or_default(), Reason::as_str, text)
}

fn place(text: &str) -> Result<At, String> {
    named(At::ALL, At::as_str, text)
}

fn kind(text: &str) -> Result<Kind, String> {
    named(Kind::ALL, Kind::as_str, text)
}

/// Whose service ports are, read again where one is unknown.
#[derive(Debug)]
struct Directory {
    names: Names,
    read: Option<Instant>,
}

impl Directory {
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
}

/// Listens until it is enough.
///
/// # Errors
///
/// When somebody else listens, or the maps cannot be used.
pub(super) async fn run(args: TraceArgs, pin_path: &Path) -> anyhow::Result<()> {
    let kernel = view::open(pin_path)?;
    let mut directory = Directory { names: Names::new(), read: None };
    directory.refresh(&kernel)?;
    let filter = Filter {
        service: args.service,
        network: args.address,
        port: args.port,
        protocol: args.protocol,
        reasons: args.reason,
        places: args.hook,
        kinds: args.kind,
        fates: if args.drops { vec![Fate::Dropped, Fate::Rejected] } else { Vec::new() },
    };
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

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let deadline = args.duration.map(|time| Instant::now() + time);
    let mut renew = tokio::time::interval(RENEW);
    let mut output = Output { form: args.output, left: args.count, said: 0, headed: false };
    let mut lost = before;
    let ended = loop {
        tokio::select! {
            ready = ring.readable_mut() => {
                let mut ready = ready.context("cannot wait for events")?;
                let mut drained = false;
                for _ in 0..AT_ONCE {
                    let Some(event) = ready.get_inner_mut().next() else { drained = true; break };
                    if !directory.names.contains_key(&event.service_port)
                        && event.service_port != 0
                        && directory.read.is_none_or(|read| read.elapsed() >= RENEW)
                    {
                        directory.refresh(&kernel)?;
                    }
                    if filter.takes(&event, &directory.names) && !output.say(&event, &directory.names)? {
                        break;
                    }
                }
                if output.is_done() {
                    break Ok(());
                }
                if drained {
                    ready.clear_ready();
                }
            }
            _ = renew.tick() => {
                if let Err(error) = ring.get_ref().listen(&filter.sieve(&directory.names)) {
                    break Err(error);
                }
                let now = ring.get_ref().lost()?;
                if now != lost {
                    eprintln!("warning: {} events were lost, the ring was full; ask for fewer", now.wrapping_sub(lost));
                    lost = now;
                }
            }
            _ = interrupt.recv() => break Ok(()),
            _ = terminate.recv() => break Ok(()),
            () = async { tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)).await }, if deadline.is_some() => break Ok(()),
        }
    };
    let now = ring.get_ref().lost().unwrap_or(lost);
    eprintln!("{} events, {} lost", output.said, now.wrapping_sub(before));
    ended.map_err(Into::into)
}

/// Where events are said.
#[derive(Debug)]
struct Output {
    form: Form,
    left: Option<u64>,
    said: u64,
    headed: bool,
}

impl Output {
    fn is_done(&self) -> bool {
        self.left == Some(0)
    }

    /// Says an event; false when it was the last one.
    fn say(&mut self, event: &Event, names: &Names) -> anyhow::Result<bool> {
        let told = Told::new(event, names, (now_ns(), SystemTime::now()), device);
        let mut text = match self.form {
            Form::Json => serde_json::to_string(&told)? + "\n",
            Form::Table => line(&told.cells()),
        };
        if self.form == Form::Table && !self.headed {
            self.headed = true;
            text = line(&Told::COLUMNS.map(|(name, _)| name.to_owned())) + &text;
        }
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            // A reader that has gone (`| head`) has had enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.left = Some(0),
            result => {
                result.context("cannot print")?;
                self.said += 1;
                self.left = self.left.map(|left| left.saturating_sub(1));
            }
        }
        Ok(!self.is_done())
    }
}

/// A row: columns are as wide as they mostly need, since what comes is not known.
fn line(cells: &[String; 10]) -> String {
    let mut line = String::new();
    for (cell, (_, width)) in cells.iter().zip(Told::COLUMNS) {
        let cell = if cell.is_empty() { "-" } else { cell };
        // Writing to a string cannot fail.
        let _ = write!(line, "{cell:width$}   ");
    }
    line.trim_end().to_owned() + "\n"
}

/// A device's name, or its number where it has gone.
fn device(index: u32) -> String {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: as many bytes as the call may write.
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
