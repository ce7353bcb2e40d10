//! The clients other than HTTP.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use sluice_lab::Event;

use crate::socket::{
    any, connect, mapped, ms_since, parse_reply, plain, report, udp as udp_socket,
};

#[derive(Args)]
pub(crate) struct UdpAsking {
    /// Whom to ask.
    #[arg(long)]
    to: SocketAddr,
    /// Ask this one too, every other time.
    #[arg(long)]
    beside: Option<SocketAddr>,
    /// Number of requests.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Connect the socket, so that only connect(2) names the destination.
    #[arg(long)]
    connected: bool,
    /// Use a new socket, and so another source port, for each request.
    #[arg(long)]
    new_socket: bool,
    /// Pause between requests.
    #[arg(long, default_value_t = 0)]
    interval_ms: u64,
    /// Milliseconds to wait for an answer.
    #[arg(long, default_value_t = 1000)]
    timeout_ms: u64,
    /// Send from this address.
    #[arg(long)]
    source: Option<IpAddr>,
    /// Send from this port; 0 for any.
    #[arg(long, default_value_t = 0)]
    source_port: u16,
    /// Use a v6 socket for a v4 address.
    #[arg(long)]
    mapped: bool,
    /// At least this many bytes in each request.
    #[arg(long, default_value_t = 0)]
    size: usize,
}

/// Returns the address that a socket to a destination is bound to.
fn source(to: SocketAddr, ip: Option<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.unwrap_or_else(|| any(to).ip()), port)
}

pub(crate) fn udp(asking: &UdpAsking) -> Result<bool> {
    let to = if asking.mapped { mapped(asking.to) } else { asking.to };
    let start = Instant::now();
    let open = |first: bool| -> Result<_> {
        let socket = udp_socket(source(to, asking.source, asking.source_port))?;
        if asking.connected {
            socket.connect(to).with_context(|| format!("cannot connect to {to}"))?;
            if first {
                report(&Event::Connected {
                    local: plain(socket.local_addr()?),
                    peer: plain(socket.peer_addr()?),
                });
            }
        }
        Ok(socket)
    };
    let mut socket = open(true)?;
    let (mut received, mut bytes) = (0, 0);
    for seq in 0..asking.count {
        if asking.new_socket && seq > 0 {
            socket = open(false)?;
        }
        let asked = Instant::now();
        let request =
            format!("{seq} {}", "x".repeat(asking.size.saturating_sub(seq.to_string().len() + 1)));
        let to = asking.beside.filter(|_| seq % 2 == 1).unwrap_or(to);
        match ask_by(&socket, asking, to, request.as_bytes(), seq, start) {
            Ok((reply, length)) => {
                report(&Event::Reply(reply));
                received += 1;
                bytes += length;
            }
            Err(error) => report(&Event::Lost {
                seq,
                reason: format!("{error:#} ({} ms)", ms_since(asked)),
                at_ms: ms_since(start),
            }),
        }
        thread::sleep(Duration::from_millis(asking.interval_ms));
    }
    report(&Event::Done { sent: asking.count, received, bytes, elapsed_ms: ms_since(start) });
    Ok(received == asking.count)
}

fn ask_by(
    socket: &std::net::UdpSocket,
    asking: &UdpAsking,
    to: SocketAddr,
    request: &[u8],
    seq: u64,
    start: Instant,
) -> Result<(sluice_lab::Reply, u64)> {
    let asked = Instant::now();
    let sent = if asking.connected { socket.send(request) } else { socket.send_to(request, to) };
    let _ = sent.context("cannot send")?;
    let deadline = asked + Duration::from_millis(asking.timeout_ms);
    let mut buffer = vec![0u8; 65_536];
    loop {
        // A timeout of zero is refused.
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(left))?;
        let (length, from) = socket.recv_from(&mut buffer).context("no answer")?;
        let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        // An answer to an earlier request that comes too late is skipped.
        match parse_reply(&text, seq, plain(from), asked, start) {
            Some((reply, data)) if data.split(' ').next() == Some(&seq.to_string()) => {
                return Ok((reply, length as u64));
            }
            _ => {}
        }
    }
}

#[derive(Args)]
pub(crate) struct Flooding {
    /// The destination.
    #[arg(long)]
    to: SocketAddr,
    /// Number of datagrams, each from a new socket.
    #[arg(long)]
    count: u64,
}

pub(crate) fn flood(flooding: &Flooding) -> Result<bool> {
    let start = Instant::now();
    let mut bytes = 0;
    for _ in 0..flooding.count {
        let sent = udp_socket(any(flooding.to))?.send_to(b"0", flooding.to);
        bytes += sent.with_context(|| format!("cannot send to {}", flooding.to))? as u64;
    }
    report(&Event::Done { sent: flooding.count, received: 0, bytes, elapsed_ms: ms_since(start) });
    Ok(true)
}

#[derive(Args)]
pub(crate) struct TcpAsking {
    /// Whom to ask.
    #[arg(long)]
    to: SocketAddr,
    /// Number of requests; without it, until the end.
    #[arg(long)]
    count: Option<u64>,
    /// Pause between requests.
    #[arg(long, default_value_t = 100)]
    interval_ms: u64,
    /// Milliseconds to wait for an answer before the connection counts as broken.
    #[arg(long, default_value_t = 3000)]
    timeout_ms: u64,
    /// Connect from this address.
    #[arg(long)]
    source: Option<IpAddr>,
    /// Connect from this port; 0 for any.
    #[arg(long, default_value_t = 0)]
    source_port: u16,
    /// Use a v6 socket for a v4 address.
    #[arg(long)]
    mapped: bool,
}

pub(crate) fn tcp(asking: &TcpAsking) -> Result<bool> {
    let to = if asking.mapped { mapped(asking.to) } else { asking.to };
    let start = Instant::now();
    let mut writer = match connect(
        to,
        source(to, asking.source, asking.source_port),
        Duration::from_millis(asking.timeout_ms),
    ) {
        Ok(stream) => stream,
        Err(error) => {
            report(&Event::Broken { seq: 0, reason: format!("{error:#}"), at_ms: ms_since(start) });
            return Ok(false);
        }
    };
    let from = plain(writer.peer_addr()?);
    report(&Event::Connected { local: plain(writer.local_addr()?), peer: from });
    let mut lines = BufReader::new(writer.try_clone()?).lines();
    let (mut seq, mut bytes) = (0, 0);
    let broken = loop {
        // The greeting precedes the first request and answers none.
        let greeted = if seq == 0 { read_line(&mut lines).map(drop) } else { Ok(()) };
        let asked = Instant::now();
        let answer = greeted.and_then(|()| {
            writer.write_all(format!("{seq}\n").as_bytes()).context("cannot send")?;
            read_line(&mut lines)
        });
        match answer {
            Err(error) => break format!("{error:#}"),
            Ok(line) => match parse_reply(&line, seq, from, asked, start) {
                Some((reply, data)) if data == seq.to_string() => report(&Event::Reply(reply)),
                _ => break format!("the answer `{line}` is none to request {seq}"),
            },
        }
        seq += 1;
        bytes += 1;
        if asking.count.is_some_and(|count| seq >= count) {
            report(&Event::Done { sent: seq, received: seq, bytes, elapsed_ms: ms_since(start) });
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(asking.interval_ms));
    };
    report(&Event::Broken { seq, reason: broken, at_ms: ms_since(start) });
    Ok(false)
}

fn read_line(lines: &mut std::io::Lines<BufReader<std::net::TcpStream>>) -> Result<String> {
    lines.next().context("the server ended the connection")?.context("no answer")
}

#[derive(Args)]
pub(crate) struct Streaming {
    /// Whom to read from.
    #[arg(long)]
    to: SocketAddr,
    /// For how long.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Milliseconds of silence that count as a break.
    #[arg(long, default_value_t = 3000)]
    timeout_ms: u64,
}

pub(crate) fn stream(streaming: &Streaming) -> Result<bool> {
    let start = Instant::now();
    let broken = |seq, reason: String| {
        report(&Event::Broken { seq, reason, at_ms: ms_since(start) });
        Ok(false)
    };
    let stream =
        match connect(streaming.to, any(streaming.to), Duration::from_millis(streaming.timeout_ms))
        {
            Ok(stream) => stream,
            Err(error) => return broken(0, format!("{error:#}")),
        };
    let from = plain(stream.peer_addr()?);
    report(&Event::Connected { local: plain(stream.local_addr()?), peer: from });
    let mut reader = BufReader::with_capacity(1 << 18, stream);
    let (mut seq, mut bytes) = (0u64, 0u64);
    let mut line = String::new();
    while start.elapsed() < Duration::from_secs(streaming.seconds) {
        line.clear();
        match reader.read_line(&mut line) {
            Ok(0) => return broken(seq, "the server ended the connection".into()),
            Err(error) => return broken(seq, error.to_string()),
            Ok(length) => bytes += length as u64,
        }
        let (number, rest) = line.trim_end().split_once(' ').unwrap_or_default();
        if number.parse() != Ok(seq) {
            return broken(seq, format!("line {seq} is `{}`", line.trim_end()));
        }
        if let Some((reply, _)) =
            (seq == 0).then(|| parse_reply(rest, 0, from, start, start)).flatten()
        {
            report(&Event::Reply(reply));
        }
        seq += 1;
    }
    report(&Event::Done { sent: 0, received: seq, bytes, elapsed_ms: ms_since(start) });
    Ok(true)
}
