//! `sluice takeover` and `sluice release`: leave a request for the agent, and show its progress.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use clap::Args;

use super::Outcome;
use crate::daemon::takeover::request::{self, Request};
use crate::daemon::takeover::{LEGACY, RELEASED, STOP};
use crate::node::kube_proxy::{running, served_by};
use crate::node::status::{self, TakeoverStatus, unix_seconds};

/// The interval at which the agent's status is read.
const PERIOD: Duration = Duration::from_millis(200);
/// The time to wait unless --wait says otherwise.
const WAIT: Duration = Duration::from_mins(1);
/// The longest time that a release may take.
const TIMEOUT_MAX: u64 = 30 * 24 * 3600;

#[derive(Debug, Args)]
pub(super) struct TakeoverArgs {
    /// Remove kube-proxy's rules, after it was stopped for good. Connections that depend on them
    /// continue.
    #[arg(long)]
    finish: bool,
    /// With --finish, do so even if a process named kube-proxy runs.
    #[arg(long, requires = "finish")]
    force: bool,
    /// Wait this long, such as 30s, 5m or 1h; 0 only shows the progress. With --finish, wait until
    /// the last connection that depends on kube-proxy's rules has ended [default: 1m until the node
    /// is served, or until the rules are gone].
    #[arg(long, value_name = "TIME", value_parser = time)]
    wait: Option<Duration>,
}

#[derive(Debug, Args)]
pub(super) struct ReleaseArgs {
    /// Wait this long for flows to end, such as 90s, 10m or 2h. Flows that live longer are cut.
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "1h")]
    timeout: Duration,
    /// Only get ready for kube-proxy to be started. If nothing else tracks connections, it would
    /// take those of this host's own processes for new ones as soon as it starts.
    #[arg(long, conflicts_with_all = ["force", "no_wait"])]
    prepare: bool,
    /// Release the node even if kube-proxy has no rules here. Nobody serves new connections then.
    #[arg(long)]
    force: bool,
    /// Return immediately. `sluice takeover --wait 0` shows the progress.
    #[arg(long)]
    no_wait: bool,
}

/// Parses a duration: a number with s, m or h.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("invalid duration {text:?}: expected 90s, 10m or 2h");
    let (number, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        _ => (text, 1),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds =
        number.checked_mul(unit).filter(|seconds| *seconds <= TIMEOUT_MAX).ok_or_else(wrong)?;
    Ok(Duration::from_secs(seconds))
}

/// Prints each step on standard error, once.
#[derive(Default)]
struct Progress {
    printed: String,
}

impl Progress {
    fn follow(&mut self, now: &TakeoverStatus) {
        let text = words(now);
        if text != self.printed {
            eprintln!("{text}");
            self.printed = text;
        }
    }
}

/// Returns the progress as one line.
pub(super) fn words(now: &TakeoverStatus) -> String {
    let mut words = vec![now.phase.clone()];
    if now.connections + now.datagram_flows != 0 {
        words.push(format!(
            "netfilter still has {} connections and {} datagram flows",
            now.connections, now.datagram_flows
        ));
    }
    words.extend(now.kube_proxy.as_ref().map(|rules| format!("kube-proxy still has {rules}")));
    words.extend(now.waiting_for.as_ref().map(|what| format!("waiting for {what}")));
    words.extend(now.problem.as_ref().map(|problem| format!("{problem}, trying again")));
    words.join("; ")
}

/// Returns the running agent's status.
fn status_of(state_dir: &Path) -> anyhow::Result<TakeoverStatus> {
    ensure!(
        status::is_alive(state_dir),
        "no agent runs with {}: start `sluice agent --takeover`, or give its --pin-path or --state-dir",
        state_dir.display()
    );
    status::of_living(state_dir)
        .map(|status| status.takeover)
        .with_context(|| format!("the agent has not written a status in {}", state_dir.display()))
}

/// Waits until the agent's status is as it should be. Returns the last one, and whether it is.
fn wait(
    state_dir: &Path,
    time: Duration,
    is_done: impl Fn(&TakeoverStatus) -> bool,
) -> anyhow::Result<(TakeoverStatus, bool)> {
    let (deadline, mut progress) = (Instant::now() + time, Progress::default());
    // An agent that restarts is away for a moment.
    let mut away = Instant::now();
    loop {
        match status_of(state_dir) {
            Ok(now) => {
                away = Instant::now();
                let done = is_done(&now);
                if done || Instant::now() >= deadline {
                    return Ok((now, done));
                }
                progress.follow(&now);
            }
            Err(error) if away.elapsed() > Duration::from_secs(5) => return Err(error),
            Err(_) => {}
        }
        std::thread::sleep(PERIOD);
    }
}

/// Prints the status. The exit code is 0 if the request is done.
fn outcome((now, done): (TakeoverStatus, bool)) -> Outcome {
    Outcome { text: words(&now) + "\n", code: u8::from(!done) }
}

/// Leaves a request for the agent.
fn request(state_dir: &Path, request: Request) -> anyhow::Result<()> {
    request::write(state_dir, request).context("cannot leave a request for the agent")
}

/// `sluice takeover`.
///
/// # Errors
///
/// Fails if no agent runs, or with --finish kube-proxy still does.
pub(super) fn take_over(args: &TakeoverArgs, state_dir: &Path) -> anyhow::Result<Outcome> {
    let now = status_of(state_dir)?;
    if args.finish {
        if let Some(pid) = running().filter(|_| !args.force) {
            bail!(
                "kube-proxy still runs (process {pid}) and would make its rules again: stop it for \
                 good first (delete its DaemonSet), or give --force"
            );
        }
        ensure!(
            now.phase == "serving",
            "the agent is {}, not serving: wait for it with `sluice takeover`",
            now.phase
        );
        request(state_dir, Request::Finish)?;
        let is_taken = || request::read(state_dir) != Some(Request::Finish);
        // Connections may live for days, and need nobody who waits for their end.
        let waits_for_connections = args.wait.is_some();
        let is_done = |now: &TakeoverStatus| {
            if waits_for_connections {
                return now.kube_proxy.is_none() && !now.holding;
            }
            // What is kept for connections is no rule that balances.
            let has_rules =
                now.waiting_for.as_deref().is_some_and(|what| [LEGACY, STOP].contains(&what));
            !has_rules && (now.kube_proxy.is_none() || now.holding)
        };
        return wait(state_dir, args.wait.unwrap_or(WAIT), |now| is_taken() && is_done(now))
            .map(outcome);
    }
    // An agent that serves has nothing to take over. It only ends its preparation for kube-proxy.
    let time = args.wait.unwrap_or(WAIT);
    if !time.is_zero() {
        request(state_dir, Request::Takeover)?;
    }
    let is_taken = || {
        request::read(state_dir).is_none_or(|request| {
            matches!(request, Request::Finish | Request::Prepare | Request::Prepared)
        })
    };
    wait(state_dir, time, |now| is_taken() && now.phase == "serving").map(outcome)
}

/// `sluice release`.
///
/// # Errors
///
/// Fails if no agent runs, or nobody would serve new connections.
pub(super) fn release(args: &ReleaseArgs, state_dir: &Path) -> anyhow::Result<Outcome> {
    let now = status_of(state_dir)?;
    if args.prepare {
        ensure!(now.phase == "serving", "the agent is {}, not serving", now.phase);
        request(state_dir, Request::Prepare)?;
        let is_taken = || request::read(state_dir) == Some(Request::Prepared);
        // Not every preparation needs Sluice's table, but then the agent waits for something else.
        let is_reported = |now: &TakeoverStatus| now.holding || now.waiting_for.is_some();
        return wait(state_dir, Duration::from_secs(30), |now| is_taken() && is_reported(now))
            .map(outcome);
    }
    if served_by()?.is_none() && !args.force {
        bail!(
            "kube-proxy has no rules in this network namespace, so nobody would serve new \
             connections: start it, wait until it has synced, and try again; or give --force"
        );
    }
    let deadline = unix_seconds(SystemTime::now()) + args.timeout.as_secs();
    if request::read(state_dir) != Some(Request::Released) {
        request(state_dir, Request::Release { deadline })?;
    }
    if args.no_wait {
        return Ok("requested a release\n".to_owned().into());
    }
    // Removing everything takes a moment after the deadline.
    let most = args.timeout + Duration::from_secs(30);
    wait(state_dir, most, |now| now.phase == RELEASED && now.waiting_for.is_none()).map(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        for (text, seconds) in
            [("90s", Some(90)), ("10m", Some(600)), ("2h", Some(7200)), ("7", Some(7))]
        {
            assert_eq!(time(text).ok().map(|time| time.as_secs()), seconds, "{text}");
        }
        for wrong in ["", "h", "1d", "-5s", "1.5h", "99999999h"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_progress_is_one_line() {
        let now = TakeoverStatus {
            phase: "serving".to_owned(),
            connections: 12,
            waiting_for: Some("somebody".to_owned()),
            ..TakeoverStatus::default()
        };
        assert_eq!(
            words(&now),
            "serving; netfilter still has 12 connections and 0 datagram flows; waiting for somebody"
        );
    }
}
