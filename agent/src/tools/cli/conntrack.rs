//! The agent's flags for the kernel's connection tracking, the same as kube-proxy's.

use std::time::Duration;

use clap::Args;

use crate::node::conntrack::limits::Limits;

#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Kernel connection tracking (unchanged unless given)")]
pub(super) struct ConntrackArgs {
    /// Maximum number of tracked connections per CPU; 0 leaves the limit unchanged.
    #[arg(long = "conntrack-max-per-core", value_name = "NUMBER")]
    max_per_core: Option<u32>,
    /// Minimum for the limit that --conntrack-max-per-core sets.
    #[arg(long = "conntrack-min", value_name = "NUMBER")]
    min: Option<u32>,
    /// Treat TCP segments outside of the window as valid.
    #[arg(long = "conntrack-tcp-be-liberal",
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    tcp_be_liberal: bool,
    /// Timeout of idle TCP connections, such as 24h0m0s; 0s leaves it unchanged.
    #[arg(long = "conntrack-tcp-timeout-established", value_name = "TIME", value_parser = time)]
    tcp_timeout_established: Option<Duration>,
    /// Timeout of TCP connections that the peer has closed.
    #[arg(long = "conntrack-tcp-timeout-close-wait", value_name = "TIME", value_parser = time)]
    tcp_timeout_close_wait: Option<Duration>,
    /// Timeout of UDP flows without a reply.
    #[arg(long = "conntrack-udp-timeout", value_name = "TIME", value_parser = time)]
    udp_timeout: Option<Duration>,
    /// Timeout of UDP flows with replies.
    #[arg(long = "conntrack-udp-timeout-stream", value_name = "TIME", value_parser = time)]
    udp_timeout_stream: Option<Duration>,
}

/// Parses a duration as Go writes it.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|time| Duration::try_from(time).ok())
        .ok_or_else(|| "expected a duration such as 90s, 24h or 1h30m0s".to_owned())
}

impl ConntrackArgs {
    /// Returns the settings to apply.
    pub(super) fn limits(self) -> Limits {
        Limits {
            max_per_core: self.max_per_core,
            min: self.min,
            tcp_be_liberal: self.tcp_be_liberal,
            tcp_established: self.tcp_timeout_established,
            tcp_close_wait: self.tcp_timeout_close_wait,
            udp: self.udp_timeout,
            udp_stream: self.udp_timeout_stream,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_go_has_them() {
        for (text, seconds) in
            [("24h0m0s", 86_400), ("1h", 3_600), ("90s", 90), ("0s", 0), ("0", 0)]
        {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(time("1.5h"), Ok(Duration::from_mins(90)));
        for wrong in ["", "5", "-1h", "soon"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }
}
