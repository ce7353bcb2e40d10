//! Small servers, clients and a packet relay for labs. Each prints one JSON object a line; see
//! [`sluice_lab::Event`].

mod clients;
mod http;
mod load;
mod many;
mod relay;
mod servers;
mod socket;

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Small servers, clients and a packet relay for labs.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Answer HTTP requests with `<name> <client>`; `/bytes/<n>` with n bytes.
    Http(Listen),
    /// Answer datagrams with `<name> <client> <data>`.
    UdpEcho(Listen),
    /// Greet with `<name> <client>`, then answer each line with `<name> <client> <line>`.
    TcpEcho(Listen),
    /// Send numbered lines to whoever connects.
    Stream {
        #[command(flatten)]
        listen: Listen,
        /// Pause between lines; 0 sends at full speed.
        #[arg(long, default_value_t = 0)]
        interval_ms: u64,
    },
    /// Have connections established, silently; raise `net.core.somaxconn` for many.
    Hold(Listen),
    /// Open many connections at once, and tell how many there came to be.
    ManyClient(many::Opening),
    /// Ask a server by HTTP.
    HttpClient(http::Asking),
    /// Ask a `udp-echo`.
    UdpClient(clients::UdpAsking),
    /// Send one datagram from each of many new sockets, and wait for nothing.
    UdpFlood(clients::Flooding),
    /// Keep a connection to a `tcp-echo` and ask over it.
    TcpClient(clients::TcpAsking),
    /// Read what a `stream` sends, and see that no line is missing.
    StreamClient(clients::Streaming),
    /// Hold connections to `tcp-echo` servers and open new ones at a rate, and count what becomes
    /// of them.
    LoadClient(load::Loading),
    /// Carry the packets of a tun device to other nodes over UDP.
    Relay(relay::Relaying),
}

#[derive(Args)]
struct Listen {
    /// Address and port.
    #[arg(long)]
    listen: SocketAddr,
    /// The server's name in its answers.
    #[arg(long)]
    name: String,
}

fn main() -> ExitCode {
    let done = match Cli::parse().mode {
        Mode::Http(listen) => http::serve(listen.listen, &listen.name).map(|()| true),
        Mode::UdpEcho(listen) => servers::udp_echo(listen.listen, &listen.name).map(|()| true),
        Mode::TcpEcho(listen) => servers::tcp_echo(listen.listen, &listen.name).map(|()| true),
        Mode::Stream { listen, interval_ms } => {
            servers::stream(listen.listen, &listen.name, interval_ms).map(|()| true)
        }
        Mode::Hold(listen) => many::hold(listen.listen).map(|()| true),
        Mode::ManyClient(opening) => many::open(&opening),
        Mode::HttpClient(asking) => http::ask(&asking),
        Mode::UdpClient(asking) => clients::udp(&asking),
        Mode::UdpFlood(flooding) => clients::flood(&flooding),
        Mode::TcpClient(asking) => clients::tcp(&asking),
        Mode::StreamClient(streaming) => clients::stream(&streaming),
        Mode::LoadClient(loading) => load::run(&loading),
        Mode::Relay(relaying) => relay::relay(&relaying).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("sluice-lab-server: {error:#}");
            ExitCode::from(3)
        }
    }
}
