//! Prints cases, and the differences between an outcome and its expectation.
//!
//! A case prints as a person would draw it:
//!
//! ```text
//! IPv4 TCP: the first packet opens a flow
//!   8.0.1.7:40001 > 8.0.96.10:80 S  =>  8.0.1.7:40001 > 8.0.2.3:8080 S (forward, opens)
//!   tc_ingress_l2 on device 11
//!   frontend 8.0.96.10:80 TCP, ClusterIP: service port 1
//!   service port 1: backends [1]
//!   backend 1: 8.0.2.3:8080 of service port 1, local, serving
//!   leaves embryonic 8.0.1.7:40001 > 8.0.96.10:80 becomes 8.0.1.7:40001 > 8.0.2.3:8080; ...
//! ```

use std::fmt::{self, Display, Formatter, Write};
use std::net::{IpAddr, SocketAddr};

use sluice_common::abi::{Flow, Range, Service, Settings, Tuple, backend, frontend};

use super::case::{Case, Counted, End, Outcome};
use super::frame::{ACK, FIN, PSH, RST, SCTP, SYN, TCP, UDP};
use super::world::{Flows, World};

impl Display for Case {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.name)?;
        writeln!(f, "  {}  =>  {}", packet(&self.input), result(&self.input, &self.expected))?;
        write!(f, "  {} on device {}", self.program.name(), self.ifindex)?;
        if self.came_by != 0 {
            write!(f, ", came in by device {}", self.came_by)?;
        }
        writeln!(f, "{}", if self.partial { ", checksum left to the device" } else { "" })?;
        write!(f, "{}", self.world)?;
        changes(f, "flows", &self.world.flows, &self.expected.flows)?;
        changes(f, "embryonic", &self.world.embryonic, &self.expected.embryonic)
    }
}

/// Describes what becomes of a packet, and how it is counted.
fn result(input: &[u8], outcome: &Outcome) -> String {
    let becomes = match outcome.end {
        End::Drop | End::XdpDrop => "dropped".to_owned(),
        End::Next | End::Redirect | End::XdpPass if outcome.frame == input => {
            "unchanged".to_owned()
        }
        End::Next | End::Redirect | End::XdpPass => packet(&outcome.frame),
    };
    let mut notes: Vec<String> = outcome.counted.iter().flatten().map(counted).collect();
    notes.extend(outcome.failed.iter().map(|(_, failure)| format!("fails: {}", failure.as_str())));
    if outcome.end == End::Redirect {
        notes.push("redirected".to_owned());
    }
    if notes.is_empty() { becomes } else { format!("{becomes} ({})", notes.join(", ")) }
}

fn counted(counted: &Counted) -> String {
    match counted {
        Counted::Reason { reason, .. } => reason.as_str().to_owned(),
        Counted::Forward { opened: true, .. } => "forward, opens".to_owned(),
        Counted::Forward { opened: false, .. } => "forward".to_owned(),
        Counted::Reply { .. } => "reply".to_owned(),
    }
}

/// Prints the entries that a packet leaves in a map, if it changes any.
fn changes(f: &mut Formatter<'_>, map: &str, before: &Flows, after: &Flows) -> fmt::Result {
    if before == after {
        return Ok(());
    }
    for (key, flow) in after {
        writeln!(f, "  leaves {map} {}", entry(key, flow))?;
    }
    if after.is_empty() {
        writeln!(f, "  leaves {map} empty")?;
    }
    Ok(())
}

/// Prints the entries that decide about packets, one a line.
impl Display for World {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (key, Service { service_port, kind, .. }) in &self.services {
            let at = SocketAddr::new(key.address, key.port);
            let (protocol, kind) = (protocol(key.protocol), kind_word(*kind));
            writeln!(f, "  frontend {at} {protocol}, {kind}: service port {service_port}")?;
        }
        for (id, port) in &self.ports {
            let [internal, inside, outside] = port.ranges.map(|range| self.backends_of(range));
            write!(f, "  service port {id}: backends {internal:?}")?;
            if internal != inside || internal != outside {
                write!(
                    f,
                    ", {inside:?} at external addresses from inside, {outside:?} from outside"
                )?;
            }
            if port.affinity_seconds != 0 {
                write!(f, ", affinity {} s", port.affinity_seconds)?;
            }
            writeln!(
                f,
                "{}",
                if port.flags == 0 { String::new() } else { format!(", flags {:#x}", port.flags) }
            )?;
        }
        for (id, found) in &self.backends {
            let at = SocketAddr::new(found.address, found.port);
            write!(f, "  backend {id}: {at} of service port {}", found.service_port)?;
            let place = if found.flags & backend::LOCAL == 0 { "remote" } else { "local" };
            let state = if found.flags & backend::SERVING == 0 { "not serving" } else { "serving" };
            writeln!(f, ", {place}, {state}")?;
        }
        for (map, flows) in [("flows", &self.flows), ("embryonic", &self.embryonic)] {
            for (key, flow) in flows {
                writeln!(f, "  {map} {}", entry(key, flow))?;
            }
        }
        self.fmt_rest(f)
    }
}

impl World {
    /// Returns the backends in a range of slots, each once.
    fn backends_of(&self, range: Range) -> Vec<u32> {
        let slots = range.start()..range.start() + range.size();
        let mut ids: Vec<u32> = self.slots.range(slots).map(|(_, id)| *id).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Prints the rest, which few cases have.
    fn fmt_rest(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (key, found) in &self.affinity {
            writeln!(
                f,
                "  affinity {} to service port {}: {found:?}",
                key.client, key.service_port
            )?;
        }
        for (key, told) in &self.fragments {
            writeln!(f, "  fragments {key:?}: {told:?}")?;
        }
        for (key, bits) in &self.imported {
            writeln!(f, "  netfilter flow {}, bits {bits:#x}", tuple(key))?;
        }
        for (key, age) in &self.exhausted {
            writeln!(f, "  exhausted {} {age} ticks ago", tuple(key))?;
        }
        for key in &self.held {
            writeln!(f, "  socket that receives {}", tuple(key))?;
        }
        for (number, at) in &self.listeners {
            writeln!(f, "  socket that listens at {at} {}", protocol(*number))?;
        }
        for (client, credit) in &self.rejects {
            writeln!(f, "  {client} has {credit} ms of credit for ICMP errors")?;
        }
        if !self.source_ranges.is_empty() {
            writeln!(f, "  source ranges {:?}", self.source_ranges)?;
        }
        if !self.node_ports.is_empty() {
            writeln!(f, "  node ports {:?}", self.node_ports)?;
        }
        if self.marks != 0 {
            writeln!(f, "  marks {:#x}", self.marks)?;
        }
        let Settings { phase, masquerade, detect_local, networks, .. } = self.settings;
        writeln!(
            f,
            "  settings: phase {phase}, masquerade {masquerade}, detect_local {detect_local}, \
             networks {networks:#x}"
        )
    }
}

fn protocol(number: u8) -> &'static str {
    match number {
        TCP => "TCP",
        UDP => "UDP",
        SCTP => "SCTP",
        _ => "any protocol",
    }
}

fn kind_word(kind: u32) -> &'static str {
    match kind {
        frontend::CLUSTER_IP => "ClusterIP",
        frontend::LOAD_BALANCER => "load balancer",
        frontend::EXTERNAL_IP => "external IP",
        frontend::NODE_PORT => "node port",
        _ => "address",
    }
}

/// Returns the differences between two outcomes, one a line, or an empty string if there are none.
pub(crate) fn difference(who: &str, actual: &Outcome, expected: &Outcome) -> String {
    let mut text = String::new();
    let mut line = |what: String| {
        let _ = writeln!(text, "  {what}");
    };
    if actual.end != expected.end {
        line(format!("{who}: ends {:?} instead of {:?}", actual.end, expected.end));
    }
    if actual.failed != expected.failed {
        line(format!("{who}: failures {:?} instead of {:?}", actual.failed, expected.failed));
    }
    if expected.counted.is_some() && actual.counted != expected.counted {
        line(format!("{who}: counted {:?} instead of {:?}", actual.counted, expected.counted));
    }
    if expected.events.is_some() && actual.events != expected.events {
        line(format!("{who}: reported {:?}", actual.events));
        line(format!("    instead of {:?}", expected.events));
    }
    if actual.marks != expected.marks {
        line(format!("{who}: marks {:#x} instead of {:#x}", actual.marks, expected.marks));
    }
    if actual.frame != expected.frame {
        line(format!("{who}: frame {}", packet(&actual.frame)));
        line(format!("    instead of {}", packet(&expected.frame)));
        for row in rows(&actual.frame, &expected.frame) {
            line(row);
        }
    }
    for (map, actual, expected) in [
        ("flows", &actual.flows, &expected.flows),
        ("embryonic", &actual.embryonic, &expected.embryonic),
    ] {
        for row in entries(actual, expected) {
            line(format!("{who}: {map} {row}"));
        }
    }
    if actual.affinity != expected.affinity {
        line(format!("{who}: affinity {:?}", actual.affinity));
        line(format!("    instead of {:?}", expected.affinity));
    }
    if actual.exhausted != expected.exhausted {
        line(format!("{who}: exhausted {:?}", actual.exhausted));
        line(format!("    instead of {:?}", expected.exhausted));
    }
    if actual.fragments != expected.fragments {
        line(format!("{who}: fragments {:?}", actual.fragments));
        line(format!("    instead of {:?}", expected.fragments));
    }
    text
}

fn entries(actual: &Flows, expected: &Flows) -> Vec<String> {
    let mut rows = Vec::new();
    for (key, flow) in expected {
        match actual.get(key) {
            None => rows.push(format!("lacks {}", entry(key, flow))),
            Some(other) if other != flow => {
                rows.push(format!("has {}", entry(key, other)));
                rows.push(format!("  instead of {}", entry(key, flow)));
            }
            Some(_) => {}
        }
    }
    for (key, flow) in actual {
        if !expected.contains_key(key) {
            rows.push(format!("has, unexpected, {}", entry(key, flow)));
        }
    }
    rows
}

fn tuple(key: &Tuple<IpAddr>) -> String {
    let source = SocketAddr::new(key.source, key.source_port);
    let destination = SocketAddr::new(key.destination, key.destination_port);
    let side = if key.side == 0 { "" } else { ", far side" };
    format!("{source} > {destination}{side}")
}

fn entry(key: &Tuple<IpAddr>, flow: &Flow<IpAddr>) -> String {
    let source = SocketAddr::new(flow.source, flow.source_port);
    let destination = SocketAddr::new(flow.destination, flow.destination_port);
    let Flow { backend, generation, service_port, seen, state, flags, .. } = flow;
    format!(
        "{} becomes {source} > {destination}; backend {backend}, generation {generation}, \
         service port {service_port}, age {seen}, state {state:#x}, flags {flags:#x}",
        tuple(key)
    )
}

/// Returns the rows of sixteen bytes in which two frames differ, with those bytes marked.
fn rows(actual: &[u8], expected: &[u8]) -> Vec<String> {
    let mut rows = Vec::new();
    for at in (0..actual.len().max(expected.len())).step_by(16) {
        let row =
            |bytes: &[u8]| bytes.get(at..bytes.len().min(at + 16)).unwrap_or_default().to_vec();
        let (left, right) = (row(actual), row(expected));
        if left == right {
            continue;
        }
        let hex = |own: &[u8], other: &[u8]| {
            let mut text = String::new();
            for (index, byte) in own.iter().enumerate() {
                let mark = if other.get(index) == Some(byte) { ' ' } else { '*' };
                let _ = write!(text, "{mark}{byte:02x}");
            }
            text
        };
        rows.push(format!("    {at:4}:          {}", hex(&left, &right)));
        rows.push(format!("     instead of:  {}", hex(&right, &left)));
    }
    rows
}

/// Returns a frame in one line, as far as it can be parsed.
fn packet(frame: &[u8]) -> String {
    read(frame).unwrap_or_else(|| format!("{} bytes that are no whole packet", frame.len()))
}

/// Parses a frame: no link header of the table begins with an IP version.
fn read(frame: &[u8]) -> Option<String> {
    let mut at = if matches!(frame.first()? >> 4, 4 | 6) { 0 } else { 14 };
    while at != 0 && matches!(frame.get(at - 2..at)?, [0x81, 0x00] | [0x88, 0xa8]) {
        at += 4;
    }
    datagram(frame.get(at..)?)
}

/// Parses an IP packet.
fn datagram(ip: &[u8]) -> Option<String> {
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
    match ip.first()? >> 4 {
        4 => {
            let payload = ip.get(usize::from(ip[0] & 15) * 4..)?;
            let offset = half(ip, 6)? & 0x1fff;
            transport(v4(12)?, v4(16)?, *ip.get(9)?, payload, offset != 0)
        }
        6 => {
            let (mut next, mut at) = (*ip.get(6)?, 40);
            let mut is_later = false;
            while matches!(next, 0 | 43 | 44 | 60) {
                is_later |= next == 44 && half(ip, at + 2)? & 0xfff8 != 0;
                let words = if next == 44 { 0 } else { usize::from(*ip.get(at + 1)?) };
                next = *ip.get(at)?;
                at += 8 * (words + 1);
            }
            transport(v6(8)?, v6(24)?, next, ip.get(at..)?, is_later)
        }
        _ => None,
    }
}

fn transport(
    source: IpAddr,
    destination: IpAddr,
    number: u8,
    payload: &[u8],
    is_later: bool,
) -> Option<String> {
    if is_later {
        return Some(format!("{source} > {destination} later fragment"));
    }
    if !matches!(number, TCP | UDP | SCTP) {
        let quote = payload.get(8..).and_then(datagram);
        let quote = quote.map(|quote| format!(" about {quote}")).unwrap_or_default();
        let [kind, code] = *payload.get(..2)? else { return None };
        return Some(match number {
            1 | 58 => format!("{source} > {destination} ICMP {kind}/{code}{quote}"),
            _ => format!("{source} > {destination} protocol {number}"),
        });
    }
    let ends = format!(
        "{} > {}",
        SocketAddr::new(source, half(payload, 0)?),
        SocketAddr::new(destination, half(payload, 2)?)
    );
    Some(match number {
        TCP => format!("{ends} {}", flags(payload.get(13).copied().unwrap_or_default())),
        UDP => format!("{ends} UDP"),
        _ => format!("{ends} SCTP chunk {}", payload.get(12)?),
    })
}

/// Returns a TCP segment's flags as tcpdump prints them.
fn flags(flags: u8) -> String {
    let letters = [(SYN, 'S'), (FIN, 'F'), (RST, 'R'), (PSH, 'P'), (ACK, '.')];
    letters.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, letter)| letter).collect()
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}
