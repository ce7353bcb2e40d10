//! Shows how an outcome differs from what was expected.

use std::fmt::Write;
use std::net::IpAddr;

use sluice_common::abi::{Flow, Tuple};

use super::case::Outcome;
use super::world::Flows;

/// The differences, one a line; empty when there are none.
pub(crate) fn difference(who: &str, actual: &Outcome, expected: &Outcome) -> String {
    let mut text = String::new();
    let mut line = |what: String| {
        let _ = writeln!(text, "  {what}");
    };
    if actual.end != expected.end {
        line(format!("{who}: ends {:?} instead of {:?}", actual.end, expected.end));
    }
    if expected.counted.is_some() && actual.counted != expected.counted {
        line(format!("{who}: counted {:?} instead of {:?}", actual.counted, expected.counted));
    }
    if expected.events.is_some() && actual.events != expected.events {
        line(format!("{who}: told {:?}", actual.events));
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
            rows.push(format!("has too much: {}", entry(key, flow)));
        }
    }
    rows
}

fn entry(key: &Tuple<IpAddr>, flow: &Flow<IpAddr>) -> String {
    format!(
        "{} {}:{} > {}:{} becomes {}:{} > {}:{}; backend {} generation {} service port {} age {} state {:#x} flags {:#x}",
        key.protocol,
        key.source,
        key.source_port,
        key.destination,
        key.destination_port,
        flow.source,
        flow.source_port,
        flow.destination,
        flow.destination_port,
        flow.backend,
        flow.generation,
        flow.service_port,
        flow.seen,
        flow.state,
        flow.flags,
    )
}

/// Rows of sixteen bytes in which two frames differ, those bytes marked.
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

/// A frame in one line, as far as it can be read.
fn packet(frame: &[u8]) -> String {
    read(frame).unwrap_or_else(|| format!("{} bytes", frame.len()))
}

fn read(frame: &[u8]) -> Option<String> {
    let bare = matches!(frame.first()? >> 4, 4 | 6) && frame.get(12..14)? != [0x08, 0x00];
    let mut at = if bare { 0 } else { 14 };
    while !bare && matches!(frame.get(at - 2..at)?, [0x81, 0x00] | [0x88, 0xa8]) {
        at += 4;
    }
    let ip = frame.get(at..)?;
    let half =
        |bytes: &[u8], at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let (source, destination, protocol, ttl, transport): (IpAddr, IpAddr, u8, u8, usize) =
        match ip.first()? >> 4 {
            4 => {
                let address =
                    |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
                (address(12)?, address(16)?, *ip.get(9)?, *ip.get(8)?, usize::from(ip[0] & 15) * 4)
            }
            6 => {
                let address = |at: usize| {
                    Some(IpAddr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?))
                };
                (address(8)?, address(24)?, *ip.get(6)?, *ip.get(7)?, 40)
            }
            _ => return None,
        };
    let segment = ip.get(transport..)?;
    Some(format!(
        "{} bytes, {source}:{} > {destination}:{}, protocol {protocol}, ttl {ttl}",
        frame.len(),
        half(segment, 0)?,
        half(segment, 2)?,
    ))
}
