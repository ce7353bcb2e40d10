//! Events of the programs in words, and filters for them: `sluice trace`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use serde::Serialize;
use sluice_common::Reason;
use sluice_common::abi::{Event, Listening};
use sluice_common::event::{At, Fate, Kind};
use sluice_common::packet::header::tcp;

use crate::node::view::{PortName, protocol};

/// The names of service ports.
pub(crate) type Names = BTreeMap<u32, PortName>;

/// A filter for events. An empty field matches everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    /// `name`, `namespace/name` or either with `:port`.
    pub(crate) service: Option<String>,
    /// A network of one of the four addresses.
    pub(crate) network: Option<IpNet>,
    /// One of the four ports.
    pub(crate) port: Option<u16>,
    /// An IP protocol number.
    pub(crate) protocol: Option<u8>,
    pub(crate) reasons: Vec<Reason>,
    pub(crate) places: Vec<At>,
    pub(crate) kinds: Vec<Kind>,
    pub(crate) fates: Vec<Fate>,
}

impl Filter {
    /// Returns the part of the filter that the programs can apply. It may match more than the
    /// filter.
    pub(crate) fn sieve(&self, names: &Names) -> Listening {
        let mut sieve = Listening {
            reasons: self.reasons.iter().fold(0, |bits, reason| bits | 1 << *reason as u32),
            kinds: self.kinds.iter().fold(0, |bits, kind| bits | 1 << *kind as u32),
            places: self.places.iter().fold(0, |bits, at| bits | 1 << *at as u32),
            fates: self.fates.iter().fold(0, |bits, fate| bits | 1 << *fate as u8),
            port: self.port.unwrap_or_default(),
            protocol: self.protocol.unwrap_or_default(),
            ..Listening::default()
        };
        if let Some(network) = self.network
            && network.prefix_len() == network.max_prefix_len()
        {
            sieve.address = wide(network.addr());
        }
        let own = self.service_ports(names);
        if !own.is_empty() && own.len() <= sieve.service_ports.len() {
            for (place, id) in sieve.service_ports.iter_mut().zip(own) {
                *place = id;
            }
        }
        sieve
    }

    /// Returns the service ports of the filter's service.
    pub(crate) fn service_ports(&self, names: &Names) -> BTreeSet<u32> {
        let Some(word) = &self.service else { return BTreeSet::new() };
        names.iter().filter(|(_, name)| name.is(word)).map(|(id, _)| *id).collect()
    }

    /// Whether an event matches.
    pub(crate) fn takes(&self, event: &Event, names: &Names) -> bool {
        let sieve = Listening { service_ports: [0; 4], ..self.sieve(&Names::new()) };
        let addresses = [event.source, event.destination, event.new_source, event.new_destination];
        sieve.matches(event)
            && self.network.is_none_or(|network| {
                addresses.iter().any(|address| network.contains(&narrow(*address, event.family)))
            })
            && self
                .service
                .as_ref()
                .is_none_or(|word| names.get(&event.service_port).is_some_and(|name| name.is(word)))
    }
}

fn wide(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn narrow(address: [u8; 16], family: u8) -> IpAddr {
    let address = Ipv6Addr::from(address);
    if family == 4 { address.to_canonical() } else { IpAddr::V6(address) }
}

/// An event in words, as one line of `sluice trace -o json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Line {
    /// The time, as in RFC 3339.
    pub(crate) time: String,
    /// The fate of the packet: `passed`, `forwarded`, `rejected`, `dropped` or `held`.
    pub(crate) fate: &'static str,
    /// The kind of event: `opened`, `proven`, `closing`, `counted` or `call`.
    pub(crate) kind: &'static str,
    /// The hook: `ingress`, `egress`, `xdp`, `connect` or `send`.
    pub(crate) hook: &'static str,
    /// The name of the reason.
    pub(crate) reason: &'static str,
    pub(crate) protocol: String,
    /// Absent for a call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<SocketAddr>,
    pub(crate) destination: SocketAddr,
    /// Absent for a call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) new_source: Option<SocketAddr>,
    pub(crate) new_destination: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) service: Option<PortName>,
    /// The endpoint that the flow leads to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) backend: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) process: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) command: Option<String>,
    /// The length in bytes, from the IP header on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) length: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tcp_flags: Vec<&'static str>,
}

impl Line {
    /// Puts an event in words, given the programs' clock and ours at one moment, and the names of
    /// devices.
    pub(crate) fn new(
        event: &Event,
        names: &Names,
        (now_ns, now): (u64, SystemTime),
        device: impl Fn(u32) -> String,
    ) -> Self {
        let at = now
            .checked_sub(Duration::from_nanos(now_ns.saturating_sub(event.time_ns)))
            .unwrap_or(now);
        let end =
            |address: [u8; 16], port: u16| SocketAddr::from((narrow(address, event.family), port));
        let is_call = event.kind == Kind::Call as u8;
        let backend = if event.is_reply() {
            end(event.source, event.source_port)
        } else {
            end(event.new_destination, event.new_destination_port)
        };
        Self {
            time: jiff::Timestamp::try_from(at)
                .map(|time| format!("{time:.6}"))
                .unwrap_or_default(),
            fate: Fate::from_number(event.fate).map_or("?", Fate::as_str),
            kind: Kind::from_number(event.kind).map_or("?", Kind::as_str),
            hook: At::from_number(event.at).map_or("?", At::as_str),
            reason: Reason::from_number(event.reason.into()).map_or("?", Reason::as_str),
            protocol: protocol(event.protocol),
            source: (!is_call).then(|| end(event.source, event.source_port)),
            destination: end(event.destination, event.destination_port),
            new_source: (!is_call).then(|| end(event.new_source, event.new_source_port)),
            new_destination: end(event.new_destination, event.new_destination_port),
            service: names.get(&event.service_port).cloned(),
            backend: (event.backend != 0).then_some(backend),
            device: (!is_call).then(|| device(event.ifindex)),
            process: is_call.then_some(event.process),
            command: is_call.then(|| {
                let end =
                    event.command.iter().position(|byte| *byte == 0).unwrap_or(event.command.len());
                String::from_utf8_lossy(event.command.get(..end).unwrap_or_default()).into_owned()
            }),
            length: (!is_call).then_some(event.length),
            tcp_flags: words(event.tcp_flags),
        }
    }

    /// The columns' names and widths.
    pub(crate) const COLUMNS: [(&'static str, usize); 10] = [
        ("TIME", 15),
        ("FATE", 9),
        ("KIND", 7),
        ("HOOK", 7),
        ("PROTO", 5),
        ("FROM", 21),
        ("TO", 18),
        ("BECOMES", 18),
        ("SERVICE", 16),
        ("REASON", 0),
    ];

    /// Returns the cells of a row.
    pub(crate) fn cells(&self) -> [String; 10] {
        let clock = self.time.split_once('T').map_or("", |(_, clock)| clock.trim_end_matches('Z'));
        let who = match (self.source, &self.command) {
            (Some(source), _) => source.to_string(),
            (None, command) => {
                format!(
                    "{}[{}]",
                    command.as_deref().unwrap_or("?"),
                    self.process.unwrap_or_default()
                )
            }
        };
        let (source, destination) =
            (self.new_source != self.source, self.new_destination != self.destination);
        let new_source = self.new_source.map(|end| end.to_string()).unwrap_or_default();
        let becomes = match (source, destination) {
            (false, false) => String::new(),
            (false, true) => self.new_destination.to_string(),
            (true, false) => format!("{new_source} >"),
            (true, true) => format!("{new_source} > {}", self.new_destination),
        };
        let service = self.service.as_ref().map(ToString::to_string);
        [
            clock.to_owned(),
            self.fate.to_owned(),
            self.kind.to_owned(),
            self.hook.to_owned(),
            self.protocol.clone(),
            who,
            self.destination.to_string(),
            becomes,
            service.unwrap_or_default(),
            self.reason.to_owned(),
        ]
    }
}

/// Returns the names of TCP flags.
fn words(flags: u8) -> Vec<&'static str> {
    [(tcp::SYN, "SYN"), (tcp::ACK, "ACK"), (tcp::FIN, "FIN"), (tcp::RST, "RST")]
        .into_iter()
        .filter(|(bit, _)| flags & bit != 0)
        .map(|(_, word)| word)
        .collect()
}

#[cfg(test)]
mod tests {
    use sluice_common::abi::flow;

    use super::*;

    fn name(service: &str) -> PortName {
        PortName {
            namespace: "shop".to_owned(),
            service: service.to_owned(),
            label: "http".to_owned(),
            port: 80,
            protocol: "TCP".to_owned(),
        }
    }

    fn address(text: &str) -> [u8; 16] {
        wide(text.parse().expect("an address"))
    }

    fn event() -> Event {
        Event {
            time_ns: 1_000_000_000,
            source: address("10.244.1.7"),
            destination: address("10.96.0.10"),
            new_source: address("10.244.1.7"),
            new_destination: address("10.244.2.9"),
            source_port: 40_000,
            destination_port: 80,
            new_source_port: 40_000,
            new_destination_port: 8080,
            service_port: 3,
            backend: 5,
            ifindex: 4,
            length: 60,
            kind: Kind::Opened as u8,
            at: At::Ingress as u8,
            reason: Reason::Forward as u8,
            fate: Fate::Forwarded as u8,
            family: 4,
            protocol: 6,
            tcp_flags: tcp::SYN,
            ..Event::default()
        }
    }

    fn names() -> Names {
        [(3, name("web")), (4, name("mail"))].into()
    }

    fn line(event: &Event) -> Line {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        Line::new(event, &names(), (3_500_000_000, now), |index| format!("veth{index}"))
    }

    #[test]
    fn a_packet_is_printed_with_names_and_the_time_of_the_clock() {
        let line = line(&event());
        assert_eq!(line.time, "1970-01-01T00:01:37.500000Z");
        assert_eq!(
            line.cells().join(" "),
            "00:01:37.500000 forwarded opened ingress TCP 10.244.1.7:40000 10.96.0.10:80 10.244.2.9:8080 shop/web:http forward"
        );
        assert_eq!(line.backend, "10.244.2.9:8080".parse().ok());
        assert_eq!(line.device.as_deref(), Some("veth4"));
        assert_eq!(line.tcp_flags, ["SYN"]);
    }

    #[test]
    fn a_reply_is_printed_with_its_new_source_and_its_backend_is_where_it_came_from() {
        let event = Event {
            source: event().new_destination,
            source_port: 8080,
            destination: event().source,
            destination_port: 40_000,
            new_source: event().destination,
            new_source_port: 80,
            new_destination: event().source,
            new_destination_port: 40_000,
            flags: flow::REPLY,
            ..event()
        };
        let line = line(&event);
        assert_eq!(line.cells()[7], "10.96.0.10:80 >");
        assert_eq!(line.backend, "10.244.2.9:8080".parse().ok());
    }

    #[test]
    fn a_call_is_printed_with_its_process_instead_of_a_source() {
        let mut command = [0; 16];
        command[..4].copy_from_slice(b"curl");
        let event = Event {
            kind: Kind::Call as u8,
            at: At::Connect as u8,
            process: 77,
            command,
            ..event()
        };
        let line = line(&event);
        assert_eq!(line.cells()[5], "curl[77]");
        assert_eq!((line.source, line.device), (None, None));
    }

    #[test]
    fn an_ipv6_address_that_looks_like_a_mapped_one_stays_what_it_is() {
        assert_eq!(narrow(address("10.0.0.1"), 4).to_string(), "10.0.0.1");
        assert_eq!(narrow(address("10.0.0.1"), 6).to_string(), "::ffff:10.0.0.1");
    }

    #[test]
    fn the_sieve_lets_through_whatever_the_filter_takes() {
        let net = |text: &str| Some(text.parse().expect("a network"));
        let all = Filter::default();
        for (filter, taken) in [
            (all.clone(), true),
            (Filter { service: Some("web".to_owned()), ..all.clone() }, true),
            (Filter { service: Some("mail".to_owned()), ..all.clone() }, false),
            (Filter { network: net("10.96.0.0/16"), ..all.clone() }, true),
            (Filter { network: net("10.244.2.9/32"), ..all.clone() }, true),
            (Filter { network: net("10.97.0.0/16"), ..all.clone() }, false),
            (Filter { network: net("fd00::/8"), ..all.clone() }, false),
            (Filter { port: Some(8080), protocol: Some(6), ..all.clone() }, true),
            (Filter { protocol: Some(17), ..all.clone() }, false),
            (Filter { reasons: vec![Reason::Forward, Reason::NoRoute], ..all.clone() }, true),
            (Filter { reasons: vec![Reason::NoRoute], ..all.clone() }, false),
            (Filter { fates: vec![Fate::Dropped, Fate::Rejected], ..all.clone() }, false),
            (Filter { places: vec![At::Ingress], kinds: vec![Kind::Opened], ..all.clone() }, true),
        ] {
            assert_eq!(filter.takes(&event(), &names()), taken, "{filter:?}");
            assert!(!taken || filter.sieve(&names()).matches(&event()), "{filter:?}");
        }
    }

    #[test]
    fn a_service_with_many_ports_is_sorted_out_here_alone() {
        let names: Names = (1..=5).map(|id| (id, name("web"))).collect();
        let filter = Filter { service: Some("web".to_owned()), ..Filter::default() };
        assert_eq!(filter.sieve(&names).service_ports, [0; 4]);
        let few: Names = names.into_iter().take(2).collect();
        assert_eq!(filter.sieve(&few).service_ports, [1, 2, 0, 0]);
    }
}
