//! Measures how many connections a second a node port takes, one after the other.

use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::Options;
use crate::agents::{Bench, NODE_PORTS};
use crate::report::{self, Row, Unit};

/// Number of measurements of every node port.
const ROUNDS: usize = 9;
/// Connections of one measurement.
const CONNECTIONS: u32 = 2000;
/// The longest time that a connection may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Opens connections one after the other and resets each when the endpoint has greeted, so that
/// none keeps its port and none waits in the endpoint's queue, where one too many costs a second;
/// the connections a second.
fn connects(address: SocketAddr) -> Result<f64> {
    let started = Instant::now();
    for _ in 0..CONNECTIONS {
        let mut stream = std::net::TcpStream::connect_timeout(&address, PATIENCE)
            .with_context(|| format!("cannot connect to {address}"))?;
        stream.read_exact(&mut [0]).context("the endpoint does not greet")?;
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        // SAFETY: the option takes this structure, which lives until the call returns.
        let result = unsafe {
            libc::setsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const linger).cast(),
                size_of::<libc::linger>() as libc::socklen_t,
            )
        };
        anyhow::ensure!(result == 0, "cannot set SO_LINGER: {}", std::io::Error::last_os_error());
    }
    Ok(f64::from(CONNECTIONS) / started.elapsed().as_secs_f64())
}

/// Measures all agents by turns, and prints the table.
pub(crate) fn run(options: &Options) -> Result<()> {
    let bench = Bench::start(options.against.as_ref())?;
    let places = ["to a node port, the endpoint near", "to a node port, the endpoint far"];
    let mut samples = vec![vec![Vec::new(); bench.subjects.len()]; places.len()];
    for round in 0..ROUNDS {
        for (port, samples) in NODE_PORTS.iter().zip(&mut samples) {
            for (subject, samples) in bench.subjects.iter().zip(samples) {
                let address: Ipv4Addr = subject.node.ipv4();
                samples.push(bench.client.enter(|| connects((address, *port).into()))??);
            }
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    let rows: Vec<_> = places
        .iter()
        .zip(samples)
        .map(|(what, samples)| Row::new(*what, Unit::Rate, samples))
        .collect();
    let names: Vec<_> = bench.subjects.iter().map(|subject| subject.name.as_str()).collect();
    report::print(Unit::Rate, &names, &rows, options.json.as_deref())
}
