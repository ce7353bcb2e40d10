//! One test process: read, counted, and killed with all its children when it hangs.

use std::io::{self, PipeReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};
use sluice_cluster::process::Cmd;
use sluice_cluster::ui::seconds;

use super::libtest::{Counts, Reader};

/// How long a process that has exited may be survived by children that hold
/// its output open.
const LINGER: Duration = Duration::from_secs(2);

/// How often a running process is looked at.
const POLL: Duration = Duration::from_millis(50);

/// What became of a test process.
pub(super) struct Finished {
    pub(super) counts: Counts,
    /// What it printed, where it was not shown at once.
    pub(super) output: Vec<u8>,
    pub(super) elapsed: Duration,
}

/// Runs a test process to its end, for at most `allowed`.
///
/// # Errors
/// When it cannot be started; everything that happens later is in the sum.
pub(super) fn run(command: Cmd, allowed: Duration, shown: Shown) -> Result<Finished> {
    let started = Instant::now();
    let (mut child, output) = spawn(command)?;
    let (sender, pieces) = mpsc::channel();
    let _detached = thread::spawn(move || forward(output, &sender));
    let mut printed = Printed { reader: Reader::default(), output: Vec::new(), shown };
    let status = wait(&mut child, &pieces, &mut printed, started + allowed)?;
    // Whatever outlives a test binary would disturb others.
    kill_group(&child);
    let _last: ExitStatus = child.wait().context("cannot wait for a test process")?;
    let until = Instant::now() + LINGER;
    while let Ok(piece) = pieces.recv_timeout(until.saturating_duration_since(Instant::now())) {
        printed.take(&piece)?;
    }
    if printed.reader.is_within_line() {
        printed.show(b"\n")?;
    }
    let note = match status {
        None => Some(format!("killed: it took longer than {}\n", seconds(allowed))),
        Some(status) => status.signal().map(|signal| format!("died of signal {signal}\n")),
    };
    printed.show(note.unwrap_or_default().as_bytes())?;
    let counts = printed.reader.finish(status.is_some_and(|status| status.success()));
    Ok(Finished { counts, output: printed.output, elapsed: started.elapsed() })
}

/// When a process's output is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// As it comes.
    Now,
    /// When the process has ended, by the caller.
    Later,
}

/// What a process has printed so far.
struct Printed {
    reader: Reader,
    output: Vec<u8>,
    shown: Shown,
}

impl Printed {
    fn take(&mut self, piece: &[u8]) -> Result<()> {
        self.reader.push(piece);
        self.show(piece)
    }

    fn show(&mut self, text: &[u8]) -> Result<()> {
        match self.shown {
            Shown::Now => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(text)?;
                stdout.flush()?;
            }
            Shown::Later => self.output.extend_from_slice(text),
        }
        Ok(())
    }
}

/// Starts a process, and returns where everything that it prints can be read.
fn spawn(command: Cmd) -> Result<(Child, PipeReader)> {
    let line = command.line();
    let (output, writer) = io::pipe().context("cannot make a pipe")?;
    let errors = writer.try_clone().context("cannot copy a pipe")?;
    let mut command = command.into_inner();
    let command = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors)
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
    let child = command.spawn().with_context(|| format!("cannot run `{line}`"))?;
    Ok((child, output))
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
    printed: &mut Printed,
    end: Instant,
) -> Result<Option<ExitStatus>> {
    loop {
        match pieces.recv_timeout(POLL) {
            Ok(piece) => printed.take(&piece)?,
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

fn kill_group(child: &Child) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(group) = group {
        // An error means that the group is gone, which is what we want.
        let _gone = kill_process_group(group, Signal::KILL);
    }
}
