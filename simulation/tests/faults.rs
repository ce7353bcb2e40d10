//! The simulation finds faults that Sluice had in the past when their fixes are reverted, and none
//! in the same seeds without that.

use std::collections::BTreeSet;

use sluice_simulation::fault::Fault;
use sluice_simulation::scenario::Scenario;
use sluice_simulation::shrink::{run, shrink};

/// Runs a seed to its end; returns the rule that it breaks.
fn violated(seed: u64, fault: Option<Fault>) -> Option<&'static str> {
    run(&Scenario::of(seed), &BTreeSet::new(), fault).map(|violation| violation.rule)
}

/// Checks that one of a few seeds shows a fault by breaking one of these rules, and breaks none
/// without the fault.
fn check(fault: Fault, rules: &[&str]) {
    let found = (1..40).find(|seed| violated(*seed, Some(fault)).is_some());
    let seed = found.expect("some seed shows the fault");
    let rule = violated(seed, Some(fault)).expect("a run repeats itself");
    assert!(rules.contains(&rule), "seed {seed}: {rule}");
    assert_eq!(violated(seed, None), None, "seed {seed} without the fault");
}

const LIVES: &str = "an open connection lives as long as its endpoint";
const ASIDE: &str = "what has ended stands aside";
const SOURCE: &str = "an answer comes from whom was asked";
const EMPTY: &str = "a layout that is given up is empty";
const OTHERS: &str = "a client's packet changes no other connection's entry";

#[test]
fn unproven_flows_among_proven_ones_are_found() {
    check(Fault::Unconfined, &[LIVES, ASIDE]);
}

#[test]
fn believed_guesses_are_found() {
    check(Fault::Believes, &[LIVES, ASIDE, SOURCE, OTHERS]);
}

#[test]
fn ended_flows_among_live_ones_are_found() {
    check(Fault::KeepsEnded, &[LIVES, ASIDE]);
}

#[test]
fn renewals_of_others_entries_are_found() {
    check(Fault::RenewsAny, &[OTHERS]);
}

#[test]
fn entries_left_in_the_previous_layout_are_found() {
    check(Fault::LeavesPrevious, &[EMPTY, LIVES, ASIDE, SOURCE, OTHERS]);
}

#[test]
fn a_trace_has_only_what_its_violation_needs() {
    let fault = Some(Fault::RenewsAny);
    let seed = (1..40).find(|seed| violated(*seed, fault) == Some(OTHERS));
    let scenario = Scenario::of(seed.expect("some seed shows the fault"));
    let skipped = shrink(&scenario, fault, OTHERS, 200);
    let violation = run(&scenario, &skipped, fault).expect("the shorter list fails as well");
    assert_eq!(violation.rule, OTHERS);
    let left = scenario.events.len() - skipped.len();
    assert!(left <= 8, "{left} events are left");
}
