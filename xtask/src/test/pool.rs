//! Runs as many jobs in parallel as the machine has room for: first those that use all of it, then
//! those that took longest last time, and at the end, one by one, those that must run alone.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sluice_cluster::cache::Cache;
use sluice_cluster::ui::seconds;

use super::job::{Job, Share};
use super::libtest::Counts;
use super::run::{self, Finished, Shown};

/// The results of a tier.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    pub(super) counts: Counts,
    /// The sum of the times that the jobs took.
    pub(super) took: Duration,
    /// The processor time that the jobs used.
    pub(super) busy: Duration,
}

/// Settings of a run.
pub(super) struct Settings {
    /// The number of sixths of a processor that jobs share.
    pub(super) room: usize,
    /// The longest time that a job may take.
    pub(super) allowed: Duration,
    /// Whether the output of passing tests is shown.
    pub(super) verbose: bool,
}

/// Runs all jobs and returns the sums by tier. A job that cannot be started counts as a failure.
///
/// # Errors
/// If nothing can be printed.
pub(super) fn run(jobs: Vec<Job>, settings: &Settings) -> Result<BTreeMap<&'static str, Sum>> {
    let mut times = Times::read();
    // A job without a time may take long.
    let last = |job: &Job| times.last(job).unwrap_or(Duration::MAX);
    let mut waiting: Vec<Job> = jobs;
    let place = |job: &Job| match job.share {
        Share::All => 0,
        Share::One | Share::Half | Share::Third => 1,
        Share::Alone => 2,
    };
    waiting.sort_by_key(|job| (place(job), Reverse(last(job))));
    let shown = if waiting.len() == 1 { Shown::Now } else { Shown::Later };
    let mut waiting = VecDeque::from(waiting);
    let mut sums: BTreeMap<&'static str, Sum> = BTreeMap::new();
    let (room, mut used) = (settings.room, 0);
    let (sender, ended) = mpsc::channel();
    let (started, before) = (Instant::now(), Processors::read());
    thread::scope(|scope| {
        loop {
            while let Some(job) = waiting.pop_front_if(|job| has_room(job.share, used, room)) {
                used += cost(job.share, room);
                let sender = sender.clone();
                let _joined_at_the_end = scope.spawn(move || {
                    let Job { tier, name, command, share } = job;
                    let finished = run::run(command, settings.allowed, shown);
                    // The receiver is gone if nothing could be printed.
                    let _ = sender.send((tier, name, share, finished));
                });
            }
            if used == 0 {
                break;
            }
            let (tier, name, share, finished) = ended.recv().context("a job that never ends")?;
            used -= cost(share, room);
            let finished = finished.unwrap_or_else(|error| Finished {
                counts: Counts { failed: 1, ..Counts::default() },
                output: format!("{error:#}\n").into_bytes(),
                elapsed: Duration::ZERO,
                busy: Duration::ZERO,
            });
            report(tier, &name, &finished, settings.verbose)?;
            let sum = sums.entry(tier).or_default();
            sum.counts.add(finished.counts);
            sum.took += finished.elapsed;
            sum.busy += finished.busy;
            times.note(tier, &name, finished.elapsed);
            times.write();
        }
        Ok(())
    })
    .map(|()| {
        let busy = Processors::read().busy_since(&before);
        eprintln!("tests: {}, processors {busy} % busy", seconds(started.elapsed()));
        sums
    })
}

/// The processor time of the machine since it booted, in clock ticks.
#[derive(Default)]
struct Processors {
    all: u64,
    idle: u64,
}

impl Processors {
    /// Reads the first line of `/proc/stat`: `cpu user nice system idle iowait irq softirq steal`,
    /// then guests, who are in the first two already.
    fn read() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        Self::parse(stat.lines().next().unwrap_or_default())
    }

    fn parse(line: &str) -> Self {
        let ticks: Vec<u64> =
            line.split_whitespace().skip(1).take(8).flat_map(str::parse).collect();
        Self { all: ticks.iter().sum(), idle: ticks.iter().skip(3).take(2).sum() }
    }

    /// Returns the share of processor time that was used, in percent.
    fn busy_since(&self, before: &Self) -> u64 {
        let all = self.all.saturating_sub(before.all);
        let idle = self.idle.saturating_sub(before.idle);
        (all.saturating_sub(idle) * 100).checked_div(all).unwrap_or_default()
    }
}

/// Whether a job may start. It needs some room, not all that it takes: otherwise processors would
/// idle until enough small jobs have ended for a large one.
fn has_room(share: Share, used: usize, room: usize) -> bool {
    match share {
        Share::Third | Share::Half | Share::One => used < room,
        Share::All | Share::Alone => used == 0,
    }
}

/// Returns how many sixths of a processor a job takes.
fn cost(share: Share, room: usize) -> usize {
    match share {
        Share::Third => 2.min(room),
        Share::Half => 3.min(room),
        Share::One => 6.min(room),
        Share::All | Share::Alone => room,
    }
}

/// Prints one line for a job, after all of its output if it failed.
fn report(tier: &str, name: &str, finished: &Finished, verbose: bool) -> Result<()> {
    let Finished { counts, output, elapsed, busy } = finished;
    let mut stdout = io::stdout().lock();
    if counts.failed > 0 || verbose {
        stdout.write_all(output)?;
    }
    let outcome = match (counts.failed, counts.passed, counts.skipped) {
        (0, 0, _) => "ignored".to_owned(),
        (0, 1, 0) => "ok".to_owned(),
        (1, 0, 0) => "FAILED".to_owned(),
        _ => counts.to_string(),
    };
    let (elapsed, busy) = (seconds(*elapsed), seconds(*busy));
    writeln!(stdout, "{tier}: {name} ... {outcome} ({elapsed}, {busy} of a processor)")?;
    Ok(())
}

/// The times that jobs took when they last ran, kept in the cache. Without them only the order is
/// worse.
struct Times {
    path: Option<PathBuf>,
    seconds: BTreeMap<String, f64>,
}

impl Times {
    fn read() -> Self {
        let path = Cache::open().map(|cache| cache.path("test-times.json")).ok();
        let seconds = path
            .as_ref()
            .and_then(|path| fs::read(path).ok())
            .and_then(|content| serde_json::from_slice(&content).ok())
            .unwrap_or_default();
        Self { path, seconds }
    }

    fn last(&self, job: &Job) -> Option<Duration> {
        let seconds = self.seconds.get(&key(job.tier, &job.name))?;
        Duration::try_from_secs_f64(*seconds).ok()
    }

    fn note(&mut self, tier: &str, name: &str, took: Duration) {
        let _before = self.seconds.insert(key(tier, name), took.as_secs_f64());
    }

    fn write(&self) {
        let Some(path) = &self.path else { return };
        let written =
            serde_json::to_vec_pretty(&self.seconds).map_err(io::Error::from).and_then(|content| {
                path.parent().map_or(Ok(()), fs::create_dir_all)?;
                fs::write(path, content)
            });
        if let Err(error) = written {
            eprintln!("cannot keep the times of tests in {}: {error}", path.display());
        }
    }
}

fn key(tier: &str, name: &str) -> String {
    format!("{tier} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_job_needs_some_room_and_one_that_is_alone_all_of_it() {
        let room = 12;
        assert!(has_room(Share::One, 10, room) && !has_room(Share::One, 12, room));
        assert!(has_room(Share::Alone, 0, room) && !has_room(Share::Alone, 2, room));
        // What a large job has taken too much is missing for the next ones.
        assert!(!has_room(Share::Third, 10 + cost(Share::One, room), room));
        assert!(!has_room(Share::Third, cost(Share::All, room), room));
    }

    #[test]
    fn processors_are_busy_unless_they_idle_or_wait_for_a_disk() {
        let before = Processors::parse("cpu  10 0 10 70 10 0 0 0 5 0");
        let after = Processors::parse("cpu  40 0 20 120 20 0 0 0 9 0");
        assert_eq!(after.busy_since(&before), 40);
        assert_eq!(after.busy_since(&after), 0);
    }
}
