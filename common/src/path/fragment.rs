//! Fragmented datagrams. Only the first fragment has the ports; the others are matched by what all
//! fragments of a datagram have in common.
//!
//! The adapter notes the ports of a first fragment once it is decided about. Later fragments follow
//! the datagram's flow and change nothing of it. A fragment that arrives before the first is
//! *held*: it is sent out of our own device, labelled with where it came from, and the agent
//! listens there. When the first fragment has been seen, or after a while, the agent sends it back,
//! by our own device again, to where it came from. While no agent runs, nothing is held: at an
//! address of the node a fragment may be anybody's, such as an overlay's outer packet, which must
//! not depend on us.

use crate::abi::{Datagram, DatagramPorts, Ticks, Tuple, side};
use crate::family::Family;
use crate::packet::header::{Wire, protocol};
use crate::packet::parse::Headers;
use crate::packet::rewrite::can_follow;
use crate::reason::Reason;
use crate::tables::Tables;

use super::entry::entry_of;
use super::facts::is_unassigned;
use super::known::{is_answer, reason_of_entry, verdict_of_entry};
use super::{Decision, Hook, Verdict, facts};

/// The number of ticks for which a first fragment's ports are valid. Linux gives a datagram 30 s to
/// complete, but at a high rate IPv4's 65 536 identifications wrap much sooner.
pub const DATAGRAM_TICKS: u32 = 14;

/// Returns the key of the datagram that a fragment belongs to. It is the same for all of its
/// fragments.
#[inline(always)]
pub fn key<F: Family>(headers: &Headers<F>) -> Datagram<F::Address> {
    // Not the tuple's addresses: in an ICMP error those are the quoted packet's.
    let [source, destination] = headers.outer;
    Datagram {
        source,
        destination,
        id: headers.datagram,
        protocol: headers.datagram_protocol,
        reserved: [0; 3],
    }
}

/// Returns what the later fragments of a datagram need to know. The ports are zero if those are not
/// to be translated either.
#[inline(always)]
pub fn ports<F: Family>(headers: &Headers<F>, decision: &Decision<F>, now: Ticks) -> DatagramPorts {
    let is_rewritten = match decision.verdict {
        Verdict::Translate
        | Verdict::Around
        | Verdict::Bounce
        | Verdict::Inject
        | Verdict::Route => true,
        Verdict::Pass | Verdict::Reset | Verdict::Unreachable | Verdict::Drop | Verdict::Hold => {
            false
        }
    };
    if !is_rewritten || !can_follow(headers, &decision.flow) {
        return DatagramPorts { source_port: 0, destination_port: 0, seen: now };
    }
    let Tuple { source_port, destination_port, .. } = headers.tuple;
    DatagramPorts { source_port, destination_port, seen: now }
}

/// Reports whether a first fragment's ports are those of the datagram that is under way now.
#[inline(always)]
pub fn is_fresh(ports: &DatagramPorts, now: Ticks) -> bool {
    now.wrapping_sub(ports.seen) <= DATAGRAM_TICKS
}

/// The number of ticks after the agent's last heartbeat for which fragments are still held.
pub const HEARTBEAT_TICKS: u32 = 4;

/// Returns the key under which the agent writes its heartbeat while it holds fragments. No datagram
/// has this key, since none has protocol 0.
#[inline(always)]
pub fn heartbeat_key<A: Copy + Default>() -> Datagram<A> {
    Datagram {
        source: A::default(),
        destination: A::default(),
        id: 0,
        protocol: 0,
        reserved: [0; 3],
    }
}

/// Reports whether the agent holds fragments, going by its last heartbeat.
#[inline(always)]
pub fn is_agent_holding(heartbeat: Option<&DatagramPorts>, now: Ticks) -> bool {
    matches!(heartbeat, Some(last) if now.wrapping_sub(last.seen) <= HEARTBEAT_TICKS)
}

/// Reports whether the protocol is one whose ports are translated; fragments of others are left
/// alone.
#[inline(always)]
pub fn is_transport(protocol: u8) -> bool {
    matches!(protocol, protocol::TCP | protocol::UDP | protocol::SCTP)
}

/// Largest IP packet that can be held, in bytes: it returns through our own device, whose MTU is
/// the usual one.
pub const HELD_LENGTH_MAX: u32 = 1_500;
/// Ethertype of a held frame's label, from those for local experiments.
pub const LABEL_ETHERTYPE: u16 = 0x88b5;
/// Priority of packets on our own device that are held, or on their way back.
pub const HELD_PRIORITY: u32 = 0x5c1c_e0f7;

/// Bits of [`Label::flags`].
pub mod label {
    /// The fragment was at tc egress.
    pub const EGRESS: u8 = 1;
    /// The device has no link header.
    pub const L3: u8 = 2;
}

/// The start of a held frame: an Ethernet header that says where the frame behind it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Label {
    /// 2, which marks a locally administered address for anybody who takes this for one.
    pub local: u8,
    /// Bits of [`label`].
    pub flags: u8,
    /// The device's index, in network order.
    pub ifindex: [u8; 4],
    /// Zero.
    pub source: [u8; 6],
    /// [`LABEL_ETHERTYPE`] in network order.
    pub ethertype: [u8; 2],
}

const _: () = assert!(size_of::<Label>() == 14 && align_of::<Label>() == 1);
// SAFETY: bytes alone, which fill the struct (asserted above).
unsafe impl Wire for Label {}

impl Label {
    /// Returns the label of a packet that was seen on a device.
    #[inline(always)]
    pub fn new(ifindex: u32, flags: u8) -> Self {
        let ethertype = LABEL_ETHERTYPE.to_be_bytes();
        Self { local: 2, flags, ifindex: ifindex.to_be_bytes(), source: [0; 6], ethertype }
    }

    /// Returns the firewall mark that sends a packet back to where it came from. It is never zero.
    #[inline(always)]
    pub fn mark(&self) -> u32 {
        u32::from_be_bytes(self.ifindex) << 1 | u32::from(self.flags & label::EGRESS)
    }
}

/// Returns the device in a [mark](Label::mark), and whether the packet has to leave there.
#[inline(always)]
pub fn place_of_mark(mark: u32) -> (u32, bool) {
    (mark >> 1, mark & 1 != 0)
}

/// Makes a later fragment follow its datagram's first one. It has no flags, opens nothing and
/// changes nothing.
#[inline(always)]
pub(super) fn follow_first<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
    decision: &mut Decision<F>,
) {
    let to_address = decision.facts & facts::TO_ADDRESS != 0;
    let ports = match tables.datagram(&key(headers)) {
        Some(ports) if is_fresh(ports, tables.now()) => ports,
        _ => {
            if headers.length <= HELD_LENGTH_MAX
                && is_agent_holding(tables.datagram(&heartbeat_key()), tables.now())
                && matches!(tables.settings(), Some(settings) if settings.own_device != 0)
            {
                decision.set(Verdict::Hold, Reason::FragmentHeld);
            } else if to_address {
                decision.reason = Reason::Fragment;
            }
            return;
        }
    };
    decision.key.source_port = ports.source_port;
    decision.key.destination_port = ports.destination_port;
    let mut found = None;
    if decision.facts & facts::FAR_SIDE != 0 {
        decision.key.side = side::FAR;
        found = entry_of(&decision.key, tables);
        decision.key.side = side::NEAR;
    }
    if found.is_none() {
        found = entry_of(&decision.key, tables);
    }
    if let Some((entry, _)) = found {
        let verdict = verdict_of_entry(entry, hook);
        if verdict != Verdict::Pass {
            decision.flow = *entry;
            decision.set(verdict, reason_of_entry(entry));
        } else if decision.facts & facts::ACCELERATED != 0 && is_answer(entry) {
            decision.verdict = Verdict::Around;
        }
    } else if hook.is_egress() && is_unassigned(headers, tables) {
        decision.set(Verdict::Drop, Reason::UnassignedAddress);
    } else if to_address {
        decision.reason = Reason::Fragment;
    }
}
