//! The agent of a node: the real model, plan and reconciler, without a kernel or a cluster. It may
//! be killed between any two writes; the next agent reads the maps.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use sluice_core::image::{Dataplane, Image, Reconciler};
use sluice_core::model::{self, Change, Event, Model, SourceId};
use sluice_core::plan::{Plan, Sizes};

use crate::maps::Handle;

/// An agent.
#[derive(Debug)]
pub struct Agent {
    model: Model,
    plan: Plan,
    reconciler: Reconciler<Handle>,
}

/// The time at which everything is noticed: nothing depends on it.
const NOW: SystemTime = SystemTime::UNIX_EPOCH;

impl Agent {
    /// Starts an agent on what the maps hold, with all objects.
    #[must_use]
    pub fn start(
        maps: &Handle,
        node: &str,
        addresses: &[IpAddr],
        sizes: Sizes,
        objects: Vec<Change>,
    ) -> Self {
        let image = maps.read().unwrap_or_default();
        let settings = model::Settings {
            node: Some(Arc::from(node)),
            sources: [SourceId::Kubernetes].into(),
            ..model::Settings::default()
        };
        let mut agent = Self {
            model: Model::new(settings),
            plan: Plan::adopt(sizes, image),
            reconciler: Reconciler::new(maps.clone()),
        };
        let addresses: BTreeMap<IpAddr, bool> =
            addresses.iter().map(|address| (*address, true)).collect();
        agent.model.set_interfaces(addresses.clone());
        let writes = agent.plan.set_node_addresses(addresses);
        agent.reconciler.push(writes);
        agent.hear(objects.into_iter().chain([Change::Synced]).collect());
        agent
    }

    /// Applies changes of objects.
    pub fn hear(&mut self, changes: Vec<Change>) {
        for change in changes {
            self.model.apply(Event { source: SourceId::Kubernetes, change }, NOW);
        }
        if let Some(batch) = self.model.take(NOW) {
            let update = self.plan.update(&batch);
            self.reconciler.push(update.writes);
        }
    }

    /// Carries out at most this many writes; returns whether some are left.
    pub fn write(&mut self, writes: usize) -> bool {
        self.reconciler.dataplane.budget.set(writes);
        self.reconciler.run().is_err()
    }

    /// Returns the writes that the maps still lack, or [`None`] if they are as planned.
    #[must_use]
    pub fn differs(&self) -> Option<String> {
        let held = self.reconciler.dataplane.read().unwrap_or_default();
        let writes = sluice_core::image::diff(&held, self.plan.image());
        (!writes.is_empty()).then(|| format!("{writes:?}"))
    }

    /// Returns the planned content of the maps.
    #[must_use]
    pub fn image(&self) -> &Image {
        self.plan.image()
    }

    /// Returns the reports on objects, as text.
    pub fn reports(&self) -> impl Iterator<Item = String> + '_ {
        self.model.reports().iter().map(ToString::to_string)
    }
}
