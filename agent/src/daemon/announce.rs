//! What is wrong with objects, told beside them: Kubernetes Events, as plain data.
//!
//! Every node sees the same objects and so finds the same flaws in them. None is elected to tell:
//! an Event's name is made of what it says ([`Announcement::event_name`]), so the node that comes
//! first writes it, and to the others the API server answers that it exists. What concerns one node
//! alone has the node in its name.
//!
//! The API server forgets Events (after an hour, unless it is set otherwise), so what still holds
//! is written again after a little more than that. A bucket of tries bounds all of it. It is a task
//! of its own: nothing else waits for an answer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use sluice_core::model::object::ObjectName;
use sluice_core::model::report::{Flaw, Level, Report, Subject};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::daemon::health::{Failure, Failures};

/// What has not lasted so long is not told: objects that belong together come one after another.
const SETTLE: Duration = Duration::from_secs(2);
/// The nodes' first tries are spread over so long.
const SPREAD: Duration = Duration::from_secs(8);
/// When what still holds is tried again: a little after the API server has forgotten it by default.
const AGAIN: Duration = Duration::from_mins(65);
/// The same for what is only worth knowing: most nodes may see it in a cluster where all is well.
const NOTICE_AGAIN: Duration = Duration::from_hours(24);
/// The nodes' later tries are spread over so long.
const AGAIN_SPREAD: Duration = Duration::from_mins(10);
/// When what could not be written is tried again.
const RETRY: Duration = Duration::from_mins(15);
/// Tries that may follow each other at once; then one in [`REFILL`]. A try is a list of one object
/// and a create.
const BURST: u32 = 20;
/// How long one try more takes.
const REFILL: Duration = Duration::from_secs(30);
/// How long a try may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The longest note of an Event, in bytes (`events.k8s.io/v1`).
const NOTE_MAX: usize = 1024;
/// The longest part of an Event's name that is the object's; the whole may have 253 bytes.
const NAME_MAX: usize = 220;

/// What is to be told of an object, as a key: one Event each.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Whether it is only worth knowing: what is wrong comes first.
    pub is_notice: bool,
    /// The object's kind, as in a manifest.
    pub kind: String,
    /// The object.
    pub name: ObjectName,
    /// The Event's reason.
    pub reason: &'static str,
    /// The fields that it concerns.
    pub fields: Vec<String>,
    /// Whether it concerns one node alone, so that each tells its own.
    pub is_of_node: bool,
}

/// What is to be told, with its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// What is to be told.
    pub finding: Finding,
    /// For people; at most 1024 bytes.
    pub note: String,
}

impl Announcement {
    /// The name of the Event: the same on every node, unless it concerns one alone.
    pub fn event_name(&self, uid: &str, node: &str) -> String {
        let Finding { name, reason, fields, is_of_node, .. } = &self.finding;
        let node = if *is_of_node { node } else { "" };
        let parts = [uid, reason, node].into_iter().chain(fields.iter().map(String::as_str));
        let object = cut(&name.name, NAME_MAX).trim_end_matches(['-', '.']);
        format!("{object}.{:016x}", fingerprint(parts))
    }
}

/// All that is to be told now.
pub type Announcements = BTreeMap<Finding, String>;

/// Gathers what is to be told: problems of objects, policies that leave no endpoint, and health
/// checks that are not answered.
pub fn gather<'a>(
    node: &str,
    reports: impl Iterator<Item = &'a Report>,
    failures: &Failures,
) -> Announcements {
    let mut notes: BTreeMap<(&Subject, Flaw), Vec<(&str, &str)>> = BTreeMap::new();
    for report in reports.filter(|report| is_told(report.note.flaw)) {
        let of_flaw = notes.entry((&report.subject, report.note.flaw)).or_default();
        of_flaw.push((&report.note.field, &report.note.message));
    }
    let mut all = Announcements::new();
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
    all
}

/// Whether a flaw is worth an Event: all that is wrong, and of the rest what drops packets, lets in
/// whom it should not, or sends packets where nobody may want them.
fn is_told(flaw: Flaw) -> bool {
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

/// Whether a flaw is the object's together with the node that met it: the first to tell says which
/// it is.
fn is_nodes_view(flaw: Flaw) -> bool {
    matches!(flaw, Flaw::NoLocalEndpoint | Flaw::NoRoom | Flaw::TooManyEndpoints)
}

/// The beginning of a text, of at most so many bytes.
fn cut(text: &str, max: usize) -> &str {
    text.get(..text.floor_char_boundary(max)).unwrap_or(text)
}

/// FNV-1a of 64 bits: the same in every release, as names of Events must be.
fn fingerprint<'a>(parts: impl Iterator<Item = &'a str>) -> u64 {
    // No part contains a byte 0xff, so none runs into the next.
    parts.flat_map(|part| part.bytes().chain([0xff])).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// What has become of a try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is written.
    Written,
    /// Another node, or an earlier agent, has written it.
    Exists,
    /// The API server does not have the object: it is a manifest's, or gone.
    NoObject,
    /// It could not be written, and why.
    Failed(String),
}

/// Who can write Events.
pub trait Write: Send + std::marker::Sync + 'static {
    /// Writes one.
    fn write(&self, announcement: &Announcement) -> impl Future<Output = Outcome> + Send;
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Tell this now.
    Tell(Finding),
    /// Nothing before then.
    Wait(Instant),
    /// Nothing, unless something changes.
    Rest,
}

/// What is known of a finding.
#[derive(Debug)]
struct Known {
    due: Instant,
    tried: bool,
}

/// Decides what is told when. Holds what there is, and of what is gone that which was tried and
/// would not be due again.
#[derive(Debug)]
struct Teller {
    node: String,
    known: BTreeMap<Finding, Known>,
    tries: u32,
    /// Since when the bucket fills.
    refilled: Instant,
}

impl Teller {
    fn new(node: &str, now: Instant) -> Self {
        Self { node: node.to_owned(), known: BTreeMap::new(), tries: BURST, refilled: now }
    }

    /// A part of a time, of this node's own for each finding.
    fn share(&self, finding: &Finding, of: Duration) -> Duration {
        let Finding { kind, name, reason, .. } = finding;
        let hash =
            fingerprint([&*self.node, kind, &name.namespace, &name.name, reason].into_iter());
        of.mul_f64(f64::from((hash >> 32) as u32) / f64::from(u32::MAX))
    }

    /// What is to be told, or when to ask again.
    fn next(&mut self, now: Instant, present: &Announcements) -> Next {
        // Tried ones stay known until they would be due again: what comes and goes is not told each
        // time.
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
        // Problems come first, being less as keys.
        if let Some((finding, _)) = waiting.clone().find(|(_, known)| known.due <= now) {
            if self.tries == 0 {
                return Next::Wait(self.refilled + REFILL);
            }
            return Next::Tell(finding.clone());
        }
        waiting.map(|(_, known)| known.due).min().map_or(Next::Rest, Next::Wait)
    }

    /// Notes that a finding was tried, and with what outcome.
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

/// Tells what there is to tell until the sender is gone. What cannot be written is dropped; the log
/// has it once, at debug.
pub async fn serve(
    node: String,
    writer: impl Write,
    mut present: watch::Receiver<Arc<Announcements>>,
) {
    let mut teller = Teller::new(&node, Instant::now());
    let mut logged = false;
    loop {
        let now = present.borrow_and_update().clone();
        let deadline = match teller.next(Instant::now(), &now) {
            Next::Tell(finding) => {
                let note = now.get(&finding).cloned().unwrap_or_default();
                let announcement = Announcement { finding, note };
                let outcome = tokio::time::timeout(TIMEOUT, writer.write(&announcement))
                    .await
                    .unwrap_or_else(|_| {
                        Outcome::Failed(format!("no answer in {} s", TIMEOUT.as_secs()))
                    });
                if let Outcome::Failed(why) = &outcome
                    && !std::mem::replace(&mut logged, true)
                {
                    tracing::debug!(
                        "an Event could not be written: {why}; `sluice status` tells the same"
                    );
                }
                teller.tried(Instant::now(), &announcement.finding, &outcome);
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
