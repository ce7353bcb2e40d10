//! Runs the simulation with several seeds, or repeats one. See CONTRIBUTING.md.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use sluice_simulation::fault::Fault;
use sluice_simulation::scenario::Scenario;
use sluice_simulation::shrink::shrink;
use sluice_simulation::world::{Sums, World};

/// Runs nodes, clients and networks on the real path, plan and image.
#[derive(Parser)]
struct Options {
    /// Run only this seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Run new seeds for this many minutes.
    #[arg(long, conflicts_with = "seed")]
    minutes: Option<u64>,
    /// Number of fixed seeds to run.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// Revert the fix of a fault that Sluice had in the past.
    #[arg(long, value_enum)]
    fault: Option<Fault>,
    /// Number of further runs to shorten the trace of a failure.
    #[arg(long, default_value_t = 400)]
    shrink: u32,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let begun = Instant::now();
    let first = match (options.seed, options.minutes) {
        (Some(seed), _) => seed,
        // New seeds need not be the same in the next run: a failure prints its own.
        (None, Some(_)) => std::process::id().into(),
        (None, None) => 1,
    };
    let limit = options.minutes.map(|minutes| Duration::from_secs(60 * minutes));
    let count = match limit {
        Some(_) => u64::MAX,
        None if options.seed.is_some() => 1,
        None => options.seeds,
    };
    let mut sums = Sums::default();
    let mut runs = 0;
    while runs < count && limit.is_none_or(|limit| begun.elapsed() < limit) {
        let seed = if limit.is_some() { (first << 20) + runs } else { first + runs };
        runs += 1;
        if !holds(seed, &options, &mut sums) {
            println!("test result: FAILED. {} passed; 1 failed; 0 ignored", runs - 1);
            return ExitCode::FAILURE;
        }
    }
    println!("{runs} runs in {:.1} s: {sums:?}", begun.elapsed().as_secs_f64());
    println!("test result: ok. {runs} passed; 0 failed; 0 ignored");
    ExitCode::SUCCESS
}

/// Runs a seed and prints how it fails; returns false if it does.
fn holds(seed: u64, options: &Options, sums: &mut Sums) -> bool {
    let scenario = Scenario::of(seed);
    let none = BTreeSet::new();
    let world = World::new(&scenario, &none, options.fault, false);
    let violation = world.run();
    let own = *world.sums.borrow();
    for (sum, own) in [
        (&mut sums.opened, own.opened),
        (&mut sums.completed, own.completed),
        (&mut sums.associations, own.associations),
        (&mut sums.refused, own.refused),
        (&mut sums.excused, own.excused),
        (&mut sums.programs, own.programs),
        (&mut sums.nested, own.nested),
        (&mut sums.by_xdp, own.by_xdp),
        (&mut sums.around, own.around),
        (&mut sums.bridged, own.bridged),
        (&mut sums.evicted, own.evicted),
        (&mut sums.killed, own.killed),
        (&mut sums.moved, own.moved),
    ] {
        *sum += own;
    }
    let Some(violation) = violation else { return true };
    println!("seed {seed}: {}: {}", violation.rule, violation.what);
    let skipped = shrink(&scenario, options.fault, violation.rule, options.shrink);
    let world = World::new(&scenario, &skipped, options.fault, true);
    let _ = world.run();
    println!("{:#?}", scenario.setting);
    for (index, event) in scenario.events.iter().enumerate() {
        if !skipped.contains(&index) {
            println!(
                "event {index} at {}.{:06}: {:?}",
                event.at / 1_000_000,
                event.at % 1_000_000,
                event.act
            );
        }
    }
    for line in world.trace() {
        println!("{line}");
    }
    println!("repeat it: cargo xtask test simulation -- --seed {seed}");
    false
}
