//! The servers other than HTTP.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use sluice_lab::Event;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};

use crate::load::more_descriptors;
use crate::socket::{plain, report};

/// Accepts connections for ever, with a thread for each.
pub(crate) fn accept(
    address: SocketAddr,
    name: &str,
    speak: fn(TcpStream, &str, &str) -> std::io::Result<()>,
) -> Result<()> {
    let listener =
        TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    report(&Event::Listening { address: listener.local_addr()? });
    loop {
        // A client that left between its handshake and here is no reason to end.
        let Ok((stream, client)) = listener.accept() else {
            continue;
        };
        let (name, client) = (name.to_owned(), plain(client).to_string());
        let _ = thread::spawn(move || {
            // The client reports how a conversation ends.
            let _ = stream.set_nodelay(true);
            let _ = speak(stream, &name, &client);
        });
    }
}

/// Serves all connections in one thread: thousands stay open while hundreds a second come and go.
pub(crate) fn tcp_echo(address: SocketAddr, name: &str) -> Result<()> {
    more_descriptors()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address}"))?;
        report(&Event::Listening { address: listener.local_addr()? });
        loop {
            // A client that left between its handshake and here is no reason to end.
            let Ok((stream, client)) = listener.accept().await else { continue };
            let who = format!("{name} {}", plain(client));
            // The client reports how a conversation ends.
            drop(tokio::spawn(async move { echo(stream, &who).await }));
        }
    })
}

async fn echo(stream: tokio::net::TcpStream, who: &str) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = tokio::io::BufReader::new(stream);
    stream.get_mut().write_all(format!("{who}\n").as_bytes()).await?;
    let mut line = String::new();
    while stream.read_line(&mut line).await? > 0 {
        stream.get_mut().write_all(format!("{who} {}\n", line.trim_end()).as_bytes()).await?;
        line.clear();
    }
    Ok(())
}

pub(crate) fn stream(address: SocketAddr, name: &str, interval_ms: u64) -> Result<()> {
    if interval_ms == 0 {
        return accept(address, name, |mut stream, name, client| {
            // Lines are sent in batches: one call a line would measure the calls.
            for batch in 0u64.. {
                let mut lines = Vec::with_capacity(1 << 15);
                for seq in batch * 512..(batch + 1) * 512 {
                    writeln!(lines, "{seq} {name} {client}")?;
                }
                stream.write_all(&lines)?;
            }
            Ok(())
        });
    }
    INTERVAL.store(interval_ms, std::sync::atomic::Ordering::Relaxed);
    accept(address, name, |mut stream, name, client| {
        for seq in 0u64.. {
            stream.write_all(format!("{seq} {name} {client}\n").as_bytes())?;
            thread::sleep(Duration::from_millis(
                INTERVAL.load(std::sync::atomic::Ordering::Relaxed),
            ));
        }
        Ok(())
    })
}

/// The pause of [`stream`], in milliseconds.
static INTERVAL: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

pub(crate) fn udp_echo(address: SocketAddr, name: &str) -> Result<()> {
    let socket = UdpSocket::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    report(&Event::Listening { address: socket.local_addr()? });
    let mut buffer = vec![0u8; 65_536];
    loop {
        // An error here is an ICMP error to an earlier answer.
        let Ok((length, client)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let mut answer = format!("{name} {} ", plain(client)).into_bytes();
        answer.extend_from_slice(buffer.get(..length).unwrap_or_default());
        let _ = socket.send_to(&answer, client);
    }
}
