//! Plans what an agent that starts now would make of the maps.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use sluice_common::abi;
use sluice_core::cluster::{Adopted, Cluster, Programmed};
use sluice_core::image::Write;
use sluice_core::model::report::{Flaw, Report};
use sluice_core::model::{self, Change, Event, Model, SourceId};
use sluice_core::plan::{Plan, Sizes};
use sluice_core::policy::Policy;

use super::State;
use crate::node::devices::pattern::Patterns;
use crate::node::devices::{Device, Facts, Role, Rules, Survey, survey};

/// The way in which the agent was started, or would be.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// The node's name, as in `nodeName` of endpoints.
    pub node: Arc<str>,
    /// Serve only Services with this proxy name, instead of those without one.
    pub proxy_name: Option<String>,
    /// The policy for traffic.
    pub policy: Policy,
    /// The roles that the operator has given to devices.
    pub patterns: Patterns,
    /// One of [`abi::socket_path`].
    pub socket_path: u32,
    /// The cookie of the host's network namespace, for maps that do not have it yet.
    pub host_netns: u64,
}

/// The content that the maps would get from an agent.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The wanted content of the maps.
    pub state: State,
    /// The writes that lead there, in the agent's order. They concern only the plan's maps.
    pub writes: Vec<Write>,
    /// The number of objects that were read.
    pub objects: usize,
    /// The objects that could not be read. A running agent keeps their last good form, which is not
    /// known here.
    pub unread: Vec<Report>,
}

/// Plans the content of the maps, given all events of the sources' first full lists.
#[must_use]
pub fn wanted(
    inputs: &Inputs,
    events: Vec<Event>,
    facts: &Facts,
    found: &State,
    sizes: Sizes,
) -> Wanted {
    let policy = &inputs.policy;
    // Nothing depends on the time.
    let now = SystemTime::UNIX_EPOCH;
    let sources: BTreeSet<SourceId> = events.iter().map(|event| event.source).collect();
    let mut cluster = Cluster::new(&inputs.node, Adopted::default());
    let mut model = Model::new(model::Settings {
        node: Some(inputs.node.clone()),
        proxy_name: inputs.proxy_name.as_deref().map(Into::into),
        sources,
        primary: policy.node_addresses.iter().copied().collect(),
        external_ips: policy.external_ips.clone(),
        leave: BTreeSet::new(),
    });
    let mut objects = 0;
    for event in events {
        objects += usize::from(!matches!(event.change, Change::Notes(..) | Change::Synced));
        let _ = cluster.apply(&event);
        model.apply(event, now);
    }
    let _ = cluster.complete();

    let rules = Rules {
        patterns: inputs.patterns.clone(),
        policy: policy.clone(),
        node: cluster.node_addresses(),
    };
    let survey = survey(facts, &rules, &before(&found.devices));
    model.set_left(survey.leave.clone());
    model.set_interfaces(survey.addresses.clone());
    let mut plan = Plan::adopt(sizes, found.image.clone());
    let mut writes = plan.set_node_addresses(survey.addresses.clone());
    if let Some(batch) = model.take(now) {
        writes.append(&mut plan.update(&batch).writes);
    }

    let programmed = programmed(inputs, &cluster, found, &survey);
    let unread = |report: &&Report| {
        matches!(report.note.flaw, Flaw::BrokenDocument | Flaw::Unreadable | Flaw::Undecodable)
    };
    Wanted {
        state: State {
            image: plan.image().clone(),
            programmed: Some(programmed),
            devices: entries(survey),
        },
        writes,
        objects,
        unread: model.reports().iter().filter(unread).cloned().collect(),
    }
}

fn entries(survey: Survey) -> BTreeMap<u32, abi::Device> {
    survey.devices.into_iter().map(|(index, device)| (index, device.entry)).collect()
}

/// Returns the settings and networks that the agent would write.
fn programmed(inputs: &Inputs, cluster: &Cluster, found: &State, survey: &Survey) -> Programmed {
    let own = survey.devices.values().find(|device| device.role == Role::Own);
    let settings = found.programmed.map_or(
        abi::Settings {
            host_netns: inputs.host_netns,
            own_device: own.map_or(0, |device| device.index),
            ..abi::Settings::default()
        },
        |programmed| programmed.settings,
    );
    // The agent reports networks for which there is no room.
    let settings = abi::Settings { socket_path: inputs.socket_path, ..settings };
    cluster.programmed(&inputs.policy, settings).0
}

/// Returns the agent's last survey, as far as the maps have it. A veth that was the uplink stays so
/// while its route is away.
fn before(devices: &BTreeMap<u32, abi::Device>) -> Survey {
    let device = |(index, entry): (&u32, &abi::Device)| {
        let role = Role::from_number(entry.role)?;
        let device =
            Device { index: *index, name: String::new(), role, entry: *entry, veth: false };
        Some((*index, device))
    };
    Survey { devices: devices.iter().filter_map(device).collect(), ..Survey::default() }
}
