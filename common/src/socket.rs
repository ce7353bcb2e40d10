//! What a socket's call to an address becomes.
//!
//! A call is translated once and costs nothing per packet afterwards. The slot is
//! chosen by the socket's cookie: one socket stays with one backend as long as the service
//! port's table does.

use crate::abi::{self, Class, ServiceKey, frontend};
use crate::family::{Family, mix};
use crate::maglev;
use crate::tables::Tables;

/// What to do with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice<F: Family> {
    /// The address is no frontend.
    Stranger,
    /// The service port has no backends.
    Refuse {
        /// Index into `ports`.
        service_port: u32,
    },
    /// Speak to this backend instead.
    Backend {
        /// Index into `backends`.
        id: u32,
        /// The backend.
        backend: abi::Backend<F::Address>,
    },
}

/// Chooses the backend for a call of the socket with this cookie to this address.
#[inline(always)]
pub fn choose<F: Family, T: Tables<F>>(key: &ServiceKey<F::Address>, cookie: u64, tables: &T) -> Choice<F> {
    if tables.listing(&key.address) & abi::listing::FRONTEND == 0 {
        return Choice::Stranger;
    }
    let Some(service) = tables.service(key) else {
        return Choice::Stranger;
    };
    let service_port = service.service_port;
    let class = if service.kind == frontend::CLUSTER_IP { Class::Internal } else { Class::ExternalInside };
    let Some(range) = tables.range(service_port, class) else {
        return Choice::Stranger;
    };
    if range.size() == 0 {
        return Choice::Refuse { service_port };
    }
    let hash = mix(mix(cookie as u32) ^ (cookie >> 32) as u32 ^ u32::from(key.port));
    let hash = mix(hash ^ F::hash(&key.address));
    let slot = range.start().wrapping_add(maglev::scale(hash, range.size()));
    match tables.slot(slot).and_then(|id| tables.backend(id).map(|backend| (id, backend))) {
        Some((id, backend)) => Choice::Backend { id, backend: *backend },
        None => Choice::Refuse { service_port },
    }
}
