//! Opens a flow: the path decides until the tuple that it chose is free and the flow is recorded.

use crate::abi::{device, flow};
use crate::family::Family;
use crate::packet::header::protocol;
use crate::path::{Decision, Hook, Record, Step, keeps_direct, policy, uses_host_address};
use crate::reason::Reason;
use crate::tables::Tables;

/// Number of times that a flow's first packet is decided about if its tuple is taken meanwhile.
pub const OPEN_TRIES: u32 = 4;

/// The reason why a packet must not go on after all, as a number, since a global function of the
/// kernel returns no more than that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal(u32);

impl Refusal {
    /// The packet goes on.
    pub const NONE: Self = Self(0);

    /// Returns the refusal in the result of a record.
    #[inline(always)]
    #[must_use]
    pub fn of(result: Result<(), Reason>) -> Self {
        match result {
            Ok(()) => Self::NONE,
            Err(reason) => Self(reason as u32),
        }
    }

    /// Returns the refusal with the number that a global function returned.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// Returns the number for a global function to return.
    #[inline(always)]
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Returns the reason, if the packet must not go on.
    #[inline(always)]
    #[must_use]
    pub fn reason(self) -> Option<Reason> {
        match Reason::from_number(self.0) {
            Some(Reason::Stranger) | None => None,
            Some(reason) => Some(reason),
        }
    }
}

/// The steps of deciding about one packet and of opening its flow.
pub trait Steps<F: Family> {
    /// Returns the decision.
    fn decision(&self) -> &Decision<F>;
    /// Sets what the decision still needs.
    fn set_step(&mut self, step: Step);
    /// Performs [`open_into`](crate::path::open_into).
    fn open(&mut self);
    /// Asks the FIB where packets to either end of the flow leave.
    fn look_up_routes(&mut self);
    /// Performs [`search`](super::search::search).
    fn search(&mut self);
    /// Reports whether a socket holds the tuple that the flow is to have ([`sockets`]).
    fn is_taken_by_socket(&mut self) -> bool;
    /// Makes the next try skip one more source port.
    fn skip_one_port(&mut self);
    /// Performs [`record`](super::record::record).
    fn record(&mut self) -> Refusal;
}

/// Decides about a flow's first packet as far as that needs only the tables and the FIB.
#[inline(always)]
pub fn decide<F: Family, S: Steps<F>>(steps: &mut S) {
    steps.open();
    if steps.decision().step == Step::LookUpRoutes {
        steps.look_up_routes();
        steps.open();
    }
}

/// Decides about a flow's first packet completely, and records the flow.
///
/// Another CPU may take the tuple between the path's lookup and the record, or a socket may hold
/// it: then the path is asked again.
#[inline(always)]
pub fn open<F: Family, S: Steps<F>>(steps: &mut S) -> Refusal {
    let step = steps.decision().step;
    let mut refusal = Refusal::of(Err(Reason::PortsExhausted));
    for _ in 0..OPEN_TRIES {
        steps.set_step(step);
        decide(steps);
        if steps.decision().step == Step::SearchPort {
            steps.search();
        }
        if steps.is_taken_by_socket() {
            steps.skip_one_port();
            continue;
        }
        refusal = steps.record();
        if refusal.number() != Reason::ClashRace as u32 {
            break;
        }
    }
    refusal
}

/// Sockets that may hold the tuple of a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sockets {
    /// Whose they are.
    pub of: Owner,
    /// The end of the flow that they are at.
    pub end: FlowEnd,
}

/// Whose sockets are to be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// This host.
    Host,
    /// The network namespace with this id, as this host knows it: a pod.
    Netns(u32),
}

/// An end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowEnd {
    /// Sockets that are connected to the backend.
    Client,
    /// Sockets of the backend itself.
    Backend,
}

impl FlowEnd {
    /// Reports whether a socket of a protocol in this state (Linux's `TCP_*`, for UDP too) holds
    /// its tuple against a new flow.
    ///
    /// A client's socket does while it is connected. At the backend, a handshake may be the flow's
    /// own, whose entry was lost, and a socket in TIME_WAIT makes room for a new connection.
    #[inline(always)]
    #[must_use]
    pub fn is_taken_in(self, protocol_number: u8, state: u32) -> bool {
        const ESTABLISHED: u32 = 1;
        const TIME_WAIT: u32 = 6;
        const LISTEN: u32 = 10;
        const NEW_SYN_RECV: u32 = 12;
        if protocol_number == protocol::UDP {
            return state == ESTABLISHED;
        }
        match self {
            Self::Client => state != LISTEN,
            Self::Backend => !matches!(state, LISTEN | TIME_WAIT | NEW_SYN_RECV),
        }
    }
}

/// Returns which sockets have to be looked up before a flow is recorded: this host's if the client
/// gets its address, otherwise those of the pod that the packet comes from, otherwise the
/// backend's, which knows every client that is connected to it directly.
///
/// A client that holds all ports that were tried gets the last one all the same, but this host does
/// not.
#[inline(always)]
pub fn sockets<F: Family, T: Tables<F>>(
    hook: Hook,
    decision: &Decision<F>,
    tables: &T,
) -> Option<Sockets> {
    if !matches!(decision.record, Record::Open | Record::Establish) {
        return None;
    }
    if uses_host_address(&decision.flow) {
        return Some(Sockets { of: Owner::Host, end: FlowEnd::Client });
    }
    if hook == Hook::Egress || tables.ports_to_skip() >= OPEN_TRIES - 1 || keeps_direct(decision) {
        return None;
    }
    let here = tables.hook_device()?;
    if here.role == device::EDGE {
        let netns = policy::netns_of_sockets(here)?;
        return Some(Sockets { of: Owner::Netns(netns), end: FlowEnd::Client });
    }
    // In the middle of a connection the backend's socket is the flow's own. For a datagram it
    // proves nothing: a server may have connected its socket to the client (DTLS, QUIC).
    if decision.record != Record::Open
        || decision.key.protocol != protocol::TCP
        || decision.flow.flags & (flow::LOCAL | flow::HAIRPIN | flow::DIRECT) != flow::LOCAL
    {
        return None;
    }
    let netns = policy::netns_of_sockets(tables.device(tables.routes()?.to_backend)?)?;
    Some(Sockets { of: Owner::Netns(netns), end: FlowEnd::Backend })
}
