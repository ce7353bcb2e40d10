//! The agent's log, and how much it says: changed while it runs, as Kubernetes' components do it.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// The one log of this process.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// The log's form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The filter of a verbosity: 0 as it is by default, 1 more, from 2 on everything.
fn filter(verbosity: u8) -> &'static str {
    match verbosity {
        0 => "info",
        1 => "info,sluice=debug",
        _ => "debug,sluice=trace",
    }
}

/// Starts the log. The variable `SLUICE_LOG` goes before the verbosity.
pub(crate) fn start(verbosity: u8, format: LogFormat) {
    let chosen =
        EnvFilter::try_from_env("SLUICE_LOG").unwrap_or_else(|_| EnvFilter::new(filter(verbosity)));
    let (chosen, handle) = reload::Layer::new(chosen);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => {
            lines.with_target(false).with_ansi(std::io::stderr().is_terminal()).boxed()
        }
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    // A process starts one log: whoever has started another before keeps it.
    if tracing_subscriber::registry().with(chosen).with(lines).try_init().is_ok() {
        let _ = FILTER.set(handle);
    }
}

/// Says as much as a verbosity asks for from now on; until the agent starts anew.
///
/// # Errors
///
/// When this process has started no log.
pub(crate) fn set(verbosity: u8) -> Result<(), String> {
    let handle = FILTER.get().ok_or("this process has no log of its own")?;
    handle.reload(EnvFilter::new(filter(verbosity))).map_err(|error| error.to_string())
}
