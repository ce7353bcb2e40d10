//! The agent's log. Its verbosity can change while it runs, as in Kubernetes' components.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// The handle to this process's only log.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// The format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Returns the filter of a verbosity: 0 is the default, 1 logs more, and 2 or more everything.
/// The source has its own lines about requests that fail.
fn filter(verbosity: u8) -> &'static str {
    match verbosity {
        0 => "info,kube_client=error,kube_runtime=error",
        1 => "info,kube_client=error,kube_runtime=error,sluice=debug",
        _ => "debug,sluice=trace",
    }
}

/// Starts the log. The variable `SLUICE_LOG` takes precedence over the verbosity.
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
    // A process has one log. If another was started before, it stays.
    if tracing_subscriber::registry().with(chosen).with(lines).try_init().is_ok() {
        let _ = FILTER.set(handle);
    }
}

/// Sets the verbosity until the agent restarts.
///
/// # Errors
///
/// Fails if this process has not started a log.
pub(crate) fn set(verbosity: u8) -> Result<(), String> {
    let handle = FILTER.get().ok_or("this process has not started a log")?;
    handle.reload(EnvFilter::new(filter(verbosity))).map_err(|error| error.to_string())
}
