//! Reports problems with objects as Kubernetes Events, here as plain data.
//!
//! Every node sees the same objects, and so finds the same problems. No node is elected to report
//! them: an Event's name is a hash of what it says ([`ObjectEvent::event_name`]). The first node
//! writes the Event, and the API server refuses the others' because it exists. The name of an Event
//! about one node alone includes the node.
//!
//! The API server forgets Events, by default after an hour. So what still holds is written again a
//! little later than that. A token bucket bounds all writes. It is a task of its own: nothing else
//! waits for the API server.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use sluice_core::model::object::ObjectName;
use sluice_core::model::report::{Flaw, Level, Report, Subject};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::daemon::failures::FailingServices;
use crate::daemon::health::{Failure, Failures};

/// A problem is reported only after it has lasted this long: objects that belong together arrive
/// one after another.
const SETTLE: Duration = Duration::from_secs(2);
/// The first attempts of the nodes are spread over this time.
const SPREAD: Duration = Duration::from_secs(8);
/// The age at which an Event that still holds is written again: a little after the API server has
/// forgotten it by default.
const AGAIN: Duration = Duration::from_mins(65);
/// The same for notices: most nodes may see them in a healthy cluster.
const NOTICE_AGAIN: Duration = Duration::from_hours(24);
/// The later attempts of the nodes are spread over this time.
const AGAIN_SPREAD: Duration = Duration::from_mins(10);
/// The time after which a failed attempt is repeated.
const RETRY: Duration = Duration::from_mins(15);
/// The attempts that may follow each other immediately. After that there is one per [`REFILL`]. An
/// attempt is a list of one object and a create.
const BURST: u32 = 20;
/// The time in which the bucket gets one more attempt.
const REFILL: Duration = Duration::from_secs(30);
/// The time that an attempt may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A Service has an Event only after it has been failing for this long.
const FAILING_MIN: Duration = Duration::from_secs(30);
/// The reason of that Event (type Warning).
const FAILING_REASON: &str = "EndpointsUnreachable";
/// The longest note of an Event, in bytes (`events.k8s.io/v1`).
const NOTE_MAX: usize = 1024;
/// The longest part of an Event's name that comes from the object; the whole may have 253 bytes.
const NAME_MAX: usize = 220;

/// A finding about an object. It is a key: each finding has one Event.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Whether it is only a notice. Problems are ordered first.
    pub is_notice: bool,
    /// The object's kind, as in a manifest.
    pub kind: String,
    /// The object.
    pub name: ObjectName,
    /// The Event's reason.
    pub reason: &'static str,
    /// The fields that it is about.
    pub fields: Vec<String>,
    /// Whether it concerns only one node, so that each node reports its own.
    pub is_of_node: bool,
}

/// A finding with its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectEvent {
    /// The finding.
    pub finding: Finding,
    /// The text for people, of at most 1024 bytes.
    pub note: String,
}

impl ObjectEvent {
    /// Returns the name of the Event. It is the same on every node, unless the finding concerns
    /// only one.
    pub fn event_name(&self, uid: &str, node: &str) -> String {
        let Finding { name, reason, fields, is_of_node, .. } = &self.finding;
        let node = if *is_of_node { node } else { "" };
        let parts = [uid, reason, node].into_iter().chain(fields.iter().map(String::as_str));
        let object = cut(&name.name, NAME_MAX).trim_end_matches(['-', '.']);
        format!("{object}.{:016x}", fingerprint(parts))
    }
}

/// All present findings, with their texts.
pub type ObjectEvents = BTreeMap<Finding, String>;

/// Collects the findings: problems of objects, policies that leave no endpoint, health checks that
/// are not answered, and Services that nobody reaches.
pub(crate) fn gather<'a>(
    node: &str,
    reports: impl Iterator<Item = &'a Report>,
    failures: &Failures,
    failing: &FailingServices,
) -> ObjectEvents {
    let mut notes: BTreeMap<(&Subject, Flaw), Vec<(&str, &str)>> = BTreeMap::new();
    for report in reports.filter(|report| deserves_event(report.note.flaw)) {
        let of_flaw = notes.entry((&report.subject, report.note.flaw)).or_default();
        of_flaw.push((&report.note.field, &report.note.message));
    }
    let mut all = ObjectEvents::new();
    for ((subject, flaw), mut notes) in notes {
        let Subject::Object { kind, name } = subject else { continue };
        notes.sort_unstable();
        notes.dedup();
        let texts: Vec<String> = notes
            .iter()
            .map(|(field, message)| {
                if field.is_empty() { (*message).to_owned() } else { format!("{field}: {message}") }
            })
            .collect();
        let place = if is_nodes_view(flaw) { format!("on node {node}: ") } else { String::new() };
        let finding = Finding {
            is_notice: flaw.level() == Level::Notice,
            kind: kind.clone(),
            name: name.clone(),
            reason: flaw.reason(),
            fields: notes.iter().map(|(field, _)| (*field).to_owned()).collect(),
            is_of_node: false,
        };
        let _ =
            all.insert(finding, cut(&format!("{place}{}", texts.join("; ")), NOTE_MAX).to_owned());
    }
    for (service, failure) in failures {
        let finding = Finding {
            is_notice: false,
            kind: "Service".to_owned(),
            name: service.clone(),
            reason: Failure::EVENT_REASON,
            fields: Vec::new(),
            is_of_node: true,
        };
        let _ =
            all.insert(finding, cut(&format!("on node {node}: {failure}"), NOTE_MAX).to_owned());
    }
    add_failing(node, failing, &mut all);
    all
}

/// Adds the Services that have been failing for a while. Every node that has clients of such a
/// Service sees the same, so there is one Event for the whole cluster, and while it lasts it is
/// written again only once a day.
fn add_failing(node: &str, failing: &FailingServices, all: &mut ObjectEvents) {
    for (port, failing) in failing {
        if failing.since.elapsed().is_ok_and(|time| time < FAILING_MIN) {
            continue;
        }
        let finding = Finding {
            is_notice: true,
            kind: "Service".to_owned(),
            name: ObjectName::new(&port.namespace, &port.service),
            reason: FAILING_REASON,
            fields: vec![format!("port {}", port.port)],
            is_of_node: false,
        };
        let note = format!("on node {node}, port {}: {}", port.port, failing.message);
        let _ = all.insert(finding, cut(&note, NOTE_MAX).to_owned());
    }
}

/// Whether a flaw deserves an Event: all problems do, and of the notices those that drop packets,
/// admit unintended clients, or may send packets where nobody wants them.
fn deserves_event(flaw: Flaw) -> bool {
    flaw.level() == Level::Problem
        || matches!(
            flaw,
            Flaw::NoLocalEndpoint
                | Flaw::OpenToAll
                | Flaw::StaleMirror
                | Flaw::SurplusAddresses
                | Flaw::ShadowsHealthCheck
        )
}

/// Whether a flaw depends on the node as well as on the object. The Event then says which node has
/// reported it.
fn is_nodes_view(flaw: Flaw) -> bool {
    matches!(flaw, Flaw::NoLocalEndpoint | Flaw::NoRoom | Flaw::TooManyEndpoints)
}

/// Returns the beginning of a text, of at most so many bytes.
fn cut(text: &str, max: usize) -> &str {
    text.get(..text.floor_char_boundary(max)).unwrap_or(text)
}

/// Returns the 64-bit FNV-1a hash. The names of Events must be the same in every release.
fn fingerprint<'a>(parts: impl Iterator<Item = &'a str>) -> u64 {
    // No part contains the byte 0xff, so none runs into the next.
    parts.flat_map(|part| part.bytes().chain([0xff])).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The outcome of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The Event is written.
    Written,
    /// Another node, or an earlier agent, has written the Event.
    Exists,
    /// The API server does not have the object: it comes from a manifest, or is gone.
    NoObject,
    /// The Event could not be written, and why.
    Failed(String),
}

/// A writer of Events.
pub trait EventWriter: Send + Sync + 'static {
    /// Writes an Event.
    fn write(&self, object_event: &ObjectEvent) -> impl Future<Output = Outcome> + Send;
}

/// The next action.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Write this now.
    Write(Finding),
    /// Wait until then.
    Wait(Instant),
    /// Do nothing until something changes.
    Rest,
}

/// The known facts about a finding.
#[derive(Debug)]
struct Known {
    due: Instant,
    tried: bool,
}

/// Decides when findings are written. Holds the present findings, and past ones that were tried and
/// are not due again.
#[derive(Debug)]
struct Schedule {
    node: String,
    known: BTreeMap<Finding, Known>,
    tries: u32,
    /// The time since which the bucket fills.
    refilled: Instant,
}

impl Schedule {
    fn new(node: &str, now: Instant) -> Self {
        Self { node: node.to_owned(), known: BTreeMap::new(), tries: BURST, refilled: now }
    }

    /// Returns a share of a duration that depends on this node and the finding.
    fn share(&self, finding: &Finding, of: Duration) -> Duration {
        let Finding { kind, name, reason, .. } = finding;
        let hash =
            fingerprint([&*self.node, kind, &name.namespace, &name.name, reason].into_iter());
        of.mul_f64(f64::from((hash >> 32) as u32) / f64::from(u32::MAX))
    }

    /// Returns what to write, or when to ask again.
    fn next(&mut self, now: Instant, present: &ObjectEvents) -> Next {
        // A finding that was tried stays known until it would be due again. So one that comes and
        // goes is not written each time.
        self.known.retain(|finding, known| {
            present.contains_key(finding) || (known.tried && known.due > now)
        });
        for finding in present.keys() {
            if !self.known.contains_key(finding) {
                let due = now + SETTLE + self.share(finding, SPREAD);
                let _ = self.known.insert(finding.clone(), Known { due, tried: false });
            }
        }
        while self.tries < BURST && self.refilled + REFILL <= now {
            self.tries += 1;
            self.refilled += REFILL;
        }
        let waiting = self.known.iter().filter(|(finding, _)| present.contains_key(*finding));
        // Problems come first in the order of keys.
        if let Some((finding, _)) = waiting.clone().find(|(_, known)| known.due <= now) {
            if self.tries == 0 {
                return Next::Wait(self.refilled + REFILL);
            }
            return Next::Write(finding.clone());
        }
        waiting.map(|(_, known)| known.due).min().map_or(Next::Rest, Next::Wait)
    }

    /// Records the outcome of an attempt.
    fn tried(&mut self, now: Instant, finding: &Finding, outcome: &Outcome) {
        if self.tries == BURST {
            self.refilled = now;
        }
        self.tries = self.tries.saturating_sub(1);
        let wait = match outcome {
            Outcome::Written | Outcome::Exists | Outcome::NoObject => {
                let again = if finding.is_notice { NOTICE_AGAIN } else { AGAIN };
                again + self.share(finding, AGAIN_SPREAD)
            }
            Outcome::Failed(_) => RETRY,
        };
        let _ = self.known.insert(finding.clone(), Known { due: now + wait, tried: true });
    }
}

/// Writes Events until the sender is gone. Events that cannot be written are dropped. The log
/// mentions that once, at debug level.
pub async fn serve(
    node: String,
    writer: impl EventWriter,
    mut present: watch::Receiver<Arc<ObjectEvents>>,
) {
    let mut schedule = Schedule::new(&node, Instant::now());
    let mut logged = false;
    loop {
        let now = present.borrow_and_update().clone();
        let deadline = match schedule.next(Instant::now(), &now) {
            Next::Write(finding) => {
                let note = now.get(&finding).cloned().unwrap_or_default();
                let object_event = ObjectEvent { finding, note };
                let outcome = tokio::time::timeout(TIMEOUT, writer.write(&object_event))
                    .await
                    .unwrap_or_else(|_| {
                        Outcome::Failed(format!("no answer in {} s", TIMEOUT.as_secs()))
                    });
                if let Outcome::Failed(why) = &outcome
                    && !std::mem::replace(&mut logged, true)
                {
                    tracing::debug!(
                        "cannot write an Event: {why}; `sluice status` shows the same problems"
                    );
                }
                schedule.tried(Instant::now(), &object_event.finding, &outcome);
                Some(Instant::now())
            }
            Next::Wait(until) => Some(until),
            Next::Rest => None,
        };
        tokio::select! {
            biased;
            changed = present.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {}
        }
    }
}

#[cfg(test)]
mod tests;
