//! `sluice explain`: what a packet would meet, and why.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use sluice_core::model::object::Protocol;
use sluice_core::policy::Policy;
use sluice_core::policy::SocketPath;

use super::flows::monotonic_ns;
use super::policy::PolicyArgs;
use super::table::{Table, render};
use super::{NO_OBJECTS, Output, Usage};
use crate::node::status;
use crate::node::view;
use crate::tools::explain::{
    Answer, Client, Endpoint, Live, Manifests, Options, Question, Way, explain,
};

/// The words after `sluice explain`.
#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// The protocol: TCP, UDP or SCTP.
    #[arg(value_name = "PROTO", value_parser = protocol)]
    protocol: Protocol,
    /// The client's address and port; IPv6 as `[ADDRESS]:PORT`.
    #[arg(value_name = "SRC:PORT", value_parser = endpoint)]
    source: SocketAddr,
    /// The address and port that it speaks to.
    #[arg(value_name = "DST:PORT", value_parser = endpoint)]
    destination: SocketAddr,
    /// Who the client is: a pod of this node, a process of this host, or somebody outside.
    #[arg(long, value_enum, value_name = "WHO")]
    from: Client,
    /// Where it is met first [default: where the client's packets are].
    #[arg(long, value_enum, value_name = "WAY")]
    path: Option<Way>,
    /// The device that its packets are met on [default: by the routes].
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// The packet's length with its IP header, in bytes [default: without payload].
    #[arg(long, value_name = "BYTES")]
    length: Option<u16>,
    /// The packet's TTL or hop limit where it is met [default: 64].
    #[arg(long, value_name = "HOPS", value_parser = clap::value_parser!(u8).range(1..))]
    ttl: Option<u8>,
    /// Ask the manifests of a folder (or of one file) instead of the maps of this node: needs no
    /// rights.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// The node's name, as in nodeName of endpoints [default: the only Node of the manifests].
    #[arg(long, visible_alias = "node-name", value_name = "NAME", env = "NODE_NAME")]
    node: Option<String>,
    /// Apply these manifests first, and show the answer before and after.
    #[arg(long, value_name = "FILE")]
    what_if: Option<PathBuf>,
    /// With --manifests, as of the agent: whose connections are translated at the socket.
    #[arg(long, value_enum, default_value_t, value_name = "WHOSE")]
    socket_path: SocketPath,
    /// With --manifests, as of the agent: serve Services with this label
    /// service.kubernetes.io/service-proxy-name.
    #[arg(long, value_name = "NAME")]
    proxy_name: Option<String>,
    #[command(flatten)]
    pub(super) output: Output,
    // Last: its heading would go on over what follows.
    #[command(flatten)]
    policy: PolicyArgs,
}

fn protocol(text: &str) -> Result<Protocol, String> {
    Protocol::from_word(&text.to_ascii_uppercase()).ok_or_else(|| "say TCP, UDP or SCTP".to_owned())
}

fn endpoint(text: &str) -> Result<SocketAddr, String> {
    let wanted = "an address and a port are wanted: 10.0.0.1:80, or [2001:db8::1]:80";
    let endpoint: SocketAddr = text.parse().map_err(|_| wanted.to_owned())?;
    if endpoint.port() == 0 {
        return Err("0 is no port".to_owned());
    }
    Ok(SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port()))
}

impl ExplainArgs {
    /// Whether manifests are asked, and nothing of this node.
    pub(super) fn is_of_manifests(&self) -> bool {
        self.manifests.is_some()
    }
}

/// An answer, or two.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Told {
    One(Box<Answer>),
    Two { before: Box<Answer>, after: Box<Answer> },
}

/// Answers; the number is the exit code.
///
/// # Errors
///
/// [`Usage`] for a question that makes no sense; else when something cannot be read.
pub(super) fn run(
    args: ExplainArgs,
    pin_path: &Path,
    state_dir: &Path,
) -> anyhow::Result<(String, u8)> {
    let ExplainArgs { protocol, source, destination, from, path, device, output, what_if, .. } =
        args;
    let (length, ttl) = (args.length, args.ttl);
    if source.is_ipv4() != destination.is_ipv4() {
        bail!(Usage(format!("{source} and {destination} are not of one family")));
    }
    if path == Some(Way::Socket) && from == Client::External {
        bail!(Usage("--path socket: a client outside makes no calls on this node".to_owned()));
    }
    let policy = args.policy.policy().map_err(|error| Usage(format!("{error:#}")))?;
    let question = Question { protocol, source, destination, from, way: path, device, length, ttl };
    let least = question.least_length();
    if let Some(length) = length.filter(|length| *length < least) {
        let word = protocol.word();
        bail!(Usage(format!("--length {length}: the headers of {word} alone have {least} bytes")));
    }
    let (told, context) = if let Some(folder) = args.manifests {
        let options = Options {
            path: folder,
            node: args.node.map(Into::into),
            proxy_name: args.proxy_name,
            policy,
            socket_path: args.socket_path.number(),
        };
        let context = format!("the manifests in {}", options.path.display());
        (of_manifests(&question, options, what_if.as_deref())?, context)
    } else {
        if policy != Policy::default() {
            let what =
                "the flags on policies go with --manifests: what the agent was told is in the maps";
            bail!(Usage(what.to_owned()));
        }
        let context = format!("the maps under {}", pin_path.display());
        let status = status::read(state_dir).unwrap_or_default();
        let node = args.node.unwrap_or(status.node);
        let left = status.policy.left_alone.into_iter().collect();
        (of_maps(&question, pin_path, &node, left, what_if.as_deref())?, context)
    };
    let code = match &told {
        Told::One(answer) | Told::Two { after: answer, .. } => answer.verdict.code(),
    };
    Ok((render(output.output, &told, |told| text(&question, &context, told))?, code))
}

fn of_manifests(
    question: &Question,
    options: Options,
    what_if: Option<&Path>,
) -> anyhow::Result<Told> {
    let folder = options.path.clone();
    let mut manifests =
        Manifests::read(options).with_context(|| format!("cannot read {}", folder.display()))?;
    for report in manifests.unread() {
        eprintln!("warning: without {}: {}", report.subject, report.note.message);
    }
    if manifests.objects() == 0 {
        bail!("no object in {}: {NO_OBJECTS}", folder.display());
    }
    let (world, routing) = manifests.world(question);
    let before = explain(question, &world, &routing)?;
    let Some(file) = what_if else { return Ok(Told::One(Box::new(before))) };
    manifests.apply(file).with_context(|| format!("--what-if {}", file.display()))?;
    let (world, routing) = manifests.world(question);
    let after = explain(question, &world, &routing)?;
    Ok(Told::Two { before: Box::new(before), after: Box::new(after) })
}

fn of_maps(
    question: &Question,
    pin_path: &Path,
    node: &str,
    left: BTreeSet<IpAddr>,
    what_if: Option<&Path>,
) -> anyhow::Result<Told> {
    let kernel = view::open(pin_path)
        .context("cannot look at this node's maps; --manifests DIR asks manifests instead")?;
    let live = Live::new().context("cannot ask the kernel for its routes")?;
    let mut world = live.world(&kernel, monotonic_ns(), left)?;
    let before = explain(question, &world, &live)?;
    let Some(file) = what_if else { return Ok(Told::One(Box::new(before))) };
    world
        .apply(file, kernel.maps().sizes(), node)
        .with_context(|| format!("--what-if {}", file.display()))?;
    let after = explain(question, &world, &live)?;
    Ok(Told::Two { before: Box::new(before), after: Box::new(after) })
}

/// For people.
fn text(question: &Question, context: &str, told: &Told) -> String {
    let who = match question.from {
        Client::Pod => "a pod of this node",
        Client::Host => "a process of this host",
        Client::External => "a client outside",
    };
    let (source, destination) = (question.source, question.destination);
    let mut text = format!(
        "{} {source} -> {destination}, from {who}, by {context}\n",
        question.protocol.word()
    );
    match told {
        Told::One(answer) => one(&mut text, answer),
        Told::Two { before, after } => {
            text.push_str("\n== Before ==\n");
            one(&mut text, before);
            text.push_str("\n== After ==\n");
            one(&mut text, after);
        }
    }
    text
}

fn one(text: &mut String, answer: &Answer) {
    text.push('\n');
    for step in &answer.steps {
        let behind: Vec<&str> = step.object.iter().chain(&step.field).map(String::as_str).collect();
        let behind =
            if behind.is_empty() { String::new() } else { format!(" [{}]", behind.join(": ")) };
        let mut head = step.step.to_owned();
        if let Some(first) = head.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{:<12}{}{behind}", format!("{head}:"), step.text);
    }
    if !answer.candidates.is_empty() {
        let mut table = Table::new(&["CANDIDATE", "SHARE", "CHOSEN"]);
        for candidate in &answer.candidates {
            let at = Endpoint { address: candidate.address, port: candidate.port };
            let chosen = if answer.backend == Some(at) { "yes" } else { "" };
            table.row([
                SocketAddr::from((at.address, at.port)).to_string(),
                format!("{:.1}%", 100.0 * candidate.share),
                chosen.to_owned(),
            ]);
        }
        let _ = write!(text, "\n{}", table.text());
    }
    if let Some(call) = &answer.socket {
        text.push_str(
            "\nBut where the client's connect() or sendmsg() is translated, no such packet is sent:\n",
        );
        one(text, call);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_an_address_and_a_port() {
        assert_eq!(endpoint("10.0.0.1:80"), Ok(SocketAddr::from(([10, 0, 0, 1], 80))));
        assert_eq!(endpoint("[::ffff:10.0.0.1]:80"), Ok(SocketAddr::from(([10, 0, 0, 1], 80))));
        assert_eq!(endpoint("[2001:db8::1]:80").map(|endpoint| endpoint.is_ipv6()), Ok(true));
        for text in ["10.0.0.1", "2001:db8::1:80", "web:80", "10.0.0.1:0", "10.0.0.1:65536", ""] {
            assert!(endpoint(text).is_err(), "{text:?}");
        }
    }
}
