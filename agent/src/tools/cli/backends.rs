//! `sluice backends`: every backend with its share of the slots and its counters.

use super::names::NamesArgs;
use super::output::{Item, ListArgs};
use super::table::{Column, Mood, Text, bytes, cut, failures, whole, wide};
use super::{Outcome, Places};
use crate::node::view::View;
use crate::tools::api::{Backend, backends};

impl Item for Backend {
    const COLUMNS: &'static [Column] = &[
        cut("SERVICE"),
        whole("BACKEND"),
        whole("STATE"),
        whole("SHARE"),
        whole("OPENED"),
        whole("FAILED"),
        wide("RESETS"),
        wide("IN"),
        wide("OUT"),
        wide("POD"),
        wide("NODE"),
        wide("PROTO"),
        wide("ID"),
        wide("LOCAL"),
        wide("OPEN"),
        wide("FLOWS"),
        wide("CALLS"),
        wide("PACKETS"),
        wide("SEGMENTS"),
    ];

    fn cells(&self, _: bool) -> Vec<Text> {
        let (name, sockets) = (&self.name, &self.sockets);
        let failed = self.failures.flows() + sockets.failed;
        let mood = if self.state == "serving" { Mood::Good } else { Mood::Warning };
        vec![
            name.to_string().into(),
            self.address.clone().into(),
            Text::new(self.state, Some(mood)),
            format!("{:.0}%", self.share).into(),
            (self.flows + sockets.connections).to_string().into(),
            failures(failed, self.flows + sockets.connections + sockets.failed),
            (self.forward_resets + self.reply_resets + sockets.resets).to_string().into(),
            bytes(self.forward_bytes + sockets.sent_bytes).into(),
            bytes(self.reply_bytes + sockets.received_bytes).into(),
            self.pod.clone().unwrap_or_default().into(),
            self.node.clone().unwrap_or_default().into(),
            name.protocol.clone().into(),
            self.id.to_string().into(),
            if self.local { "yes" } else { "no" }.into(),
            sockets.connections.saturating_sub(sockets.closed).to_string().into(),
            self.flows.to_string().into(),
            self.calls.to_string().into(),
            (self.forward_packets + self.reply_packets).to_string().into(),
            (sockets.sent_segments + sockets.received_segments).to_string().into(),
        ]
    }

    fn name(&self) -> String {
        format!("backend/{}/{}", self.name, self.address)
    }

    fn namespace(&self) -> Option<&str> {
        Some(&self.name.namespace)
    }
}

/// Prints the backends of one service, or of all.
///
/// # Errors
///
/// Fails if the maps cannot be read, or labels are asked for and cannot be.
pub(super) fn run(
    places: &Places,
    service: Option<&str>,
    names: &NamesArgs,
    list: &ListArgs,
) -> anyhow::Result<Outcome> {
    let chosen = list.chosen(places, names, service)?;
    list.list(|| {
        let view = View::read(&places.pin_path)?;
        Ok(backends(&view, &chosen.names, |name| chosen.takes(name)))
    })
}
