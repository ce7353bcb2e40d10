//! `sluice services`: every service port with its VIPs and counters.

use super::names::NamesArgs;
use super::output::{Item, ListArgs};
use super::table::{Column, Mood, Text, bytes, cut, failures, whole, wide};
use super::{Outcome, Places};
use crate::node::view::View;
use crate::tools::api::{Service, services};

impl Item for Service {
    const COLUMNS: &'static [Column] = &[
        cut("NAMESPACE"),
        cut("NAME"),
        whole("PORT"),
        cut("VIPS"),
        whole("BACKENDS"),
        whole("OPENED"),
        whole("FAILED"),
        whole("BYTES"),
        wide("PROTO"),
        wide("KIND"),
        wide("ID"),
        wide("SLOTS"),
        wide("FLOWS"),
        wide("CALLS"),
        wide("PACKETS"),
    ];

    fn cells(&self, is_wide: bool) -> Vec<Text> {
        let vips = match &self.vips[..] {
            [first, more @ ..] if !is_wide && !more.is_empty() => {
                format!("{first},+{}", more.len())
            }
            all => all.join(","),
        };
        let failed = self.failures.flows() + self.failed;
        vec![
            self.name.namespace.clone().into(),
            self.name.service.clone().into(),
            self.name.port.to_string().into(),
            vips.into(),
            Text::new(self.backends.to_string(), (self.backends == 0).then_some(Mood::Warning)),
            (self.flows + self.connections).to_string().into(),
            failures(failed, self.flows + self.connections + self.failed),
            bytes(self.bytes + self.socket_bytes).into(),
            self.name.protocol.clone().into(),
            self.kinds.join(",").into(),
            self.id.to_string().into(),
            self.slots.to_string().into(),
            self.flows.to_string().into(),
            self.calls.to_string().into(),
            self.packets.to_string().into(),
        ]
    }

    fn name(&self) -> String {
        format!("service/{}", self.name)
    }

    fn key(&self) -> String {
        // A service port has an id in each address family.
        self.id.to_string()
    }

    fn namespace(&self) -> Option<&str> {
        Some(&self.name.namespace)
    }
}

/// Prints the service ports.
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
    list.list(|| Ok(services(&View::read(&places.pin_path)?, |name| chosen.takes(name))))
}
