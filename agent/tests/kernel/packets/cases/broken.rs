//! Packets that contradict themselves or are not whole: passed untouched.

use sluice_common::Reason;

use super::Table;
use crate::packets::case::case;
use crate::packets::frame::{Frame, From, TCP};
use crate::packets::world::{Cast, EDGE, UPLINK, Version, mac};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        transport(table, &cast);
        short(table, &cast);
        match cast.version {
            Version::V4 => network_v4(table, &cast),
            Version::V6 => network_v6(table, &cast),
        }
    }
    for cast in Cast::of(TCP) {
        let other = |protocol, bytes: &[u8]| {
            Frame::other(cast.client.ip(), cast.frontend.ip(), protocol, bytes)
        };
        let version = if cast.version == Version::V4 { "IPv4" } else { "IPv6" };
        let kind = if cast.version == Version::V4 { (8, 0) } else { (128, 0) };
        let echo = Frame::icmp(cast.client.ip(), cast.frontend.ip(), kind, 0x0001_0001, b"ping");
        for (what, frame) in
            [("an echo request to a frontend", echo), ("GRE to a frontend", other(47, &[0; 24]))]
        {
            table.add(
                case(format!("{version}: {what}"))
                    .world(&cast.world())
                    .tc_ingress(EDGE)
                    .sends(&frame),
            );
        }
    }
}

/// Adds a packet that is passed, with a reason by tc and without one by XDP.
fn pass(table: &mut Table, cast: &Cast, what: &str, frame: &Frame, reason: Reason, length: u32) {
    let world = cast.world();
    table.add(
        cast.case(what).world(&world).tc_ingress(EDGE).sends(frame).says(length).reason(reason, 0),
    );
    let frame = frame.clone().at(mac(UPLINK));
    table.add(cast.case(format!("{what}, by XDP")).world(&world).xdp(UPLINK).sends(&frame));
}

fn transport(table: &mut Table, cast: &Cast) {
    let frame = cast.next(cast.client, cast.frontend);
    let length = frame.length();
    let mut bad = |what: &str, offset, bytes: &[u8]| {
        let frame = frame.clone().patch(From::Transport, offset, bytes);
        pass(table, cast, what, &frame, Reason::Malformed, length);
    };
    if cast.protocol == TCP {
        bad("a data offset of zero", 12, &[0]);
        bad("a data offset below the header's length", 12, &[4 << 4]);
        bad("a data offset beyond the segment", 12, &[7 << 4]);
    } else {
        bad("a length of zero", 4, &[0, 0]);
        bad("a length below the header's", 4, &[0, 7]);
        bad("a length beyond the packet", 4, &[0, 14]);
    }
}

/// The packet ends within its transport header, as its IP header says.
fn short(table: &mut Table, cast: &Cast) {
    let whole = cast.first(cast.client, cast.frontend);
    let network = if cast.version == Version::V4 { 20 } else { 40 };
    let header = if cast.protocol == TCP { 20 } else { 8 };
    for length in 0..header {
        let segment = &whole.packet()[network..network + length];
        let frame = Frame::other(cast.client.ip(), cast.frontend.ip(), cast.protocol, segment);
        let what = format!("{length} bytes of a transport header");
        pass(table, cast, &what, &frame, Reason::Truncated, frame.length());
        let what = format!("{length} bytes of a transport header, and padding");
        pass(table, cast, &what, &frame.clone().padded(30), Reason::Truncated, frame.length());
    }
}

fn network_v4(table: &mut Table, cast: &Cast) {
    let frame = cast.next(cast.client, cast.frontend);
    let length = frame.length();
    let mut bad = |what: &str, offset, bytes: &[u8], reason, length| {
        pass(table, cast, what, &frame.clone().patch(From::Network, offset, bytes), reason, length);
    };
    bad("a version of 5", 0, &[0x55], Reason::Malformed, length);
    bad("a version of 6 behind IPv4's ethertype", 0, &[0x65], Reason::Malformed, length);
    bad("a header of no words", 0, &[0x40], Reason::Malformed, length);
    bad("a header of four words", 0, &[0x44], Reason::Malformed, length);
    bad("a header beyond the packet", 0, &[0x4f], Reason::Malformed, length);
    bad("a total length of zero", 2, &[0, 0], Reason::Malformed, 0);
    bad("a total length below the header's", 2, &[0, 19], Reason::Malformed, 19);
    bad(
        "a total length one beyond the frame",
        2,
        &(length as u16 + 1).to_be_bytes(),
        Reason::Truncated,
        length + 1,
    );
    bad("a total length far beyond the frame", 2, &[0xff, 0xff], Reason::Truncated, 0xffff);
}

fn network_v6(table: &mut Table, cast: &Cast) {
    let frame = cast.next(cast.client, cast.frontend);
    let length = frame.length();
    let mut bad = |what: &str, frame: &Frame, offset, bytes: &[u8], reason, length| {
        pass(table, cast, what, &frame.clone().patch(From::Network, offset, bytes), reason, length);
    };
    let payload = (length - 40) as u16;
    bad("a version of 4 behind IPv6's ethertype", &frame, 0, &[0x45], Reason::Malformed, length);
    bad("a version of 7", &frame, 0, &[0x70], Reason::Malformed, length);
    bad("a payload length of zero", &frame, 4, &[0, 0], Reason::Truncated, 40);
    bad(
        "a payload length one beyond the frame",
        &frame,
        4,
        &(payload + 1).to_be_bytes(),
        Reason::Truncated,
        length + 1,
    );
    let extended = frame.clone().extension(0, &[0, 0, 1, 4, 0, 0, 0, 0]);
    let length = extended.length();
    bad("an extension header beyond the packet", &extended, 41, &[20], Reason::Malformed, length);
    bad("an extension header beyond any packet", &extended, 41, &[255], Reason::Malformed, length);
    bad(
        "extension headers that lead beyond the packet",
        &extended,
        40,
        &[60, 20],
        Reason::Truncated,
        length,
    );
    bad(
        "a packet that ends within its extension headers",
        &extended,
        4,
        &[0, 4],
        Reason::Malformed,
        44,
    );
}
