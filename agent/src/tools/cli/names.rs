//! Where the names behind addresses come from.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use super::diff::of_agent;
use super::{Places, runtime};
use crate::daemon::source::kubernetes;
use crate::daemon::source::names::Names;
use crate::node::status;

/// The flags of where names are read.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Names")]
pub(super) struct NamesArgs {
    /// Read the names of pods, nodes and labels with this kubeconfig file [default: from the
    /// agent's sources, whose EndpointSlices name the pods of endpoints].
    #[arg(long, value_name = "FILE")]
    pub(super) kubeconfig: Option<PathBuf>,
}

/// The names that are needed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need<'a> {
    /// Of one namespace, or of all.
    pub(super) namespace: Option<&'a str>,
    /// Of pods that are no endpoints, too.
    pub(super) pods: bool,
}

impl NamesArgs {
    /// Reads names: with the given kubeconfig, or else as the agent of this node reads objects.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub(super) fn read(&self, places: &Places, need: Need<'_>) -> anyhow::Result<Names> {
        let Need { namespace, pods } = need;
        if let Some(path) = &self.kubeconfig {
            let settings = kubernetes::Settings {
                kubeconfig: Some(path.clone()),
                ..kubernetes::Settings::default()
            };
            return of_server(&settings, namespace, pods);
        }
        let last = status::read(&places.state_dir);
        let agent = of_agent(last.as_ref())?;
        if let Some(folder) = &agent.manifests {
            let names = Names::of_manifests(folder);
            return names.with_context(|| format!("cannot read {}", folder.display()));
        }
        let settings = kubernetes::Settings {
            kubeconfig: agent.kubeconfig,
            api: agent.api,
            ..kubernetes::Settings::default()
        };
        // The agent's account may not read pods.
        of_server(&settings, namespace, false)
    }

    /// Reads names that are only shown: without them there is a warning.
    pub(super) fn read_or_warn(&self, places: &Places, need: Need<'_>) -> Names {
        self.read(places, need).unwrap_or_else(|error| {
            eprintln!("warning: the names of pods are not known: {error:#}");
            Names::default()
        })
    }
}

fn of_server(
    settings: &kubernetes::Settings,
    namespace: Option<&str>,
    pods: bool,
) -> anyhow::Result<Names> {
    runtime()?.block_on(async {
        let client = kubernetes::connect(settings).await?;
        Names::of_server(client, namespace, pods).await.map_err(anyhow::Error::msg)
    })
}
