//! Servers and clients in namespaces: `sluice-lab-server` in its modes, and nginx.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::event::{Event, Reply};
use crate::namespace::Namespace;
use crate::running::Running;

const TOOL: &str = "sluice-lab-server";

/// A kind of built-in server. Each answer has the server's name and the client's address as the
/// server sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serve {
    /// HTTP/1.1 with keep-alive; the answer to `/bytes/<n>` has n bytes.
    Http,
    /// Answers each datagram with `<name> <client> <data>`.
    UdpEcho,
    /// Greets with `<name> <client>`, then answers each line with `<name> <client> <line>`.
    TcpEcho,
    /// Sends numbered lines at full speed to whoever connects.
    Stream,
}

impl Serve {
    fn mode(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::UdpEcho => "udp-echo",
            Self::TcpEcho => "tcp-echo",
            Self::Stream => "stream",
        }
    }
}

/// Finds `sluice-lab-server`: `$SLUICE_LAB_SERVER`, or in the directory of this program or, for a
/// test, the one above.
///
/// # Errors
/// If it has not been built.
pub fn tool_path() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SLUICE_LAB_SERVER") {
        return Ok(path.into());
    }
    let this = std::env::current_exe().context("cannot tell where this program is")?;
    let found = this
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(TOOL))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!("there is no {TOOL} near {}: build it with `cargo build -p sluice-lab --bins`, or set SLUICE_LAB_SERVER", this.display())
    })
}

/// Waits until a server reports that it listens.
pub(crate) fn until_listening(mut server: Running) -> Result<Running> {
    let _ = server.wait_event("it listens", Duration::from_secs(5), |event| {
        matches!(event, Event::Listening { .. })
    })?;
    Ok(server)
}

impl Namespace {
    /// Starts a built-in server on a port of all addresses of both families. Its name is the
    /// namespace's.
    pub fn serve(&self, what: Serve, port: u16) -> Result<Running> {
        self.serve_as(what, port, self.name())
    }

    /// Like [`Namespace::serve`], with another name.
    pub fn serve_as(&self, what: Serve, port: u16, name: &str) -> Result<Running> {
        until_listening(self.tool([
            what.mode(),
            &format!("--listen=[::]:{port}"),
            &format!("--name={name}"),
        ])?)
    }

    /// Starts `sluice-lab-server` with the given arguments: one of its client modes (`udp-client`,
    /// `tcp-client`, `http-client`, `stream-client`; `--help` lists their options), or a server
    /// with special ones.
    pub fn tool<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Running> {
        self.spawn(tool_path()?, args)
    }

    /// Runs a client mode of `sluice-lab-server` to its end and returns its events.
    ///
    /// # Errors
    /// If it runs for longer than two minutes, or cannot work at all. A lost answer or a broken
    /// connection is an event, not an error.
    pub fn ask<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Vec<Event>> {
        let mut client = self.tool(args)?;
        let status = client.wait(Duration::from_mins(2))?;
        let events = client.events();
        // 1: something was lost, as the events report.
        if !matches!(status.code(), Some(0 | 1)) || events.is_empty() {
            bail!(
                "{TOOL} in the namespace {} failed ({status}): {}",
                self.name(),
                client.stderr().trim()
            );
        }
        Ok(events)
    }

    /// Sends HTTP requests, with a new connection for each.
    ///
    /// # Errors
    /// If one of the requests gets no answer.
    pub fn http_get(&self, url: &str, count: u32) -> Result<Vec<Reply>> {
        self.replies(&["http-client".into(), format!("--url={url}"), format!("--count={count}")])
    }

    /// Sends UDP requests, with a new unconnected socket for each.
    ///
    /// # Errors
    /// If one of the requests gets no answer.
    pub fn udp_ask(&self, to: SocketAddr, count: u32) -> Result<Vec<Reply>> {
        self.replies(&[
            "udp-client".into(),
            format!("--to={to}"),
            format!("--count={count}"),
            "--new-socket".into(),
        ])
    }

    /// Like [`Namespace::udp_ask`], but with connected sockets, so that only connect(2) names the
    /// destination.
    pub fn udp_ask_connected(&self, to: SocketAddr, count: u32) -> Result<Vec<Reply>> {
        self.replies(&[
            "udp-client".into(),
            format!("--to={to}"),
            format!("--count={count}"),
            "--new-socket".into(),
            "--connected".into(),
        ])
    }

    fn replies(&self, args: &[String]) -> Result<Vec<Reply>> {
        let mut client = self.tool(args)?;
        // Each request without an answer takes its timeout, so the first one ends the client.
        let _ = client.wait_first(Duration::from_mins(2), |this| {
            this.stdout().contains(r#"{"event":"lost""#)
        })?;
        let _ = client.kill()?;
        let events = client.events();
        if events.is_empty() {
            bail!("{TOOL} in the namespace {} failed: {}", self.name(), client.stderr().trim());
        }
        let mut replies = Vec::new();
        for event in events {
            match event {
                Event::Reply(reply) => replies.push(reply),
                Event::Lost { seq, reason, .. } | Event::Broken { seq, reason, .. } => {
                    bail!(
                        "request {seq} of `{}` from {} got no answer: {reason}",
                        args.join(" "),
                        self.name()
                    )
                }
                Event::Listening { .. }
                | Event::Connected { .. }
                | Event::Load(_)
                | Event::Done { .. } => {}
            }
        }
        Ok(replies)
    }

    /// Starts nginx on a port of all addresses of both families. It answers `/` with
    /// `<namespace> <client>`, and `/bytes` with 64 KiB.
    pub fn nginx(&self, port: u16) -> Result<Running> {
        let directory = self.shared.state.join(format!("nginx-{}-{port}", self.name()));
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let (at, name, page) = (directory.display(), self.name(), "x".repeat(65_536));
        let config = format!(
            "daemon off;\nmaster_process off;\npid {at}/pid;\nerror_log {at}/error.log;\nevents {{ worker_connections 4096; }}\n\
             http {{\n  access_log off;\n  client_body_temp_path {at}/body;\n  proxy_temp_path {at}/proxy;\n  fastcgi_temp_path {at}/fastcgi;\n  \
             uwsgi_temp_path {at}/uwsgi;\n  scgi_temp_path {at}/scgi;\n  server {{\n    listen {port} reuseport backlog=4096;\n    listen [::]:{port} reuseport backlog=4096;\n    \
             root {at};\n    location = / {{ return 200 \"{name} $remote_addr\\n\"; }}\n  }}\n}}\n"
        );
        std::fs::write(directory.join("bytes"), page)?;
        let path = directory.join("nginx.conf");
        std::fs::write(&path, config)?;
        let mut nginx = self.spawn(
            "nginx",
            [
                OsStr::new("-e"),
                directory.join("error.log").as_os_str(),
                OsStr::new("-c"),
                path.as_os_str(),
            ],
        )?;
        let _ = nginx.wait_until("it listens", Duration::from_secs(5), |_| {
            self.enter(|| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok())
                .ok()
                .filter(|up| *up)
        })?;
        Ok(nginx)
    }
}
