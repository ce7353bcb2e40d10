//! Events for `sluice trace`: only what happens rarely.
//!
//! A packet of an established flow is never an event, and does not check whether anybody listens.
//! The programs apply the listener's filter ([`Listening`]) themselves, so that what nobody asked
//! for does not fill the ring buffer.

use crate::abi::{Event, Flow, Listening, Tuple};
use crate::family::{Family, V4, V6};
use crate::packet::header::tcp;
use crate::packet::parse::Headers;
use crate::path::{Decision, Hook, Record, Verdict};
use crate::reason::Reason;

/// Declares the values of an event's byte: number and word in one place.
macro_rules! bytes {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $number:literal, $word:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$vmeta])* $variant = $number,)* }

        impl $name {
            /// All values, in order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Returns the word for people.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }

            /// Returns the value with a number that was found in an event.
            pub const fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

bytes! {
    /// The kind of the event.
    Kind {
        /// A flow's first packet, or one that made a lost entry again.
        Opened = 1, "opened";
        /// The flow is proven: the client's second TCP packet, or a UDP reply.
        Proven = 2, "proven";
        /// The first FIN of either side, or a RST.
        Closing = 3, "closing";
        /// A packet that was counted by its reason.
        Counted = 4, "counted";
        /// A socket's call.
        Call = 5, "call";
    }
}

bytes! {
    /// The hook of the event.
    At {
        /// tc ingress.
        Ingress = 0, "ingress";
        /// tc egress.
        Egress = 1, "egress";
        /// XDP.
        Xdp = 2, "xdp";
        /// connect() of a process.
        Connect = 3, "connect";
        /// sendto() or sendmsg() of a process.
        Send = 4, "send";
    }
}

impl From<Hook> for At {
    #[inline(always)]
    fn from(hook: Hook) -> Self {
        match hook {
            Hook::Ingress => Self::Ingress,
            Hook::Egress => Self::Egress,
            Hook::Xdp => Self::Xdp,
        }
    }
}

bytes! {
    /// The fate of the packet.
    Fate {
        /// Left as it was.
        Passed = 0, "passed";
        /// Translated.
        Forwarded = 1, "forwarded";
        /// Answered that there is nobody.
        Rejected = 2, "rejected";
        /// Dropped.
        Dropped = 3, "dropped";
        /// Held by the agent until the datagram's first fragment has been seen.
        Held = 4, "held";
    }
}

/// Returns the fate that a verdict led to, given whether the adapter dropped the packet.
#[inline(always)]
pub fn fate(verdict: Verdict, is_dropped: bool) -> Fate {
    if is_dropped {
        return Fate::Dropped;
    }
    match verdict {
        Verdict::Pass => Fate::Passed,
        Verdict::Translate
        | Verdict::Around
        | Verdict::Bounce
        | Verdict::Inject
        | Verdict::Route => Fate::Forwarded,
        Verdict::Reset | Verdict::Unreachable => Fate::Rejected,
        Verdict::Drop => Fate::Dropped,
        Verdict::Hold => Fate::Held,
    }
}

/// Returns the kind of event that a packet's decision is, or `None` for a packet of an established
/// flow.
#[inline(always)]
pub fn kind<F: Family>(decision: &Decision<F>, headers: &Headers<F>) -> Option<Kind> {
    if decision.reason == Reason::Stranger {
        return None;
    }
    if !matches!(decision.reason, Reason::Forward | Reason::Reply) {
        return Some(Kind::Counted);
    }
    match decision.record {
        Record::Nothing => None,
        Record::Open | Record::Establish => Some(Kind::Opened),
        Record::Promote => Some(Kind::Proven),
        Record::Demote => Some(Kind::Closing),
        // Only its state or its time is updated.
        Record::Renew | Record::RenewEmbryonic => {
            (headers.tcp_flags & (tcp::FIN | tcp::RST) != 0).then_some(Kind::Closing)
        }
    }
}

/// A family whose addresses an event can hold.
pub trait Wide: Family {
    /// Returns the address as an IPv6 address, IPv4-mapped if need be.
    fn wide(address: &Self::Address) -> [u8; 16];
}

impl Wide for V4 {
    #[inline(always)]
    fn wide(address: &Self::Address) -> [u8; 16] {
        let [a, b, c, d] = address.octets;
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
    }
}

impl Wide for V6 {
    #[inline(always)]
    fn wide(address: &Self::Address) -> [u8; 16] {
        address.octets
    }
}

/// Writes the two tuples of an event, before and after translation.
#[inline(always)]
pub fn tuples<F: Wide>(event: &mut Event, before: &Tuple<F::Address>, after: &Flow<F::Address>) {
    event.family = F::VERSION;
    event.protocol = before.protocol;
    event.source = F::wide(&before.source);
    event.destination = F::wide(&before.destination);
    event.source_port = before.source_port;
    event.destination_port = before.destination_port;
    event.new_source = F::wide(&after.source);
    event.new_destination = F::wide(&after.destination);
    event.new_source_port = after.source_port;
    event.new_destination_port = after.destination_port;
    event.service_port = after.service_port;
    event.backend = after.backend;
    event.flags = after.flags;
}

/// Writes a packet's decision into an event.
#[inline(always)]
pub fn packet<F: Wide>(
    event: &mut Event,
    headers: &Headers<F>,
    decision: &Decision<F>,
    fate: Fate,
) {
    tuples::<F>(event, &headers.tuple, &decision.flow);
    event.reason = decision.reason as u8;
    event.fate = fate as u8;
    event.length = headers.length;
    event.tcp_flags = headers.tcp_flags;
}

impl Listening {
    /// Reports whether anybody listens at a time.
    #[inline(always)]
    pub fn is_active(&self, now_ns: u64) -> bool {
        self.until_ns > now_ns
    }

    /// Reports whether an event passes the filter.
    #[inline(always)]
    pub fn matches(&self, event: &Event) -> bool {
        if self.kinds != 0 && self.kinds & 1_u32.wrapping_shl(event.kind.into()) == 0
            || self.places != 0 && self.places & 1_u32.wrapping_shl(event.at.into()) == 0
            || self.reasons != 0 && self.reasons & 1_u64.wrapping_shl(event.reason.into()) == 0
            || self.fates != 0 && self.fates & 1_u8.wrapping_shl(event.fate.into()) == 0
            || self.protocol != 0 && self.protocol != event.protocol
        {
            return false;
        }
        let [a, b, c, d] = self.service_ports;
        let wanted = event.service_port;
        if a != 0 && a != wanted && b != wanted && c != wanted && d != wanted {
            return false;
        }
        let port = self.port;
        if port != 0
            && port != event.source_port
            && port != event.destination_port
            && port != event.new_source_port
            && port != event.new_destination_port
        {
            return false;
        }
        let address = words(&self.address);
        address == [0, 0]
            || address == words(&event.destination)
            || address == words(&event.source)
            || address == words(&event.new_destination)
            || address == words(&event.new_source)
    }
}

/// Returns an address as two words, for comparison.
#[inline(always)]
fn words(address: &[u8; 16]) -> [u64; 2] {
    // SAFETY: same size, and any bytes are a value of either type.
    unsafe { core::mem::transmute::<[u8; 16], [u64; 2]>(*address) }
}

// Every reason has a bit in a filter, and fits an event's byte.
const _: () = assert!(Reason::ALL.len() <= 64);
