//! The agent's status: what `sluice status` and the metrics read.

use std::collections::BTreeSet;

use sluice_common::abi::phase;
use sluice_core::model::SourceId;
use sluice_core::policy::Accelerate;

use super::{Agent, Source};
use crate::daemon::attacher::Attachments;
use crate::node::devices::addresses::stray_problem;
use crate::node::devices::watch::Watched;
use crate::node::status::{PolicyStatus, SourceStatus, Status, unix_seconds};

impl Agent {
    /// Whether this node serves everything that the sources ask for. Objects that were refused for
    /// lack of room count, so that a rollout stops at the first node that cannot hold the cluster.
    /// Health checks still succeed then (`Liveness`), since all else is served.
    pub(super) fn is_ready(&self) -> bool {
        self.is_attached()
            && self.settings.phase & phase::MASK == phase::SERVE
            && self.sync.refused_for_room() == 0
            && self.drift.unrepaired().is_empty()
    }

    /// Whether the maps hold what the sources say, and the programs are attached.
    pub(super) fn is_attached(&self) -> bool {
        self.sync.is_settled() && self.devices.are_attached() && self.programmed.is_some()
    }

    /// Updates the status and writes it.
    pub(super) fn report_status(&mut self) {
        let attachments = self.devices.attachments.borrow().clone();
        let ready = self.is_ready();
        if ready && !self.status.ready {
            tracing::info!(devices = attachments.devices.len(), "ready");
        }
        let waiting_for = self.waiting_for(&attachments);
        let policy = self.policy_status();
        let strays = self.log_strays();
        let status = &mut self.status;
        status.policy = policy;
        status.ready = ready;
        status.waiting_for = waiting_for;
        status.takeover = self.takeover.progress.borrow().status.clone();
        status.sources = self.sources.iter().map(Source::status).collect();
        status.counts = self.sync.counts();
        status.devices = attachments.devices;
        status.socket_path = attachments.sockets;
        status.reports = self.sync.reports();
        status.reports.extend(self.side_tasks.failing_services());
        status.last_sync = self.sync.last();
        status.failing = self.sync.failing();
        status.drift = self.drift.status();
        status.problems = self
            .refused
            .iter()
            .chain(&status.takeover.problem)
            .cloned()
            .chain(strays)
            .chain(self.side_tasks.problems())
            .collect();
        self.write_status();
    }

    /// Returns what keeps this node from being ready, as text for people.
    fn waiting_for(&self, attachments: &Attachments) -> Vec<String> {
        let mut waiting_for: Vec<String> = self
            .sync
            .awaited()
            .iter()
            .map(|id| format!("the first full list of {}", source_name(*id)))
            .collect();
        if !self.devices.are_attached() {
            let devices = &attachments.devices;
            let problems: Vec<String> = devices
                .iter()
                .filter_map(|device| device.problem.clone())
                .chain(attachments.sockets.problem.clone())
                .chain(attachments.problem.clone())
                .collect();
            if problems.is_empty() {
                waiting_for.push("the programs to be attached".to_owned());
            }
            waiting_for.extend(problems);
        }
        if self.programmed.is_none() {
            waiting_for.push("the cluster's networks to be written to the maps".to_owned());
        }
        if self.settings.phase & phase::MASK != phase::SERVE {
            let phase = self.takeover.progress.borrow().status.phase.clone();
            waiting_for.push(format!("the takeover or release, which is {phase}"));
        }
        let refused = self.sync.refused_for_room();
        if refused > 0 {
            waiting_for.push(format!(
                "room in the maps: {refused} objects are not fully served (see no_room in the \
                 list of problems)"
            ));
        }
        waiting_for.extend(self.sync.failing());
        waiting_for.extend(self.drift.unrepaired());
        waiting_for
    }

    /// Returns the effective policy. Before the first survey it is what the last agent found.
    fn policy_status(&self) -> PolicyStatus {
        let watched = self.devices.watched.borrow();
        if *watched == Watched::default() {
            return self.status.policy.clone();
        }
        let survey = &watched.survey;
        let policy = &self.devices.rules.borrow().policy;
        let serving = survey.addresses.iter().filter(|(_, serves)| **serves);
        PolicyStatus {
            masquerade: policy.masquerade.word().to_owned(),
            detect_local: policy.detect_local.to_string(),
            nodeport_addresses: policy.node_ports.to_string(),
            serving: serving.map(|(address, _)| *address).collect(),
            primary: survey.primary.iter().collect(),
            left_alone: survey.leave.iter().copied().collect(),
            accelerate: if policy.accelerate == Accelerate::On && self.settings.has_ipsec() {
                "on, but suspended while this node has IPsec policies".to_owned()
            } else {
                policy.accelerate.word().to_owned()
            },
            strays: survey.strays.keys().copied().collect(),
        }
    }

    /// Returns a problem for each address of the node that no uplink has. Logs each when it appears
    /// and when it is gone.
    fn log_strays(&mut self) -> Vec<String> {
        let found: BTreeSet<String> = self
            .devices
            .watched
            .borrow()
            .survey
            .strays
            .iter()
            .map(|(address, device)| stray_problem(*address, device.as_ref()))
            .collect();
        for problem in found.difference(&self.logged_strays) {
            tracing::warn!("{problem}");
        }
        for problem in self.logged_strays.difference(&found) {
            tracing::info!("no longer: {problem}");
        }
        self.logged_strays.clone_from(&found);
        found.into_iter().collect()
    }

    /// Writes the status file. A failure stops nothing else and is logged once.
    pub(super) fn write_status(&mut self) {
        let Status { ready, waiting_for, .. } = &self.status;
        // A node that waits for nothing may still not be ready, for a moment.
        let unknown = ["the programs to be attached".to_owned()];
        let reasons = if *ready || !waiting_for.is_empty() { &waiting_for[..] } else { &unknown };
        self.side_tasks.set_waiting_for(if *ready { &[] } else { reasons });
        let result = self.state.write(&self.status);
        match &result {
            Err(error) if !self.is_status_unwritten => tracing::warn!("{error}"),
            Ok(()) if self.is_status_unwritten => {
                tracing::info!("the status can be written again");
            }
            Ok(()) | Err(_) => {}
        }
        self.is_status_unwritten = result.is_err();
    }
}

impl Source {
    fn status(&self) -> SourceStatus {
        let health = self.pulse.health();
        SourceStatus {
            name: source_name(self.id).to_owned(),
            from: self.from.clone(),
            synced: health.synced,
            heard: health.answered.map(unix_seconds),
            problem: health.failure.map(|(why, _)| why),
        }
    }
}

/// Returns a source's name for people.
fn source_name(id: SourceId) -> &'static str {
    match id {
        SourceId::Manifests => "manifests",
        SourceId::Kubernetes => "kubernetes",
    }
}
