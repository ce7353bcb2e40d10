//! The packets that are events, and the events that a listener's filter passes.

use sluice_common::abi::{Event, Flow, Ipv4Address, Listening, Tuple};
use sluice_common::event::{At, Fate, Kind, fate, kind, packet};
use sluice_common::packet::header::tcp;
use sluice_common::packet::parse::Headers;
use sluice_common::path::{Decision, Record, Verdict};
use sluice_common::{Reason, V4};

fn ipv4(last: u8) -> Ipv4Address {
    Ipv4Address { octets: [10, 0, 0, last] }
}

fn headers(tcp_flags: u8) -> Headers<V4> {
    let tuple = Tuple {
        source: ipv4(1),
        destination: ipv4(2),
        source_port: 40_000,
        destination_port: 80,
        protocol: 6,
        side: 0,
        reserved: [0; 2],
    };
    Headers { tuple, tcp_flags, length: 60, ..Headers::default() }
}

fn decision(reason: Reason, record: Record) -> Decision<V4> {
    let flow = Flow {
        source: ipv4(1),
        destination: ipv4(9),
        source_port: 40_000,
        destination_port: 8080,
        backend: 5,
        service_port: 7,
        ..Flow::default()
    };
    Decision {
        reason,
        record,
        verdict: Verdict::Translate,
        flow,
        ..Decision::pass(&headers(0).tuple)
    }
}

#[test]
fn packets_of_an_established_flow_are_no_event() {
    for record in [Record::Nothing, Record::Renew, Record::RenewEmbryonic] {
        for reason in [Reason::Forward, Reason::Reply] {
            assert_eq!(kind(&decision(reason, record), &headers(tcp::ACK)), None, "{record:?}");
        }
    }
    assert_eq!(kind(&decision(Reason::Stranger, Record::Nothing), &headers(tcp::SYN)), None);
}

#[test]
fn a_flow_has_events_when_it_opens_is_proven_and_closes() {
    for (record, flags, expected) in [
        (Record::Open, tcp::SYN, Kind::Opened),
        (Record::Establish, tcp::ACK, Kind::Opened),
        (Record::Promote, tcp::ACK, Kind::Proven),
        (Record::Renew, tcp::ACK | tcp::FIN, Kind::Closing),
        (Record::RenewEmbryonic, tcp::RST, Kind::Closing),
    ] {
        assert_eq!(
            kind(&decision(Reason::Forward, record), &headers(flags)),
            Some(expected),
            "{record:?}"
        );
    }
}

#[test]
fn whatever_is_counted_by_its_reason_is_an_event() {
    for reason in Reason::ALL {
        if !matches!(reason, Reason::Stranger | Reason::Forward | Reason::Reply) {
            assert_eq!(kind(&decision(*reason, Record::Nothing), &headers(0)), Some(Kind::Counted));
        }
    }
}

#[test]
fn a_packet_that_the_adapter_dropped_has_the_fate_dropped() {
    assert_eq!(fate(Verdict::Route, true), Fate::Dropped);
    assert_eq!(fate(Verdict::Route, false), Fate::Forwarded);
    assert_eq!(fate(Verdict::Reset, false), Fate::Rejected);
    assert_eq!(fate(Verdict::Hold, false), Fate::Held);
    assert_eq!(fate(Verdict::Pass, false), Fate::Passed);
}

fn event() -> Event {
    let mut event = Event { kind: Kind::Opened as u8, at: At::Egress as u8, ..Event::default() };
    packet(
        &mut event,
        &headers(tcp::SYN),
        &decision(Reason::Recovered, Record::Open),
        Fate::Forwarded,
    );
    event
}

#[test]
fn an_event_has_the_packet_before_and_after() {
    let event = event();
    assert_eq!(event.destination, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 2]);
    assert_eq!(event.new_destination[12..], [10, 0, 0, 9]);
    assert_eq!((event.source_port, event.destination_port), (40_000, 80));
    assert_eq!((event.new_source_port, event.new_destination_port), (40_000, 8080));
    assert_eq!((event.service_port, event.backend, event.length), (7, 5, 60));
    assert_eq!((event.family, event.protocol, event.tcp_flags), (4, 6, tcp::SYN));
    assert_eq!(Reason::from_number(event.reason.into()), Some(Reason::Recovered));
}

#[test]
fn a_filter_passes_what_fits_all_its_fields() {
    let all = Listening::default();
    let mapped = |last| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, last];
    let bit = |reason: Reason| 1_u64 << reason as u32;
    for (filter, taken) in [
        (all, true),
        (Listening { kinds: 1 << Kind::Opened as u32, ..all }, true),
        (Listening { kinds: 1 << Kind::Closing as u32, ..all }, false),
        (Listening { places: 1 << At::Egress as u32, ..all }, true),
        (Listening { places: 1 << At::Ingress as u32, ..all }, false),
        (Listening { reasons: bit(Reason::Recovered) | bit(Reason::NoRoute), ..all }, true),
        (Listening { reasons: bit(Reason::NoRoute), ..all }, false),
        (Listening { fates: 1 << Fate::Forwarded as u8, ..all }, true),
        (Listening { fates: 1 << Fate::Dropped as u8, ..all }, false),
        (Listening { protocol: 6, ..all }, true),
        (Listening { protocol: 17, ..all }, false),
        (Listening { service_ports: [3, 7, 0, 0], ..all }, true),
        (Listening { service_ports: [3, 4, 0, 0], ..all }, false),
        (Listening { port: 80, ..all }, true),
        (Listening { port: 8080, ..all }, true),
        (Listening { port: 81, ..all }, false),
        (Listening { address: mapped(1), ..all }, true),
        (Listening { address: mapped(9), ..all }, true),
        (Listening { address: mapped(3), ..all }, false),
        (Listening { address: mapped(9), port: 81, ..all }, false),
    ] {
        assert_eq!(filter.matches(&event()), taken, "{filter:?}");
    }
}

#[test]
fn listening_ends_by_itself() {
    let filter = Listening { until_ns: 5, ..Listening::default() };
    assert!(filter.is_active(4) && !filter.is_active(5));
    assert!(!Listening::default().is_active(0));
}
