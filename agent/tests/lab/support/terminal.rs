//! A terminal that keeps what a command shows.

use std::fs::File;
use std::io::Read as _;
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// The width of every screen, columns.
pub(crate) const COLUMNS: u16 = 80;
/// The height of a screen that commands write down line by line. No answer is longer.
const ENDLESS: u16 = 400;

/// The time for which a command runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Runs {
    /// It ends by itself.
    ToItsEnd,
    /// It shows a picture of this many rows that changes, and is stopped after a time.
    Picture(u16, Duration),
}

/// Runs a command on a terminal of 80 columns, and returns what stands on it at last.
pub(crate) fn screen(mut command: Command, runs: Runs) -> Result<String> {
    let rows = if let Runs::Picture(rows, _) = runs { rows } else { ENDLESS };
    let (controller, terminal) = pair(rows)?;
    let end = |terminal: &OwnedFd| terminal.try_clone().map(Stdio::from);
    let mut child = command
        .env_remove("COLUMNS")
        .env_remove("NO_COLOR")
        .env("TERM", "xterm-256color")
        .stdin(end(&terminal)?)
        .stdout(end(&terminal)?)
        .stderr(end(&terminal)?)
        .spawn()
        .context("cannot start the command on a terminal")?;
    // The command holds the terminal's other end, and so do its descriptors in `command`.
    drop((terminal, command));
    let output = read_all(controller);
    let stopped = match runs {
        Runs::ToItsEnd => None,
        Runs::Picture(_, time) => Some(time),
    };
    let size = |length| NonZero::new(length).context("a screen of no size");
    let mut parser = vt100::Parser::new(size(rows)?, size(COLUMNS)?, 0);
    if let Some(time) = stopped {
        gather(&output, &mut parser, time);
        let text = text(&parser);
        child.kill().context("cannot stop the command")?;
        let _ = child.wait()?;
        return Ok(text);
    }
    let deadline = Instant::now() + Duration::from_mins(1);
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill().context("cannot stop the command")?;
            let _ = child.wait()?;
            anyhow::bail!("the command has not ended after a minute:\n{}", text(&parser));
        }
        gather(&output, &mut parser, Duration::from_millis(20));
    }
    while let Ok(bytes) = output.recv_timeout(Duration::from_secs(5)) {
        parser.process(&bytes);
    }
    let (row, _) = parser.screen().cursor_position();
    ensure!(row + 1 < ENDLESS, "the answer has {ENDLESS} lines or more");
    Ok(text(&parser))
}

/// Returns both ends of a new terminal: that of its keyboard and screen, and that of programs.
fn pair(rows: u16) -> Result<(File, OwnedFd)> {
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .context("cannot make a terminal")?;
    grantpt(&controller)?;
    unlockpt(&controller)?;
    let name = ptsname(&controller, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let terminal = open(&name, flags, Mode::empty()).context("cannot open the terminal")?;
    let size = Winsize { ws_row: rows, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&controller, size)?;
    Ok((controller.into(), terminal))
}

/// Reads a terminal until no program has it open.
fn read_all(mut controller: File) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    let _reader = spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = controller.read(&mut buffer) {
            if sender.send(buffer.get(..length).unwrap_or_default().to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Lets what a terminal shows reach the parser for a time.
fn gather(output: &Receiver<Vec<u8>>, parser: &mut vt100::Parser, time: Duration) {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        match output.recv_timeout(left) {
            Ok(bytes) => parser.process(&bytes),
            Err(_) => sleep(end.saturating_duration_since(Instant::now()).min(time)),
        }
    }
}

fn text(parser: &vt100::Parser) -> String {
    let lines = parser.screen().rows(0, COLUMNS);
    let text: Vec<String> = lines.map(|line| line.trim_end().to_owned()).collect();
    text.join("\n").trim_end().to_owned() + "\n"
}
