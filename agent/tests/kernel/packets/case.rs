//! A case: what the maps hold, a packet, and what must come of both.

use sluice_common::abi::{Affinity, DatagramPorts, Event, Flow, state};
use sluice_common::{Failure, Reason};

use super::frame::Frame;
use super::world::{Affinities, Datagrams, Exhausted, Flows, UNSAID, World};

/// A program of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Ingress,
    Egress,
    IngressL3,
    EgressL3,
    Xdp,
}

impl Program {
    /// Its name in the object.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ingress => "tc_ingress_l2",
            Self::Egress => "tc_egress_l2",
            Self::IngressL3 => "tc_ingress_l3",
            Self::EgressL3 => "tc_egress_l3",
            Self::Xdp => "xdp_uplink",
        }
    }

    /// Bytes of its packets' link header.
    pub(crate) fn link(self) -> u32 {
        match self {
            Self::Ingress | Self::Egress | Self::Xdp => 14,
            Self::IngressL3 | Self::EgressL3 => 0,
        }
    }
}

/// What a program answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// tc: the next program decides.
    Next,
    /// tc: dropped.
    Drop,
    /// tc: sent elsewhere.
    Redirect,
    /// XDP: on to tc.
    XdpPass,
    /// XDP: dropped.
    XdpDrop,
}

/// How a packet was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    /// Per reason.
    Reason { reason: Reason, service_port: u32, bytes: u32 },
    /// Towards a backend.
    Forward { backend: u32, bytes: u32, opened: bool },
    /// From a backend.
    Reply { backend: u32, bytes: u32 },
}

/// What came, or must come, of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) end: End,
    pub(crate) frame: Vec<u8>,
    /// One element at most. `None` in an expectation: the two ways must agree, on whatever it is.
    pub(crate) counted: Option<Vec<Counted>>,
    /// The failure that was counted at a backend, if any.
    pub(crate) failed: Vec<(u32, Failure)>,
    /// What was told to those who listen, without the time. `None`, in every expectation: the two
    /// ways must agree.
    pub(crate) events: Option<Vec<Event>>,
    pub(crate) flows: Flows,
    pub(crate) embryonic: Flows,
    pub(crate) affinity: Affinities,
    pub(crate) exhausted: Exhausted,
    pub(crate) fragments: Datagrams,
    pub(crate) marks: u32,
}

/// A packet case.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) world: World,
    pub(crate) program: Program,
    pub(crate) ifindex: u32,
    /// At an egress, the device that the packet came in by; 0: this host has sent it.
    pub(crate) came_by: u32,
    pub(crate) input: Vec<u8>,
    pub(crate) expected: Outcome,
    /// The checksum is left to the device: a test run cannot make such an skb, so this is for the
    /// host alone.
    pub(crate) partial: bool,
    /// Whether this is another case's packet, cut off.
    pub(crate) is_cut: bool,
    length: u32,
}

/// Begins a case with its name.
///
/// ```text
/// case("the first packet opens a flow")
///     .world(&world)              // what the maps hold
///     .tc_ingress(EDGE)           // the program, and its device
///     .sends(&first)              // the packet: passed untouched and not counted by default
///     .becomes(&first.clone().to(backend))
///     .opens(ONE)
/// ```
///
/// [`Cast::case`] puts family and protocol before the name.
pub(crate) fn case(name: impl Into<String>) -> Draft {
    Draft { name: name.into(), world: None, met: None }
}

/// A case without its packet.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    name: String,
    world: Option<World>,
    /// The program and its device.
    met: Option<(Program, u32)>,
}

impl Draft {
    /// Sets what the maps hold before the packet.
    pub(crate) fn world(self, world: &World) -> Self {
        Self { world: Some(world.clone()), ..self }
    }

    /// Runs the tc program at the ingress of a device with a link header.
    pub(crate) fn tc_ingress(self, ifindex: u32) -> Self {
        self.at(Program::Ingress, ifindex)
    }

    /// Runs the tc program at the egress of a device with a link header.
    pub(crate) fn tc_egress(self, ifindex: u32) -> Self {
        self.at(Program::Egress, ifindex)
    }

    /// Runs the tc program at the ingress of a device without a link header.
    pub(crate) fn tc_ingress_l3(self, ifindex: u32) -> Self {
        self.at(Program::IngressL3, ifindex)
    }

    /// Runs the tc program at the egress of a device without a link header.
    pub(crate) fn tc_egress_l3(self, ifindex: u32) -> Self {
        self.at(Program::EgressL3, ifindex)
    }

    /// Runs the XDP program of a device.
    pub(crate) fn xdp(self, ifindex: u32) -> Self {
        self.at(Program::Xdp, ifindex)
    }

    /// Runs a program of a device.
    pub(crate) fn at(self, program: Program, ifindex: u32) -> Self {
        Self { met: Some((program, ifindex)), ..self }
    }

    /// Sends a packet, which is passed untouched, not counted, and leaves nothing behind, until
    /// said otherwise.
    pub(crate) fn sends(self, frame: &Frame) -> Case {
        let world = self.world.expect("a case says what the maps hold");
        let (program, ifindex) = self.met.expect("a case says which program it runs");
        let end = if program == Program::Xdp { End::XdpPass } else { End::Next };
        let expected = Outcome {
            end,
            frame: frame.bytes(),
            counted: Some(Vec::new()),
            failed: Vec::new(),
            events: None,
            flows: world.flows.clone(),
            embryonic: world.embryonic.clone(),
            affinity: world.affinity.clone(),
            exhausted: world.exhausted.clone(),
            fragments: world.fragments.clone(),
            marks: world.marks,
        };
        Case {
            name: self.name,
            world,
            program,
            ifindex,
            came_by: 0,
            input: frame.bytes(),
            expected,
            partial: false,
            is_cut: false,
            length: frame.length(),
        }
    }
}

impl Case {
    /// Has come in by a device, and leaves by another one.
    pub(crate) fn came_by(mut self, ifindex: u32) -> Self {
        self.came_by = ifindex;
        self
    }

    /// Becomes this frame.
    pub(crate) fn becomes(mut self, frame: &Frame) -> Self {
        self.expected.frame = frame.bytes();
        self
    }

    /// Becomes this frame and is sent where the FIB says; what has no link header gets one without
    /// addresses.
    pub(crate) fn routed(mut self, frame: &Frame) -> Self {
        let ethertype: [u8; 2] = if frame.source.is_ipv4() { [8, 0] } else { [0x86, 0xdd] };
        let header =
            if frame.link.is_none() { [&[0; 12][..], &ethertype].concat() } else { Vec::new() };
        self.expected.frame = [header, frame.bytes()].concat();
        self.ends(End::Redirect)
    }

    /// Ends like this instead.
    pub(crate) fn ends(mut self, end: End) -> Self {
        self.expected.end = end;
        self
    }

    /// Is dropped, whatever was written into it before.
    pub(crate) fn dropped(self, reason: Reason, service_port: u32) -> Self {
        self.ends(End::Drop).reason(reason, service_port)
    }

    /// Is counted by a reason.
    pub(crate) fn reason(mut self, reason: Reason, service_port: u32) -> Self {
        self.expected.counted =
            Some(vec![Counted::Reason { reason, service_port, bytes: self.length }]);
        self
    }

    /// Is counted with this length, whatever its fields say.
    pub(crate) fn says(mut self, length: u32) -> Self {
        self.length = length;
        self
    }

    /// Is counted as the first packet to a backend.
    pub(crate) fn opens(mut self, backend: u32) -> Self {
        self.expected.counted =
            Some(vec![Counted::Forward { backend, bytes: self.length, opened: true }]);
        self
    }

    /// Is counted as a packet to a backend.
    pub(crate) fn forward(mut self, backend: u32) -> Self {
        self.expected.counted =
            Some(vec![Counted::Forward { backend, bytes: self.length, opened: false }]);
        self
    }

    /// Is counted as a packet from a backend.
    pub(crate) fn reply(mut self, backend: u32) -> Self {
        self.expected.counted = Some(vec![Counted::Reply { backend, bytes: self.length }]);
        self
    }

    /// Is counted as the failure of its flow to begin, too.
    pub(crate) fn failed(mut self, backend: u32, failure: Failure) -> Self {
        self.expected.failed = vec![(backend, failure)];
        self
    }

    /// Leaves exactly these entries in `flows`.
    pub(crate) fn flows(mut self, flows: impl IntoIterator<Item = Flows>) -> Self {
        self.expected.flows = flows.into_iter().flatten().collect();
        self
    }

    /// Leaves exactly these entries in `embryonic`.
    pub(crate) fn embryonic(mut self, flows: impl IntoIterator<Item = Flows>) -> Self {
        self.expected.embryonic = flows.into_iter().flatten().collect();
        self
    }

    /// Leaves exactly these clients in `affinity`.
    pub(crate) fn affinity(mut self, affinity: Affinities) -> Self {
        self.expected.affinity = affinity;
        self
    }

    /// Leaves exactly these tuples in `exhausted`.
    pub(crate) fn exhausted(mut self, exhausted: Exhausted) -> Self {
        self.expected.exhausted = exhausted;
        self
    }

    /// Leaves exactly these datagrams in `fragments`, besides what the agent says there.
    pub(crate) fn fragments(mut self, fragments: Datagrams) -> Self {
        self.expected.fragments.retain(|key, _| key.protocol == 0);
        self.expected.fragments.extend(fragments);
        self
    }

    /// Leaves these marks.
    pub(crate) fn marks(mut self, marks: u32) -> Self {
        self.expected.marks = marks;
        self
    }

    /// Leaves the checksum to the device.
    pub(crate) fn partial(mut self) -> Self {
        self.partial = true;
        self
    }

    /// The packet cut off behind each of its bytes: never touched, whatever is counted.
    pub(crate) fn every_prefix(&self) -> Vec<Self> {
        (0..self.input.len())
            .map(|length| {
                let mut case = self.clone();
                case.is_cut = true;
                case.name = format!("{}, cut off behind {length} bytes", self.name);
                case.input.truncate(length);
                case.expected.frame = case.input.clone();
                case.expected.end =
                    if case.program == Program::Xdp { End::XdpPass } else { End::Next };
                case.expected.counted = None;
                case.expected.failed = Vec::new();
                case.expected.flows = case.world.flows.clone();
                case.expected.embryonic = case.world.embryonic.clone();
                case.expected.affinity = case.world.affinity.clone();
                case.expected.exhausted = case.world.exhausted.clone();
                case.expected.fragments = case.world.fragments.clone();
                case.expected.marks = case.world.marks;
                case
            })
            .collect()
    }
}

/// Forgives a tick that passed between filling the maps and the packet.
pub(crate) fn settle(actual: &mut Outcome, expected: &Outcome) {
    let forgive = |seen: &mut u32, expected: u32| {
        if seen.wrapping_sub(expected).wrapping_add(1) <= 2 {
            *seen = expected;
        }
    };
    for (actual, expected) in
        [(&mut actual.flows, &expected.flows), (&mut actual.embryonic, &expected.embryonic)]
    {
        for (key, Flow { seen, replied, .. }) in actual {
            if let Some(expected) = expected.get(key) {
                forgive(seen, expected.seen);
                // At tick zero it looks as if an unproven flow's endpoint was never heard.
                if expected.replied == UNSAID
                    || *replied == UNSAID && expected.state & state::ESTABLISHED == 0
                {
                    *replied = expected.replied;
                } else if expected.state & (state::GUESS | state::ANSWERED) == 0 {
                    forgive(replied, expected.replied);
                }
            }
        }
    }
    for (key, Affinity { seen, .. }) in &mut actual.affinity {
        if let Some(expected) = expected.affinity.get(key) {
            forgive(seen, expected.seen);
        }
    }
    for (key, DatagramPorts { seen, .. }) in &mut actual.fragments {
        if let Some(expected) = expected.fragments.get(key) {
            forgive(seen, expected.seen);
        }
    }
    for (key, age) in &mut actual.exhausted {
        if let Some(expected) = expected.exhausted.get(key) {
            forgive(age, *expected);
        }
    }
}
