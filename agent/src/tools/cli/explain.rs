//! `sluice explain`: what would happen to a packet, and why.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use sluice_core::model::object::Protocol;
use sluice_core::policy::{Policy, SocketPath};

use super::flows::monotonic_ns;
use super::policy::PolicyArgs;
use super::table::{Table, failures, render};
use super::{NO_OBJECTS, Outcome, Output, Usage};
use crate::node::status;
use crate::node::view::{self, BackendView, View};
use crate::tools::explain::{
    Answer, Candidate, Client, Endpoint, Live, Manifests, Options, Question, Step, Way, explain,
};

/// The arguments of `sluice explain`.
#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// The protocol: TCP, UDP or SCTP.
    #[arg(value_name = "PROTO", value_parser = protocol)]
    protocol: Protocol,
    /// The client's address and port. IPv6 addresses are written as `[ADDRESS]:PORT`.
    #[arg(value_name = "SRC:PORT", value_parser = endpoint)]
    source: SocketAddr,
    /// The destination's address and port.
    #[arg(value_name = "DST:PORT", value_parser = endpoint)]
    destination: SocketAddr,
    /// The kind of client: a pod of this node, a process of this host, or a client outside.
    #[arg(long, value_enum, value_name = "CLIENT")]
    from: Client,
    /// The first hook that handles the packet or call [default: the hook for the client's packets].
    #[arg(long, value_enum, value_name = "HOOK")]
    path: Option<Way>,
    /// The device that the packet arrives on [default: by the routes].
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// The packet's length in bytes, including its IP header [default: no payload].
    #[arg(long, value_name = "BYTES")]
    length: Option<u16>,
    /// The packet's TTL or hop limit when it arrives [default: 64].
    #[arg(long, value_name = "HOPS", value_parser = clap::value_parser!(u8).range(1..))]
    ttl: Option<u8>,
    /// Use the manifests in a directory, or in one file, instead of the maps of this node. Needs no
    /// privileges.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// The node's name, as in nodeName of endpoints [default: the only Node in the manifests].
    #[arg(long, visible_alias = "node-name", value_name = "NAME", env = "NODE_NAME")]
    node: Option<String>,
    /// Show the answer before and after these manifests are applied.
    #[arg(long, value_name = "FILE")]
    what_if: Option<PathBuf>,
    /// With --manifests, assume an agent with this --socket-path.
    #[arg(long, value_enum, default_value_t, value_name = "SCOPE")]
    socket_path: SocketPath,
    /// With --manifests, assume an agent with this --proxy-name: it serves Services whose label
    /// service.kubernetes.io/service-proxy-name has this value.
    #[arg(long, value_name = "NAME")]
    proxy_name: Option<String>,
    #[command(flatten)]
    pub(super) output: Output,
    // Comes last: its heading would apply to what follows.
    #[command(flatten)]
    policy: PolicyArgs,
}

fn protocol(text: &str) -> Result<Protocol, String> {
    Protocol::from_word(&text.to_ascii_uppercase())
        .ok_or_else(|| "expected TCP, UDP or SCTP".to_owned())
}

fn endpoint(text: &str) -> Result<SocketAddr, String> {
    let expected = "expected an address and a port, such as 10.0.0.1:80 or [2001:db8::1]:80";
    let endpoint: SocketAddr = text.parse().map_err(|_| expected.to_owned())?;
    if endpoint.port() == 0 {
        return Err("port 0 is not valid".to_owned());
    }
    Ok(SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port()))
}

impl ExplainArgs {
    /// Whether the answer comes from manifests, and from nothing on this node.
    pub(super) fn uses_manifests(&self) -> bool {
        self.manifests.is_some()
    }
}

/// One answer, or the answers before and after a change.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Answers {
    One(Box<Answer>),
    Two { before: Box<Answer>, after: Box<Answer> },
}

/// Prints the answer. The exit code is that of the verdict.
///
/// # Errors
///
/// [`Usage`] for a question that makes no sense. Also when something cannot be read.
pub(super) fn run(args: ExplainArgs, pin_path: &Path, state_dir: &Path) -> anyhow::Result<Outcome> {
    let ExplainArgs { protocol, source, destination, from, path, device, output, what_if, .. } =
        args;
    let (length, ttl) = (args.length, args.ttl);
    if source.is_ipv4() != destination.is_ipv4() {
        bail!(Usage(format!("{source} and {destination} are of different address families")));
    }
    if path == Some(Way::Socket) && from == Client::External {
        bail!(Usage("--path socket: an external client makes no calls on this node".to_owned()));
    }
    let policy = args.policy.policy().map_err(|error| Usage(format!("{error:#}")))?;
    let question = Question { protocol, source, destination, from, way: path, device, length, ttl };
    let least = question.least_length();
    if let Some(length) = length.filter(|length| *length < least) {
        let name = protocol.word();
        bail!(Usage(format!("--length {length}: the headers of {name} alone take {least} bytes")));
    }
    let (answers, context) = if let Some(folder) = args.manifests {
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
            bail!(Usage(
                "policy flags need --manifests; without it, the maps hold the agent's policy"
                    .to_owned()
            ));
        }
        let context = format!("the maps under {}", pin_path.display());
        let status = status::read(state_dir).unwrap_or_default();
        let node = args.node.unwrap_or(status.node);
        let left = status.policy.left_alone.into_iter().collect();
        (of_maps(&question, pin_path, &node, left, what_if.as_deref())?, context)
    };
    let code = match &answers {
        Answers::One(answer) | Answers::Two { after: answer, .. } => answer.verdict.code(),
    };
    let text = render(output.output, &answers, |answers| text(&question, &context, answers))?;
    Ok(Outcome { text, code })
}

fn of_manifests(
    question: &Question,
    options: Options,
    what_if: Option<&Path>,
) -> anyhow::Result<Answers> {
    let folder = options.path.clone();
    let mut manifests =
        Manifests::read(options).with_context(|| format!("cannot read {}", folder.display()))?;
    for report in manifests.unread() {
        eprintln!("warning: left out {}: {}", report.subject, report.note.message);
    }
    if manifests.objects() == 0 {
        bail!("found no object in {}: {NO_OBJECTS}", folder.display());
    }
    let (world, routing) = manifests.world(question);
    let before = explain(question, &world, &routing)?;
    let Some(file) = what_if else { return Ok(Answers::One(Box::new(before))) };
    manifests.apply(file).with_context(|| format!("--what-if {}", file.display()))?;
    let (world, routing) = manifests.world(question);
    let after = explain(question, &world, &routing)?;
    Ok(Answers::Two { before: Box::new(before), after: Box::new(after) })
}

fn of_maps(
    question: &Question,
    pin_path: &Path,
    node: &str,
    left: BTreeSet<IpAddr>,
    what_if: Option<&Path>,
) -> anyhow::Result<Answers> {
    let kernel = view::open(pin_path)
        .context("cannot read this node's maps; use --manifests DIR to read manifests instead")?;
    view::check_namespace(&kernel)?;
    let live = Live::new().context("cannot query the kernel's routes")?;
    let mut world = live.world(&kernel, monotonic_ns(), left)?;
    let view = View::with(kernel, world.image.clone())?;
    let backends = view.backends();
    let mut before = explain(question, &world, &live)?;
    add_failures(&mut before, &view, &backends);
    let Some(file) = what_if else { return Ok(Answers::One(Box::new(before))) };
    world
        .apply(file, view.kernel.maps().sizes(), node)
        .with_context(|| format!("--what-if {}", file.display()))?;
    let mut after = explain(question, &world, &live)?;
    add_failures(&mut after, &view, &backends);
    Ok(Answers::Two { before: Box::new(before), after: Box::new(after) })
}

/// Adds to each candidate what was counted of connections to it, and a step for each that fails:
/// what is forwarded may still be refused.
fn add_failures(answer: &mut Answer, view: &View, backends: &[BackendView]) {
    if let Some(call) = &mut answer.socket {
        add_failures(call, view, backends);
    }
    let Some(service) = &answer.service else { return };
    let of_service = backends.iter().filter(|backend| {
        view.name(backend.service_port)
            .is_some_and(|name| *service == format!("{}/{}", name.namespace, name.service))
    });
    for backend in of_service {
        let is_same = |candidate: &&mut Candidate| {
            backend.address == SocketAddr::from((candidate.address, candidate.port))
        };
        if let Some(candidate) = answer.candidates.iter_mut().find(is_same) {
            let (sockets, flows) = (&backend.sockets, backend.counters.flows);
            candidate.connects += sockets.connections + sockets.failed;
            candidate.failed += sockets.failed;
            candidate.flows += flows;
            candidate.failures.add(&backend.failures);
        }
    }
    for candidate in answer.candidates.iter().filter(|candidate| failed(candidate) > 0) {
        let at = SocketAddr::from((candidate.address, candidate.port));
        let (failed, attempts) = (failed(candidate), attempts(candidate));
        answer.steps.push(Step {
            step: "failures",
            text: format!(
                "{at} failed {} through this node: {}",
                failures(failed, attempts),
                candidate.failures.words()
            ),
            object: None,
            field: None,
        });
    }
}

/// Returns the number of connections to a candidate that failed to begin, on either path.
fn failed(candidate: &Candidate) -> u64 {
    candidate.failed + candidate.failures.flows()
}

/// Returns the number of connections to a candidate that were tried, on either path.
fn attempts(candidate: &Candidate) -> u64 {
    candidate.connects + candidate.flows
}

/// Returns the answers as text.
fn text(question: &Question, context: &str, answers: &Answers) -> String {
    let who = match question.from {
        Client::Pod => "a pod of this node",
        Client::Host => "a process of this host",
        Client::External => "an external client",
    };
    let (source, destination) = (question.source, question.destination);
    let mut text = format!(
        "{} {source} -> {destination}, from {who}, by {context}\n",
        question.protocol.word()
    );
    match answers {
        Answers::One(answer) => one(&mut text, answer),
        Answers::Two { before, after } => {
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
        // Nothing is known of connections by manifests.
        let is_counted = answer.candidates.iter().any(|candidate| attempts(candidate) > 0);
        let mut headers = vec!["CANDIDATE", "SHARE", "CHOSEN"];
        headers.extend(is_counted.then_some("FAILED"));
        let mut table = Table::new(&headers);
        for candidate in &answer.candidates {
            let at = Endpoint { address: candidate.address, port: candidate.port };
            let chosen = if answer.backend == Some(at) { "yes" } else { "" };
            let mut cells = vec![
                SocketAddr::from((at.address, at.port)).to_string(),
                format!("{:.1}%", 100.0 * candidate.share),
                chosen.to_owned(),
            ];
            cells.extend(is_counted.then(|| failures(failed(candidate), attempts(candidate))));
            table.row(cells);
        }
        let _ = write!(text, "\n{}", table.text());
    }
    if let Some(call) = &answer.socket {
        text.push_str(
            "\nBut if the client's connect() or sendmsg() is translated, no such packet is sent:\n",
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
