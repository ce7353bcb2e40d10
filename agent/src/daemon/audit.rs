//! Records what the audit finds: maps, pins, programs, devices, routes and settings that are no
//! longer as the agent made them.
//!
//! Whoever owns a part of these examines it again and again, repairs what differs, and reports both
//! to [`Drift`]: the loop its maps, the attacher pins, programs and devices, the task of routes its
//! routes. [`Drift`] counts and logs it, and keeps it for the status and for Kubernetes Events.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use sluice_core::model::object::ObjectName;
use tokio::sync::watch;

use crate::daemon::kubernetes_events::{Finding, ObjectEvents};
use crate::node::difference::{Change, Difference};
use crate::node::status::{Claim, DriftStatus, unix_seconds};

/// The most places that are remembered. Those that drifted longest ago are forgotten first.
const PLACES_MAX: usize = 64;
/// How often a place is logged at first. Later only the 4th, 8th, 16th time and so on are.
const LOGGED_MAX: u64 = 3;
/// How long a repaired drift is worth an Event.
const EVENT: Duration = Duration::from_mins(10);

/// A part of what is audited. Each has one owner, who reports all that it finds in one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// The maps of the plan, with the settings and networks of the programs.
    Maps,
    /// The map `devices`.
    Devices,
    /// The maps of routes' MTUs.
    RouteMtus,
    /// The pins of maps.
    Pins,
    /// The programs of devices and of the cgroup.
    Hooks,
    /// Sluice's own device.
    OwnDevice,
    /// The routes of VIPs.
    Routes,
    /// The settings of the node.
    Settings,
}

impl Part {
    /// Returns the word for people and for the metric's label.
    fn word(self) -> &'static str {
        match self {
            Self::Maps | Self::Devices | Self::RouteMtus => "map",
            Self::Pins => "pin",
            Self::Hooks => "hook",
            Self::OwnDevice => "device",
            Self::Routes => "route",
            Self::Settings => "setting",
        }
    }
}

/// Something that was not as the agent made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Where: a map, a device and its hook, a network, a setting.
    pub(crate) place: String,
    /// What was found there, for people.
    pub(crate) what: String,
    /// Why it could not be repaired, if it could not.
    pub(crate) failure: Option<String>,
}

impl Found {
    /// Makes a finding of what was tried to repair it.
    pub(crate) fn new(
        place: impl Into<String>,
        what: impl Into<String>,
        repair: Result<(), impl fmt::Display>,
    ) -> Self {
        let failure = repair.err().map(|error| error.to_string());
        Self { place: place.into(), what: what.into(), failure }
    }
}

/// The labels of the metric `sluice_drift_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Labels {
    what: &'static str,
}

/// The metric `sluice_drift_total`.
pub(crate) type Counted = Family<Labels, Counter>;

/// What is remembered of a place.
#[derive(Clone, Debug)]
struct Known {
    what: String,
    times: u64,
    at: SystemTime,
    failure: Option<String>,
}

/// The places that have drifted.
type Places = BTreeMap<(Part, String), Known>;

/// What the audit has found, shared by all who examine a part.
#[derive(Clone, Debug)]
pub(crate) struct Drift {
    claim: Claim,
    counted: Counted,
    places: Arc<Mutex<Places>>,
    changed: watch::Sender<()>,
}

impl Drift {
    /// Makes an empty record. Nothing is repaired unless `claim` holds.
    pub(crate) fn new(claim: Claim, counted: Counted) -> Self {
        Self { claim, counted, places: Arc::default(), changed: watch::Sender::new(()) }
    }

    /// Whether this agent may repair: the node is still its own, and nobody has cleaned up under
    /// it. To be asked before each pass.
    pub(crate) fn may_repair(&self) -> bool {
        self.claim.is_held()
    }

    /// Returns a receiver that is woken when something was found.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in everything that one pass over a part has found, also if that is nothing.
    pub(crate) fn report(&self, part: Part, found: Vec<Found>) {
        let mut places = self.places();
        let gone = gone(&places, part, &found);
        for (_, place) in &gone {
            if let Some(known) = places.get_mut(&(part, place.clone())) {
                known.failure = None;
                tracing::info!(what = part.word(), place, "no longer: drift that is not repaired");
            }
        }
        drop(places);
        if !gone.is_empty() {
            self.changed.send_replace(());
        }
        self.add(part, found);
    }

    /// Takes in what a pass has found that left something out: other places stay as they are.
    pub(crate) fn add(&self, part: Part, found: Vec<Found>) {
        let mut places = self.places();
        let mut is_changed = false;
        for Found { place, what, failure } in merged(found) {
            let known = places.entry((part, place.clone())).or_insert_with(|| Known {
                what: String::new(),
                times: 0,
                at: SystemTime::UNIX_EPOCH,
                failure: None,
            });
            let is_known = known.failure.is_some() && known.failure == failure;
            let was_failing = known.failure.is_some();
            known.failure = failure;
            if is_known {
                continue;
            }
            is_changed = true;
            known.at = SystemTime::now();
            known.what = what;
            // A failure is counted when it appears, and not again when it is overcome.
            if !was_failing {
                known.times += 1;
                let _ = self.counted.get_or_create(&Labels { what: part.word() }).inc();
            }
            log(part, &place, known);
        }
        while places.len() > PLACES_MAX {
            let oldest = places.iter().min_by_key(|(_, known)| known.at).map(|(at, _)| at.clone());
            let _ = oldest.and_then(|at| places.remove(&at));
        }
        drop(places);
        if is_changed {
            self.changed.send_replace(());
        }
    }

    /// Returns what could not be repaired and keeps the node from serving, as text for people.
    pub(crate) fn unrepaired(&self) -> Vec<String> {
        let text = |((part, place), known): (&(Part, String), &Known)| {
            // No setting keeps an agent from being ready when it starts.
            let failure = known.failure.as_ref().filter(|_| *part != Part::Settings)?;
            Some(format!(
                "the repair of {} {place}: {}, and that cannot be repaired: {failure}",
                part.word(),
                known.what
            ))
        };
        let mut all: Vec<String> = self.places().iter().filter_map(text).collect();
        if !self.may_repair() {
            all.push(self.claim.lost());
        }
        all
    }

    /// Returns the places that have drifted, the latest first, for the status.
    pub(crate) fn status(&self) -> Vec<DriftStatus> {
        let row = |((part, place), known): (&(Part, String), &Known)| DriftStatus {
            what: part.word().to_owned(),
            place: place.clone(),
            found: known.what.clone(),
            times: known.times,
            at: unix_seconds(known.at),
            problem: known.failure.clone(),
        };
        let mut all: Vec<DriftStatus> = self.places().iter().map(row).collect();
        all.sort_by_key(|row| std::cmp::Reverse(row.at));
        all
    }

    /// Adds the Events about the node: one for each kind of drift that was repaired lately, and for
    /// each that cannot be repaired.
    pub(crate) fn add_events(&self, node: &str, now: SystemTime, all: &mut ObjectEvents) {
        for ((part, place), known) in &*self.places() {
            let age = now.duration_since(known.at).unwrap_or_default();
            if known.failure.is_none() && age > EVENT {
                continue;
            }
            let (reason, end) = match &known.failure {
                None => ("DriftRepaired", "repaired".to_owned()),
                Some(failure) => ("DriftNotRepaired", format!("cannot be repaired: {failure}")),
            };
            let finding = Finding {
                is_notice: false,
                kind: "Node".to_owned(),
                name: ObjectName::new("", node),
                reason,
                fields: vec![part.word().to_owned()],
                is_of_node: true,
            };
            // One Event for each kind: which of its places is named makes no difference.
            let _ = all
                .entry(finding)
                .or_insert_with(|| format!("{} {place}: {}; {end}", part.word(), known.what));
        }
    }
}

/// Returns one finding for each place. What could not be repaired counts before what was.
fn merged(found: Vec<Found>) -> impl Iterator<Item = Found> {
    let mut places: BTreeMap<String, Found> = BTreeMap::new();
    for found in found {
        match places.get_mut(&found.place) {
            None => {
                let _ = places.insert(found.place.clone(), found);
            }
            Some(first) => {
                first.what = format!("{}; {}", first.what, found.what);
                first.failure = first.failure.take().or(found.failure);
            }
        }
    }
    places.into_values()
}

/// Returns the places of a part that could not be repaired before and are well now.
fn gone(places: &Places, part: Part, found: &[Found]) -> Vec<(Part, String)> {
    let is_gone = |(at, known): &(&(Part, String), &Known)| {
        at.0 == part && known.failure.is_some() && found.iter().all(|found| found.place != at.1)
    };
    places.iter().filter(is_gone).map(|(at, _)| at.clone()).collect()
}

fn log(part: Part, place: &str, known: &Known) {
    let Known { what: found, times, failure, .. } = known;
    let what = part.word();
    if let Some(failure) = failure {
        tracing::warn!(what, place, found, failure, "drift that cannot be repaired; trying again");
    } else if *times <= LOGGED_MAX || times.is_power_of_two() {
        tracing::warn!(what, place, found, times, "repaired drift");
    } else {
        tracing::debug!(what, place, found, times, "repaired drift");
    }
}

/// Returns a finding for each map in which entries differ, given whether the repair of all of them
/// worked.
pub(crate) fn maps(differences: &[Difference], failure: Option<&str>) -> Vec<Found> {
    let mut by_map: BTreeMap<&str, Vec<&Difference>> = BTreeMap::new();
    for difference in differences {
        by_map.entry(difference.map).or_default().push(difference);
    }
    let found = |(map, rows): (&str, Vec<&Difference>)| Found {
        place: map.to_owned(),
        what: describe(&rows),
        failure: failure.map(str::to_owned),
    };
    by_map.into_iter().map(found).collect()
}

/// Describes the differences in one map: how many there are of each kind, and the first.
fn describe(rows: &[&Difference]) -> String {
    let kinds = [
        (Change::Missing, "missing"),
        (Change::Extra, "too many"),
        (Change::Different, "with another value"),
    ];
    let count = |(change, word): &(Change, &str)| {
        let count = rows.iter().filter(|row| row.change == *change).count();
        (count > 0).then(|| format!("{count} {word}"))
    };
    let counts: Vec<String> = kinds.iter().filter_map(count).collect();
    let first = rows.first().map(|row| {
        let service = row.service.as_ref().map(|service| format!(" of {service}"));
        format!(", the first {}{}", row.key, service.unwrap_or_default())
    });
    let entries = if rows.len() == 1 { "entry" } else { "entries" };
    let first = if rows.len() == 1 {
        first.map(|first| first.replacen("the first ", "", 1))
    } else {
        first
    };
    format!("{entries}: {}{}", counts.join(", "), first.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drift() -> Drift {
        Drift::new(Claim::default(), Counted::default())
    }

    fn found(place: &str, failure: Option<&str>) -> Found {
        let repair = failure.map_or(Ok(()), Err);
        Found::new(place, "the pin is gone", repair)
    }

    fn count(drift: &Drift, what: &'static str) -> u64 {
        drift.counted.get_or_create(&Labels { what }).get()
    }

    #[test]
    fn what_is_repaired_is_counted_and_no_problem() {
        let drift = drift();
        let mut woken = drift.subscribe();
        drift.report(Part::Pins, Vec::new());
        assert!(!woken.has_changed().expect("it lives"), "nothing was found");
        drift.report(Part::Pins, vec![found("slots", None), found("ports", None)]);
        drift.report(Part::Pins, vec![found("slots", None)]);
        assert!(woken.has_changed().expect("it lives"));
        woken.mark_unchanged();
        assert_eq!((count(&drift, "pin"), drift.unrepaired()), (3, Vec::new()));
        let rows = drift.status();
        let times: BTreeMap<&str, u64> =
            rows.iter().map(|row| (row.place.as_str(), row.times)).collect();
        assert_eq!(times, BTreeMap::from([("ports", 1), ("slots", 2)]));
    }

    #[test]
    fn a_failure_stays_a_problem_until_it_is_overcome_and_is_counted_once() {
        let drift = drift();
        for _ in 0..3 {
            drift.report(Part::Pins, vec![found("slots", Some("read-only file system"))]);
        }
        // Others that are well end nothing.
        drift.report(Part::Hooks, Vec::new());
        assert_eq!(count(&drift, "pin"), 1);
        let [text] = &drift.unrepaired()[..] else { panic!("{:?}", drift.unrepaired()) };
        assert!(text.contains("pin slots") && text.contains("read-only file system"), "{text}");
        drift.report(Part::Pins, vec![found("slots", None)]);
        assert_eq!((count(&drift, "pin"), drift.unrepaired()), (1, Vec::new()));
        drift.report(Part::Pins, vec![found("slots", Some("read-only file system"))]);
        drift.report(Part::Pins, Vec::new());
        assert_eq!((count(&drift, "pin"), drift.unrepaired()), (2, Vec::new()));
    }

    #[test]
    fn two_findings_at_one_place_are_one_and_a_failure_outweighs_a_repair() {
        let drift = drift();
        for _ in 0..2 {
            let both = [found("sluice0", Some("read-only")), found("sluice0", None)];
            drift.report(Part::OwnDevice, both.into());
            assert_eq!((count(&drift, "device"), drift.unrepaired().len()), (1, 1));
        }
        // A pass that leaves places out ends nothing.
        drift.add(Part::OwnDevice, Vec::new());
        assert_eq!(drift.unrepaired().len(), 1);
        // A setting is repaired or not, and the node serves.
        drift.report(Part::Settings, vec![found("conntrack", Some("read-only"))]);
        assert_eq!(drift.unrepaired().len(), 1);
    }

    #[test]
    fn the_places_that_are_remembered_are_bounded() {
        let drift = drift();
        for number in 0..2 * PLACES_MAX {
            drift.report(Part::Hooks, vec![found(&format!("device {number}"), None)]);
        }
        assert_eq!(drift.status().len(), PLACES_MAX);
        assert_eq!(count(&drift, "hook"), 2 * PLACES_MAX as u64);
    }

    #[test]
    fn each_kind_of_drift_has_one_event_about_the_node() {
        let drift = drift();
        drift.report(Part::Pins, vec![found("slots", None), found("ports", None)]);
        drift.report(Part::Maps, vec![found("names", Some("the map is full"))]);
        let mut events = ObjectEvents::new();
        let now = SystemTime::now();
        drift.add_events("n1", now, &mut events);
        let rows: Vec<_> =
            events.iter().map(|(finding, note)| (finding.reason, note.as_str())).collect();
        assert_eq!(
            rows,
            [
                (
                    "DriftNotRepaired",
                    "map names: the pin is gone; cannot be repaired: the map is full"
                ),
                ("DriftRepaired", "pin ports: the pin is gone; repaired"),
            ]
        );
        assert!(events.keys().all(|finding| finding.is_of_node && &*finding.name.name == "n1"));
        // What was repaired long ago is none.
        let mut later = ObjectEvents::new();
        drift.add_events("n1", now + EVENT + Duration::from_secs(1), &mut later);
        assert_eq!(later.len(), 1);
    }

    #[test]
    fn differences_are_described_map_by_map() {
        let row = |map, change, key: &str| Difference {
            change,
            map,
            key: key.to_owned(),
            wanted: None,
            found: None,
            service: (map == "services_v4").then(|| "shop/cart:http".to_owned()),
        };
        let rows = [
            row("services_v4", Change::Missing, "10.96.0.1:80 TCP"),
            row("slots", Change::Different, "from slot 0"),
            row("services_v4", Change::Extra, "10.96.0.9:80 TCP"),
        ];
        let found = maps(&rows, None);
        let texts: Vec<_> = found.iter().map(|found| (&*found.place, &*found.what)).collect();
        assert_eq!(
            texts,
            [
                (
                    "services_v4",
                    "entries: 1 missing, 1 too many, the first 10.96.0.1:80 TCP of shop/cart:http"
                ),
                ("slots", "entry: 1 with another value, from slot 0"),
            ]
        );
    }
}
