//! Tells the steps of a decision: the path's lookups and their results, in words.

use std::net::{IpAddr, SocketAddr};

use sluice_common::abi::{
    Affinity, Class, Flow, Range, ServicePort, TICK_SHIFT, backend, detect_local, device, frontend,
    masquerade, phase, state,
};
use sluice_common::path::{Decision, Hook, Verdict as PathVerdict, policy};
use sluice_common::{Reason, V4, V6};

use super::answer::{Source, Step, Verdict};
use super::meeting::{Meeting, Target};
use super::question::{Client, Question};
use super::record::Asked;
use super::world::{Routing, Side, World};

/// Returns the kind of a frontend, as Kubernetes calls it.
pub(super) fn kind_word(kind: u32) -> &'static str {
    match kind {
        frontend::LOAD_BALANCER => "LoadBalancer",
        frontend::EXTERNAL_IP => "ExternalIP",
        frontend::NODE_PORT => "NodePort",
        _ => "ClusterIP",
    }
}

/// The steps so far.
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

    /// Returns the step of a call that is left to packets.
    pub(super) fn left(why: &str) -> Step {
        step("socket", format!("the call is left to packets: {why}"))
    }

    /// Adds that no program handles the packet.
    pub(super) fn not_handled(&mut self, why: &str) {
        self.add("packet", why);
    }

    /// Adds where the packet arrives.
    pub(super) fn arrives<F: Side>(&mut self, meeting: &Meeting<F>, routing: &dyn Routing) {
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
            if self.steps.is_empty() { "" } else { "not for a Service here; continues to " };
        self.add("packet", format!("{goes_on}{hook} of {place}{supposed}"));
    }

    /// Adds where the call is handled.
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

    /// Adds that a pod's call is only translated after a packet of the pod was seen.
    pub(super) fn is_learned(&mut self) {
        self.add(
            "socket",
            "translated if a packet of the pod to this frontend was seen within the last minute, \
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

    /// Adds the lookups of a packet's path.
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
                    let followed = decision.verdict != PathVerdict::Pass && !decision.selects();
                    self.flow::<F>(entry, *embryonic, followed);
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
                Asked::NodeAddress { serves: false } => self.serves_no_node_ports(),
                Asked::SourceRanges { within } => self.source_ranges(target, *within),
                Asked::Range { class, found } => self.policy(target, *class, *found),
                Asked::Affinity { found } => self.affinity(target, found.as_ref(), asked),
                Asked::Slot { slot } => self.slot(target, *slot, asked),
                Asked::Backend { found } => {
                    if decision.selects() {
                        let at = SocketAddr::from((F::ip(found.address), found.port));
                        self.backend(target, at, found.flags);
                    }
                }
                Asked::Flow { found: None, .. }
                | Asked::NodeAddress { serves: true }
                | Asked::Routes(_) => {}
            }
        }
        if !decision.selects()
            && target.is_none()
            && decision.verdict == PathVerdict::Pass
            && !named
        {
            self.is_no_frontend();
        }
        if decision.reason == Reason::UnassignedAddress {
            let ip = self.question.destination.ip();
            self.add(
                "frontend",
                format!("{ip} is in the cluster's Service networks, and no Service has it"),
            );
        }
    }

    /// Adds the flow of the packet's tuple.
    fn flow<F: Side>(&mut self, entry: &Flow<F::Address>, embryonic: bool, followed: bool) {
        let what = if state::has_ended(entry.state) {
            "a flow that has ended"
        } else if embryonic {
            "an unproven flow"
        } else {
            "a flow"
        };
        let fate = if followed { "followed" } else { "not followed: a new one is opened" };
        let age = self.seconds_since(entry.seen);
        self.add("flow", format!("{what} of this tuple is known, renewed {age} s ago: {fate}"));
    }

    fn serves_no_node_ports(&mut self) {
        let ip = self.question.destination.ip();
        self.add("frontend", format!("node ports are not served at {ip} (--nodeport-addresses)"));
    }

    fn is_no_frontend(&mut self) {
        let at = self.question.destination;
        let protocol = self.question.protocol.word();
        let text = if self.world.left.contains(&at.ip()) {
            format!(
                "{} is left alone: a device of this node has it, for another proxy (--leave-address)",
                at.ip()
            )
        } else {
            format!("no Service has {at} {protocol}")
        };
        self.add("frontend", text);
    }

    /// Adds why the packet is left to netfilter, if it is.
    pub(super) fn leaves<F: Side>(&mut self, decision: &Decision<F>) {
        let text = match (decision.reason, self.world.settings.phase & phase::MASK) {
            (Reason::NetfilterFlow, _) => {
                "netfilter has translated this connection since before the takeover, and continues \
                 to do so"
            }
            (Reason::NotTaken, phase::IMPORT) => {
                "a takeover is under way: until netfilter's connections have been listed again, it \
                 keeps datagrams and connections that are already open"
            }
            (Reason::NotTaken, _) => {
                "a takeover is not far enough, or a release is under way: packets without a flow of \
                 Sluice are left to netfilter"
            }
            _ => return,
        };
        self.add("takeover", text);
    }

    /// Adds why the packet ends early, for a reason that is not the Service's.
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
                "{} bytes exceed the MTU of {mtu} on the path to {destination}: {}",
                meeting.length,
                answer("packet too big"),
            ),
            (Reason::TtlExceeded, _) => {
                format!("its TTL would be 0 after this node: {}", answer("time exceeded"))
            }
            (Reason::NoRoute, _) => format!(
                "the route to {destination}, or the one back to {client}, leaves by no device with \
                 Sluice's programs, or by one without an address to masquerade with"
            ),
            (Reason::RejectLimited, _) => format!(
                "the limit of ICMP errors is reached for {client} (six at once, then one per \
                 second), or for all clients of the device (fifty, then a thousand per second)"
            ),
            _ => return,
        };
        self.add("limit", text);
    }

    /// Adds the lookups of a call.
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

    /// Adds the steps of a known flow, in place of those of a choice.
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

    /// Adds the class of the client.
    fn client(&mut self, target: &Target) {
        let ip = self.question.source.ip();
        let settings = &self.world.settings;
        let detector = match self.question.source.ip() {
            IpAddr::V4(_) => policy::detector::<V4>(settings),
            IpAddr::V6(_) => policy::detector::<V6>(settings),
        };
        let detected = match detector {
            detect_local::DEVICE | detect_local::SOME_DEVICES => "by the device that it arrives on",
            detect_local::ADDRESS => "by its address",
            _ => "local pods are not detected",
        };
        let text = if self.question.from == Client::Host {
            format!("{ip} is a process of this host")
        } else {
            match target.class {
                Class::Internal => {
                    format!("{ip} uses a ClusterIP: internal traffic for any client")
                }
                Class::ExternalInside => {
                    format!("{ip} is a local pod ({detected}): an inside client")
                }
                Class::ExternalOutside => {
                    format!("{ip} is not a local pod ({detected}): an outside client")
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
                "Local, which does not apply to clients on this node".to_owned()
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
            "none is on this node, but others are elsewhere: dropped".to_owned()
        } else {
            "none can serve: rejected".to_owned()
        };
        let text = format!("{policy}{census}; {result}");
        let object = Some(target.owner.object());
        self.steps.push(Step { step: "policy", text, object, field: Some(field.to_owned()) });
    }

    /// Returns the number of backends in a range of slots.
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
                    "ClientIP, {seconds} s: {ip} was seen {age} s ago, and stays with its backend"
                )
            }
            Some(entry) if self.seconds_since(entry.seen) >= u64::from(seconds) => {
                let age = self.seconds_since(entry.seen);
                format!("ClientIP, {seconds} s: {ip} was last seen {age} s ago, and counts as new")
            }
            Some(_) => format!("ClientIP, {seconds} s: the backend of {ip} no longer counts"),
            None => format!("ClientIP, {seconds} s: {ip} has not been seen before"),
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

    /// Adds that the packet goes around the stack, or why it does not.
    pub(super) fn goes_around(&mut self, leaves_by: Option<u32>) {
        let name = leaves_by
            .and_then(|ifindex| self.world.devices.get(&ifindex))
            .map(|device| &device.name);
        let text = match (leaves_by, name) {
            (None, _) => {
                "the stack forwards it although --accelerate is on: no device leads further"
                    .to_owned()
            }
            (Some(_), Some(name)) => {
                format!("it leaves by {name}, around netfilter: --accelerate is on")
            }
            (Some(_), None) => {
                "it is forwarded by the routes, around netfilter: --accelerate is on".to_owned()
            }
        };
        self.add("around", text);
    }

    /// Adds how addresses and ports change.
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
            PathVerdict::Bounce => "; it leaves by the device that it arrived on",
            PathVerdict::Route => "; it is forwarded by the routes",
            PathVerdict::Inject => "; it is delivered to this host",
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

    /// Adds the address that a masqueraded client appears as when its packet leaves.
    pub(super) fn leaves_as(
        &mut self,
        device: Option<&str>,
        client: SocketAddr,
        seen_as: SocketAddr,
    ) {
        let place =
            device.map_or_else(|| "at egress".to_owned(), |name| format!("at egress of {name}"));
        let seen_as = if is_unknown(seen_as.ip()) || seen_as.ip() == client.ip() {
            "an address of the node".to_owned()
        } else {
            seen_as.to_string()
        };
        self.add(
            "rewrite",
            format!("{place}, after routing and netfilter, source {client} becomes {seen_as}"),
        );
    }

    /// Adds whether the backend sees the client's address, and why.
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
        let followed = !decision.selects();
        let why = match source {
            Source::Masqueraded if hairpin => {
                "the client is its own backend, and sees itself as the frontend"
            }
            _ if followed => "as in the flow",
            _ if self.question.from == Client::Host => host_why(source),
            Source::Masqueraded if as_kube_proxy => "as kube-proxy does (--masquerade)",
            Source::Masqueraded => "otherwise replies would not return to this node",
            Source::Kept if local => "externalTrafficPolicy: Local preserves it",
            Source::Kept if asked_routes => {
                "the backend is on this node, and replies leave by a device with programs"
            }
            Source::Kept => "replies return to this node anyway",
        };
        self.add("source", format!("{}: {why}", source.as_str()));
    }

    /// As [`Self::source`], for a call.
    pub(super) fn call_source(&mut self, source: Source) {
        let why = if self.question.from == Client::Host {
            host_why(source)
        } else {
            "the pod connects to the backend itself"
        };
        self.add("source", format!("{}: {why}", source.as_str()));
    }

    /// Adds the verdict.
    pub(super) fn ends(&mut self, verdict: Verdict, reason: Reason) {
        self.add(
            "verdict",
            format!("{} ({}): {}", verdict.as_str(), reason.as_str(), reason.sentence().trim()),
        );
    }
}

fn host_why(source: Source) -> &'static str {
    match source {
        Source::Kept => "a process of this host has the source address of its route to the backend",
        Source::Masqueraded => {
            "a process of this host appears as the node, by its route to the backend"
        }
    }
}

/// Returns a placeholder for the node's address, if that is unknown.
pub(super) fn unknown_node(family_is_v4: bool) -> IpAddr {
    if family_is_v4 { IpAddr::from([0, 0, 0, 1]) } else { IpAddr::from([0, 0, 0, 0, 0, 0, 0, 2]) }
}

fn is_unknown(address: IpAddr) -> bool {
    address == unknown_node(address.is_ipv4())
}
