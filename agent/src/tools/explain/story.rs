//! What decided, in order: the path's questions and their answers, in words.

use std::net::{IpAddr, SocketAddr};

use sluice_common::abi::{
    Affinity, Class, Range, ServicePort, TICK_SHIFT, backend, detect_local, device, frontend,
    masquerade, phase, state,
};
use sluice_common::path::{Decision, Hook, Verdict as PathVerdict, policy};
use sluice_common::{Reason, V4, V6};

use super::answer::{Source, Step, Verdict};
use super::meeting::{Meeting, Target};
use super::question::{Client, Question};
use super::record::Asked;
use super::world::{Routing, Side, World};

/// A kind of frontend, as Kubernetes calls it.
pub(super) fn kind_word(kind: u32) -> &'static str {
    match kind {
        frontend::LOAD_BALANCER => "LoadBalancer",
        frontend::EXTERNAL_IP => "ExternalIP",
        frontend::NODE_PORT => "NodePort",
        _ => "ClusterIP",
    }
}

/// Steps in the making.
pub(super) struct Story<'w> {
    question: &'w Question,
    world: &'w World,
    steps: Vec<Step>,
}

fn step(step: &'static str, text: impl Into<String>) -> Step {
    Step { step, text: text.into(), object: None, field: None }
}

impl<'w> Story<'w> {
    pub(super) fn new(question: &'w Question, world: &'w World) -> Self {
        Self { question, world, steps: Vec::new() }
    }

    pub(super) fn steps(self) -> Vec<Step> {
        self.steps
    }

    fn add(&mut self, word: &'static str, text: impl Into<String>) {
        self.steps.push(step(word, text));
    }

    /// The call was left to packets.
    pub(super) fn left(why: &str) -> Step {
        step("socket", format!("the call is left to packets: {why}"))
    }

    /// No program meets the packet.
    pub(super) fn unmet(&mut self, why: &str) {
        self.add("packet", why);
    }

    /// Where the packet is met.
    pub(super) fn meets<F: Side>(&mut self, meeting: &Meeting<F>, routing: &dyn Routing) {
        let device = self.world.devices.get(&meeting.ifindex);
        let role = match device.map(|device| device.entry.role) {
            Some(device::EDGE) => "the host's end of a pod's link",
            Some(device::UPLINK) => "an uplink",
            Some(device::FABRIC) => "an overlay device",
            Some(device::LOOPBACK) => "the loopback device",
            _ => "Sluice's own device",
        };
        let name = device.map_or("", |device| device.name.as_str());
        let place = if name.is_empty() { role.to_owned() } else { format!("{name}, {role}") };
        let uplink = device.is_some_and(|device| device.entry.role == device::UPLINK);
        let hook = match meeting.hook {
            Hook::Egress => "tc egress",
            Hook::Ingress | Hook::Xdp if uplink => "XDP or tc ingress",
            Hook::Ingress | Hook::Xdp => "tc ingress",
        };
        let supposed = routing.supposes();
        let supposed = if supposed.is_empty() { String::new() } else { format!(" ({supposed})") };
        let goes_on =
            if self.steps.is_empty() { "" } else { "not for a Service here; goes on to " };
        self.add("packet", format!("{goes_on}{hook} of {place}{supposed}"));
    }

    /// The call is met.
    pub(super) fn calls(&mut self, target: &Target) {
        let call = match (self.question.protocol.number(), self.question.from) {
            (sluice_common::packet::header::protocol::TCP, _) => {
                "connect() from a socket that is not bound to a port"
            }
            _ => "sendmsg() from a socket that is not connected",
        };
        let whose =
            if self.question.from == Client::Host { "a process of this host" } else { "a pod" };
        self.add("call", format!("{call}, of {whose}, at the cgroup"));
        self.frontend(target);
    }

    /// A pod's call is taken only where the pod has been met.
    pub(super) fn is_learned(&mut self) {
        self.add(
            "socket",
            "taken if a packet of the pod was met on its way to this frontend within the last minute, \
             else left to packets",
        );
    }

    fn frontend(&mut self, target: &Target) {
        let Target { owner, kind, .. } = target;
        let at = self.question.destination;
        let protocol = self.question.protocol.word();
        let kind_name = kind_word(*kind);
        let article = if kind_name.starts_with('E') { "an" } else { "a" };
        let text = format!("{at} {protocol} is {article} {kind_name} of port {}", owner.port());
        let field = self.world.objects.frontend_field(owner, *kind, at.ip());
        let object = Some(owner.object());
        self.steps.push(Step { step: "frontend", text, object, field: Some(field) });
    }

    /// What a packet's path asked, and was told.
    pub(super) fn asks<F: Side>(
        &mut self,
        asked: &[Asked<F>],
        target: Option<&Target>,
        decision: &Decision<F>,
    ) {
        let mut named = false;
        for question in asked {
            match question {
                Asked::Flow { found: Some(entry), embryonic } => {
                    let followed = decision.verdict != PathVerdict::Pass && decision.kind == 0;
                    let age = self.seconds_since(entry.seen);
                    let what = if state::has_ended(entry.state) {
                        "a flow that has ended"
                    } else if *embryonic {
                        "an unproven flow"
                    } else {
                        "a flow"
                    };
                    let fate =
                        if followed { "followed" } else { "not followed: a new one is begun" };
                    let text =
                        format!("{what} of this tuple is known, last renewed {age} s ago: {fate}");
                    self.add("flow", text);
                    if let (true, Some(target)) = (followed && !named, target) {
                        self.followed(target, entry.is_reply(), decision);
                        named = true;
                    }
                }
                Asked::Service { found } => {
                    if let (Some(target), Some(_), false) = (target, found, named) {
                        named = true;
                        if target.service_port == 0 {
                            self.undefined(target);
                        } else {
                            self.frontend(target);
                            self.client(target);
                        }
                    }
                }
                Asked::NodeAddress { serves: false } => {
                    let ip = self.question.destination.ip();
                    self.add(
                        "frontend",
                        format!("node ports are not served at {ip} (--nodeport-addresses)"),
                    );
                }
                Asked::SourceRanges { within } => self.source_ranges(target, *within),
                Asked::Range { class, found } => self.policy(target, *class, *found),
                Asked::Affinity { found } => self.affinity(target, found.as_ref(), asked),
                Asked::Slot { slot } => self.slot(target, *slot, asked),
                Asked::Backend { found } => {
                    if decision.kind != 0 {
                        let at = SocketAddr::from((F::ip(found.address), found.port));
                        self.backend(target, at, found.flags);
                    }
                }
                Asked::Flow { found: None, .. }
                | Asked::NodeAddress { serves: true }
                | Asked::Routes(_) => {}
            }
        }
        if decision.kind == 0 && target.is_none() && decision.verdict == PathVerdict::Pass && !named
        {
            let at = self.question.destination;
            let protocol = self.question.protocol.word();
            let text = if self.world.left.contains(&at.ip()) {
                format!(
                    "{} is left alone: a device of this node has it, for another proxy (--leave-address)",
                    at.ip()
                )
            } else {
                format!("{at} {protocol} is no Service's")
            };
            self.add("frontend", text);
        }
        if decision.reason == Reason::UnassignedAddress {
            let ip = self.question.destination.ip();
            self.add(
                "frontend",
                format!("{ip} is in the cluster's Service networks, and no Service has it"),
            );
        }
    }

    /// Why the packet is netfilter's, if it is.
    pub(super) fn leaves<F: Side>(&mut self, decision: &Decision<F>) {
        let text = match (decision.reason, self.world.settings.phase & phase::MASK) {
            (Reason::NetfilterFlow, _) => {
                "netfilter's connection tracking has translated this connection before Sluice took over, and \
                 goes on with it"
            }
            (Reason::NotTaken, phase::IMPORT) => {
                "a takeover is under way: until netfilter's connections are listed once more, datagrams and \
                 what is mid-stream are left to it"
            }
            (Reason::NotTaken, _) => {
                "a takeover has not got so far, or a release is under way: what is no flow of Sluice's is left \
                 to netfilter"
            }
            _ => return,
        };
        self.add("takeover", text);
    }

    /// Why the packet goes no further, where that is no matter of the Service's.
    pub(super) fn ends_early<F: Side>(&mut self, meeting: &Meeting<F>) {
        let answer = |what: &str| match meeting.answered {
            Some(_) => format!("answered with ICMP \"{what}\""),
            None => "dropped without an answer".to_owned(),
        };
        let destination = SocketAddr::from((
            F::ip(meeting.decision.flow.destination),
            meeting.decision.flow.destination_port,
        ));
        let client = self.question.source.ip();
        let text = match (meeting.decision.reason, meeting.answered) {
            (Reason::TooBig, Some((_, mtu))) => format!(
                "{} bytes are more than the {mtu} that the way to {destination} takes: {}",
                meeting.length,
                answer("packet too big"),
            ),
            (Reason::TtlExceeded, _) => {
                format!("its TTL would be 0 behind this node: {}", answer("time exceeded"))
            }
            (Reason::NoRoute, _) => format!(
                "the way to {destination}, or the one back to {client}, leads by no device that \
                 Sluice has programs on, or by one without an address to masquerade with"
            ),
            (Reason::RejectLimited, _) => format!(
                "{client} has had its ICMP errors for now (six at once, then one a second), or all \
                 clients of the device have (fifty, then a thousand a second)"
            ),
            _ => return,
        };
        self.add("limit", text);
    }

    /// What a socket's choice asked, and was told.
    pub(super) fn chooses<F: Side>(&mut self, asked: &[Asked<F>], target: &Target) {
        for question in asked {
            if let Asked::Range { class, found } = question {
                self.policy(Some(target), *class, *found);
                if found.size() != 0 {
                    let text = format!("one of {}, chosen by the socket's cookie", found.size());
                    self.add("slot", text);
                }
            }
        }
    }

    fn seconds_since(&self, seen: u32) -> u64 {
        (u64::from(self.world.now.wrapping_sub(seen)) << TICK_SHIFT) / 1_000_000_000
    }

    /// A flow's own words stand for those of a choice.
    fn followed<F: Side>(&mut self, target: &Target, reply: bool, decision: &Decision<F>) {
        if reply {
            let vip = SocketAddr::from((F::ip(decision.flow.source), decision.flow.source_port));
            let text = format!("it answers a client of {vip}, port {}", target.owner.port());
            let object = Some(target.owner.object());
            self.steps.push(Step { step: "frontend", text, object, field: None });
        } else {
            self.frontend(target);
            let at = SocketAddr::from((
                F::ip(decision.flow.destination),
                decision.flow.destination_port,
            ));
            let local = if decision.flow.is_local() { backend::LOCAL } else { 0 };
            self.backend(Some(target), at, local);
        }
    }

    fn undefined(&mut self, target: &Target) {
        let at = self.question.destination;
        let protocol = self.question.protocol.word();
        let text = format!(
            "{} is a ClusterIP whose Service has no port {} {protocol}",
            at.ip(),
            at.port()
        );
        let object = Some(target.owner.object());
        self.steps.push(Step {
            step: "frontend",
            text,
            object,
            field: Some("spec.ports".to_owned()),
        });
    }

    /// As what the client counts.
    fn client(&mut self, target: &Target) {
        let ip = self.question.source.ip();
        let settings = &self.world.settings;
        let detector = match self.question.source.ip() {
            IpAddr::V4(_) => policy::detector::<V4>(settings),
            IpAddr::V6(_) => policy::detector::<V6>(settings),
        };
        let detected = match detector {
            detect_local::DEVICE | detect_local::SOME_DEVICES => {
                "by the device that it comes in by"
            }
            detect_local::ADDRESS => "by its address",
            _ => "nothing tells local pods from others",
        };
        let text = if self.question.from == Client::Host {
            format!("{ip} is a process of this host")
        } else {
            match target.class {
                Class::Internal => format!("{ip} asks a ClusterIP: internal traffic, whoever asks"),
                Class::ExternalInside => {
                    format!("{ip} is a local pod ({detected}): an inside client")
                }
                Class::ExternalOutside => {
                    format!("{ip} is no local pod ({detected}): an outside client")
                }
            }
        };
        self.add("client", text);
    }

    fn source_ranges(&mut self, target: Option<&Target>, within: bool) {
        let ip = self.question.source.ip();
        let text = if within {
            format!("{ip} is within the source ranges")
        } else {
            format!("{ip} is outside the source ranges: dropped")
        };
        let object = target.map(|target| target.owner.object());
        let field = Some("spec.loadBalancerSourceRanges".to_owned());
        self.steps.push(Step { step: "policy", text, object, field });
    }

    fn policy(&mut self, target: Option<&Target>, class: Class, range: Range) {
        let Some(target) = target else { return };
        let (field, word) = self.world.objects.policy(&target.owner, class);
        let policy = match (word, class) {
            (Some("Local"), Class::ExternalInside) => {
                "Local, which does not bind clients on this node".to_owned()
            }
            (Some("Local"), Class::Internal | Class::ExternalOutside) => {
                "Local: only endpoints on this node".to_owned()
            }
            (Some(word), _) => word.to_owned(),
            (None, _) => "applied".to_owned(),
        };
        let census = self.world.objects.census(&target.owner);
        let census = census.map_or(String::new(), |census| format!("; {census}"));
        let count = self.selected(range);
        let result = if range.size() != 0 {
            format!("{count} {} for this client", if count == 1 { "serves" } else { "serve" })
        } else if range.drops() {
            "none is on this node, others are elsewhere: dropped".to_owned()
        } else {
            "none can serve: rejected".to_owned()
        };
        let text = format!("{policy}{census}; {result}");
        let object = Some(target.owner.object());
        self.steps.push(Step { step: "policy", text, object, field: Some(field.to_owned()) });
    }

    /// How many backends a range of slots leads to.
    fn selected(&self, range: Range) -> usize {
        let slots = self.world.image.slots.get(&range.start()).filter(|_| range.size() != 0);
        slots.map_or(0, |slots| slots.iter().collect::<std::collections::BTreeSet<_>>().len())
    }

    fn affinity<F: Side>(
        &mut self,
        target: Option<&Target>,
        found: Option<&Affinity>,
        asked: &[Asked<F>],
    ) {
        let Some(target) = target else { return };
        let seconds = self
            .world
            .image
            .ports
            .get(&target.service_port)
            .map_or(0, |port| port.affinity_seconds);
        let led = !asked.iter().any(|asked| matches!(asked, Asked::Slot { .. }));
        let ip = self.question.source.ip();
        let text = match found {
            Some(entry) if led => {
                let age = self.seconds_since(entry.seen);
                format!(
                    "ClientIP, {seconds} s: {ip} was here {age} s ago, and stays with its backend"
                )
            }
            Some(entry) if self.seconds_since(entry.seen) >= u64::from(seconds) => {
                let age = self.seconds_since(entry.seen);
                format!(
                    "ClientIP, {seconds} s: {ip} was last here {age} s ago, and is led on as if new"
                )
            }
            Some(_) => format!("ClientIP, {seconds} s: what is known of {ip} no longer counts"),
            None => format!("ClientIP, {seconds} s: {ip} was not here before"),
        };
        let object = Some(target.owner.object());
        let field = Some("spec.sessionAffinity".to_owned());
        self.steps.push(Step { step: "affinity", text, object, field });
    }

    fn slot<F: Side>(&mut self, target: Option<&Target>, slot: u32, asked: &[Asked<F>]) {
        let range = asked.iter().rev().find_map(|asked| {
            if let Asked::Range { found, .. } = asked { Some(*found) } else { None }
        });
        let Some(range) = range else { return };
        let by_client = target
            .and_then(|target| self.world.image.ports.get(&target.service_port))
            .is_some_and(|port| port.affinity_seconds != 0);
        let by = if by_client { "the client's address" } else { "the tuple" };
        let place = slot.wrapping_sub(range.start());
        self.add("slot", format!("{place} of {}, by a hash of {by}", range.size()));
    }

    fn backend(&mut self, target: Option<&Target>, at: SocketAddr, flags: u32) {
        let place = if flags & backend::HOST != 0 {
            "in this host's network"
        } else if flags & backend::LOCAL != 0 {
            "on this node"
        } else {
            "on another node"
        };
        let named =
            target.map(|target| self.world.objects.endpoint(&target.owner, at.ip(), at.port()));
        let (object, field) = named.unzip();
        let text = format!("{at} {place}");
        self.steps.push(Step { step: "backend", text, object, field: field.flatten() });
    }

    /// The packet goes around the stack, if a device leads on.
    pub(super) fn goes_around(&mut self, leaves_by: Option<u32>) {
        let name = leaves_by
            .and_then(|ifindex| self.world.devices.get(&ifindex))
            .map(|device| &device.name);
        let text = match (leaves_by, name) {
            (None, _) => {
                "the stack takes it, although --accelerate is on: no device leads on".to_owned()
            }
            (Some(_), Some(name)) => {
                format!("it goes on by {name}, around netfilter: --accelerate is on")
            }
            (Some(_), None) => {
                "it goes on as the routes say, around netfilter: --accelerate is on".to_owned()
            }
        };
        self.add("around", text);
    }

    /// How addresses and ports change.
    pub(super) fn rewrites<F: Side>(&mut self, decision: &Decision<F>) {
        let before = (self.question.source, self.question.destination);
        let source = SocketAddr::from((F::ip(decision.flow.source), decision.flow.source_port));
        let destination =
            SocketAddr::from((F::ip(decision.flow.destination), decision.flow.destination_port));
        let mut parts = Vec::new();
        if before.1 != destination {
            parts.push(format!("destination {} becomes {destination}", before.1));
        }
        if before.0 != source {
            let source = if is_unknown(source.ip()) {
                "an address of the node".to_owned()
            } else {
                source.to_string()
            };
            parts.push(format!("source {} becomes {source}", before.0));
        }
        if parts.is_empty() {
            return;
        }
        let fate = match decision.verdict {
            PathVerdict::Bounce => "; it goes back where it came from",
            PathVerdict::Route => "; it is sent on as the routes say",
            PathVerdict::Inject => "; it is handed to this host",
            PathVerdict::Pass
            | PathVerdict::Translate
            | PathVerdict::Around
            | PathVerdict::Reset
            | PathVerdict::Unreachable
            | PathVerdict::Drop
            | PathVerdict::Hold => "",
        };
        self.add("rewrite", parts.join(", ") + fate);
    }

    /// What a masqueraded client is shown as where its packet leaves.
    pub(super) fn leaves_as(
        &mut self,
        device: Option<&str>,
        client: SocketAddr,
        seen_as: SocketAddr,
    ) {
        let place = device.map_or_else(
            || "where it leaves".to_owned(),
            |name| format!("where it leaves by {name}"),
        );
        let seen_as = if is_unknown(seen_as.ip()) || seen_as.ip() == client.ip() {
            "an address of the node".to_owned()
        } else {
            seen_as.to_string()
        };
        self.add(
            "rewrite",
            format!("{place}, behind routing and netfilter, source {client} becomes {seen_as}"),
        );
    }

    /// Whether the backend sees the client's address, and why.
    pub(super) fn source<F: Side>(
        &mut self,
        source: Source,
        decision: &Decision<F>,
        asked: &[Asked<F>],
        target: Option<&Target>,
    ) {
        if decision.flow.is_reply() {
            return;
        }
        let hairpin = decision.flow.is_hairpin();
        let as_kube_proxy = self.world.settings.masquerade != masquerade::NEEDED;
        let asked_routes = asked.iter().any(|asked| matches!(asked, Asked::Routes(_)));
        let local = target
            .and_then(|target| self.world.image.ports.get(&target.service_port))
            .is_some_and(ServicePort::is_external_local)
            && target.is_some_and(|target| target.class != Class::Internal);
        let followed = decision.kind == 0;
        let why = match source {
            Source::Masqueraded if hairpin => {
                "the client is its own backend, and is shown to itself as the frontend"
            }
            _ if followed => "as the flow has it",
            _ if self.question.from == Client::Host => host_why(source),
            Source::Masqueraded if as_kube_proxy => "as kube-proxy does (--masquerade)",
            Source::Masqueraded => "otherwise answers would not find back here",
            Source::Kept if local => "externalTrafficPolicy: Local keeps it",
            Source::Kept if asked_routes => {
                "the backend is on this node, and answers leave by a device that programs are attached to"
            }
            Source::Kept => "answers come back here anyway",
        };
        self.add("source", format!("{}: {why}", source.word()));
    }

    /// As [`Self::source`], of a call.
    pub(super) fn call_source(&mut self, source: Source) {
        let why = if self.question.from == Client::Host {
            host_why(source)
        } else {
            "the pod speaks to the backend itself"
        };
        self.add("source", format!("{}: {why}", source.word()));
    }

    /// The end.
    pub(super) fn ends(&mut self, verdict: Verdict, reason: Reason) {
        self.add(
            "verdict",
            format!("{} ({}): {}", verdict.word(), reason.as_str(), reason.sentence().trim()),
        );
    }
}

fn host_why(source: Source) -> &'static str {
    match source {
        Source::Kept => {
            "a process of this host has the address that its route to the backend gives it"
        }
        Source::Masqueraded => {
            "a process of this host appears as the node, by the route to the backend"
        }
    }
}

/// The address that stands for the node's where nobody has told it.
pub(super) fn unknown_node(family_is_v4: bool) -> IpAddr {
    if family_is_v4 { IpAddr::from([0, 0, 0, 1]) } else { IpAddr::from([0, 0, 0, 0, 0, 0, 0, 2]) }
}

fn is_unknown(address: IpAddr) -> bool {
    address == unknown_node(address.is_ipv4())
}
