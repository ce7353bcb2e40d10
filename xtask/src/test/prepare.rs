//! What the tiers need before they can run, and why one cannot.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::artifacts::Artifact;
use crate::cache::Cache;
use crate::toolchain::Choice;
use crate::workspace::{OBJECT_ENV, Workspace};
use crate::{components, ebpf, packages, toolchain};

use super::tier::{self, Tier};

/// Whether a tier can run.
#[derive(Debug)]
pub(super) enum Readiness {
    Ready,
    Skip(String),
}

/// Everything that was got ready.
pub(super) struct Prepared {
    tiers: Vec<(Tier, Readiness)>,
    object: Option<PathBuf>,
    sluice: Option<PathBuf>,
    control_plane: Option<PathBuf>,
    prometheus: Option<PathBuf>,
}

impl Prepared {
    pub(super) fn readiness(&self, tier: Tier) -> &Readiness {
        self.tiers
            .iter()
            .find_map(|(own, readiness)| (*own == tier).then_some(readiness))
            .unwrap_or(&Readiness::Ready)
    }

    /// The eBPF object, if a tier needs it.
    pub(super) fn object(&self) -> Option<&Path> {
        self.object.as_deref()
    }

    /// The variables by which a tier's tests find what was built for them.
    pub(super) fn environment(&self, tier: Tier) -> impl Iterator<Item = (&'static str, OsString)> {
        let built = match tier {
            Tier::Unit => [None, None, None, None],
            Tier::Kernel => [self.object.as_ref(), self.sluice.as_ref(), None, None],
            Tier::Lab => [self.object.as_ref(), self.sluice.as_ref(), None, self.prometheus.as_ref()],
            Tier::Api => [self.object.as_ref(), self.sluice.as_ref(), self.control_plane.as_ref(), None],
        };
        [OBJECT_ENV, "SLUICE_BIN", "SLUICE_CONTROL_PLANE", "SLUICE_PROMETHEUS"]
            .into_iter()
            .zip(built)
            .filter_map(|(name, path)| Some((name, path?.into())))
    }
}

/// Gets everything ready that the wanted tiers need. What a machine lacks
/// makes a tier skip; what does not compile is an error.
pub(super) fn prepare(workspace: &Workspace, choice: Choice, wanted: &[Tier]) -> Result<Prepared> {
    let mut prepared =
        Prepared { tiers: Vec::new(), object: None, sluice: None, control_plane: None, prometheus: None };
    for tier in wanted.iter().copied().filter(|tier| *tier != Tier::Unit) {
        let readiness = if !tier::has_tests(workspace, &[tier])? {
            Readiness::Skip("it has no tests".to_owned())
        } else if !packages::is_root() {
            Readiness::Skip("it needs root".to_owned())
        } else {
            Readiness::Ready
        };
        prepared.tiers.push((tier, readiness));
    }
    prepared.install_tools();
    if prepared.has_ready() {
        match Cache::open().and_then(|cache| toolchain::obtain(&cache, choice)) {
            Ok(toolchain) => {
                prepared.object = Some(ebpf::build(workspace, &toolchain)?);
            }
            Err(error) => prepared.skip_ready(&format!("{error:#}")),
        }
    }
    for (tier, readiness) in &mut prepared.tiers {
        if *tier == Tier::Lab && matches!(readiness, Readiness::Ready) {
            match Cache::open().and_then(|cache| components::prometheus(&cache)) {
                Ok(directory) => prepared.prometheus = Some(directory),
                // Only the tests of what is for it need it, and say that it is not there.
                Err(error) => eprintln!("no Prometheus: {error:#}"),
            }
        }
        if *tier == Tier::Api && matches!(readiness, Readiness::Ready) {
            let got = Cache::open().and_then(|cache| components::control_plane(&cache));
            *readiness = ready_or_skip(got.map(|directory| prepared.control_plane = Some(directory)));
        }
    }
    Ok(prepared)
}

impl Prepared {
    /// Finds the agent's binary: cargo builds it with the agent's integration
    /// tests.
    pub(super) fn take_sluice(&mut self, artifacts: &[Artifact]) {
        self.sluice =
            artifacts.iter().filter(|artifact| artifact.is_agents()).find_map(Artifact::binary).cloned();
    }

    fn has_ready(&self) -> bool {
        self.tiers.iter().any(|(_, readiness)| matches!(readiness, Readiness::Ready))
    }

    /// Installs what all the tiers call with one apt-get.
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

fn ready_or_skip(result: Result<()>) -> Readiness {
    match result {
        Ok(()) => Readiness::Ready,
        Err(error) => Readiness::Skip(format!("{error:#}")),
    }
}
