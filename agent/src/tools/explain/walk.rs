//! Follows the packet from hook to hook, as the adapters in the kernel do.

use std::net::{IpAddr, SocketAddr};

use sluice_common::abi::{Class, Range, ServiceKey, Tuple, device, flow, frontend, listing, side};
use sluice_common::engine;
use sluice_common::engine::adapter::Action;
use sluice_common::path::socket::{Choice, choose, is_left_to_netfilter};
use sluice_common::path::{self, Decision, Hook, Step as Next, policy};
use sluice_common::{Reason, Tables, V4, V6};
use sluice_core::image::Stack;
use sluice_core::model::object::Protocol;

use super::answer::{Affinity, Answer, Candidate, Endpoint, Frontend, Source, Verdict};
use super::frame::Shape;
use super::meeting::{Meeting, Target};
use super::objects::Owner;
use super::passage::{Host, Passage};
use super::question::{Client, Question, Way};
use super::record::{Asked, Recorder};
use super::story::{Story, kind_word};
use super::world::{LOOPBACK, Routing, Seen, Side, World};
use crate::node::dataplane::Failures;

/// There is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such device, or it has no programs.
    #[error("no programs are attached to a device {0:?}; `sluice status` lists the devices")]
    Device(String),
    /// No device has the requested role.
    #[error("no programs are attached to {0}; `sluice status` lists the devices")]
    Role(&'static str),
    /// External clients make no calls on this node.
    #[error(
        "an external client makes no calls on this node: use --path socket with --from pod or host"
    )]
    OutsideCall,
}

/// Answers a question.
///
/// # Errors
///
/// Fails if no hook handles the packet.
pub fn explain(question: &Question, world: &World, routing: &dyn Routing) -> Result<Answer, Error> {
    if question.source.is_ipv4() {
        Walk::<V4>::new(question, world, routing).answer()
    } else {
        Walk::<V6>::new(question, world, routing).answer()
    }
}

struct Walk<'w, F: Side> {
    question: &'w Question,
    world: &'w World,
    routing: &'w dyn Routing,
    tuple: Tuple<F::Address>,
}

/// The fate of a call.
enum Call {
    /// No program handles the call.
    Unseen,
    /// The call is left to packets, for this reason.
    Left(&'static str),
    /// The call is translated or refused.
    Taken(Box<Answer>),
}

impl<'w, F: Side> Walk<'w, F> {
    fn new(question: &'w Question, world: &'w World, routing: &'w dyn Routing) -> Self {
        let address = |ip: IpAddr| F::address(ip).unwrap_or_default();
        let tuple = Tuple {
            source: address(question.source.ip()),
            destination: address(question.destination.ip()),
            source_port: question.source.port(),
            destination_port: question.destination.port(),
            protocol: question.protocol.number(),
            side: 0,
            reserved: [0; 2],
        };
        Self { question, world, routing, tuple }
    }

    fn answer(&self) -> Result<Answer, Error> {
        let call = self.call();
        if self.question.way == Some(Way::Socket) {
            if self.question.from == Client::External {
                return Err(Error::OutsideCall);
            }
            if let Call::Taken(answer) = call {
                return Ok(*answer);
            }
        }
        let mut answer = match self.place()? {
            Some((hook, ifindex)) => self.packet(hook, ifindex),
            None => self.not_handled("the route to it leaves by no device with programs"),
        };
        match call {
            Call::Taken(call) => answer.socket = Some(call),
            Call::Left(why) => {
                let before =
                    answer.steps.iter().position(|step| step.step != "packet").unwrap_or(0);
                answer.steps.insert(before, Story::left(why));
            }
            Call::Unseen => {}
        }
        Ok(answer)
    }

    /// Returns the first hook for the packet, or [`None`] if no device with programs receives it.
    fn place(&self) -> Result<Option<(Hook, u32)>, Error> {
        let hook = if self.question.from == Client::Host { Hook::Egress } else { Hook::Ingress };
        if let Some(name) = &self.question.device {
            let named = self.world.devices.iter().find(|(_, device)| device.name == *name);
            if let Some((ifindex, _)) = named {
                return Ok(Some((hook, *ifindex)));
            }
            if self.routing.supposes().is_empty() {
                return Err(Error::Device(name.clone()));
            }
        }
        let role = match self.question.way {
            Some(Way::Edge) => Some((device::EDGE, "an edge")),
            Some(Way::Uplink) => Some((device::UPLINK, "an uplink")),
            Some(Way::Socket) | None => None,
        };
        let by_route = match self.question.from {
            Client::Host if self.routing.is_local(self.question.destination.ip()) => Some(LOOPBACK),
            Client::Host => self.routing.leaves_by(self.question.destination.ip()),
            Client::Pod | Client::External => {
                self.routing.comes_in_by(self.question, &self.world.devices)
            }
        };
        let by_route = by_route.filter(|ifindex| self.world.devices.contains_key(ifindex));
        let fits = |ifindex: &u32, wanted: u32| {
            self.world.devices.get(ifindex).is_some_and(|device| device.entry.role == wanted)
        };
        match (role, self.question.from) {
            (Some((wanted, word)), _) => by_route
                .filter(|ifindex| fits(ifindex, wanted))
                .or_else(|| {
                    self.world.devices.keys().find(|ifindex| fits(ifindex, wanted)).copied()
                })
                .map(|ifindex| Some((hook, ifindex)))
                .ok_or(Error::Role(word)),
            (None, Client::Host) => Ok(by_route.map(|ifindex| (hook, ifindex))),
            (None, Client::Pod) => by_route
                .or_else(|| {
                    self.world.devices.keys().find(|ifindex| fits(ifindex, device::EDGE)).copied()
                })
                .map(|ifindex| Some((hook, ifindex)))
                .ok_or(Error::Role("an edge")),
            (None, Client::External) => by_route
                .or_else(|| {
                    self.world.devices.keys().find(|ifindex| fits(ifindex, device::UPLINK)).copied()
                })
                .map(|ifindex| Some((hook, ifindex)))
                .ok_or(Error::Role("an uplink")),
        }
    }

    /// Takes the packet through a program.
    fn run_program(&self, hook: Hook, ifindex: u32) -> Meeting<F> {
        let seen = Seen { world: self.world, ifindex };
        let shape = Shape { length: self.question.length, ttl: self.question.ttl };
        let mut passage = Passage::new(&seen, self.routing, hook, &self.tuple, shape);
        let action = engine::tc::run(&mut passage);
        let Passage { host, tables, decision, headers } = passage;
        let Host { answered, .. } = host;
        let (asked, length) = (tables.asked(), headers.length);
        Meeting { hook, ifindex, decision, asked, action, answered, length }
    }

    /// Follows a packet from a hook on.
    fn packet(&self, hook: Hook, ifindex: u32) -> Answer {
        let first = self.run_program(hook, ifindex);
        let goes_on = (verdict(first.decision.verdict) == Verdict::Pass
            || first.decision.is_answer())
            && first.decision.reason == Reason::Stranger
            && hook != Hook::Egress
            && !self.routing.is_local(self.question.destination.ip());
        let mut story = Story::new(self.question, self.world);
        let mut meeting = first;
        if goes_on {
            story.arrives(&meeting, self.routing);
            let target = self.routing.leaves_by(self.question.destination.ip());
            if meeting.decision.is_answer() {
                story.goes_around(target);
            }
            let carries = |ifindex: &u32| {
                self.world.devices.get(ifindex).is_some_and(|found| {
                    matches!(found.entry.role, device::UPLINK | device::FABRIC)
                })
            };
            match target.filter(carries) {
                Some(out) => meeting = self.run_program(Hook::Egress, out),
                None => return Self::pass(story),
            }
        }
        self.answer_at(story, &meeting)
    }

    /// Returns the answer for a packet at a hook.
    fn answer_at(&self, mut story: Story<'_>, meeting: &Meeting<F>) -> Answer {
        let Meeting { hook, ifindex, decision, asked, action, .. } = meeting;
        let target = self.target(*hook, *ifindex, decision);
        story.arrives(meeting, self.routing);
        story.asks(asked, target.as_ref(), decision);
        story.leaves(decision);
        story.ends_early(meeting);
        let verdict = match (action, meeting.answered) {
            _ if is_note(decision) => Verdict::Pass,
            (_, Some(_)) => Verdict::Reject,
            (Action::Drop, None) => Verdict::Drop,
            _ => verdict(decision.verdict),
        };
        let reply = decision.flow.is_reply() && verdict == Verdict::Forward;
        let forward = verdict == Verdict::Forward && decision.reason != Reason::DirectRemapped;
        let backend = forward.then(|| {
            let (address, port) = if reply {
                (self.tuple.source, self.tuple.source_port)
            } else {
                (decision.flow.destination, decision.flow.destination_port)
            };
            Endpoint { address: F::ip(address), port }
        });
        let source = forward.then(|| self.source(target.as_ref(), decision.flow.flags, backend));
        if let Some(source) = source {
            story.rewrites(decision);
            if decision.verdict == path::Verdict::Around {
                story.goes_around(self.routing.leaves_by(F::ip(decision.flow.destination)));
            }
            if !reply && decision.flow.flags & (flow::MASQUERADED | flow::HOST) == flow::MASQUERADED
            {
                let (device, seen_as) = self.client_side(decision, asked);
                story.leaves_as(device.as_deref(), self.question.source, seen_as);
            }
            story.source(source, decision, asked, target.as_ref());
        }
        let candidates =
            if forward && !reply { self.candidates(target.as_ref()) } else { Vec::new() };
        story.ends(verdict, decision.reason);
        Answer {
            verdict,
            reason: decision.reason.as_str(),
            service: target.as_ref().map(|target| target.owner.service.to_string()),
            port: target
                .as_ref()
                .filter(|target| target.service_port != 0)
                .map(|target| target.owner.port()),
            frontend: target.as_ref().map(|target| self.frontend(target, decision, reply)),
            backend,
            candidates,
            source,
            affinity: self.affinity(target.as_ref()),
            steps: story.steps(),
            socket: None,
        }
    }

    /// Returns the address that a masqueraded client appears as, and the device where its packets
    /// leave for the backend.
    fn client_side(
        &self,
        decision: &Decision<F>,
        asked: &[Asked<F>],
    ) -> (Option<String>, SocketAddr) {
        let flow = &decision.flow;
        let key = Tuple {
            source: flow.source,
            destination: flow.destination,
            source_port: flow.source_port,
            destination_port: flow.destination_port,
            protocol: self.tuple.protocol,
            side: side::FAR,
            reserved: [0; 2],
        };
        let routes = asked.iter().find_map(|asked| match asked {
            Asked::Routes(routes) => Some(routes.to_backend),
            Asked::Flow { .. }
            | Asked::Service { .. }
            | Asked::Range { .. }
            | Asked::Slot { .. }
            | Asked::Backend { .. }
            | Asked::Affinity { .. }
            | Asked::SourceRanges { .. }
            | Asked::NodeAddress { .. } => None,
        });
        let seen = Seen { world: self.world, ifindex: routes.unwrap_or(0) };
        let known = Tables::<F>::flow(&seen, &key).or_else(|| Tables::<F>::embryonic(&seen, &key));
        let seen_as = if let Some(entry) = known {
            (entry.source, entry.source_port)
        } else {
            let mut passage =
                Passage::<F>::new(&seen, self.routing, Hook::Egress, &key, Shape::default());
            passage.decision.flow.flags = flow::SOURCE;
            passage.decision.step = Next::Select;
            let _ = engine::open::open(&mut passage);
            (passage.decision.flow.source, passage.decision.flow.source_port)
        };
        let device = routes.and_then(|ifindex| self.world.devices.get(&ifindex));
        (device.map(|device| device.name.clone()), SocketAddr::from((F::ip(seen_as.0), seen_as.1)))
    }

    /// Returns the answer for a packet that is not translated.
    fn pass(mut story: Story<'_>) -> Answer {
        story.ends(Verdict::Pass, Reason::Stranger);
        Answer {
            verdict: Verdict::Pass,
            reason: Reason::Stranger.as_str(),
            service: None,
            port: None,
            frontend: None,
            backend: None,
            candidates: Vec::new(),
            source: None,
            affinity: None,
            steps: story.steps(),
            socket: None,
        }
    }

    /// Returns the answer for a packet that no program handles.
    fn not_handled(&self, why: &str) -> Answer {
        let mut story = Story::new(self.question, self.world);
        story.not_handled(why);
        Self::pass(story)
    }

    /// Returns what the packet has requested.
    fn target(&self, hook: Hook, ifindex: u32, decision: &Decision<F>) -> Option<Target> {
        let seen = Seen { world: self.world, ifindex };
        let is_local = hook.is_egress() || policy::is_local_pod::<F, _>(&self.tuple.source, &seen);
        if decision.flow.flags & (flow::REPLY | flow::DIRECT) != 0 {
            let service_port = decision.flow.service_port;
            let key = self.key(decision.flow.source, decision.flow.source_port);
            let known = F::of(&self.world.image).services.get(&key);
            let kind = known.map_or(frontend::NODE_PORT, |service| service.kind);
            let class = policy::class(kind, is_local);
            return Some(Target { owner: self.owner(service_port)?, service_port, kind, class });
        }
        let found = self.find(
            policy::may_ask_for_node_ports::<F, _>(hook, &self.tuple.destination, &seen),
            &seen,
        );
        if let Some((service_port, kind)) = found {
            let class = policy::class(kind, is_local);
            return Some(Target { owner: self.owner(service_port)?, service_port, kind, class });
        }
        if decision.reason != Reason::UndefinedPort {
            return None;
        }
        // Another port of the same address shows the Service.
        let services = &F::of(&self.world.image).services;
        let other = services.iter().find(|(key, service)| {
            key.address == self.tuple.destination && service.kind == frontend::CLUSTER_IP
        });
        let owner = self.owner(other?.1.service_port)?;
        Some(Target { owner, service_port: 0, kind: frontend::CLUSTER_IP, class: Class::Internal })
    }

    fn find(&self, node_ports: bool, seen: &Seen<'_>) -> Option<(u32, u32)> {
        let listed = Tables::<F>::listing(seen, &self.tuple.destination);
        let to_node_port = node_ports
            && listed & listing::NODE_PORTS != 0
            && Tables::<F>::is_node_port(seen, self.tuple.destination_port);
        if listed & listing::FRONTEND == 0 && !to_node_port {
            return None;
        }
        path::find::<F, _>(&self.tuple, to_node_port, seen)
    }

    fn owner(&self, service_port: u32) -> Option<Owner> {
        let name = self.world.image.names.get(&service_port)?;
        let protocol = Protocol::from_number(name.protocol).map_or("?", Protocol::word);
        Some(Owner::new(name, protocol))
    }

    fn key(&self, address: F::Address, port: u16) -> ServiceKey<F::Address> {
        ServiceKey { address, port, protocol: self.tuple.protocol, reserved: 0 }
    }

    fn frontend(&self, target: &Target, decision: &Decision<F>, reply: bool) -> Frontend {
        let (address, port) = if reply {
            (decision.flow.source, decision.flow.source_port)
        } else {
            (self.tuple.destination, self.tuple.destination_port)
        };
        Frontend {
            kind: kind_word(target.kind),
            address: F::ip(address),
            port,
            protocol: self.question.protocol.word(),
        }
    }

    fn affinity(&self, target: Option<&Target>) -> Option<Affinity> {
        let port = self.world.image.ports.get(&target?.service_port)?;
        (port.affinity_seconds != 0).then_some(Affinity { seconds: port.affinity_seconds })
    }

    /// Returns every backend that clients of the class may reach.
    fn candidates(&self, target: Option<&Target>) -> Vec<Candidate> {
        let Some(target) = target else { return Vec::new() };
        let range = self.world.image.range(target.service_port, target.class);
        range.map_or_else(Vec::new, |range| shares::<F>(self.world, range))
    }

    /// Whether the backend sees the client's address. A process of this host has the address that
    /// its route gives it, so the flow does not show it. What counts is whether kube-proxy would
    /// replace the address.
    fn source(&self, target: Option<&Target>, flags: u8, backend: Option<Endpoint>) -> Source {
        let hairpin = backend.is_some_and(|backend| backend.address == self.question.source.ip());
        let masqueraded = if self.question.from == Client::Host {
            let cluster_ip = target.is_none_or(|target| target.kind == frontend::CLUSTER_IP);
            !cluster_ip || self.masquerades_host()
        } else {
            flags & flow::MASQUERADED != 0
        };
        if hairpin || masqueraded { Source::Masqueraded } else { Source::Kept }
    }

    /// Whether kube-proxy would replace the address of a process of this host that connects to a
    /// ClusterIP.
    fn masquerades_host(&self) -> bool {
        use sluice_common::abi::{detect_local, masquerade};
        let settings = &self.world.settings;
        let pods = F::around(self.world).networks.pods;
        // An unused prefix has a mask of zeros and another network.
        let knows_pods = pods
            .iter()
            .any(|prefix| F::words(&prefix.mask) != [0; 4] || F::words(&prefix.network) == [0; 4]);
        settings.masquerade == masquerade::ALL
            || settings.masquerade == masquerade::KUBE_PROXY
                && policy::detector::<F>(settings) != detect_local::NONE
            || knows_pods
    }

    /// Returns what happens to the call that would cause the packet.
    fn call(&self) -> Call {
        use sluice_common::abi::detect_local;
        use sluice_common::abi::socket_path::{ALL, HOST, MACHINE};
        let is_host = self.question.from == Client::Host;
        let reason = match self.question.protocol {
            Protocol::Tcp => Reason::SocketConnect,
            Protocol::Udp => Reason::SocketSend,
            Protocol::Sctp => return Call::Unseen,
        };
        let mode = self.world.settings.socket_path;
        if self.question.from == Client::External
            || !(matches!(mode, ALL | MACHINE) || mode == HOST && is_host)
        {
            return Call::Unseen;
        }
        let seen = Seen { world: self.world, ifindex: 0 };
        let tables = Recorder::new(&seen, self.tuple);
        let key = self.key(self.tuple.destination, self.tuple.destination_port);
        // Any cookie will do: only whether there is a backend counts, not which one.
        let choice = choose::<F, _>(&key, 0, is_host, || None, &tables);
        let asked = tables.asked();
        let Some((service_port, kind)) = self.find(is_host, &seen) else { return Call::Unseen };
        let Some(owner) = self.owner(service_port) else { return Call::Unseen };
        let is_local = is_host || policy::detector::<F>(&self.world.settings) != detect_local::NONE;
        let class = policy::class(kind, is_local);
        let target = Target { owner, service_port, kind, class };
        let (verdict, reason) = match choice {
            Choice::Untouched => return Call::Left(self.why_left(&target, &asked)),
            Choice::Refuse { .. } if self.question.protocol != Protocol::Tcp => {
                return Call::Left(
                    "there is no backend, so packets are answered with an ICMP error",
                );
            }
            Choice::Refuse { .. } => (Verdict::Reject, Reason::SocketRefused),
            Choice::Backend { .. } => (Verdict::Forward, reason),
        };
        let mut story = Story::new(self.question, self.world);
        story.calls(&target);
        if !is_host && mode == ALL {
            story.is_learned();
        }
        story.chooses(&asked, &target);
        Call::Taken(Box::new(self.call_answer(story, &target, verdict, reason)))
    }

    /// Returns the answer for a call that is translated or refused.
    fn call_answer(
        &self,
        mut story: Story<'_>,
        target: &Target,
        verdict: Verdict,
        reason: Reason,
    ) -> Answer {
        let mut answer = Answer {
            verdict,
            reason: reason.as_str(),
            service: Some(target.owner.service.to_string()),
            port: Some(target.owner.port()),
            frontend: Some(self.frontend(target, &Decision::pass(&self.tuple), false)),
            backend: None,
            candidates: Vec::new(),
            source: None,
            affinity: self.affinity(Some(target)),
            steps: Vec::new(),
            socket: None,
        };
        if verdict == Verdict::Forward {
            answer.candidates = self.candidates(Some(target));
            let only = match answer.candidates[..] {
                [only] => Some(Endpoint { address: only.address, port: only.port }),
                _ => None,
            };
            let source = self.source(Some(target), 0, only);
            answer.source = Some(source);
            story.call_source(source);
        }
        story.ends(verdict, reason);
        answer.steps = story.steps();
        answer
    }

    fn why_left(&self, target: &Target, asked: &[Asked<F>]) -> &'static str {
        let port = self.world.image.ports.get(&target.service_port).copied().unwrap_or_default();
        let drops = |asked: &Asked<F>| matches!(asked, Asked::Range { found, .. } if found.drops());
        if is_left_to_netfilter(self.world.settings.phase, self.question.protocol.number()) {
            "a takeover or release leaves such calls to packets"
        } else if asked.iter().any(drops) {
            "clients are dropped without an answer, which is only possible with packets"
        } else if port.affinity_seconds != 0 {
            "session affinity needs the client's address, which only packets have"
        } else if port.restricts_sources() && target.kind == frontend::LOAD_BALANCER {
            "source ranges need the client's address, which only packets have"
        } else if target.kind != frontend::CLUSTER_IP
            && port.is_external_local()
            && !policy::is_known_at_the_socket::<F>(&self.world.settings)
        {
            "the choice of backends needs the client's address or device, which only packets have"
        } else {
            "its client is masqueraded, which is only possible with packets"
        }
    }
}

/// Returns the backends in a range of slots with their shares, by address.
fn shares<F: Stack>(world: &World, range: Range) -> Vec<Candidate> {
    let mut owned = std::collections::BTreeMap::<Endpoint, usize>::new();
    for id in world.image.backends_in(range) {
        if let Some(backend) = F::of(&world.image).backends.get(id) {
            *owned
                .entry(Endpoint { address: F::ip(backend.address), port: backend.port })
                .or_default() += 1;
        }
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "a table has fewer slots than a float has digits"
    )]
    let share = |count: usize| count as f64 / f64::from(range.size());
    owned
        .into_iter()
        .map(|(at, count)| Candidate {
            address: at.address,
            port: at.port,
            share: share(count),
            connects: 0,
            failed: 0,
            flows: 0,
            failures: Failures::default(),
        })
        .collect()
}

/// Whether the packet only gets an entry and continues unchanged. It leaves with an address of the
/// node, and the entry keeps its port from being given to a client.
fn is_note<F: Side>(decision: &Decision<F>) -> bool {
    const NOTE: u8 = flow::SOURCE | flow::DIRECT;
    decision.reason == Reason::Stranger && decision.flow.flags & NOTE == NOTE
}

/// Returns the verdict for people.
fn verdict(verdict: path::Verdict) -> Verdict {
    match verdict {
        // Questions are about whole packets only, and those are never held.
        path::Verdict::Pass | path::Verdict::Hold => Verdict::Pass,
        path::Verdict::Translate
        | path::Verdict::Around
        | path::Verdict::Bounce
        | path::Verdict::Inject
        | path::Verdict::Route => Verdict::Forward,
        path::Verdict::Reset | path::Verdict::Unreachable => Verdict::Reject,
        path::Verdict::Drop => Verdict::Drop,
    }
}
