//! Load balancers that pass packets on unchanged: one address per family for every Service of the
//! type LoadBalancer, and on the bridge a route from each to the nodes, by connection.
//!
//! For a Service with the external traffic policy Local the route leads to the nodes whose health
//! check answers 200. With session affinity it leads to one node, because the kernel would choose
//! by ports, too.

mod pool;
mod service;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, sleep};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::process::Cmd;

use self::pool::Pool;
use self::service::{Service, Services};
use crate::addresses::{LOAD_BALANCERS, LOAD_BALANCERS_IPV6, NodeNumber};
use crate::kubectl::Kubectl;
use crate::namespace::Namespace;
use crate::network::BRIDGE;
use crate::state::State;

/// The interval of health checks.
const INTERVAL: Duration = Duration::from_millis(500);

/// The timeout of a health check.
const PATIENCE: Duration = Duration::from_secs(1);

/// Serves the cluster's Services for ever. Returns only if it cannot begin.
pub(crate) fn serve(state: &State, kubectl: &Kubectl, nodes: u8) -> Result<()> {
    let bridge = Namespace::named(state, BRIDGE);
    // Routes of an earlier process.
    bridge.enter(|| {
        let flush = |args: [&str; 5]| Cmd::new("ip").args(args).run();
        flush(["-4", "route", "flush", "root", LOAD_BALANCERS])?;
        flush(["-6", "route", "flush", "root", LOAD_BALANCERS_IPV6])
    })?;
    let mut all = LoadBalancers {
        kubectl,
        bridge,
        nodes: NodeNumber::all(nodes).collect(),
        pool: Pool::default(),
        routes: BTreeMap::new(),
    };
    let (changed, changes) = mpsc::channel();
    let _watcher = {
        let kubectl = kubectl.clone();
        thread::spawn(move || watch(&kubectl, &changed))
    };
    let mut services = Vec::new();
    loop {
        match changes.recv_timeout(INTERVAL) {
            Ok(()) => {
                // Further changes are in the same list.
                while changes.try_recv().is_ok() {}
                match list(kubectl) {
                    Ok(found) => services = found,
                    Err(error) => eprintln!("{error:#}"),
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => bail!("nobody watches the Services any more"),
        }
        all.follow(&services);
    }
}

/// Reports all Services, and then every change of one, for ever.
fn watch(kubectl: &Kubectl, changed: &Sender<()>) -> ! {
    loop {
        let watched = kubectl.follow(
            &["get", "services", "--all-namespaces", "--watch", "--output=name"],
            |_name| changed.send(()).is_ok(),
        );
        if let Err(error) = watched {
            eprintln!("{error:#}");
        }
        // The API server has ended it, or does not answer.
        sleep(INTERVAL);
    }
}

fn list(kubectl: &Kubectl) -> Result<Vec<Service>> {
    let answer = kubectl.ask(["get", "services", "--all-namespaces", "--output=json"])?;
    let services: Services =
        serde_json::from_str(&answer).context("cannot parse the list of Services")?;
    Ok(services.items)
}

struct LoadBalancers<'a> {
    kubectl: &'a Kubectl,
    bridge: Namespace,
    nodes: Vec<NodeNumber>,
    pool: Pool,
    /// Returns the nodes that an address is routed to.
    routes: BTreeMap<IpAddr, Vec<NodeNumber>>,
}

impl LoadBalancers<'_> {
    /// Does what the Services request. The next call retries what fails.
    fn follow(&mut self, services: &[Service]) {
        for service in services {
            let done =
                if service.is_wanted() { self.provide(service) } else { self.withdraw(service) };
            if let Err(error) = done {
                eprintln!("{service}: {error:#}");
            }
        }
        for address in self.pool.retain(|uid| services.iter().any(|service| service.uid() == uid)) {
            self.route_or_tell(address, &[]);
        }
    }

    fn provide(&mut self, service: &Service) -> Result<()> {
        if !service.has_finalizer() {
            self.patch(
                service,
                &[],
                &json!({"metadata": {"finalizers": service.finalizers_with()}}),
            )?;
        }
        let (addresses, released) = self.pool.give(service)?;
        for address in released {
            self.route_or_tell(address, &[]);
        }
        let nodes = self.targets(service);
        for address in &addresses {
            self.route(*address, &nodes)?;
        }
        if service.ingress() != addresses {
            let ingress: Vec<_> =
                addresses.iter().map(|address| json!({"ip": address, "ipMode": "VIP"})).collect();
            self.patch_status(service, &json!(ingress))?;
        }
        Ok(())
    }

    /// Takes the addresses and routes of the Service back, if it has any.
    fn withdraw(&mut self, service: &Service) -> Result<()> {
        for address in self.pool.take(service.uid()) {
            self.route(address, &[])?;
        }
        if service.has_finalizer() {
            if !service.ingress().is_empty() && !service.is_going() {
                self.patch_status(service, &json!(null))?;
            }
            self.patch(
                service,
                &[],
                &json!({"metadata": {"finalizers": service.finalizers_without()}}),
            )?;
        }
        Ok(())
    }

    fn targets(&self, service: &Service) -> Vec<NodeNumber> {
        let check = service.health_check();
        let healthy = self
            .nodes
            .iter()
            .copied()
            .filter(|node| check.is_none_or(|port| is_healthy(*node, port)));
        if service.has_affinity() { healthy.take(1).collect() } else { healthy.collect() }
    }

    fn route_or_tell(&mut self, address: IpAddr, nodes: &[NodeNumber]) {
        if let Err(error) = self.route(address, nodes) {
            eprintln!("{error:#}");
        }
    }

    fn route(&mut self, address: IpAddr, nodes: &[NodeNumber]) -> Result<()> {
        if self.routes.get(&address).map_or(&[][..], Vec::as_slice) == nodes {
            return Ok(());
        }
        let mut lines = String::new();
        if nodes.is_empty() {
            // Writing to a String cannot fail.
            let _ = writeln!(lines, "route del {address}");
        } else {
            let _ = write!(lines, "route replace {address}");
            for node in nodes {
                let gateway = if address.is_ipv6() { node.ipv6() } else { node.ipv4() };
                let _ = write!(lines, " nexthop via {gateway}");
            }
            lines.push('\n');
        }
        self.bridge.ip(&lines)?;
        let _earlier = if nodes.is_empty() {
            self.routes.remove(&address)
        } else {
            self.routes.insert(address, nodes.to_owned())
        };
        let names: Vec<_> = nodes.iter().map(|node| node.name()).collect();
        eprintln!("{address} is routed to [{}]", names.join(" "));
        Ok(())
    }

    fn patch_status(&self, service: &Service, ingress: &serde_json::Value) -> Result<()> {
        let patch = json!({"status": {"loadBalancer": {"ingress": ingress}}});
        self.patch(service, &["--subresource=status"], &patch)
    }

    fn patch(&self, service: &Service, flags: &[&str], patch: &serde_json::Value) -> Result<()> {
        let (namespace, patch) =
            (format!("--namespace={}", service.namespace()), patch.to_string());
        let args =
            ["patch", "service", service.name(), &namespace, "--type=merge", "--patch", &patch];
        let args: Vec<_> = args.into_iter().chain(flags.iter().copied()).collect();
        self.kubectl.run(&args).map(drop)
    }
}

/// Reports whether the health check of a node answers 200.
fn is_healthy(node: NodeNumber, port: u16) -> bool {
    let ask = || -> Result<bool> {
        let address = SocketAddr::new(node.ipv4().parse()?, port);
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n")?;
        let mut begin = [0; 12];
        stream.read_exact(&mut begin)?;
        Ok(begin.starts_with(b"HTTP/1.") && begin.ends_with(b" 200"))
    };
    ask().unwrap_or(false)
}
