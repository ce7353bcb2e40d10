//! The agent's flags for monitoring, the same as kube-proxy's.

use std::net::{IpAddr, SocketAddr};

use clap::Args;

use crate::daemon::monitor::{Detail, Settings};

/// kube-proxy's ports.
const HEALTHZ: u16 = 10_256;
const METRICS: u16 = 10_249;

#[derive(Debug, Args)]
#[command(next_help_heading = "Monitoring")]
pub(super) struct MonitorArgs {
    /// Serve /healthz and /livez at these addresses, by default on port 10256; "off" disables both.
    #[arg(
        long,
        value_name = "ADDRESS[:PORT]",
        value_delimiter = ',',
        default_value = "0.0.0.0,::",
        value_parser = healthz
    )]
    healthz_bind_address: Vec<Listen>,
    /// Serve /metrics and /proxyMode at these addresses, by default on port 10249; "off" disables
    /// both.
    #[arg(
        long,
        value_name = "ADDRESS[:PORT]",
        value_delimiter = ',',
        default_value = "127.0.0.1",
        value_parser = metrics
    )]
    metrics_bind_address: Vec<Listen>,
    /// The finest thing that has metrics of its own. Counters of Services and backends that are
    /// zero are left out.
    #[arg(long, value_enum, default_value_t, value_name = "LEVEL")]
    metrics_detail: Detail,
}

/// An address to listen on, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Listen(Option<SocketAddr>);

fn healthz(text: &str) -> Result<Listen, String> {
    listen(text, HEALTHZ)
}

fn metrics(text: &str) -> Result<Listen, String> {
    listen(text, METRICS)
}

fn listen(text: &str, port: u16) -> Result<Listen, String> {
    // For kube-proxy an empty value means "off".
    if text.is_empty() || text == "off" {
        return Ok(Listen(None));
    }
    let address = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, port));
    match address.or_else(|_| text.parse::<SocketAddr>()) {
        Ok(at) if at.port() != 0 => Ok(Listen(Some(at))),
        _ => {
            Err("expected an address with or without a port, such as 0.0.0.0, 127.0.0.1:10256 or \
                  [::1]:10256"
                .to_owned())
        }
    }
}

impl MonitorArgs {
    /// Returns what is answered, and where.
    pub(super) fn settings(&self) -> Settings {
        let all = |listens: &[Listen]| listens.iter().filter_map(|listen| listen.0).collect();
        Settings {
            healthz: all(&self.healthz_bind_address),
            metrics: all(&self.metrics_bind_address),
            detail: self.metrics_detail,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_kube_proxys_port_unless_it_says_another() {
        let at = |text: &str| Ok(Listen(Some(text.parse().expect("an address"))));
        assert_eq!(healthz("0.0.0.0"), at("0.0.0.0:10256"));
        assert_eq!(metrics("::1"), at("[::1]:10249"));
        assert_eq!(metrics("[::1]:9"), at("[::1]:9"));
        assert_eq!((healthz(""), healthz("off")), (Ok(Listen(None)), Ok(Listen(None))));
        for wrong in ["localhost", "10.0.0.1:0", "10.0.0.1:x", ":10256"] {
            assert!(healthz(wrong).is_err(), "{wrong}");
        }
    }
}
