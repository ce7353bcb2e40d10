//! `sluice flows`: the translated connections in the maps.

use serde_json::Value;

use super::names::NamesArgs;
use super::output::{Item, ListArgs};
use super::table::{Column, Text, age, cut, whole, wide};
use super::{Outcome, Places};
use crate::node::view::{PortName, View};
use crate::tools::api::{Flow, flows};

impl Item for Flow {
    const COLUMNS: &'static [Column] = &[
        wide("PROTO"),
        whole("CLIENT"),
        whole("VIP"),
        whole("BACKEND"),
        wide("SERVICE"),
        cut("STATE"),
        whole("IDLE"),
        wide("SEEN AS"),
        wide("CLIENT POD"),
        wide("POD"),
        wide("NODE"),
    ];

    fn cells(&self, _: bool) -> Vec<Text> {
        vec![
            self.protocol.clone().into(),
            self.client.clone().into(),
            self.vip.clone().into(),
            self.backend.clone().into(),
            self.service.as_ref().map(PortName::service).unwrap_or_default().into(),
            self.state.join(",").into(),
            age(self.idle_seconds).into(),
            self.seen_as.clone().unwrap_or_default().into(),
            self.client_pod.clone().unwrap_or_default().into(),
            self.pod.clone().unwrap_or_default().into(),
            self.node.clone().unwrap_or_default().into(),
        ]
    }

    fn name(&self) -> String {
        format!("flow/{}/{}/{}", self.protocol, self.client, self.vip)
    }

    fn namespace(&self) -> Option<&str> {
        self.service.as_ref().map(|name| name.namespace.as_str())
    }

    fn state(&self) -> anyhow::Result<Value> {
        // Time alone changes nothing.
        Ok(serde_json::to_value(Self { idle_seconds: 0, ..self.clone() })?)
    }
}

/// Prints the flows, the most recently used first.
///
/// # Errors
///
/// Fails if the maps cannot be read, or labels are asked for and cannot be.
pub(super) fn run(
    places: &Places,
    service: Option<&str>,
    limit: Option<usize>,
    names: &NamesArgs,
    list: &ListArgs,
) -> anyhow::Result<Outcome> {
    let chosen = list.chosen(places, names, service)?;
    list.list(|| {
        let mut flows = flows(&View::read(&places.pin_path)?, &chosen.names)?;
        if !chosen.takes_all() {
            flows.retain(|flow| flow.service.as_ref().is_some_and(|name| chosen.takes(name)));
        }
        flows.truncate(limit.unwrap_or(usize::MAX));
        Ok(flows)
    })
}
