//! `sluice takeover` and `sluice release`: what a person wants of the agent, and how far it is.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use clap::Args;

use crate::daemon::takeover::RELEASED;
use crate::daemon::takeover::wish::{self, Wish};
use crate::node::kube_proxy::{running, served_by};
use crate::node::status::{self, TakeoverStatus, unix_seconds};

/// How often the agent's word is read.
const LOOK: Duration = Duration::from_millis(200);
/// The longest time that a release may take.
const TIMEOUT_MAX: u64 = 30 * 24 * 3600;

#[derive(Debug, Args)]
pub(super) struct TakeoverArgs {
    /// kube-proxy is stopped for good: remove its rules. Connections that live by them go on.
    #[arg(long)]
    finish: bool,
    /// With --finish: even if a process of this name is seen.
    #[arg(long, requires = "finish")]
    force: bool,
    /// How long to wait, as 30s, 5m or 1h; 0: only tell how far it is.
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "1m")]
    wait: Duration,
}

#[derive(Debug, Args)]
pub(super) struct ReleaseArgs {
    /// How long flows are waited for, as 90s, 10m or 2h; those that live longer are cut.
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "1h")]
    timeout: Duration,
    /// Not yet: get ready for kube-proxy to be started. Where nothing else tracks connections, it
    /// would take those of this host's own processes for new ones as soon as it comes.
    #[arg(long, conflicts_with_all = ["force", "no_wait"])]
    prepare: bool,
    /// Even if kube-proxy has no rules here: nobody serves new connections then.
    #[arg(long)]
    force: bool,
    /// Return at once; `sluice takeover --wait 0` tells how far it is.
    #[arg(long)]
    no_wait: bool,
}

/// A time as people write it: a number with s, m or h.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: write 90s, 10m or 2h");
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

/// Tells of every step on standard error.
#[derive(Default)]
struct Progress {
    told: String,
}

impl Progress {
    fn follow(&mut self, now: &TakeoverStatus) {
        let text = words(now);
        if text != self.told {
            eprintln!("{text}");
            self.told = text;
        }
    }
}

/// How far it is, in a line.
pub(super) fn words(now: &TakeoverStatus) -> String {
    let mut words = vec![now.phase.clone()];
    if now.connections + now.datagram_flows != 0 {
        words.push(format!(
            "netfilter goes on with {} connections and {} flows of datagrams",
            now.connections, now.datagram_flows
        ));
    }
    words.extend(now.kube_proxy.as_ref().map(|rules| format!("of kube-proxy there is {rules}")));
    words.extend(now.waiting_for.as_ref().map(|what| format!("waits for {what}")));
    words.extend(now.problem.as_ref().map(|problem| format!("{problem}, trying again")));
    words.join("; ")
}

/// The running agent's word.
fn ask(state_dir: &Path) -> anyhow::Result<TakeoverStatus> {
    ensure!(
        status::is_alive(state_dir),
        "no agent runs here ({}): start `sluice agent --takeover`, or give its --pin-path or --state-dir",
        state_dir.display()
    );
    status::of_living(state_dir)
        .map(|status| status.takeover)
        .with_context(|| format!("the agent has not told anything yet in {}", state_dir.display()))
}

/// Waits until the agent's word is as it should be; the last one, and whether it is.
fn wait(
    state_dir: &Path,
    time: Duration,
    is_done: impl Fn(&TakeoverStatus) -> bool,
) -> anyhow::Result<(TakeoverStatus, bool)> {
    let (deadline, mut progress) = (Instant::now() + time, Progress::default());
    // An agent that starts anew is away for a moment.
    let mut away = Instant::now();
    loop {
        match ask(state_dir) {
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
        std::thread::sleep(LOOK);
    }
}

/// What was asked for is done, or not yet: text and exit code.
fn answer((now, done): (TakeoverStatus, bool)) -> (String, u8) {
    (words(&now) + "\n", u8::from(!done))
}

/// `sluice takeover`.
///
/// # Errors
///
/// When no agent runs, or kube-proxy does and its rules are to go.
pub(super) fn take_over(args: &TakeoverArgs, state_dir: &Path) -> anyhow::Result<(String, u8)> {
    let now = ask(state_dir)?;
    if args.finish {
        if let Some(pid) = running().filter(|_| !args.force) {
            bail!(
                "kube-proxy still runs (process {pid}) and would make its rules again: stop it first, for good (its DaemonSet), or give --force"
            );
        }
        ensure!(
            now.phase == "serving",
            "the agent is not serving but {}: wait for it with `sluice takeover`",
            now.phase
        );
        wish::write(state_dir, Wish::Finish).context("cannot tell the agent")?;
        let is_taken = || wish::read(state_dir) != Some(Wish::Finish);
        return wait(state_dir, args.wait, |now| {
            is_taken() && now.kube_proxy.is_none() && !now.holding
        })
        .map(answer);
    }
    // An agent that serves has nothing to take over; it only stops to be ready for kube-proxy.
    if !args.wait.is_zero() {
        wish::write(state_dir, Wish::Takeover).context("cannot tell the agent")?;
    }
    let is_taken = || {
        wish::read(state_dir)
            .is_none_or(|wish| matches!(wish, Wish::Finish | Wish::Prepare | Wish::Prepared))
    };
    wait(state_dir, args.wait, |now| is_taken() && now.phase == "serving").map(answer)
}

/// `sluice release`.
///
/// # Errors
///
/// When no agent runs, or nobody would serve new connections.
pub(super) fn release(args: &ReleaseArgs, state_dir: &Path) -> anyhow::Result<(String, u8)> {
    let now = ask(state_dir)?;
    if args.prepare {
        ensure!(now.phase == "serving", "the agent is not serving but {}", now.phase);
        wish::write(state_dir, Wish::Prepare).context("cannot tell the agent")?;
        let is_taken = || wish::read(state_dir) == Some(Wish::Prepared);
        // Our own table is not always needed for it, but then something else is waited for.
        let is_told = |now: &TakeoverStatus| now.holding || now.waiting_for.is_some();
        return wait(state_dir, Duration::from_secs(30), |now| is_taken() && is_told(now))
            .map(answer);
    }
    if served_by()?.is_none() && !args.force {
        bail!(
            "kube-proxy has no rules in this network namespace, so nobody would serve new connections: start it, wait until it has synced, and call this again; or give --force"
        );
    }
    let deadline = unix_seconds(SystemTime::now()) + args.timeout.as_secs();
    if wish::read(state_dir) != Some(Wish::Released) {
        wish::write(state_dir, Wish::Release { deadline }).context("cannot tell the agent")?;
    }
    if args.no_wait {
        return Ok(("a release was asked for\n".to_owned(), 0));
    }
    // Removing everything takes a moment after the deadline.
    let most = args.timeout + Duration::from_secs(30);
    wait(state_dir, most, |now| now.phase == RELEASED && now.waiting_for.is_none()).map(answer)
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
    fn a_line_tells_how_far_it_is() {
        let now = TakeoverStatus {
            phase: "serving".to_owned(),
            connections: 12,
            waiting_for: Some("somebody".to_owned()),
            ..TakeoverStatus::default()
        };
        assert_eq!(
            words(&now),
            "serving; netfilter goes on with 12 connections and 0 flows of datagrams; waits for somebody"
        );
    }
}
