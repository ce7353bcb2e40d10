//! Shortens the list of events for as long as it fails in the same way.

use std::collections::BTreeSet;

use crate::fault::Fault;
use crate::scenario::Scenario;
use crate::world::{Violation, World};

/// Runs a scenario without the skipped events.
#[must_use]
pub fn run(
    scenario: &Scenario,
    skipped: &BTreeSet<usize>,
    fault: Option<Fault>,
) -> Option<Violation> {
    World::new(scenario, skipped, fault, false).run()
}

/// Returns the events that a violation of a rule does not need, after at most `runs` runs.
///
/// Delta debugging: ever smaller parts of the list are left out (Zeller, 2002).
#[must_use]
pub fn shrink(
    scenario: &Scenario,
    fault: Option<Fault>,
    rule: &'static str,
    mut runs: u32,
) -> BTreeSet<usize> {
    let mut skipped = BTreeSet::new();
    let fails = |skipped: &BTreeSet<usize>| {
        run(scenario, skipped, fault).is_some_and(|violation| violation.rule == rule)
    };
    let mut part = scenario.events.len().div_ceil(2);
    while part > 0 && runs > 0 {
        let left: Vec<usize> =
            (0..scenario.events.len()).filter(|index| !skipped.contains(index)).collect();
        let mut has_shrunk = false;
        for chunk in left.chunks(part) {
            if runs == 0 {
                break;
            }
            runs -= 1;
            let mut more = skipped.clone();
            more.extend(chunk);
            if fails(&more) {
                skipped = more;
                has_shrunk = true;
            }
        }
        if part == 1 && !has_shrunk {
            break;
        }
        part = if part == 1 { 1 } else { part.div_ceil(2) };
    }
    skipped
}
