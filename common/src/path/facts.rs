//! What a packet's addresses are: bits of [`Decision::met`](super::Decision::met).

use crate::abi::{device, listing, networks, phase};
use crate::family::Family;
use crate::packet::parse::{Fragment, Headers, Kind};
use crate::tables::Tables;

use super::open::asks_from_node_port;
use super::{Hook, mark, policy};

/// To an address of a frontend.
pub const TO_ADDRESS: u32 = 1;
/// To a node port, as far as its number tells.
pub const TO_NODE_PORT: u32 = 2;
/// Either of both.
pub const TO_FRONTEND: u32 = 4;
/// To a backend's address, at ingress.
pub const TO_BACKEND: u32 = 8;
/// To an address of this node.
pub const TO_NODE: u32 = 16;
/// It leaves where packets of masqueraded clients leave, or must not meet them.
pub const FAR_SIDE: u32 = 32;
/// It may have an entry.
pub const KNOWN: u32 = 64;
/// From an address of this node, or to a frontend from anywhere.
pub const FROM_NODE: u32 = 128;
/// From a backend's address, and not to a frontend.
pub const FROM_BACKEND: u32 = 256;
/// It goes around the stack, if it is a client's or an endpoint's.
pub const ACCELERATED: u32 = 512;
/// Its own tuple had an entry.
pub const HAD_ENTRY: u32 = 1024;

/// What a packet's addresses are, as far as their listing and the port numbers tell.
#[inline(always)]
pub(super) fn classify<F: Family, T: Tables<F>>(
    hook: Hook,
    headers: &Headers<F>,
    tables: &T,
) -> u32 {
    let is_egress = hook.is_egress();
    let key = &headers.tuple;
    let destination = tables.listing(&key.destination);
    let to_address = destination & listing::FRONTEND != 0;
    // Of fragments all are taken for one's until their ports are known: the first is to be noted
    // wherever others ask for it.
    let to_node_port = destination & listing::NODE_PORTS != 0
        && (headers.fragment != Fragment::Whole || tables.is_node_port(key.destination_port))
        && policy::may_ask_for_node_ports::<F, T>(hook, &key.destination, tables);
    let to_frontend = to_address || to_node_port;
    let source = if to_frontend { 0 } else { tables.listing(&key.source) };
    let is_far = is_egress
        && (destination & listing::BACKEND != 0
            && tables.marks() & mark::MASQUERADED != 0
            && (destination & listing::NODE == 0 || !tables.is_node_address(&key.destination))
            || source & listing::NODE_PORTS != 0 && asks_from_node_port(headers, tables));
    // An endpoint's packet too, which else is met where it leaves alone.
    let accelerated = hook == Hook::Ingress
        && (to_frontend || source & listing::BACKEND != 0)
        && matches!(tables.settings(), Some(settings) if settings.accelerates());
    let known = if is_egress {
        to_frontend || is_far || source & listing::BACKEND != 0
    } else {
        accelerated ||
        // A reply to a masqueraded client, or to this host's own translated packets, comes from a
        // backend to an address of the node.
        to_frontend
            || (source & listing::BACKEND != 0
                && destination & listing::NODE != 0
                && tables.marks() & (mark::HOST | mark::MASQUERADED) != 0)
    };
    let bit = |is: bool, bit: u32| if is { bit } else { 0 };
    bit(to_address, TO_ADDRESS)
        | bit(to_node_port, TO_NODE_PORT)
        | bit(to_frontend, TO_FRONTEND)
        | bit(!is_egress && destination & listing::BACKEND != 0, TO_BACKEND)
        | bit(destination & listing::NODE != 0, TO_NODE)
        | bit(is_far, FAR_SIDE)
        | bit(known, KNOWN)
        | bit(to_frontend || source & listing::NODE != 0, FROM_NODE)
        | bit(source & listing::BACKEND != 0, FROM_BACKEND)
        | bit(accelerated, ACCELERATED)
}

/// Whether a packet leaves this node for an address that Services may have, and none has.
#[inline(always)]
pub(super) fn is_unassigned<F: Family, T: Tables<F>>(headers: &Headers<F>, tables: &T) -> bool {
    let bit = if F::VERSION == 4 { networks::SERVICES_V4 } else { networks::SERVICES_V6 };
    let Some(settings) = tables.settings() else { return false };
    if settings.networks & bit == 0
        || settings.phase & phase::MASK != phase::SERVE
        || headers.kind == Kind::IcmpError
    {
        return false;
    }
    // Never at an edge: another proxy of this node may serve it.
    let Some(here) = tables.hook_device() else { return false };
    if here.role != device::UPLINK && here.role != device::FABRIC && here.role != device::OWN {
        return false;
    }
    let Some(networks) = tables.networks() else { return false };
    policy::is_within::<F>(&networks.services, &headers.tuple.destination)
}
