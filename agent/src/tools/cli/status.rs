//! `sluice status`: the state of the node, from the agent's status and from the maps.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{anyhow, bail};
use schemars::JsonSchema;
use serde::Serialize;
use sluice_common::Reason;

use super::output::Output;
use super::table::{Mood, Style, Table, Text as Cell, age, cut, prose, whole};
use super::takeover::words;
use super::{Outcome, Places};
use crate::daemon::takeover::RELEASED;
use crate::node::dataplane::Fill;
use crate::node::devices::Role;
use crate::node::status::{
    self, Counts, DeviceStatus, DriftStatus, PolicyStatus, ReportStatus, Status, TakeoverStatus,
    unix_seconds,
};
use crate::node::view::{PortName, View};
use crate::tools::api::kinds;
use crate::tools::units::percent;

/// Everything that `sluice status` prints.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Overview {
    /// Whether the agent runs, and everything is in place.
    ready: bool,
    /// Where maps and links are pinned.
    pin_path: PathBuf,
    agent: AgentView,
    /// The agent's last status; absent if no agent ever ran here.
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<Status>,
    counts: Counts,
    devices: Vec<DeviceStatus>,
    reasons: Vec<ReasonView>,
    maps: Vec<Fill>,
}

kinds! { Overview = "Status"; }

/// The agent's process.
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct AgentView {
    alive: bool,
    pid: Option<u32>,
    version: Option<String>,
    uptime_seconds: Option<u64>,
}

/// A reason that has been counted.
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct ReasonView {
    reason: &'static str,
    packets: u64,
    bytes: u64,
    sentence: &'static str,
    /// The service with the most of them; absent if no service is concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    most: Option<PortName>,
}

/// Prints the status. The exit code is 0 if the node is ready.
///
/// # Errors
///
/// Fails if the node is released, nothing is pinned, or the maps cannot be read.
pub(super) fn run(places: &Places, output: &Output) -> anyhow::Result<Outcome> {
    let Places { pin_path, state_dir, .. } = places;
    let (alive, running) = (status::is_alive(state_dir), status::of_living(state_dir));
    let last = running.clone().or_else(|| status::read(state_dir));
    if last.as_ref().is_some_and(|status| status.takeover.phase == RELEASED) {
        bail!("this node is released: run `sluice takeover` to attach Sluice again");
    }
    let view = View::read(pin_path).map_err(|error| match &running {
        Some(status) if !status.waiting_for.is_empty() => {
            anyhow!("{error:#}\n\nThe agent waits for {}", status.waiting_for.join("\nand for "))
        }
        Some(_) | None => error,
    })?;
    let now = unix_seconds(SystemTime::now());
    let overview = Overview {
        ready: running.as_ref().is_some_and(|status| status.ready),
        pin_path: pin_path.clone(),
        agent: AgentView {
            alive,
            pid: running.as_ref().map(|status| status.pid),
            version: running.as_ref().map(|status| status.version.clone()),
            uptime_seconds: running.as_ref().map(|status| now.saturating_sub(status.started)),
        },
        counts: Counts {
            frontends: view.image.v4.services.len() + view.image.v6.services.len(),
            service_ports: view.image.names.len(),
            backends: view.backends().iter().filter(|backend| backend.serving).count(),
        },
        devices: devices(&view, last.as_ref())?,
        reasons: reasons(&view)?,
        maps: view.kernel.maps().fill(&view.image)?,
        last,
    };
    let text = output.object(&overview, |overview, style| text(overview, now, style))?;
    Ok(Outcome { text, code: u8::from(!overview.ready) })
}

/// Returns the devices in the map, each with the agent's last status of it.
fn devices(view: &View, last: Option<&Status>) -> anyhow::Result<Vec<DeviceStatus>> {
    let known = last.map_or(&[][..], |status| status.devices.as_slice());
    let entries = view.kernel.maps().device_entries()?;
    let device = |(index, entry): (u32, sluice_common::abi::Device)| {
        let known = known.iter().find(|device| device.index == index).cloned();
        known.or_else(|| {
            let role = Role::from_number(entry.role)?;
            let (name, hooks, notes) = (format!("ifindex {index}"), Vec::new(), Vec::new());
            Some(DeviceStatus { index, name, role, hooks, problem: None, notes })
        })
    };
    Ok(entries.into_iter().filter_map(device).collect())
}

fn reasons(view: &View) -> anyhow::Result<Vec<ReasonView>> {
    let counters = view.kernel.maps().reason_counters()?;
    let mut reasons = Vec::new();
    for reason in Reason::ALL {
        let counted: Vec<_> =
            counters.iter().filter(|(key, _)| key.reason == *reason as u32).collect();
        let packets: u64 = counted.iter().map(|(_, counters)| counters.packets).sum();
        if packets == 0 {
            continue;
        }
        let most = counted.iter().max_by_key(|(_, counters)| counters.packets);
        reasons.push(ReasonView {
            reason: reason.as_str(),
            packets,
            bytes: counted.iter().map(|(_, counters)| counters.bytes).sum(),
            sentence: reason.sentence().trim(),
            most: most.and_then(|(key, _)| view.name(key.service_port)),
        });
    }
    Ok(reasons)
}

fn text(overview: &Overview, now: u64, style: Style) -> String {
    let mut text =
        Text { written: String::new(), style, lines: Table::new(&[whole(""), prose("")]) };
    let last = overview.last.as_ref();
    text.line("Node", last.map_or("unknown", |status| &status.node));
    text.line("Ready", if overview.ready { "yes" } else { "no" });
    text.line("Agent", &agent(&overview.agent, last));
    if overview.agent.alive {
        for reason in last.iter().flat_map(|status| &status.waiting_for) {
            text.line("Waiting", reason);
        }
    }
    text.line("Pins", &overview.pin_path.display().to_string());
    if let Some(status) = last {
        text.inputs(status);
        text.work(status, now);
    }
    let Counts { frontends, service_ports, backends } = overview.counts;
    text.line(
        "Holds",
        &format!("{frontends} frontends, {service_ports} service ports, {backends} backends"),
    );
    text.end_lines();
    text.section("Devices", &overview.devices, devices_table);
    text.section("Reasons", &overview.reasons, reasons_table);
    text.section("Maps", &overview.maps, maps_table);
    let reports = last.map_or(&[][..], |status| status.reports.as_slice());
    text.section("Problems", reports, |reports| problems_table(reports, now));
    text.written
}

/// Describes the agent's process.
fn agent(agent: &AgentView, last: Option<&Status>) -> String {
    match (agent, last) {
        (AgentView { alive: true, pid: Some(pid), version, uptime_seconds, .. }, _) => format!(
            "running, pid {pid}, version {}, for {}",
            version.as_deref().unwrap_or("?"),
            age(uptime_seconds.unwrap_or_default())
        ),
        (AgentView { alive: true, .. }, _) => "starting".to_owned(),
        (_, Some(status)) => {
            format!("not running (last: pid {}); pinned programs continue to serve", status.pid)
        }
        (_, None) => "not running; pinned programs continue to serve".to_owned(),
    }
}

/// The text of a status, as it grows.
struct Text {
    written: String,
    style: Style,
    /// The lines above all sections.
    lines: Table,
}

impl Text {
    fn line(&mut self, head: &str, body: &str) {
        self.lines.row([format!("{head}:"), body.to_owned()]);
    }

    /// Adds the lines, wrapped at words.
    fn end_lines(&mut self) {
        self.written += &self.lines.text(Style { headers: false, ..self.style });
    }

    /// Adds where objects come from, and the policies for traffic.
    fn inputs(&mut self, status: &Status) {
        for source in &status.sources {
            let state = match (&source.problem, source.synced) {
                (Some(problem), _) => problem.clone(),
                (None, true) => "synced".to_owned(),
                (None, false) => "waiting for the first full list".to_owned(),
            };
            self.line("Source", &format!("{} {}: {state}", source.name, source.from));
        }
        let path = &status.socket_path;
        let cgroup = path.cgroup.as_ref().map(|cgroup| format!(" at {}", cgroup.display()));
        let problem = path.problem.as_ref().map(|problem| format!(": {problem}"));
        self.line(
            "Sockets",
            &format!("{}{}{}", path.mode, cgroup.unwrap_or_default(), problem.unwrap_or_default()),
        );
        if !status.policy.masquerade.is_empty() {
            self.policy(&status.policy);
        }
    }

    fn policy(&mut self, policy: &PolicyStatus) {
        let words = |addresses: &[IpAddr], none: &str| {
            let words: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            if words.is_empty() { none.to_owned() } else { words.join(", ") }
        };
        self.line(
            "Masquerade",
            &format!(
                "{}, as {} where a device has no address of its own",
                policy.masquerade,
                words(&policy.primary, "nothing")
            ),
        );
        self.line("Local pods", &policy.detect_local);
        let serving = words(&policy.serving, "nowhere");
        self.line("Node ports", &format!("{}: {serving}", policy.nodeport_addresses));
        if !policy.left_alone.is_empty() {
            self.line("Left alone", &words(&policy.left_alone, ""));
        }
        if !policy.accelerate.is_empty() {
            self.line("Accelerate", &policy.accelerate);
        }
    }

    /// Adds what the agent is doing, and what keeps it from it.
    fn work(&mut self, status: &Status, now: u64) {
        if status.takeover != serving() {
            self.line("Takeover", &words(&status.takeover));
        }
        if let Some(sync) = status.last_sync {
            let ago = age(now.saturating_sub(sync.at));
            let took = Duration::from_micros(sync.took_us);
            self.line("Last sync", &format!("{ago} ago, {} writes in {took:.1?}", sync.writes));
        }
        if let Some(failing) = &status.failing {
            self.line("Failing", failing);
        }
        for problem in &status.problems {
            self.line("Problem", problem);
        }
        for DriftStatus { what, place, found, times, at, problem } in &status.drift {
            let ago = age(now.saturating_sub(*at));
            let end = match problem {
                None => format!("repaired {ago} ago"),
                Some(problem) => format!("not repaired, since {ago}: {problem}"),
            };
            let times = if *times > 1 { format!(", {times} times") } else { String::new() };
            self.line("Drift", &format!("{what} {place}: {found}; {end}{times}"));
        }
    }

    /// Adds a table under a title, or "none" if it has no rows.
    fn section<T>(&mut self, title: &str, rows: &[T], table: impl FnOnce(&[T]) -> Table) {
        let body = if rows.is_empty() { "none\n".to_owned() } else { table(rows).text(self.style) };
        // Writing to a string cannot fail.
        let _ = write!(self.written, "\n{title}\n{body}");
    }
}

fn devices_table(devices: &[DeviceStatus]) -> Table {
    let mut table = Table::new(&[whole("DEVICE"), whole("ROLE"), cut("HOOKS"), prose("NOTE")]);
    for device in devices {
        let hooks: Vec<&str> = device.hooks.iter().map(|hook| hook.word()).collect();
        let notes: Vec<&str> =
            device.problem.iter().chain(&device.notes).map(String::as_str).collect();
        table.row([
            Cell::from(device.name.as_str()),
            device.role.word().into(),
            hooks.join(",").into(),
            Cell::new(notes.join("; "), device.problem.as_ref().map(|_| Mood::Bad)),
        ]);
    }
    table
}

fn reasons_table(reasons: &[ReasonView]) -> Table {
    let mut table = Table::new(&[whole("REASON"), whole("PACKETS"), cut("MOST"), prose("MEANING")]);
    for reason in reasons {
        let most = reason.most.as_ref().map(PortName::service);
        let cells =
            [reason.reason.to_owned(), reason.packets.to_string(), most.unwrap_or_default()];
        table.row(cells.into_iter().chain([reason.sentence.to_owned()]));
    }
    table
}

fn maps_table(maps: &[Fill]) -> Table {
    let mut table = Table::new(&[whole("MAP"), whole("ENTRIES"), whole("MAX"), whole("FULL")]);
    for fill in maps {
        table.row([
            Cell::from(fill.map),
            fill.entries.to_string().into(),
            fill.max.to_string().into(),
            full(percent(fill.entries, fill.max)),
        ]);
    }
    table
}

fn problems_table(reports: &[ReportStatus], now: u64) -> Table {
    let mut table =
        Table::new(&[cut("OBJECT"), whole("FLAW"), cut("FIELD"), whole("SINCE"), prose("MESSAGE")]);
    for report in reports {
        table.row([
            report.subject.clone(),
            report.flaw.clone(),
            report.field.clone(),
            age(now.saturating_sub(report.since)),
            report.message.clone(),
        ]);
    }
    table
}

/// Returns how full a map is.
fn full(percent: f64) -> Cell {
    let mood = match percent {
        95.0.. => Some(Mood::Bad),
        80.0.. => Some(Mood::Warning),
        _ => None,
    };
    Cell::new(format!("{percent:.1}%"), mood)
}

/// Returns the takeover's status if there is nothing to take over or to release.
fn serving() -> TakeoverStatus {
    TakeoverStatus { phase: "serving".to_owned(), ..TakeoverStatus::default() }
}
