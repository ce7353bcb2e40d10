//! Just enough HTTP/1.1: GET, with and without keep-alive.

use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use sluice_lab::{Event, Reply};

use crate::socket::{any, connect, ms_since, plain, report};

pub(crate) fn serve(address: SocketAddr, name: &str) -> Result<()> {
    crate::servers::accept(address, name, |stream, name, client| {
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        while let Some((request, headers)) = read_head(&mut reader)? {
            let close = header(&headers, "connection")
                .is_some_and(|value| value.eq_ignore_ascii_case("close"));
            let path = request.split(' ').nth(1).unwrap_or("/");
            let body = match path.strip_prefix("/bytes/").and_then(|count| count.parse().ok()) {
                Some(count) => "x".repeat(count),
                None => format!("{name} {client}\n"),
            };
            let connection = if close { "close" } else { "keep-alive" };
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: {connection}\r\nX-Name: {name}\r\nX-Client: {client}\r\n\r\n{body}",
                body.len()
            );
            writer.write_all(answer.as_bytes())?;
            if close {
                break;
            }
        }
        Ok(())
    })
}

/// Returns the first line and the headers, or nothing at the stream's end.
fn read_head(reader: &mut impl BufRead) -> io::Result<Option<(String, Vec<String>)>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            let mut lines = lines.into_iter();
            return Ok(lines.next().map(|first| (first, lines.collect())));
        }
        lines.push(line);
    }
}

fn header<'a>(headers: &'a [String], name: &str) -> Option<&'a str> {
    headers.iter().find_map(|line| {
        line.split_once(':')
            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
    })
}

#[derive(Args)]
pub(crate) struct Asking {
    /// `http://<address>:<port>/<path>`, with an address and no name.
    #[arg(long)]
    url: String,
    /// Number of requests.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Use one connection for all.
    #[arg(long)]
    keep_alive: bool,
    /// Pause between requests.
    #[arg(long, default_value_t = 0)]
    interval_ms: u64,
    /// Milliseconds to wait for a connection or an answer.
    #[arg(long, default_value_t = 3000)]
    timeout_ms: u64,
    /// Use a v6 socket for a v4 address.
    #[arg(long)]
    mapped: bool,
}

pub(crate) fn ask(asking: &Asking) -> Result<bool> {
    let rest = asking.url.strip_prefix("http://").context("the URL does not begin with http://")?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let to: SocketAddr =
        host.parse().with_context(|| format!("`{host}` is no address and port"))?;
    let to = if asking.mapped { crate::socket::mapped(to) } else { to };
    let start = Instant::now();
    let (mut received, mut bytes, mut open) = (0, 0, None);
    for seq in 0..asking.count {
        let asked = Instant::now();
        match ask_once(asking, to, host, path, open.take()) {
            Ok((name, seen, from, length, stream)) => {
                let took_us = u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX);
                report(&Event::Reply(Reply {
                    seq,
                    name,
                    seen,
                    from,
                    at_ms: ms_since(start),
                    took_us,
                }));
                received += 1;
                bytes += length;
                open = asking.keep_alive.then_some(stream);
            }
            Err(error) => {
                report(&Event::Lost { seq, reason: format!("{error:#}"), at_ms: ms_since(start) });
            }
        }
        thread::sleep(Duration::from_millis(asking.interval_ms));
    }
    report(&Event::Done { sent: asking.count, received, bytes, elapsed_ms: ms_since(start) });
    Ok(received == asking.count)
}

type Answer = (String, SocketAddr, SocketAddr, u64, BufReader<TcpStream>);

fn ask_once(
    asking: &Asking,
    to: SocketAddr,
    host: &str,
    path: &str,
    open: Option<BufReader<TcpStream>>,
) -> Result<Answer> {
    let mut stream = match open {
        Some(stream) => stream,
        None => BufReader::new(connect(to, any(to), Duration::from_millis(asking.timeout_ms))?),
    };
    let from = plain(stream.get_ref().peer_addr()?);
    let connection = if asking.keep_alive { "keep-alive" } else { "close" };
    stream.get_mut().write_all(
        format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\n\r\n")
            .as_bytes(),
    )?;
    let (status, headers) = read_head(&mut stream)
        .context("no answer")?
        .context("the connection ended before an answer")?;
    if !status.contains(" 200 ") {
        bail!("the server answered `{status}`");
    }
    let length = header(&headers, "content-length")
        .and_then(|value| value.parse().ok())
        .context("an answer without a length")?;
    let read = io::copy(&mut stream.by_ref().take(length), &mut io::sink())
        .context("a body that does not end")?;
    if read != length {
        bail!("the connection ended after {read} of {length} bytes");
    }
    let name = header(&headers, "x-name").context("an answer without a name")?.to_owned();
    let seen = header(&headers, "x-client")
        .and_then(|value| value.parse().ok())
        .context("an answer without our address")?;
    Ok((name, seen, from, length, stream))
}
