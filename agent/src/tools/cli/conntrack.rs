//! The agent's flags for the kernel's connection tracking, as kube-proxy has them.

use std::time::Duration;

use clap::Args;

use crate::node::conntrack::limits::Limits;

#[derive(Clone, Copy, Debug, Args)]
#[command(
    next_help_heading = "Connection tracking of the kernel (what is not given stays as it is)"
)]
pub(super) struct ConntrackArgs {
    /// Connections for each CPU; 0: as it is.
    #[arg(long = "conntrack-max-per-core", value_name = "NUMBER")]
    max_per_core: Option<u32>,
    /// Connections at least, where --conntrack-max-per-core is given.
    #[arg(long = "conntrack-min", value_name = "NUMBER")]
    min: Option<u32>,
    /// Take TCP segments outside of the window for valid.
    #[arg(long = "conntrack-tcp-be-liberal",
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    tcp_be_liberal: bool,
    /// How long an idle TCP connection is remembered, as 24h0m0s; 0s: as it is.
    #[arg(long = "conntrack-tcp-timeout-established", value_name = "TIME", value_parser = time)]
    tcp_timeout_established: Option<Duration>,
    /// How long one is that the peer has closed.
    #[arg(long = "conntrack-tcp-timeout-close-wait", value_name = "TIME", value_parser = time)]
    tcp_timeout_close_wait: Option<Duration>,
    /// How long a UDP flow without an answer is.
    #[arg(long = "conntrack-udp-timeout", value_name = "TIME", value_parser = time)]
    udp_timeout: Option<Duration>,
    /// How long a UDP flow with answers is.
    #[arg(long = "conntrack-udp-timeout-stream", value_name = "TIME", value_parser = time)]
    udp_timeout_stream: Option<Duration>,
}

/// A time as Go writes it.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|time| Duration::try_from(time).ok())
        .ok_or_else(|| "a time is wanted, as 90s, 24h or 1h30m0s".to_owned())
}

impl ConntrackArgs {
    /// What is to be set.
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
