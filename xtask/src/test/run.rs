//! One test process: streamed, counted, and killed with all its children when
//! it hangs.

use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};

use crate::artifacts::Artifact;
use crate::process::Cmd;
use crate::ui::seconds;

use super::libtest::{Counts, Reader, parse_list};
use super::tier::Tier;

/// How long a process that has exited may be survived by children that hold
/// its output open.
const LINGER: Duration = Duration::from_secs(2);

/// How often a running process is looked at.
const POLL: Duration = Duration::from_millis(50);

/// A built test binary.
pub(super) struct Binary {
    name: String,
    executable: PathBuf,
    source: PathBuf,
    package: PathBuf,
    manifest: PathBuf,
}

impl Binary {
    pub(super) fn new(artifact: &Artifact) -> Result<Self> {
        Ok(Self {
            name: artifact.target.name.clone(),
            executable: artifact.executable().context("a test binary has a file")?.clone(),
            source: artifact.target.src_path.clone(),
            package: artifact
                .manifest_path
                .parent()
                .context("a manifest has a directory")?
                .to_owned(),
            manifest: artifact.manifest_path.clone(),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn source(&self) -> &Path {
        &self.source
    }

    /// The command as `cargo test` would run it: in the package's directory.
    pub(super) fn command(&self) -> Cmd {
        Cmd::new(&self.executable)
            .dir(&self.package)
            .env("CARGO_MANIFEST_DIR", &self.package)
            .env("CARGO_MANIFEST_PATH", &self.manifest)
    }

    /// How many tests it would run.
    pub(super) fn list(&self, filter: &[String]) -> u64 {
        self.command().arg("--list").args(filter).probe().map_or(0, |output| parse_list(&output))
    }
}

/// When a tier has to be over.
pub(super) struct Limit {
    tier: Tier,
    allowed: Duration,
    end: Instant,
}

impl Limit {
    pub(super) fn new(tier: Tier, allowed: Duration) -> Self {
        Self { tier, allowed, end: Instant::now() + allowed }
    }
}

/// Runs a test process and returns its sum.
///
/// # Errors
/// When it cannot be started; everything that happens later is in the sum.
pub(super) fn run(name: &str, command: Cmd, limit: &Limit) -> Result<Counts> {
    println!("\n== {}: {name}", limit.tier);
    let mut child = spawn(command)?;
    let (sender, pieces) = mpsc::channel();
    let output = child.stdout.take().context("the child's output is piped")?;
    let _detached = thread::spawn(move || forward(output, &sender));
    let mut reader = Reader::default();
    let status = wait(&mut child, &pieces, &mut reader, limit.end)?;
    if status.is_none() {
        eprintln!(
            "\n{name}: killed, the {} tier took longer than {}",
            limit.tier,
            seconds(limit.allowed)
        );
    }
    // Whatever outlives a test binary would disturb the next one.
    kill_group(&child);
    let _last: ExitStatus = child.wait().context("cannot wait for a test process")?;
    let until = Instant::now() + LINGER;
    while let Ok(piece) = pieces.recv_timeout(until.saturating_duration_since(Instant::now())) {
        take(&mut reader, &piece)?;
    }
    if reader.is_within_line() {
        println!();
    }
    if let Some(signal) = status.and_then(|status| status.signal()) {
        eprintln!("{name}: died of signal {signal}");
    }
    Ok(reader.finish(status.is_some_and(|status| status.success())))
}

fn spawn(command: Cmd) -> Result<Child> {
    let line = command.line();
    let mut command = command.into_inner();
    let command = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // A group of its own can be killed as a whole.
        .process_group(0);
    // SAFETY: between fork and exec the closure makes one prctl call; it
    // neither allocates nor takes a lock.
    let command = unsafe {
        command.pre_exec(|| {
            // The terminal's Ctrl-C reaches only our own group; this makes the
            // test process follow us.
            set_parent_process_death_signal(Some(Signal::TERM))?;
            Ok(())
        })
    };
    command.spawn().with_context(|| format!("cannot run `{line}`"))
}

/// Copies what the process prints, in the pieces in which it comes.
fn forward(mut output: impl Read, sender: &Sender<Vec<u8>>) {
    let mut buffer = [0; 8192];
    loop {
        match output.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                let piece = buffer.get(..count).unwrap_or_default().to_vec();
                if sender.send(piece).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Streams until the process exits (its status) or the time is up (`None`).
fn wait(
    child: &mut Child,
    pieces: &Receiver<Vec<u8>>,
    reader: &mut Reader,
    end: Instant,
) -> Result<Option<ExitStatus>> {
    loop {
        match pieces.recv_timeout(POLL) {
            Ok(piece) => take(reader, &piece)?,
            Err(RecvTimeoutError::Timeout) => {}
            // It closed its output; it is about to exit.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(POLL),
        }
        if let Some(status) = child.try_wait().context("cannot wait for a test process")? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
    }
}

fn take(reader: &mut Reader, piece: &[u8]) -> Result<()> {
    reader.push(piece);
    let mut stdout = io::stdout().lock();
    stdout.write_all(piece)?;
    stdout.flush()?;
    Ok(())
}

fn kill_group(child: &Child) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(group) = group {
        // An error means that the group is gone, which is what we want.
        let _gone = kill_process_group(group, Signal::KILL);
    }
}
