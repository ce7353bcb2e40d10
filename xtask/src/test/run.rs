//! Runs one test process: reads and counts its output, and kills it with all its children when it
//! hangs.

use std::fs;
use std::io::{self, PipeReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process_group, set_parent_process_death_signal, waitid,
};
use sluice_cluster::process::Cmd;
use sluice_cluster::ui::seconds;

use super::libtest::{Counts, Reader};

/// The longest time that children of a process that has exited may keep its output open.
const LINGER: Duration = Duration::from_secs(2);

/// The interval at which a running process is checked.
const POLL: Duration = Duration::from_millis(50);

/// The outcome of a test process.
pub(super) struct Finished {
    pub(super) counts: Counts,
    /// Its output, unless that was shown at once.
    pub(super) output: Vec<u8>,
    pub(super) elapsed: Duration,
    /// The processor time of the process and of the children that it has waited for.
    pub(super) busy: Duration,
}

/// Runs a test process to its end, for at most `allowed`.
///
/// # Errors
/// If it cannot be started; everything that happens later is part of the result.
pub(super) fn run(command: Cmd, allowed: Duration, shown: Shown) -> Result<Finished> {
    let started = Instant::now();
    let (mut child, output) = spawn(command)?;
    let (sender, pieces) = mpsc::channel();
    let _detached = thread::spawn(move || forward(output, &sender));
    let mut printed = Printed { reader: Reader::default(), output: Vec::new(), shown };
    let has_ended = wait(&child, &pieces, &mut printed, started + allowed)?;
    // Whatever outlives a test binary would disturb others.
    kill_group(&child);
    let busy = if has_ended { processor_time(&child) } else { None }.unwrap_or_default();
    let last = child.wait().context("cannot wait for a test process")?;
    let status = has_ended.then_some(last);
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
    Ok(Finished { counts, output: printed.output, elapsed: started.elapsed(), busy })
}

/// The time at which the output of a process is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// As it arrives.
    Now,
    /// After the process has ended, by the caller.
    Later,
}

/// The output of a process so far.
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

/// Starts a process and returns it with a pipe for everything it prints.
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
            // The terminal's Ctrl-C reaches only our own group; this lets the test process end
            // with us.
            set_parent_process_death_signal(Some(Signal::TERM))?;
            Ok(())
        })
    };
    let child = command.spawn().with_context(|| format!("cannot run `{line}`"))?;
    Ok((child, output))
}

/// Passes on the output of a process, in the pieces in which it arrives.
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

/// Streams until the process has exited or the time is up, and returns whether it has exited. The
/// process is not reaped.
fn wait(
    child: &Child,
    pieces: &Receiver<Vec<u8>>,
    printed: &mut Printed,
    end: Instant,
) -> Result<bool> {
    let pid = pid_of(child).context("a process without an id")?;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    loop {
        match pieces.recv_timeout(POLL) {
            Ok(piece) => printed.take(&piece)?,
            Err(RecvTimeoutError::Timeout) => {}
            // It closed its output; it is about to exit.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(POLL),
        }
        let exited = waitid(WaitId::Pid(pid), options).context("cannot wait for a test process")?;
        if exited.is_some() {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
    }
}

/// Returns the processor time of a process that has ended and is not reaped yet, with that of its
/// children as far as it has waited for them: fields 14 to 17 of proc_pid_stat(5).
fn processor_time(child: &Child) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).ok()?;
    // The command name, in parentheses, may contain anything; field 14 is the 12th after it.
    let fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).take(4);
    let ticks: u64 = fields.map(|field| field.parse::<u64>().unwrap_or_default()).sum();
    Some(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

fn pid_of(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

fn kill_group(child: &Child) {
    if let Some(group) = pid_of(child) {
        // An error means that the group is gone, which is what we want.
        let _gone = kill_process_group(group, Signal::KILL);
    }
}
