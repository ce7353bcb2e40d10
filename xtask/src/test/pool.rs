//! Runs jobs side by side, as many as the machine has room for: first those that use all of it,
//! then those that took longest last time, and those that must be alone at the end, one by one.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use sluice_cluster::cache::Cache;
use sluice_cluster::ui::seconds;

use super::job::{Job, Share};
use super::libtest::Counts;
use super::run::{self, Finished, Shown};

/// What the tests of a tier came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    pub(super) counts: Counts,
    /// How long they would have taken one by one.
    pub(super) took: Duration,
}

/// What a run of jobs is told.
pub(super) struct Settings {
    /// How many half processors there are to share.
    pub(super) room: usize,
    /// How long a job may take.
    pub(super) allowed: Duration,
    /// Whether what passing tests print is shown.
    pub(super) verbose: bool,
}

/// Runs all jobs and returns the sums by tier. A job that cannot be started is a failure in them.
///
/// # Errors
/// When nothing can be printed.
pub(super) fn run(jobs: Vec<Job>, settings: &Settings) -> Result<BTreeMap<&'static str, Sum>> {
    let mut times = Times::read();
    // What nobody has timed may take long.
    let last = |job: &Job| times.last(job).unwrap_or(Duration::MAX);
    let mut waiting: Vec<Job> = jobs;
    let place = |job: &Job| match job.share {
        Share::All => 0,
        Share::One | Share::Half => 1,
        Share::Alone => 2,
    };
    waiting.sort_by_key(|job| (place(job), Reverse(last(job))));
    let shown = if waiting.len() == 1 { Shown::Now } else { Shown::Later };
    let mut waiting = VecDeque::from(waiting);
    let mut sums: BTreeMap<&'static str, Sum> = BTreeMap::new();
    let mut free = settings.room;
    let (sender, ended) = mpsc::channel();
    thread::scope(|scope| {
        loop {
            while let Some(job) = waiting.pop_front_if(|job| cost(job.share, settings.room) <= free)
            {
                free -= cost(job.share, settings.room);
                let sender = sender.clone();
                let _joined_at_the_end = scope.spawn(move || {
                    let Job { tier, name, command, share } = job;
                    let finished = run::run(command, settings.allowed, shown);
                    // The other end is gone when nothing could be printed.
                    let _ = sender.send((tier, name, share, finished));
                });
            }
            if free == settings.room {
                break;
            }
            let (tier, name, share, finished) = ended.recv().context("a job that never ends")?;
            free += cost(share, settings.room);
            let finished = finished.unwrap_or_else(|error| Finished {
                counts: Counts { failed: 1, ..Counts::default() },
                output: format!("{error:#}\n").into_bytes(),
                elapsed: Duration::ZERO,
            });
            report(tier, &name, &finished, settings.verbose)?;
            let sum = sums.entry(tier).or_default();
            sum.counts.add(finished.counts);
            sum.took += finished.elapsed;
            times.note(tier, &name, finished.elapsed);
            times.write();
        }
        Ok(())
    })
    .map(|()| sums)
}

/// How many half processors a job takes.
fn cost(share: Share, room: usize) -> usize {
    match share {
        Share::Half => 1.min(room),
        Share::One => 2.min(room),
        Share::All | Share::Alone => room,
    }
}

/// One line for a job that passed, all that it printed for one that failed.
fn report(tier: &str, name: &str, finished: &Finished, verbose: bool) -> Result<()> {
    let Finished { counts, output, elapsed } = finished;
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
    writeln!(stdout, "{tier}: {name} ... {outcome} ({})", seconds(*elapsed))?;
    Ok(())
}

/// How long jobs took when they were run last, kept in the cache: all that is lost without it is
/// a good order.
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
