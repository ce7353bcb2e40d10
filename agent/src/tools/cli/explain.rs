//! `sluice explain`: what would happen to a packet, and why.

mod parties;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use schemars::JsonSchema;
use serde::Serialize;
use sluice_common::abi::device;
use sluice_core::model::object::Protocol;
use sluice_core::policy::{Policy, SocketPath};

use super::names::{NamesArgs, Need};
use super::output::{Format, Output};
use super::policy::PolicyArgs;
use super::table::{Mood, Style, Table, Text, cut, failures, prose, whole};
use super::{NO_OBJECTS, Outcome, Places, Usage};
use crate::daemon::source::names::Names;
use crate::node::status;
use crate::node::view::{self, BackendView, View};
use crate::tools::api::{kinds, monotonic_ns};
use crate::tools::explain::{
    Answer, Candidate, Client, Endpoint, Live, Manifests, NamedDevice, Options, Question, Routing,
    Step, Verdict, Way, World, explain,
};
use parties::{Directory, Party, Resolved};

/// The arguments of `sluice explain`.
#[derive(Debug, Args)]
#[command(override_usage = "sluice explain [OPTIONS] [PROTO] CLIENT DESTINATION")]
pub(super) struct ExplainArgs {
    /// The protocol (tcp, udp or sctp; a Service's own, else tcp), the client and the destination.
    ///
    /// Each is an address and port, pod/NAME or node/NAME. The client may also be external, and the
    /// destination svc/NAME:PORT. Names of pods and Services may have a namespace before them, as
    /// in pod/shop/client.
    #[arg(value_name = "QUESTION", num_args = 2..=3, required = true)]
    question: Vec<String>,
    /// The namespace of names that are given without one [default: default for pods, any for
    /// Services].
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// The kind of client: a pod of this node, a process of this host, or a client outside
    /// [default: as the client's name or address shows].
    #[arg(long, help_heading = "Packet", value_enum, value_name = "CLIENT")]
    from: Option<Client>,
    /// The first hook that handles the packet or call [default: the hook for the client's packets].
    #[arg(long, help_heading = "Packet", value_enum, value_name = "HOOK")]
    path: Option<Way>,
    /// The device that the packet arrives on [default: by the routes].
    #[arg(long, help_heading = "Packet", value_name = "NAME")]
    device: Option<String>,
    /// The packet's length in bytes, including its IP header [default: no payload].
    #[arg(long, help_heading = "Packet", value_name = "BYTES")]
    length: Option<u16>,
    /// The packet's TTL or hop limit when it arrives [default: 64].
    #[arg(long, help_heading = "Packet", value_name = "HOPS", value_parser = clap::value_parser!(u8).range(1..))]
    ttl: Option<u8>,
    /// Use the manifests in a directory, or in one file, instead of the maps of this node. Needs no
    /// privileges.
    #[arg(long, help_heading = "Manifests", value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// The node's name, as in nodeName of endpoints [default: the only Node in the manifests].
    #[arg(
        long,
        help_heading = "Manifests",
        visible_alias = "node-name",
        value_name = "NAME",
        env = "NODE_NAME"
    )]
    node: Option<String>,
    /// Show the answer before and after these manifests are applied.
    #[arg(long, help_heading = "Manifests", value_name = "FILE")]
    what_if: Option<PathBuf>,
    /// With --manifests, assume an agent with this --socket-path.
    #[arg(long, help_heading = "Manifests", value_enum, default_value_t, value_name = "SCOPE")]
    socket_path: SocketPath,
    /// With --manifests, assume an agent with this --proxy-name: it serves Services whose label
    /// service.kubernetes.io/service-proxy-name has this value.
    #[arg(long, help_heading = "Manifests", value_name = "NAME")]
    proxy_name: Option<String>,
    #[command(flatten)]
    names: NamesArgs,
    #[command(flatten)]
    pub(super) output: Output,
    // Comes last: its heading would apply to what follows.
    #[command(flatten)]
    policy: PolicyArgs,
}

impl ExplainArgs {
    /// Whether the answer comes from manifests, and from nothing on this node.
    pub(super) fn uses_manifests(&self) -> bool {
        self.manifests.is_some()
    }
}

/// The answers before and after a change.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Change {
    /// The answer as things are.
    before: Answer,
    /// The answer once the manifests are applied.
    after: Answer,
}

kinds! {
    Answer = "Explanation";
    Change = "ExplanationChange";
}

/// One answer, or the answers before and after a change.
enum Answers {
    One(Box<Answer>),
    Two(Box<Change>),
}

/// An answer with what it is about, for people.
struct Told<'a> {
    question: &'a Question,
    source: &'a Party,
    destination: &'a Party,
    names: &'a Names,
    /// Where the answer comes from.
    context: String,
}

/// Prints the answer. The exit code is that of the verdict.
///
/// # Errors
///
/// [`Usage`] for a question that makes no sense. Also when something cannot be read, or the client
/// is not where it is said to be.
pub(super) fn run(args: ExplainArgs, places: &Places) -> anyhow::Result<Outcome> {
    let asked = Asked::parse(&args)?;
    let output = args.output.clone();
    let (answers, question, names, context) = if args.manifests.is_some() {
        of_manifests(args, &asked)?
    } else {
        of_maps(&args, &asked, &args.names, places)?
    };
    let told = Told {
        question: &question,
        source: &asked.source,
        destination: &asked.destination,
        names: &names,
        context,
    };
    let (text, verdict) = match &answers {
        Answers::One(answer) => {
            let text = |answer: &Answer, style| told.one(answer, style);
            (output.object(&**answer, text)?, answer.verdict)
        }
        Answers::Two(change) => {
            let text = |change: &Change, style| told.two(change, style);
            (output.object(&**change, text)?, change.after.verdict)
        }
    };
    Ok(Outcome { text, code: verdict.code() })
}

/// The question as it was asked.
#[derive(Debug)]
struct Asked {
    protocol: Option<Protocol>,
    source: Party,
    destination: Party,
}

impl Asked {
    fn parse(args: &ExplainArgs) -> Result<Self, Usage> {
        let (protocol, source, destination) = match &args.question[..] {
            [source, destination] => (None, source, destination),
            [protocol, source, destination] => (Some(protocol), source, destination),
            _ => return Err(Usage("expected a client and a destination".to_owned())),
        };
        let protocol = protocol.map(|word| {
            let found = Protocol::from_word(&word.to_ascii_uppercase());
            found.ok_or_else(|| Usage(format!("{word:?}: expected tcp, udp or sctp")))
        });
        let namespace = args.namespace.as_deref();
        let asked = Self {
            protocol: protocol.transpose()?,
            source: Party::parse(source, namespace)?,
            destination: Party::parse(destination, namespace)?,
        };
        asked.check(args)?;
        Ok(asked)
    }

    /// Refuses what makes no sense whatever the sources say.
    fn check(&self, args: &ExplainArgs) -> Result<(), Usage> {
        let (Party::Address(source), Party::Address(destination)) =
            (&self.source, &self.destination)
        else {
            return Ok(());
        };
        if source.is_ipv4() != destination.is_ipv4() {
            let text = format!("{source} and {destination} are of different address families");
            return Err(Usage(text));
        }
        if args.path == Some(Way::Socket) && args.from == Some(Client::External) {
            return Err(no_call());
        }
        let has_names = args.manifests.is_some() || args.names.kubeconfig.is_some();
        if args.from.is_none() && !has_names {
            return Err(unknown_kind(*source));
        }
        Ok(())
    }

    /// Whether names that the maps do not have are needed.
    fn needs_names(&self) -> bool {
        self.source.needs_names() || self.destination.needs_names()
    }

    /// Returns the question in addresses.
    fn question(&self, args: &ExplainArgs, directory: Directory<'_>) -> anyhow::Result<Question> {
        let resolved = directory.resolve(&self.source, &self.destination, self.protocol)?;
        let Resolved { source, destination, .. } = resolved;
        let known = resolved.from.or_else(|| directory.kind_of(source.ip()));
        let from = args.from.or(known).ok_or_else(|| unknown_kind(source))?;
        if args.path == Some(Way::Socket) && from == Client::External {
            bail!(Usage(
                "--path socket: an external client makes no calls on this node".to_owned()
            ));
        }
        // Who names the place knows why packets with this source are there.
        if args.path.is_none() && args.device.is_none() {
            directory.check(source.ip(), from)?;
        }
        let protocol = self.protocol.or(resolved.protocol).unwrap_or(Protocol::Tcp);
        let question = Question {
            protocol,
            source,
            destination,
            from,
            way: args.path,
            device: args.device.clone(),
            length: args.length,
            ttl: args.ttl,
        };
        let least = question.least_length();
        if let Some(length) = args.length.filter(|length| *length < least) {
            let name = protocol.word();
            bail!(Usage(format!(
                "--length {length}: the headers of {name} alone take {least} bytes"
            )));
        }
        Ok(question)
    }
}

fn no_call() -> Usage {
    Usage("--path socket: an external client makes no calls on this node".to_owned())
}

fn unknown_kind(client: SocketAddr) -> Usage {
    Usage(format!("nothing shows what {client} is: give --from pod, host or external"))
}

fn of_manifests(
    mut args: ExplainArgs,
    asked: &Asked,
) -> anyhow::Result<(Answers, Question, Names, String)> {
    let folder = args.manifests.clone().unwrap_or_default();
    let policy = args.policy.clone().policy().map_err(|error| Usage(format!("{error:#}")))?;
    let options = Options {
        path: folder.clone(),
        node: args.node.take().map(Into::into),
        proxy_name: args.proxy_name.take(),
        policy,
        socket_path: args.socket_path.number(),
    };
    let unreadable = || format!("cannot read {}", folder.display());
    let mut manifests = Manifests::read(options).with_context(unreadable)?;
    for report in manifests.unread() {
        eprintln!("warning: left out {}: {}", report.subject, report.note.message);
    }
    if manifests.objects() == 0 {
        bail!("found no object in {}: {NO_OBJECTS}", folder.display());
    }
    let names = Names::of_manifests(&folder).with_context(unreadable)?;
    let node = manifests.node().unwrap_or_default().to_owned();
    let directory = Directory { names: &names, image: manifests.image(), node: &node };
    let question = asked.question(&args, directory)?;
    let context = format!("the manifests in {}", folder.display());
    let (world, routing) = manifests.world(&question);
    let before = explain(&question, &world, &routing)?;
    let Some(file) = &args.what_if else {
        return Ok((Answers::One(Box::new(before)), question, names, context));
    };
    manifests.apply(file).with_context(|| format!("--what-if {}", file.display()))?;
    let (world, routing) = manifests.world(&question);
    let after = explain(&question, &world, &routing)?;
    Ok((Answers::Two(Box::new(Change { before, after })), question, names, context))
}

fn of_maps(
    args: &ExplainArgs,
    asked: &Asked,
    sources: &NamesArgs,
    places: &Places,
) -> anyhow::Result<(Answers, Question, Names, String)> {
    let Places { pin_path, state_dir, .. } = places;
    let policy = args.policy.clone().policy().map_err(|error| Usage(format!("{error:#}")))?;
    if policy != Policy::default() {
        bail!(Usage(
            "policy flags need --manifests; without it, the maps hold the agent's policy"
                .to_owned()
        ));
    }
    let status = status::read(state_dir).unwrap_or_default();
    let node = args.node.clone().unwrap_or(status.node);
    let left = status.policy.left_alone.into_iter().collect();
    let kernel = view::open(pin_path)
        .context("cannot read this node's maps; use --manifests DIR to read manifests instead")?;
    view::check_namespace(&kernel)?;
    let live = Live::new().context("cannot query the kernel's routes")?;
    let mut world = live.world(&kernel, monotonic_ns(), left)?;
    let need = Need { namespace: None, pods: sources.kubeconfig.is_some() };
    let names = if asked.needs_names() {
        sources.read(places, need).context("the names of pods and nodes are not known")?
    } else if sources.kubeconfig.is_some() || args.output.format == Format::Wide {
        sources.read_or_warn(places, need)
    } else {
        Names::default()
    };
    let directory = Directory { names: &names, image: &world.image, node: &node };
    let question = asked.question(args, directory)?;
    if args.path.is_none() && args.device.is_none() {
        check_route(&question, &world, &live)?;
    }
    let view = View::with(kernel, world.image.clone())?;
    let backends = view.backends();
    let context = format!("the maps under {}", pin_path.display());
    let mut before = explain(&question, &world, &live)?;
    add_failures(&mut before, &view, &backends);
    let Some(file) = &args.what_if else {
        return Ok((Answers::One(Box::new(before)), question, names, context));
    };
    world
        .apply(file, view.kernel.maps().sizes(), &node)
        .with_context(|| format!("--what-if {}", file.display()))?;
    let mut after = explain(&question, &world, &live)?;
    add_failures(&mut after, &view, &backends);
    Ok((Answers::Two(Box::new(Change { before, after })), question, names, context))
}

/// Refuses a client that the routes of this node show not to be what it is said to be.
fn check_route(question: &Question, world: &World, routing: &dyn Routing) -> anyhow::Result<()> {
    let client = question.source.ip();
    let is_own = routing.is_local(client);
    match question.from {
        Client::Pod if is_own => {
            bail!(Usage(format!("{client} is this host's own address: ask with --from host")))
        }
        Client::Host if !is_own => bail!("no device of this node has the address {client}"),
        Client::Pod => {
            let device = routing
                .comes_in_by(question, &world.devices)
                .and_then(|ifindex| world.devices.get(&ifindex))
                .filter(|device| matches!(device.entry.role, device::UPLINK | device::FABRIC));
            if let Some(NamedDevice { name, .. }) = device {
                bail!(
                    "no pod of this node has the address {client}: it is reached by {name}, which \
                     leads off the node; a pod of another node is to be asked about there, and a \
                     client outside with --from external"
                );
            }
            Ok(())
        }
        Client::Host | Client::External => Ok(()),
    }
}

/// Adds to each candidate what was counted of connections to it, and a step for each that fails:
/// what is forwarded may still be refused.
fn add_failures(answer: &mut Answer, view: &View, backends: &[BackendView]) {
    if let Some(call) = &mut answer.socket {
        add_failures(call, view, backends);
    }
    let Some(service) = &answer.service else { return };
    let of_service = backends.iter().filter(|backend| {
        view.name(backend.service_port).is_some_and(|name| *service == name.service())
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
                "{at} failed {failed} of {} through this node: {}",
                attempts.max(failed),
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

impl Told<'_> {
    /// Returns an answer as text.
    fn one(&self, answer: &Answer, style: Style) -> String {
        let mut text = self.head();
        self.add(&mut text, answer, style);
        text
    }

    /// Returns the answers before and after a change as text.
    fn two(&self, change: &Change, style: Style) -> String {
        let mut text = self.head();
        text.push_str("\n== Before ==\n");
        self.add(&mut text, &change.before, style);
        text.push_str("\n== After ==\n");
        self.add(&mut text, &change.after, style);
        text
    }

    fn head(&self) -> String {
        let Self { question, context, .. } = self;
        let who = match question.from {
            Client::Pod => "a pod of this node",
            Client::Host => "a process of this host",
            Client::External => "an external client",
        };
        let named = |party: &Party, address: SocketAddr| match party {
            Party::Address(_) => {
                let pod = self.names.pod(address.ip());
                pod.map_or_else(String::new, |pod| format!(" (pod {})", pod.name))
            }
            Party::External => String::new(),
            Party::Pod(..) | Party::Node(..) | Party::Service(_) => format!(" ({party})"),
        };
        let (source, destination) = (question.source, question.destination);
        format!(
            "{} {source}{} -> {destination}{}, from {who}, by {context}\n",
            question.protocol.word(),
            named(self.source, source),
            named(self.destination, destination),
        )
    }

    /// Adds the stories of an answer, the one that happens first.
    fn add(&self, text: &mut String, answer: &Answer, style: Style) {
        let Some(call) = &answer.socket else { return self.story(text, answer, style) };
        text.push_str(
            "\nThe client's connect() or sendmsg() is translated before there is a packet:\n",
        );
        self.story(text, call, style);
        text.push_str("\nA socket whose call is not translated sends packets instead:\n");
        self.story(text, answer, style);
    }

    /// Adds a story: the verdict, the steps to it, and who else might be chosen.
    fn story(&self, text: &mut String, answer: &Answer, style: Style) {
        let is_result = |step: &&Step| matches!(step.step, "verdict" | "failures");
        let mood = |step: &Step| match (step.step, answer.verdict) {
            ("failures", _) | ("verdict", Verdict::Reject | Verdict::Drop) => Some(Mood::Bad),
            ("verdict", Verdict::Forward | Verdict::Pass) => Some(Mood::Good),
            _ => None,
        };
        let (results, steps): (Vec<_>, Vec<_>) = answer.steps.iter().partition(is_result);
        for part in [results, steps] {
            let mut table = Table::new(&[whole(""), prose("")]);
            for step in part {
                table.row([Text::new(head(step), mood(step)), words(step).into()]);
            }
            let style = Style { headers: false, ..style };
            // Writing to a string cannot fail.
            let _ = write!(text, "\n{}", table.text(style));
        }
        if !answer.candidates.is_empty() {
            let _ = write!(text, "\n{}", self.candidates(answer).text(style));
        }
    }

    fn candidates(&self, answer: &Answer) -> Table {
        let pod = |candidate: &Candidate| {
            let (namespace, _) = answer.service.as_deref()?.split_once('/')?;
            self.names.endpoint(namespace, candidate.address)
        };
        // Nothing is known of connections by manifests.
        let is_counted = answer.candidates.iter().any(|candidate| attempts(candidate) > 0);
        let is_named = answer.candidates.iter().any(|candidate| pod(candidate).is_some());
        let mut columns = vec![cut("CANDIDATE")];
        columns.extend(is_named.then_some([cut("POD"), cut("NODE")]).into_iter().flatten());
        columns.extend([whole("SHARE"), whole("CHOSEN")]);
        columns.extend(is_counted.then_some(whole("FAILED")));
        let mut table = Table::new(&columns);
        for candidate in &answer.candidates {
            let at = Endpoint { address: candidate.address, port: candidate.port };
            let chosen = if answer.backend == Some(at) { "yes" } else { "" };
            let mut cells = vec![Text::from(SocketAddr::from((at.address, at.port)).to_string())];
            if is_named {
                let pod = pod(candidate);
                cells.push(pod.map(|pod| pod.name.to_string()).unwrap_or_default().into());
                cells.push(pod.and_then(|pod| pod.node.clone()).unwrap_or_default().into());
            }
            cells.extend([format!("{:.1}%", 100.0 * candidate.share).into(), chosen.into()]);
            cells.extend(is_counted.then(|| failures(failed(candidate), attempts(candidate))));
            table.row(cells);
        }
        table
    }
}

/// Returns the head of a step's line.
fn head(step: &Step) -> String {
    let mut head = step.step.to_owned();
    if let Some(first) = head.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    head + ":"
}

/// Returns a step's text, with the object and field behind it.
fn words(step: &Step) -> String {
    let behind: Vec<&str> = step.object.iter().chain(&step.field).map(String::as_str).collect();
    let behind =
        if behind.is_empty() { String::new() } else { format!(" [{}]", behind.join(": ")) };
    format!("{}{behind}", step.text)
}
