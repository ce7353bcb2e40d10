//! `cargo xtask cluster up`: every step makes only what is missing, so that a second run repairs a
//! cluster.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::addresses::NodeNumber;
use crate::cache::Cache;
use crate::components::{self, Components};
use crate::kubectl::Kubectl;
use crate::launch;
use crate::network::CONTROL_PLANE;
use crate::packages;
use crate::state::{Description, State, boot_id};
use crate::ui::{Step, seconds};
use crate::{
    Overlay, Proxy, Tree, UpOptions, cgroup, control_plane, down, images, network, node, pki,
    workloads,
};

/// The directories in which distributions put the CNI's own plugins.
const CNI_PLUGINS: [&str; 4] =
    ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni", "/usr/lib/cni/bin"];

/// Brings the cluster up.
pub(crate) fn run(tree: &Tree<'_>, options: &UpOptions) -> Result<()> {
    let cache = Cache::open()?;
    let state = State::open();
    let description = Description {
        nodes: options.nodes,
        cni: options.cni,
        proxy: options.proxy,
        overlay: options.overlay,
        boot: boot_id(),
        is_complete: false,
    };
    // Checked before anything that takes long.
    let known = check(&state, &description)?;

    packages::ensure_tools(packages::CLUSTER)?;
    let plugins = cni_plugins()?;
    let components = components::cluster(&cache)?;
    let archive = images::obtain(&cache, &components)?;
    let sluice = match options.proxy {
        Proxy::Sluice if options.agent.is_some() => options.agent.clone(),
        Proxy::Sluice => Some((tree.build)()?),
        Proxy::KubeProxy | Proxy::None => None,
    };

    let started = Instant::now();
    let _lock = cache.lock("cluster")?;
    if !known {
        down::remove_remains(&state).context("cannot remove what is left of an earlier cluster")?;
    }
    state.describe(&description)?;
    let up = Up { tree, state: &state, components: &components, plugins: &plugins, options };
    up.machine(&archive)?;
    up.nodes()?;
    up.workloads(sluice.as_deref())?;
    state.describe(&Description { is_complete: true, ..description })?;
    eprintln!(
        "A cluster of {} is up after {}. Go on with\n\
         \x20   cargo xtask cluster shell      # kubectl and curl, where the outside client is\n\
         \x20   cargo xtask cluster status\n\
         \x20   cargo xtask cluster down",
        count(options.nodes),
        seconds(started.elapsed())
    );
    Ok(())
}

fn count(nodes: u8) -> String {
    if nodes == 1 { "one node".to_owned() } else { format!("{nodes} nodes") }
}

/// Whether a cluster with these options is up already. If not, the remains of another may be
/// removed.
fn check(state: &State, wanted: &Description) -> Result<bool> {
    let Some(found) =
        state.description()?.filter(|found| found.is_complete && found.boot == wanted.boot)
    else {
        return Ok(false);
    };
    if (found.nodes, found.cni) != (wanted.nodes, wanted.cni) {
        bail!(
            "a cluster of {} with --cni {} is up, not {} with --cni {}: take it down first, with `cargo xtask cluster down`",
            count(found.nodes),
            found.cni,
            count(wanted.nodes),
            wanted.cni
        );
    }
    if found.proxy != wanted.proxy && found.proxy != Proxy::None {
        bail!(
            "the cluster that is up has --proxy {}, and its nodes keep traces of that: take it down first, with `cargo xtask cluster down`",
            found.proxy
        );
    }
    let beside = |description: &Description| {
        description.proxy == Proxy::Sluice && description.overlay == Overlay::BesideKubeProxy
    };
    if beside(&found) != beside(wanted) && found.proxy != Proxy::None {
        bail!(
            "the cluster that is up has --overlay {}, and with or without a kube-proxy beside it is another cluster: take it down first, with `cargo xtask cluster down`",
            found.overlay.name()
        );
    }
    Ok(true)
}

struct Up<'a> {
    tree: &'a Tree<'a>,
    state: &'a State,
    components: &'a Components,
    plugins: &'a Path,
    options: &'a UpOptions,
}

impl Up<'_> {
    fn numbers(&self) -> impl Iterator<Item = NodeNumber> + use<> {
        NodeNumber::all(self.options.nodes)
    }

    /// Network, control plane, and the nodes as machines without a kubelet.
    fn machine(&self, archive: &Path) -> Result<()> {
        let step = Step::start("network");
        network::ensure(self.state, self.options.nodes)?;
        step.done("made");

        let step = Step::start("certificates and tokens");
        pki::ensure(self.state, self.options.nodes)?;
        self.link_programs()?;
        step.done("made");

        let step = Step::start(format!(
            "control plane, and containerd with images on {}",
            count(self.options.nodes)
        ));
        cgroup::create(self.state, CONTROL_PLANE)?;
        control_plane::ensure_api_server(self.state, self.components)?;
        for number in self.numbers() {
            node::ensure(self.state, self.components, self.plugins, self.options.cni, number)
                .with_context(|| format!("cannot start the node {}", number.name()))?;
        }
        // The name of the archive's directory contains the versions.
        let key =
            archive.parent().and_then(Path::file_name).context("an archive has a directory")?;
        self.import(archive, &key.to_string_lossy())?;
        control_plane::wait_api_server(self.state, &self.kubectl())?;
        control_plane::ensure_controllers(self.state, self.components)?;
        step.done("running");
        Ok(())
    }

    /// Lets the nodes join.
    fn nodes(&self) -> Result<()> {
        let step = Step::start("nodes");
        let kubectl = self.kubectl();
        for number in self.numbers() {
            self.state.write(node::may_join(number), "")?;
        }
        for number in self.numbers() {
            self.wait_registered(&kubectl, number)?;
            let (ipv4, ipv6) = (number.pods_ipv4(), number.pods_ipv6());
            let ranges =
                format!(r#"{{"spec":{{"podCIDR":"{ipv4}","podCIDRs":["{ipv4}","{ipv6}"]}}}}"#);
            let _output = kubectl.run(["patch", "node", &number.name(), "--patch", &ranges])?;
        }
        let ready =
            kubectl.run(["wait", "--for=condition=Ready", "node", "--all", "--timeout=90s"]);
        let _output = ready.with_context(|| {
            format!(
                "not every node became ready; their kubelets' logs are in {}",
                self.state.path("log").display()
            )
        })?;
        control_plane::check(self.state, &control_plane::NAMES)?;
        step.done("ready");
        Ok(())
    }

    fn wait_registered(&self, kubectl: &Kubectl, number: NodeNumber) -> Result<()> {
        let deadline = Instant::now() + Duration::from_mins(1);
        while kubectl.ask(["get", "node", &number.name()]).is_err() {
            if Instant::now() > deadline {
                let log = launch::log(self.state, &format!("{}-kubelet", number.name()));
                bail!(
                    "the kubelet of {} did not join within a minute; {}",
                    number.name(),
                    launch::last_words(&log)
                );
            }
            sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Starts the Service proxy, and DNS, which needs one.
    fn workloads(&self, sluice: Option<&Path>) -> Result<()> {
        let kubectl = self.kubectl();
        let proxy = match self.options.proxy {
            Proxy::None => None,
            Proxy::KubeProxy => {
                let step = Step::start("kube-proxy");
                workloads::apply_kube_proxy(self.state, &kubectl)?;
                Some((step, "ds/kube-proxy"))
            }
            Proxy::Sluice => {
                if self.options.overlay == Overlay::BesideKubeProxy {
                    let step = Step::start("kube-proxy");
                    workloads::apply_kube_proxy(self.state, &kubectl)?;
                    workloads::wait(&kubectl, "ds/kube-proxy")?;
                    step.done("ready");
                }
                let step = Step::start("sluice");
                let binary = sluice.context("no binary of Sluice was built")?;
                let own = images::sluice(self.tree, binary, &self.state.path("sluice"))?;
                self.import(&own.archive, &format!("sluice-{}", own.tag))?;
                workloads::apply_sluice(
                    self.tree,
                    self.state,
                    &kubectl,
                    self.options.overlay,
                    &own.tag,
                )?;
                Some((step, "ds/sluice"))
            }
        };
        workloads::apply_dns(self.state, &kubectl)?;
        let Some((step, workload)) = proxy else {
            eprintln!(
                "CoreDNS: applied; its pods become ready when something serves the Service `kubernetes`"
            );
            return Ok(());
        };
        workloads::wait(&kubectl, workload)?;
        step.done("ready");
        let step = Step::start("CoreDNS");
        workloads::wait(&kubectl, "deploy/coredns")?;
        step.done("ready");
        Ok(())
    }

    /// Imports an archive of images on all nodes in parallel.
    fn import(&self, archive: &Path, key: &str) -> Result<()> {
        thread::scope(|scope| {
            let imports: Vec<_> = self
                .numbers()
                .map(|number| {
                    scope.spawn(move || {
                        node::import(self.state, self.components, number, archive, key)
                    })
                })
                .collect();
            imports.into_iter().try_for_each(|import| {
                import.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })
    }

    fn kubectl(&self) -> Kubectl {
        Kubectl::new(self.state)
    }

    fn link_programs(&self) -> Result<()> {
        let directory = self.state.programs();
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        for (programs, name) in [
            (&self.components.kubectl, "kubectl"),
            (&self.components.containerd, "ctr"),
            (&self.components.test_images, "agnhost"),
        ] {
            let link = directory.join(name);
            drop(fs::remove_file(&link));
            symlink(programs.join(name), &link)
                .with_context(|| format!("cannot make {}", link.display()))?;
        }
        Ok(())
    }
}

fn cni_plugins() -> Result<PathBuf> {
    let find = || {
        let has_all = |directory: &PathBuf| {
            ["ptp", "bridge", "host-local", "portmap"]
                .iter()
                .all(|name| directory.join(name).exists())
        };
        CNI_PLUGINS.into_iter().map(PathBuf::from).find(has_all)
    };
    if let Some(found) = find() {
        return Ok(found);
    }
    packages::install(&["containernetworking-plugins"])?;
    find().with_context(|| {
        format!("no CNI plugins (ptp, bridge, host-local, portmap) in {}", CNI_PLUGINS.join(", "))
    })
}
