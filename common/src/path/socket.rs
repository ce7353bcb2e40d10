//! Decides what becomes of a socket's call to an address.
//!
//! A call is translated once and costs nothing per packet afterwards. The slot follows from the
//! socket's cookie. A socket that sends again stays with its backend as long as that serves,
//! whatever becomes of the service port's table.

use crate::abi::{
    self, ServiceKey, ServicePort, Settings, Tuple, detect_local, frontend, listing, masquerade,
    phase,
};
use crate::family::{Family, mix};
use crate::maglev;
use crate::packet::header::protocol;
use crate::path::{find, policy};
use crate::tables::Tables;

/// A decision about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice<F: Family> {
    /// The call goes on unchanged. The address is no frontend, or the decision needs what only
    /// packets show (the client's address, the device that they come in by) or do (be dropped
    /// without an answer).
    Untouched,
    /// The service port has no backends.
    Refuse {
        /// Index into `ports`.
        service_port: u32,
    },
    /// The socket is connected to this backend instead.
    Backend {
        /// Index into `backends`.
        id: u32,
        /// The backend.
        backend: abi::Backend<F::Address>,
    },
}

/// Chooses the backend for a call of the socket with this cookie to this address.
///
/// `kept` returns the backend, with its generation, that the socket was given for this address
/// before; it is called only if there is a choice.
///
/// Node ports are translated for processes of this host only: the same address number may mean
/// another address to a pod.
#[inline(always)]
pub fn choose<F: Family, T: Tables<F>>(
    key: &ServiceKey<F::Address>,
    cookie: u64,
    is_host: bool,
    kept: impl FnOnce() -> Option<(u32, u16)>,
    tables: &T,
) -> Choice<F> {
    let listed = tables.listing(&key.address);
    let to_node_port =
        is_host && listed & listing::NODE_PORTS != 0 && tables.is_node_port(key.port);
    if listed & listing::FRONTEND == 0 && !to_node_port {
        return Choice::Untouched;
    }
    let tuple = Tuple {
        source: F::Address::default(),
        destination: key.address,
        source_port: 0,
        destination_port: key.port,
        protocol: key.protocol,
        side: 0,
        reserved: [0; 2],
    };
    let Some((service_port, kind)) = find(&tuple, to_node_port, tables) else {
        return Choice::Untouched;
    };
    let (Some(port), Some(settings)) = (tables.port(service_port), tables.settings()) else {
        return Choice::Untouched;
    };
    if settings.phase != phase::SERVE && is_left_to_netfilter(settings.phase, key.protocol) {
        return Choice::Untouched;
    }
    if needs_packets::<F>(kind, is_host, port, settings) {
        return Choice::Untouched;
    }
    // As in the packet path: without a detector, local pods are clients like any other.
    let is_local = is_host || policy::detector::<F>(settings) != detect_local::NONE;
    let class = policy::class(kind, is_local);
    let Some(range) = tables.range(service_port, class) else {
        return Choice::Untouched;
    };
    if range.size() == 0 {
        return if range.drops() { Choice::Untouched } else { Choice::Refuse { service_port } };
    }
    if let Some((id, generation)) = kept()
        && let Some(backend) = tables.backend(id)
        && backend.generation == generation
        && backend.service_port == service_port
        && backend.is_serving()
    {
        return Choice::Backend { id, backend: *backend };
    }
    let hash = mix(mix(cookie as u32) ^ (cookie >> 32) as u32 ^ u32::from(key.port));
    let hash = mix(hash ^ F::hash(&key.address));
    let slot = range.start().wrapping_add(maglev::scale(hash, range.size()));
    match tables.slot(slot).and_then(|id| tables.backend(id).map(|backend| (id, backend))) {
        Some((id, backend)) => Choice::Backend { id, backend: *backend },
        None => Choice::Refuse { service_port },
    }
}

/// Reports whether only packets show what a frontend of this kind does with a call: its client's
/// address decides, or is changed.
#[inline(always)]
fn needs_packets<F: Family>(
    kind: u32,
    is_host: bool,
    port: &ServicePort,
    settings: &Settings,
) -> bool {
    let is_cluster_ip = kind == frontend::CLUSTER_IP;
    let is_masqueraded = !is_host
        && (settings.masquerade == masquerade::ALL
            || settings.masquerade == masquerade::KUBE_PROXY && !is_cluster_ip);
    let is_restricted = kind == frontend::LOAD_BALANCER && port.restricts_sources();
    // The backends that the pod may reach depend on whether it counts as inside.
    let depends_on_side = !is_host
        && !is_cluster_ip
        && port.is_external_local()
        && !policy::is_known_at_the_socket::<F>(settings);
    port.affinity_seconds != 0 || is_restricted || is_masqueraded || depends_on_side
}

/// Reports whether a takeover or release leaves calls of this protocol to packets. A connect()
/// always opens something new; a datagram may belong to a flow that netfilter translates, which
/// only its packet shows.
#[inline(always)]
pub fn is_left_to_netfilter(now: u32, protocol: u8) -> bool {
    match now & phase::MASK {
        phase::SERVE => protocol == protocol::UDP && now & phase::IMPORTED_UDP != 0,
        phase::IMPORT => protocol == protocol::UDP,
        _ => true,
    }
}
