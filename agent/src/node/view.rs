//! Joins the live maps for people: the owners of service ports, the frontends, the counters.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use sluice_common::abi::{
    Backend, BackendCounters, COUNTER_V6, Name, Range, Service, ServiceKey, SocketCounters,
    frontend,
};
use sluice_common::{V4, V6};
use sluice_core::image::{Dataplane, Image, Stack};
use sluice_core::model::object::Protocol;

use crate::node::dataplane::{Access, Error, Failures, Kernel, Maps, Pins};
use crate::node::host;

/// The content of the pinned maps, read once.
#[derive(Debug)]
pub(crate) struct View {
    /// The maps.
    pub(crate) kernel: Kernel,
    /// The content of the plan's maps.
    pub(crate) image: Image,
    /// Backend counters.
    pub(crate) counters: BTreeMap<u32, BackendCounters>,
    /// Counters of connections that were translated at the socket.
    pub(crate) sockets: BTreeMap<u32, SocketCounters>,
    /// What failed to begin.
    pub(crate) failures: BTreeMap<u32, Failures>,
}

/// A backend of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BackendView {
    /// Its id in its family's map.
    pub(crate) id: u32,
    /// Its endpoint.
    pub(crate) address: SocketAddr,
    /// The service port that it belongs to.
    pub(crate) service_port: u32,
    /// Whether it is on this node.
    pub(crate) local: bool,
    /// Whether it takes new flows.
    pub(crate) serving: bool,
    /// Its counters.
    pub(crate) counters: BackendCounters,
    /// Counters of connections that were translated at the socket.
    pub(crate) sockets: SocketCounters,
    /// What failed to begin.
    pub(crate) failures: Failures,
}

/// The counters of one backend, or of several.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sums {
    /// Counters per packet, and the calls.
    pub(crate) packets: BackendCounters,
    /// Counters of connections that are translated at the socket.
    pub(crate) sockets: SocketCounters,
    /// What failed to begin.
    pub(crate) failures: Failures,
}

impl Sums {
    /// Adds a backend's counters.
    pub(crate) fn add(&mut self, backend: &BackendView) {
        self.packets.add(&backend.counters);
        self.sockets.add(&backend.sockets);
        self.failures.add(&backend.failures);
    }

    /// Returns the sums of each service port's backends.
    #[must_use]
    pub(crate) fn by_service_port(backends: &[BackendView]) -> BTreeMap<u32, Self> {
        let mut sums: BTreeMap<u32, Self> = BTreeMap::new();
        for backend in backends {
            sums.entry(backend.service_port).or_default().add(backend);
        }
        sums
    }
}

/// A Service's port in words.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, schemars::JsonSchema)]
pub(crate) struct PortName {
    /// The Service's namespace.
    pub(crate) namespace: String,
    /// The Service's name.
    pub(crate) service: String,
    /// The port's name; empty for an unnamed port.
    #[serde(rename = "port_name")]
    pub(crate) label: String,
    /// The port's number.
    pub(crate) port: u16,
    /// `TCP` or `UDP`.
    pub(crate) protocol: String,
}

impl PortName {
    /// Returns the Service, as `namespace/name`.
    #[must_use]
    pub(crate) fn service(&self) -> String {
        format!("{}/{}", self.namespace, self.service)
    }

    /// Whether a word names this service: `name` or `namespace/name`, perhaps with `svc/` before
    /// it and `:port` after it.
    #[must_use]
    pub(crate) fn is(&self, word: &str) -> bool {
        let plain = SERVICE_PREFIXES.iter().find_map(|prefix| word.strip_prefix(prefix));
        self.is_named(word) || plain.is_some_and(|word| self.is_named(word))
    }

    fn is_named(&self, word: &str) -> bool {
        let (service, port) =
            word.split_once(':').map_or((word, None), |(service, port)| (service, Some(port)));
        let (namespace, name) =
            service.split_once('/').map_or((None, service), |(ns, name)| (Some(ns), name));
        name == self.service
            && namespace.is_none_or(|namespace| namespace == self.namespace)
            && port.is_none_or(|port| port == self.label || port == self.port.to_string())
    }
}

/// What kubectl takes before the name of a Service.
pub(crate) const SERVICE_PREFIXES: [&str; 3] = ["svc/", "service/", "services/"];

/// `namespace/name:port`, with the port's name if it has one.
impl std::fmt::Display for PortName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { namespace, service, label, port, .. } = self;
        if label.is_empty() {
            write!(formatter, "{namespace}/{service}:{port}")
        } else {
            write!(formatter, "{namespace}/{service}:{label}")
        }
    }
}

impl From<&Name> for PortName {
    fn from(name: &Name) -> Self {
        Self {
            namespace: text(&name.namespace),
            service: text(&name.service),
            label: text(&name.port),
            port: name.number,
            protocol: protocol(name.protocol),
        }
    }
}

/// Returns the text before the first zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// Returns a protocol's name, or its number if it is unknown.
#[must_use]
pub(crate) fn protocol(number: u8) -> String {
    Protocol::from_number(number)
        .map_or_else(|| number.to_string(), |protocol| protocol.word().to_owned())
}

/// Opens the maps pinned under a path, to be read.
///
/// # Errors
///
/// Fails if nothing or another layout is pinned there, or if it may not be opened.
pub(crate) fn open(pin_path: &Path) -> anyhow::Result<Kernel> {
    let pins = Pins::new(pin_path);
    let folder = pins.maps();
    match folder.try_exists() {
        Ok(true) => {}
        Ok(false) if !pins.other_layouts().is_empty() => {
            bail!(
                "the maps under {} have another layout than this program knows; use the `sluice` of the running agent's version",
                pin_path.display()
            );
        }
        Ok(false) => return Err(Error::NothingPinned { path: pin_path.to_owned() }.into()),
        Err(error) => {
            return Err(error)
                .with_context(|| format!("cannot open {}; run as root", folder.display()));
        }
    }
    Ok(Kernel::new(Maps::open(&folder, Access::Read)?))
}

/// Checks that this process is in the network namespace of the agent that wrote the maps: devices,
/// addresses and routes of another one say nothing about them.
///
/// # Errors
///
/// Fails if it is in another one, or the maps cannot be read.
pub(crate) fn check_namespace(kernel: &Kernel) -> anyhow::Result<()> {
    let wanted = kernel.maps().read_programmed()?.map_or(0, |all| all.settings.host_netns);
    // A kernel before Linux 5.14 has no cookies, and maps that no agent has filled have none.
    let here = host::netns_cookie().unwrap_or_default();
    ensure!(
        wanted == 0 || here == 0 || wanted == here,
        "this is another network namespace than the agent's, so its devices, addresses and routes \
         have nothing to do with these maps; run the command in the agent's: \
         nsenter --net=/proc/PID/ns/net sluice ... (`sluice status` shows the PID)"
    );
    Ok(())
}

impl View {
    /// Reads the maps pinned under a path.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be opened or read.
    pub(crate) fn read(pin_path: &Path) -> anyhow::Result<Self> {
        let kernel = open(pin_path)?;
        let image = kernel.read()?;
        Self::with(kernel, image)
    }

    /// Reads the counters of maps whose image has been read.
    ///
    /// # Errors
    ///
    /// Fails if they cannot be read.
    pub(crate) fn with(kernel: Kernel, image: Image) -> anyhow::Result<Self> {
        let counters = kernel.maps().backend_counters()?;
        let sockets = kernel.maps().socket_counters()?;
        let failures = kernel.maps().failures()?;
        Ok(Self { kernel, image, counters, sockets, failures })
    }

    /// Returns the owner of a service port.
    #[must_use]
    pub(crate) fn name(&self, service_port: u32) -> Option<PortName> {
        self.image.names.get(&service_port).map(PortName::from)
    }

    /// Returns the frontends of each service port with their kinds. A node port has any address.
    #[must_use]
    pub(crate) fn vips(&self) -> BTreeMap<u32, Vec<(String, u32)>> {
        let mut vips: BTreeMap<u32, Vec<(String, u32)>> = BTreeMap::new();
        self.add_vips::<V4>(&mut vips);
        self.add_vips::<V6>(&mut vips);
        vips
    }

    fn add_vips<F: Stack>(&self, vips: &mut BTreeMap<u32, Vec<(String, u32)>>) {
        for (ServiceKey { address, port, .. }, Service { service_port, kind }) in
            &F::of(&self.image).services
        {
            let vip = match *kind {
                frontend::NODE_PORT => format!("*:{port}"),
                _ => F::ip(*address).to_string(),
            };
            vips.entry(*service_port).or_default().push((vip, *kind));
        }
    }

    /// Returns every backend that has served and whose id was not reused.
    #[must_use]
    pub(crate) fn backends(&self) -> Vec<BackendView> {
        let mut backends = self.backends_of::<V4>(0);
        backends.extend(self.backends_of::<V6>(COUNTER_V6));
        backends
    }

    fn backends_of<F: Stack>(&self, bit: u32) -> Vec<BackendView> {
        let view = |(id, found): (&u32, &Backend<F::Address>)| BackendView {
            id: *id,
            address: (F::ip(found.address), found.port).into(),
            service_port: found.service_port,
            local: found.is_local(),
            serving: found.is_serving(),
            counters: self.counters.get(&(id | bit)).copied().unwrap_or_default(),
            sockets: self.sockets.get(&(id | bit)).copied().unwrap_or_default(),
            failures: self.failures.get(&(id | bit)).copied().unwrap_or_default(),
        };
        F::of(&self.image).backends.iter().map(view).collect()
    }

    /// Returns the slots of a service port: those of internal clients, or else of the others.
    #[must_use]
    pub(crate) fn slots(&self, service_port: u32) -> &[u32] {
        let port = self.image.ports.get(&service_port).copied().unwrap_or_default();
        let range = port.ranges.map(Range).into_iter().find(|range| range.size() > 0);
        range.and_then(|range| self.image.slots.get(&range.start())).map_or(&[], Vec::as_slice)
    }

    /// Returns the backends of a service port that get new flows of any class of clients.
    #[must_use]
    pub(crate) fn selected(&self, service_port: u32) -> BTreeSet<u32> {
        let port = self.image.ports.get(&service_port).copied().unwrap_or_default();
        let ranges = port.ranges.map(Range).into_iter().filter(|range| range.size() > 0);
        ranges.filter_map(|range| self.image.slots.get(&range.start())).flatten().copied().collect()
    }
}

/// Returns Kubernetes' name of a frontend kind.
#[must_use]
pub(crate) fn kind(number: u32) -> &'static str {
    match number {
        frontend::CLUSTER_IP => "ClusterIP",
        frontend::LOAD_BALANCER => "LoadBalancer",
        frontend::EXTERNAL_IP => "ExternalIP",
        frontend::NODE_PORT => "NodePort",
        _ => "?",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> PortName {
        PortName {
            namespace: "shop".to_owned(),
            service: "web".to_owned(),
            label: "http".to_owned(),
            port: 80,
            protocol: "TCP".to_owned(),
        }
    }

    #[test]
    fn a_service_is_named_with_or_without_namespace_and_port() {
        for word in ["web", "shop/web", "web:80", "shop/web:http", "svc/web", "service/shop/web:80"]
        {
            assert!(name().is(word), "{word}");
        }
        assert_eq!(name().to_string(), "shop/web:http");
        for word in ["we", "other/web", "web:81", "shop/web:https", "svc/other/web"] {
            assert!(!name().is(word), "{word}");
        }
    }

    #[test]
    fn a_name_ends_at_its_first_zero() {
        assert_eq!(text(b"web\0\0"), "web");
        assert_eq!(text(b"web"), "web");
    }
}
