//! A case: the content of the maps, a packet, and the expected outcome of both.

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
    /// Returns its name in the object.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ingress => "tc_ingress_l2",
            Self::Egress => "tc_egress_l2",
            Self::IngressL3 => "tc_ingress_l3",
            Self::EgressL3 => "tc_egress_l3",
            Self::Xdp => "xdp_uplink",
        }
    }

    /// Returns the length of its packets' link header in bytes.
    pub(crate) fn link(self) -> u32 {
        match self {
            Self::Ingress | Self::Egress | Self::Xdp => 14,
            Self::IngressL3 | Self::EgressL3 => 0,
        }
    }
}

/// The return value of a program.
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

/// The counter of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    /// A reason's.
    Reason { reason: Reason, service_port: u32, bytes: u32 },
    /// That of packets towards a backend.
    Forward { backend: u32, bytes: u32, opened: bool },
    /// That of packets from a backend.
    Reply { backend: u32, bytes: u32 },
}

/// The observed or expected outcome of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) end: End,
    pub(crate) frame: Vec<u8>,
    /// At most one element. `None` in an expectation: kernel and host must agree, whatever they
    /// count.
    pub(crate) counted: Option<Vec<Counted>>,
    /// The failure that was counted at a backend, if any.
    pub(crate) failed: Vec<(u32, Failure)>,
    /// Events sent to listeners, without their times. `None` in every expectation: kernel and host
    /// must agree.
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
    /// At an egress, the device that the packet came in by, or 0 if this host has sent it.
    pub(crate) came_by: u32,
    pub(crate) input: Vec<u8>,
    pub(crate) expected: Outcome,
    /// Whether the checksum is left to the device. A test run cannot make such an skb, so such
    /// cases run on the host alone.
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
    /// The program, and its device.
    met: Option<(Program, u32)>,
}

impl Draft {
    /// Sets the content of the maps before the packet.
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

    /// Sends a packet. By default it is passed untouched, not counted, and leaves nothing behind.
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
    /// Sets the device by which the packet came in, and leaves by another one.
    pub(crate) fn came_by(mut self, ifindex: u32) -> Self {
        self.came_by = ifindex;
        self
    }

    /// Expects the packet to become this frame.
    pub(crate) fn becomes(mut self, frame: &Frame) -> Self {
        self.expected.frame = frame.bytes();
        self
    }

    /// Expects the packet to become this frame and to be sent where the FIB says. A packet without
    /// a link header gets one without addresses.
    pub(crate) fn routed(mut self, frame: &Frame) -> Self {
        let ethertype: [u8; 2] = if frame.source.is_ipv4() { [8, 0] } else { [0x86, 0xdd] };
        let header =
            if frame.link.is_none() { [&[0; 12][..], &ethertype].concat() } else { Vec::new() };
        self.expected.frame = [header, frame.bytes()].concat();
        self.ends(End::Redirect)
    }

    /// Expects the program to return this instead.
    pub(crate) fn ends(mut self, end: End) -> Self {
        self.expected.end = end;
        self
    }

    /// Expects the program, at tc or XDP, to drop the packet and count it with a reason, whatever
    /// was written into it before.
    pub(crate) fn dropped(self, reason: Reason, service_port: u32) -> Self {
        let end = if self.program == Program::Xdp { End::XdpDrop } else { End::Drop };
        self.ends(end).reason(reason, service_port)
    }

    /// Expects the packet to be counted with a reason.
    pub(crate) fn reason(mut self, reason: Reason, service_port: u32) -> Self {
        self.expected.counted =
            Some(vec![Counted::Reason { reason, service_port, bytes: self.length }]);
        self
    }

    /// Expects the packet to be counted with this length, whatever its fields say.
    pub(crate) fn says(mut self, length: u32) -> Self {
        self.length = length;
        self
    }

    /// Expects the packet to be counted as the first one to a backend.
    pub(crate) fn opens(mut self, backend: u32) -> Self {
        self.expected.counted =
            Some(vec![Counted::Forward { backend, bytes: self.length, opened: true }]);
        self
    }

    /// Expects the packet to be counted as one to a backend.
    pub(crate) fn forward(mut self, backend: u32) -> Self {
        self.expected.counted =
            Some(vec![Counted::Forward { backend, bytes: self.length, opened: false }]);
        self
    }

    /// Expects the packet to be counted as one from a backend.
    pub(crate) fn reply(mut self, backend: u32) -> Self {
        self.expected.counted = Some(vec![Counted::Reply { backend, bytes: self.length }]);
        self
    }

    /// Expects the failure of its flow to begin to be counted, too.
    pub(crate) fn failed(mut self, backend: u32, failure: Failure) -> Self {
        self.expected.failed = vec![(backend, failure)];
        self
    }

    /// Expects exactly these entries in `flows`.
    pub(crate) fn flows(mut self, flows: impl IntoIterator<Item = Flows>) -> Self {
        self.expected.flows = flows.into_iter().flatten().collect();
        self
    }

    /// Expects exactly these entries in `embryonic`.
    pub(crate) fn embryonic(mut self, flows: impl IntoIterator<Item = Flows>) -> Self {
        self.expected.embryonic = flows.into_iter().flatten().collect();
        self
    }

    /// Expects exactly these clients in `affinity`.
    pub(crate) fn affinity(mut self, affinity: Affinities) -> Self {
        self.expected.affinity = affinity;
        self
    }

    /// Expects exactly these tuples in `exhausted`.
    pub(crate) fn exhausted(mut self, exhausted: Exhausted) -> Self {
        self.expected.exhausted = exhausted;
        self
    }

    /// Expects exactly these datagrams in `fragments`, besides the agent's own entries.
    pub(crate) fn fragments(mut self, fragments: Datagrams) -> Self {
        self.expected.fragments.retain(|key, _| key.protocol == 0);
        self.expected.fragments.extend(fragments);
        self
    }

    /// Expects these marks.
    pub(crate) fn marks(mut self, marks: u32) -> Self {
        self.expected.marks = marks;
        self
    }

    /// Leaves the checksum to the device.
    pub(crate) fn partial(mut self) -> Self {
        self.partial = true;
        self
    }

    /// Returns the case with its packet cut off behind each byte. Such a packet is never modified,
    /// whatever is counted.
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

/// Corrects the outcome for a tick that may have passed between filling the maps and the packet.
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
                // At tick zero an unproven flow looks as if its endpoint was never heard.
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
