//! Facts about a packet's addresses: bits of [`Decision::facts`](super::Decision::facts).

use crate::abi::{device, listing, networks, phase};
use crate::family::Family;
use crate::packet::parse::{Fragment, Headers, Kind};
use crate::tables::Tables;

use super::open::asks_from_node_port;
use super::{Hook, mark, policy};

/// The destination is an address of a frontend.
pub const TO_ADDRESS: u32 = 1;
/// The destination may be a node port, to judge by its number.
pub const TO_NODE_PORT: u32 = 2;
/// One of the two above.
pub const TO_FRONTEND: u32 = 4;
/// The destination is a backend's address, and the packet is at ingress.
pub const TO_BACKEND: u32 = 8;
/// The destination is an address of this node.
pub const TO_NODE: u32 = 16;
/// The packet leaves where masqueraded clients' packets leave, or must not be mistaken for one of
/// theirs: an entry of the far side may apply.
pub const FAR_SIDE: u32 = 32;
/// The packet may have an entry.
pub const KNOWN: u32 = 64;
/// The source is an address of this node, or the destination a frontend.
pub const FROM_NODE: u32 = 128;
/// The source is a backend's address, and the destination no frontend.
pub const FROM_BACKEND: u32 = 256;
/// The packet goes around the stack if it is a client's or an endpoint's.
pub const ACCELERATED: u32 = 512;
/// The packet's own tuple had an entry.
pub const HAD_ENTRY: u32 = 1024;

/// Returns what the listing and the port numbers tell about a packet's addresses.
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
    // Every fragment counts as one for a node port until its ports are known. The first one has to
    // be noted wherever later ones are looked up.
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
    // This includes endpoints' packets, which are otherwise handled only where they leave.
    let accelerated = hook == Hook::Ingress
        && (to_frontend || source & listing::BACKEND != 0)
        && matches!(tables.settings(), Some(settings) if settings.accelerates());
    let known = if is_egress {
        to_frontend || is_far || source & listing::BACKEND != 0
    } else {
        accelerated ||
        // A reply to a masqueraded client, or to a translated packet of this host's own, goes from
        // a backend to an address of the node.
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

/// Reports whether a packet leaves this node for an address of the Service ranges that no Service
/// has.
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
    // Never at an edge: another proxy on this node may serve the address.
    let Some(here) = tables.hook_device() else { return false };
    if here.role != device::UPLINK && here.role != device::FABRIC && here.role != device::OWN {
        return false;
    }
    let Some(networks) = tables.networks() else { return false };
    policy::is_within::<F>(&networks.services, &headers.tuple.destination)
}
