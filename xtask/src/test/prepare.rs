//! Prepares the tools and binaries of the tiers, and says why a tier cannot run.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;
use sluice_cluster::cache::Cache;
use sluice_cluster::{components, packages};

use crate::artifacts::Artifact;
use crate::toolchain::Choice;
use crate::workspace::{OBJECT_ENV, Workspace};
use crate::{agent, ebpf, toolchain};

use super::tier::Tier;

/// The ability of this machine to run a tier.
#[derive(Debug)]
pub(super) enum Readiness {
    Ready,
    Skip(String),
}

/// Everything that was prepared.
#[derive(Default)]
pub(super) struct Prepared {
    tiers: Vec<(Tier, Readiness)>,
    object: Option<PathBuf>,
    sluice: Option<PathBuf>,
    next_object: Option<PathBuf>,
    next_sluice: Option<PathBuf>,
    control_plane: Option<PathBuf>,
    kubectl: Option<PathBuf>,
    helm: Option<PathBuf>,
    prometheus: Option<PathBuf>,
}

impl Prepared {
    pub(super) fn readiness(&self, tier: Tier) -> &Readiness {
        self.tiers
            .iter()
            .find_map(|(own, readiness)| (*own == tier).then_some(readiness))
            .unwrap_or(&Readiness::Ready)
    }

    /// Returns the eBPF object, if a tier needs it.
    pub(super) fn object(&self) -> Option<&Path> {
        self.object.as_deref()
    }

    /// Returns the agent's binary, once the tests are built.
    pub(super) fn sluice(&self) -> Option<&Path> {
        self.sluice.as_deref()
    }

    /// Returns the eBPF object of the layout that tests upgrade to.
    pub(super) fn next_object(&self) -> Option<&Path> {
        self.next_object.as_deref()
    }

    /// Returns the variables by which the tests of a tier find what was built for them.
    pub(super) fn environment(&self, tier: Tier) -> impl Iterator<Item = (&'static str, OsString)> {
        let built = match tier {
            Tier::Unit => vec![],
            Tier::Kernel => vec![(OBJECT_ENV, &self.object), ("SLUICE_BIN", &self.sluice)],
            Tier::Lab => vec![
                (OBJECT_ENV, &self.object),
                ("SLUICE_BIN", &self.sluice),
                ("SLUICE_NEXT_BIN", &self.next_sluice),
                ("SLUICE_PROMETHEUS", &self.prometheus),
            ],
            Tier::Api => vec![
                (OBJECT_ENV, &self.object),
                ("SLUICE_BIN", &self.sluice),
                ("SLUICE_CONTROL_PLANE", &self.control_plane),
                ("SLUICE_KUBECTL", &self.kubectl),
                ("SLUICE_HELM", &self.helm),
            ],
        };
        built.into_iter().filter_map(|(name, path)| Some((name, path.as_ref()?.into())))
    }
}

/// Prepares everything that the wanted tiers need. A tier is skipped if the machine lacks
/// something; code that does not compile is an error.
pub(super) fn prepare(workspace: &Workspace, choice: Choice, wanted: &[Tier]) -> Result<Prepared> {
    let mut prepared = Prepared::default();
    for tier in wanted.iter().copied().filter(|tier| *tier != Tier::Unit) {
        let readiness = if packages::is_root() {
            Readiness::Ready
        } else {
            Readiness::Skip("it needs root".to_owned())
        };
        prepared.tiers.push((tier, readiness));
    }
    prepared.install_tools();
    if prepared.has_ready() {
        match Cache::open().and_then(|cache| toolchain::obtain(&cache, choice)) {
            Ok(toolchain) => {
                prepared.object = Some(ebpf::build(workspace, &toolchain)?);
                if prepared.is_ready(Tier::Kernel) || prepared.is_ready(Tier::Lab) {
                    prepared.next_object = Some(ebpf::build_next(workspace, &toolchain)?);
                }
                if prepared.is_ready(Tier::Lab) {
                    prepared.next_sluice = Some(agent::build_next(workspace)?);
                }
            }
            Err(error) => prepared.skip_ready(&format!("{error:#}")),
        }
    }
    for (tier, readiness) in &mut prepared.tiers {
        if *tier == Tier::Lab && matches!(readiness, Readiness::Ready) {
            match Cache::open().and_then(|cache| components::prometheus(&cache)) {
                Ok(directory) => prepared.prometheus = Some(directory),
                // Only the tests of alerts and dashboard need it, and they report its absence.
                Err(error) => eprintln!("no Prometheus: {error:#}"),
            }
        }
        if *tier == Tier::Api && matches!(readiness, Readiness::Ready) {
            let got = Cache::open().and_then(|cache| {
                prepared.control_plane = Some(components::control_plane(&cache)?);
                prepared.kubectl = Some(components::kubectl(&cache)?.join("kubectl"));
                prepared.helm = Some(components::helm(&cache)?.join("helm"));
                Ok(())
            });
            *readiness = ready_or_skip(got);
        }
    }
    Ok(prepared)
}

impl Prepared {
    /// Finds the agent's binary, which cargo builds for the agent's integration tests.
    pub(super) fn take_sluice(&mut self, artifacts: &[Artifact]) {
        self.sluice = artifacts
            .iter()
            .filter(|artifact| artifact.is_agents())
            .find_map(Artifact::binary)
            .cloned();
    }

    fn is_ready(&self, wanted: Tier) -> bool {
        self.tiers
            .iter()
            .any(|(tier, readiness)| *tier == wanted && matches!(readiness, Readiness::Ready))
    }

    fn has_ready(&self) -> bool {
        self.tiers.iter().any(|(_, readiness)| matches!(readiness, Readiness::Ready))
    }

    /// Installs the tools of all tiers with one apt-get.
    fn install_tools(&mut self) {
        let ready = |(_, readiness): &&(Tier, Readiness)| matches!(readiness, Readiness::Ready);
        let tools = self.tiers.iter().filter(ready).flat_map(|(tier, _)| tier.tools());
        if let Err(error) = packages::ensure_tools(tools) {
            for (tier, readiness) in &mut self.tiers {
                if matches!(readiness, Readiness::Ready) && !packages::has_tools(tier.tools()) {
                    *readiness = Readiness::Skip(format!("{error:#}"));
                }
            }
        }
    }

    fn skip_ready(&mut self, reason: &str) {
        for (_, readiness) in &mut self.tiers {
            if matches!(readiness, Readiness::Ready) {
                *readiness = Readiness::Skip(reason.to_owned());
            }
        }
    }
}

/// Builds what Kubernetes' own tests need, and returns whether they can run.
pub(super) fn e2e() -> Readiness {
    if !packages::is_root() {
        return Readiness::Skip("it needs root".to_owned());
    }
    let build = |cache: Cache| components::cluster(&cache).and_then(|_| components::e2e(&cache));
    ready_or_skip(Cache::open().and_then(build).map(drop))
}

fn ready_or_skip(result: Result<()>) -> Readiness {
    match result {
        Ok(()) => Readiness::Ready,
        Err(error) => Readiness::Skip(format!("{error:#}")),
    }
}
