//! Progress for people: a spinner on a terminal, plain lines elsewhere. All of it goes to stderr;
//! results go to stdout.

use std::cell::Cell;
use std::fmt::Display;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// The interval at which a long step reports without a terminal that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// A step of a command, with a name, a time, and one line when it is done.
pub struct Step {
    name: String,
    started: Instant,
    spinner: Option<ProgressBar>,
    spoke: Cell<Instant>,
}

impl Step {
    /// Starts a step that takes seconds.
    pub fn start(name: impl Into<String>) -> Self {
        let name = name.into();
        let now = Instant::now();
        let spinner = io::stderr().is_terminal().then(|| {
            let spinner = ProgressBar::new_spinner().with_prefix(name.clone());
            spinner.set_style(style());
            spinner.enable_steady_tick(Duration::from_millis(120));
            spinner
        });
        Self { name, started: now, spinner, spoke: Cell::new(now) }
    }

    /// Starts a step that takes so long that even plain output announces it.
    pub fn start_long(name: impl Into<String>) -> Self {
        let step = Self::start(name);
        if step.spinner.is_none() {
            eprintln!("{} ...", step.name);
        }
        step
    }

    /// Shows what the step is doing.
    pub fn note(&self, text: &str) {
        if let Some(spinner) = &self.spinner {
            spinner.set_message(text.to_owned());
        } else if self.spoke.get().elapsed() >= HEARTBEAT {
            self.spoke.set(Instant::now());
            eprintln!("{}: {} so far: {text}", self.name, seconds(self.started.elapsed()));
        }
    }

    /// Clears the line for output of another kind.
    pub fn interrupt(&self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }

    /// Ends the step and prints its line.
    pub fn done(self, outcome: impl Display) {
        self.interrupt();
        eprintln!("{}: {outcome} ({})", self.name, seconds(self.started.elapsed()));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.interrupt();
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg:.dim}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
}

/// Formats a duration for people: `0.4 s`, `63 s`, `4 min 10 s`.
pub fn seconds(duration: Duration) -> String {
    let whole = duration.as_secs();
    match whole {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..120 => format!("{whole} s"),
        _ => format!("{} min {} s", whole / 60, whole % 60),
    }
}

/// Formats a size for people: `812 B`, `17.3 KiB`, `21.0 MiB`.
pub fn bytes(count: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "a rounded figure for people")]
    let count_f = count as f64;
    match count {
        0..1024 => format!("{count} B"),
        1024..1_048_576 => format!("{:.1} KiB", count_f / 1024.0),
        _ => format!("{:.1} MiB", count_f / 1_048_576.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_are_rounded_for_people() {
        assert_eq!(seconds(Duration::from_millis(440)), "0.4 s");
        assert_eq!(seconds(Duration::from_secs(63)), "63 s");
        assert_eq!(seconds(Duration::from_secs(250)), "4 min 10 s");
        assert_eq!(bytes(812), "812 B");
        assert_eq!(bytes(17_715), "17.3 KiB");
        assert_eq!(bytes(22_020_096), "21.0 MiB");
    }
}
