//! `sluice status`: how the node is, from the agent's last word and from the maps themselves.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::bail;
use serde::Serialize;
use sluice_common::Reason;

use super::table::{Format, Table, age, percent, render};
use super::takeover::words;
use crate::daemon::takeover::RELEASED;
use crate::node::dataplane::Fill;
use crate::node::devices::Role;
use crate::node::status::{self, Counts, DeviceStatus, Status, TakeoverStatus, unix_seconds};
use crate::node::view::{PortName, View};

/// Everything that `sluice status` tells.
#[derive(Clone, Debug, Serialize)]
struct Overview {
    ready: bool,
    pin_path: PathBuf,
    agent: AgentView,
    /// What the agent last told about itself; absent if it never ran here.
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<Status>,
    counts: Counts,
    devices: Vec<DeviceStatus>,
    reasons: Vec<ReasonView>,
    maps: Vec<Fill>,
}

#[derive(Clone, Debug, Serialize)]
struct AgentView {
    alive: bool,
    pid: Option<u32>,
    version: Option<String>,
    uptime_seconds: Option<u64>,
}

/// A reason with something counted.
#[derive(Clone, Debug, Serialize)]
struct ReasonView {
    reason: &'static str,
    packets: u64,
    bytes: u64,
    sentence: &'static str,
    /// The service with most of them; absent where no service is concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    most: Option<PortName>,
}

/// Prints the status; the flag says whether the node is ready.
///
/// # Errors
///
/// When nothing is pinned, or the maps cannot be read.
pub(super) fn run(
    pin_path: &Path,
    state_dir: &Path,
    format: Format,
) -> anyhow::Result<(String, bool)> {
    let (alive, running) = (status::is_alive(state_dir), status::of_living(state_dir));
    let last = running.clone().or_else(|| status::read(state_dir));
    if last.as_ref().is_some_and(|status| status.takeover.phase == RELEASED) {
        bail!("this node is released: nothing of Sluice is attached until `sluice takeover`");
    }
    let view = View::read(pin_path)?;
    let now = unix_seconds(SystemTime::now());
    let overview = Overview {
        ready: running.as_ref().is_some_and(|status| status.ready),
        pin_path: pin_path.to_owned(),
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
    Ok((render(format, &overview, |overview| text(overview, now))?, overview.ready))
}

/// The devices in the map, with what the agent last told about each.
fn devices(view: &View, last: Option<&Status>) -> anyhow::Result<Vec<DeviceStatus>> {
    let told = last.map_or(&[][..], |status| status.devices.as_slice());
    let entries = view.kernel.maps().device_entries()?;
    let device = |(index, entry): (u32, sluice_common::abi::Device)| {
        let told = told.iter().find(|device| device.index == index).cloned();
        told.or_else(|| {
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

fn text(overview: &Overview, now: u64) -> String {
    let mut text = String::new();
    let mut line = |head: &str, body: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{:<12}{body}", format!("{head}:"));
    };
    let last = overview.last.as_ref();
    line("Node", last.map_or_else(|| "unknown".to_owned(), |status| status.node.clone()));
    line("Ready", if overview.ready { "yes" } else { "no" }.to_owned());
    line(
        "Agent",
        match (&overview.agent, last) {
            (AgentView { alive: true, pid: Some(pid), version, uptime_seconds, .. }, _) => format!(
                "running, pid {pid}, version {}, for {}",
                version.as_deref().unwrap_or("?"),
                age(uptime_seconds.unwrap_or_default())
            ),
            (AgentView { alive: true, .. }, _) => "starting".to_owned(),
            (_, Some(status)) => {
                format!("not running (last: pid {}); packets flow on by what is pinned", status.pid)
            }
            (_, None) => "not running; packets flow on by what is pinned".to_owned(),
        },
    );
    for reason in last
        .filter(|_| overview.agent.alive)
        .map_or(&[][..], |status| status.waiting_for.as_slice())
    {
        line("Waiting", reason.clone());
    }
    line("Pins", overview.pin_path.display().to_string());
    for source in last.map_or(&[][..], |status| status.sources.as_slice()) {
        let state = match (&source.problem, source.synced) {
            (Some(problem), _) => problem.clone(),
            (None, true) => "synced".to_owned(),
            (None, false) => "waiting for the first full list".to_owned(),
        };
        line("Source", format!("{} {}: {state}", source.name, source.from));
    }
    if let Some(path) = last.map(|status| &status.socket_path) {
        let cgroup = path
            .cgroup
            .as_ref()
            .map_or(String::new(), |cgroup| format!(" at {}", cgroup.display()));
        let problem = path.problem.as_ref().map_or(String::new(), |problem| format!(": {problem}"));
        line("Sockets", format!("{}{cgroup}{problem}", path.mode));
    }
    if let Some(policy) =
        last.map(|status| &status.policy).filter(|policy| !policy.masquerade.is_empty())
    {
        let words = |addresses: &[IpAddr]| {
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        let shown =
            if policy.primary.is_empty() { "nothing".to_owned() } else { words(&policy.primary) };
        line(
            "Masquerade",
            format!("{}, as {shown} where a device has no address of its own", policy.masquerade),
        );
        line("Local pods", policy.detect_local.clone());
        let serving =
            if policy.serving.is_empty() { "nowhere".to_owned() } else { words(&policy.serving) };
        line("Node ports", format!("{}: {serving}", policy.nodeport_addresses));
        if !policy.left_alone.is_empty() {
            line("Left alone", words(&policy.left_alone));
        }
        if !policy.accelerate.is_empty() {
            line("Accelerate", policy.accelerate.clone());
        }
    }
    let takeover = last.map(|status| &status.takeover);
    if let Some(takeover) = takeover.filter(|takeover| **takeover != serving()) {
        line("Takeover", words(takeover));
    }
    if let Some(sync) = last.and_then(|status| status.last_sync) {
        let (ago, took) = (age(now.saturating_sub(sync.at)), Duration::from_micros(sync.took_us));
        line("Last sync", format!("{ago} ago, {} writes in {took:.1?}", sync.writes));
    }
    if let Some(failing) = last.and_then(|status| status.failing.as_ref()) {
        line("Failing", failing.clone());
    }
    for problem in last.iter().flat_map(|status| &status.problems) {
        line("Problem", problem.clone());
    }
    let Counts { frontends, service_ports, backends } = overview.counts;
    line(
        "Holds",
        format!("{frontends} frontends, {service_ports} service ports, {backends} backends"),
    );

    let mut devices = Table::new(&["DEVICE", "ROLE", "HOOKS", "NOTE"]);
    for device in &overview.devices {
        let hooks: Vec<&str> = device.hooks.iter().map(|hook| hook.word()).collect();
        let notes: Vec<&str> =
            device.problem.iter().chain(&device.notes).map(String::as_str).collect();
        devices.row([
            device.name.clone(),
            device.role.word().to_owned(),
            hooks.join(","),
            notes.join("; "),
        ]);
    }
    section(&mut text, "Devices", &devices, overview.devices.is_empty());

    let mut reasons = Table::new(&["REASON", "PACKETS", "MOST", "MEANING"]);
    for reason in &overview.reasons {
        let most = reason.most.as_ref().map(|name| format!("{}/{}", name.namespace, name.service));
        let cells =
            [reason.reason.to_owned(), reason.packets.to_string(), most.unwrap_or_default()];
        reasons.row(cells.into_iter().chain([reason.sentence.to_owned()]));
    }
    section(&mut text, "Reasons", &reasons, overview.reasons.is_empty());

    let mut maps = Table::new(&["MAP", "ENTRIES", "MAX", "FULL"]);
    for fill in &overview.maps {
        maps.row([
            fill.map.to_owned(),
            fill.entries.to_string(),
            fill.max.to_string(),
            format!("{:.1}%", percent(fill.entries, fill.max)),
        ]);
    }
    section(&mut text, "Maps", &maps, overview.maps.is_empty());

    let reports = last.map_or(&[][..], |status| status.reports.as_slice());
    let mut problems = Table::new(&["OBJECT", "FLAW", "FIELD", "SINCE", "MESSAGE"]);
    for report in reports {
        let since = age(now.saturating_sub(report.since));
        problems.row([
            report.subject.clone(),
            report.flaw.clone(),
            report.field.clone(),
            since,
            report.message.clone(),
        ]);
    }
    section(&mut text, "Problems", &problems, reports.is_empty());
    text
}

/// What is told where there is nothing to take over or to release.
fn serving() -> TakeoverStatus {
    TakeoverStatus { phase: "serving".to_owned(), ..TakeoverStatus::default() }
}

fn section(text: &mut String, title: &str, table: &Table, empty: bool) {
    let body = if empty { "none\n".to_owned() } else { table.text() };
    // Writing to a string cannot fail.
    let _ = write!(text, "\n{title}\n{body}");
}
