//! Policies: the class of a client, and whether it keeps its source address.
//!
//! The rules follow kube-proxy's. They differ where a client's source can be kept without losing
//! the way back of its replies.
//!
//! | frontend | client | [`masquerade::NEEDED`] | [`masquerade::KUBE_PROXY`] |
//! |---|---|---|---|
//! | ClusterIP | local pod | kept, another node's with a way back | kept (`ALL`: masqueraded) |
//! | ClusterIP | host process | as routed | as routed |
//! | ClusterIP | anybody else | with cluster CIDRs: masqueraded, else kept with a way back | masqueraded; kept without a detector |
//! | external, `Cluster` | local pod | kept, another node's with a way back | masqueraded |
//! | external, `Cluster` | anybody else | kept with a way back | masqueraded |
//! | external, `Local` | all | kept | kept |
//!
//! *With a way back*: the backend is on this node, and the FIB sends packets to the client out of a
//! device that programs are attached to. *Another node's*: a detector that goes by addresses takes
//! all of the cluster's pods for local ones. *As routed*: a process of this host gets the address
//! that the route to its backend prescribes.

use crate::abi::{
    self, Class, Prefix, ServicePort, Settings, detect_local, device, frontend, masquerade,
    networks,
};
use crate::family::Family;
use crate::packet::header::protocol;
use crate::tables::Tables;

use super::Hook;

/// The treatment of a client's source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It is kept.
    Kept,
    /// It is kept if replies come by this node and leave by a device of ours.
    KeptWithWayBack,
    /// It is replaced by an address of this node.
    Masqueraded,
}

/// A client's place, as far as its packet tells.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// Whether the client counts as a local pod.
    pub is_local_pod: bool,
    /// Whether the packet came in by a pod's device.
    pub is_at_edge: bool,
}

/// Returns how local pods of a family are detected: one of [`detect_local`]. Prefixes of the other
/// family alone detect none of this one.
#[inline(always)]
pub fn detector<F: Family>(settings: &Settings) -> u32 {
    let bit = if F::VERSION == 4 { networks::PODS_V4 } else { networks::PODS_V6 };
    if settings.detect_local == detect_local::ADDRESS && settings.networks & bit == 0 {
        detect_local::NONE
    } else {
        settings.detect_local
    }
}

/// Returns what happens to the source address of a client that is not this host.
#[inline(always)]
pub fn source<F: Family>(
    settings: &Settings,
    class: Class,
    port: &ServicePort,
    client: Client,
) -> Source {
    let Client { is_local_pod, is_at_edge } = client;
    let as_kube_proxy = settings.masquerade != masquerade::NEEDED;
    let is_elsewhere =
        is_local_pod && !is_at_edge && detector::<F>(settings) == detect_local::ADDRESS;
    if class == Class::Internal {
        if settings.masquerade == masquerade::ALL {
            Source::Masqueraded
        } else if is_elsewhere && !as_kube_proxy {
            Source::KeptWithWayBack
        } else if is_local_pod {
            Source::Kept
        } else if as_kube_proxy {
            if detector::<F>(settings) == detect_local::NONE {
                Source::Kept
            } else {
                Source::Masqueraded
            }
        } else if detector::<F>(settings) == detect_local::ADDRESS {
            Source::Masqueraded
        } else {
            Source::KeptWithWayBack
        }
    } else if port.is_external_local() {
        Source::Kept
    } else if as_kube_proxy {
        Source::Masqueraded
    } else if is_local_pod && !is_elsewhere {
        Source::Kept
    } else {
        Source::KeptWithWayBack
    }
}

/// Returns the class of a client at a kind of frontend; `is_local`: it is a pod or process of this
/// node.
#[inline(always)]
pub fn class(kind: u32, is_local: bool) -> Class {
    if kind == frontend::CLUSTER_IP {
        Class::Internal
    } else if is_local {
        Class::ExternalInside
    } else {
        Class::ExternalOutside
    }
}

/// Reports whether an incoming packet is a local pod's, as far as the configured detector can tell.
#[inline(always)]
pub fn is_local_pod<F: Family, T: Tables<F>>(client: &F::Address, tables: &T) -> bool {
    let Some(settings) = tables.settings() else { return false };
    match detector::<F>(settings) {
        detect_local::DEVICE | detect_local::SOME_DEVICES => match tables.hook_device() {
            Some(here) => here.has_local_pods(),
            None => false,
        },
        detect_local::ADDRESS => match tables.networks() {
            Some(networks) => is_within::<F>(&networks.pods, client),
            None => false,
        },
        _ => false,
    }
}

/// Reports whether a socket's call is enough to tell if its client counts as a local pod. Some
/// detectors go by what only packets show.
#[inline(always)]
pub fn is_known_at_the_socket<F: Family>(settings: &Settings) -> bool {
    matches!(detector::<F>(settings), detect_local::NONE | detect_local::DEVICE)
}

/// Reports whether the packet's device is the host's end of a pod's link.
#[inline(always)]
pub fn is_edge<F: Family, T: Tables<F>>(tables: &T) -> bool {
    match tables.hook_device() {
        Some(here) => here.role == device::EDGE,
        None => false,
    }
}

/// Reports whether a flow that a packet opens here may have the port of a socket that cannot be
/// looked up.
///
/// A pod's kernel gives one port to two connections whose peers differ, as a frontend and its
/// endpoint do, and no entry records a connection to the endpoint itself. The pod's sockets are
/// looked up in its namespace. `has_socket` says whether the packet comes straight from one of
/// them, and not from a stack of the pod's own (gVisor), a virtual machine or a namespace behind
/// the pod. UDP keeps its ports: sockets of one process share none unless they ask for it.
#[inline(always)]
pub fn hides_sockets(here: &abi::Device, protocol_number: u8, has_socket: bool) -> bool {
    here.role == device::EDGE
        && protocol_number != protocol::UDP
        && (here.hides_sockets() || here.netns != 0 && !has_socket)
}

/// Returns the id of the network namespace whose sockets send by the device, if it is a pod's.
#[inline(always)]
pub fn netns_of_sockets(here: &abi::Device) -> Option<u32> {
    if here.role == device::EDGE { here.netns.checked_sub(1) } else { None }
}

/// Reports whether node ports at an address are served to packets of the device whose hook the
/// packet passes.
///
/// Packets from this host to its own addresses leave by the loopback device, and are handled only
/// there. Loopback addresses are served to nobody else, whatever a frame says (the stack would drop
/// it as martian). A pod's link counts as a different link for link-local addresses.
#[inline(always)]
pub fn may_ask_for_node_ports<F: Family, T: Tables<F>>(
    hook: Hook,
    address: &F::Address,
    tables: &T,
) -> bool {
    if hook.is_egress() {
        return is_loopback_device::<F, T>(tables);
    }
    !(F::is_loopback(address) || F::is_of_link(address) && is_edge::<F, T>(tables))
}

/// Reports whether the packet's device carries what this host sends to its own addresses.
#[inline(always)]
pub fn is_loopback_device<F: Family, T: Tables<F>>(tables: &T) -> bool {
    matches!(tables.hook_device(), Some(here) if here.role == device::LOOPBACK)
}

/// Reports whether one of the prefixes contains an address.
#[inline(always)]
pub fn is_within<F: Family>(
    prefixes: &[Prefix<F::Address>; abi::PREFIXES],
    address: &F::Address,
) -> bool {
    let address = F::words(address);
    for prefix in prefixes {
        let (network, mask) = (F::words(&prefix.network), F::words(&prefix.mask));
        let mut differs = 0;
        for ((word, network), mask) in address.iter().zip(&network).zip(&mask) {
            differs |= (word & mask) ^ network;
        }
        if differs == 0 {
            return true;
        }
    }
    false
}

/// Reports whether a packet's source does not belong to the device that it came in by, so that it
/// may be forged.
///
/// `from` is that device, or 0 for this host itself. `route` returns the device that the route to
/// the source names, or 0 if there is none: called with false, as this host would send there;
/// called with true, as a packet that came in by `from` would go.
///
/// At a pod's device the check is a strict reverse path filter, except that a bridge's pods may be
/// reached through a device above it of which nothing is known. An uplink or a fabric device may
/// receive packets whose way back is another one, but no pod of this node sends by those, nor does
/// the node itself.
#[inline(always)]
pub fn is_foreign<F: Family, T: Tables<F>>(
    hook: Hook,
    source: &F::Address,
    from: u32,
    tables: &T,
    mut route: impl FnMut(bool) -> u32,
) -> bool {
    if from == 0 || F::is_of_link(source) {
        return false;
    }
    if tables.is_node_address(source) {
        // On the way out netfilter may have masqueraded it.
        return !hook.is_egress();
    }
    let named = route(false);
    let (role, bridge, is_gateway_above) = match tables.device(from) {
        Some(device) => (device.role, device.bridge, device.has_gateway_above()),
        None => (0, 0, false),
    };
    if named == from || bridge != 0 && named == bridge {
        return false;
    }
    match role {
        device::EDGE => {
            let named = route(true);
            let is_above = is_gateway_above && named != 0;
            named != from
                && (bridge == 0 || named != bridge)
                && !(is_above && tables.device(named).is_none())
        }
        device::UPLINK | device::FABRIC => {
            let is_way_out =
                |there: &abi::Device| matches!(there.role, device::UPLINK | device::FABRIC);
            named != 0 && !tables.device(named).is_some_and(is_way_out)
        }
        // Packets that this host sends itself.
        device::OWN | device::LOOPBACK => false,
        _ => named != 0,
    }
}
