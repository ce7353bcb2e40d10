//! The many shapes of a valid packet: options, extensions, tags, no link header, checksums.

use sluice_common::abi::state;

use super::Table;
use crate::packets::case::Program;
use crate::packets::frame::{Frame, Payload, Sum, UDP};
use crate::packets::world::{Cast, EDGE, ONE, TUNNEL, UPLINK, Version, mac};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        match cast.version {
            Version::V4 => options(table, &cast),
            Version::V6 => extensions(table, &cast),
        }
        tags(table, &cast);
        bare(table, &cast);
        checksums(table, &cast);
        let padded = cast.first(cast.client, cast.frontend).padded(6);
        forward(table, &cast, "a frame with padding", &padded);
    }
}

/// Adds a first packet in another shape, for tc and for XDP.
fn forward(table: &mut Table, cast: &Cast, what: &str, frame: &Frame) {
    for (program, ifindex) in [(Program::Ingress, EDGE), (Program::Xdp, UPLINK)] {
        let frame = frame.clone().at(mac(ifindex));
        table.cut_padded(
            cast.case(format!("{what}, {}", program.name()))
                .world(&cast.world())
                .at(program, ifindex)
                .sends(&frame)
                .becomes(&frame.clone().to(cast.backend))
                .opens(ONE)
                .embryonic([cast.connection().both()]),
            frame.padding.len(),
        );
    }
}

/// Adds a packet that tc and XDP leave alone.
fn pass(table: &mut Table, cast: &Cast, what: &str, frame: &Frame) {
    for (program, ifindex) in [(Program::Ingress, EDGE), (Program::Xdp, UPLINK)] {
        let frame = frame.clone().at(mac(ifindex));
        table.add(
            cast.case(format!("{what}, {}", program.name()))
                .world(&cast.world())
                .at(program, ifindex)
                .sends(&frame),
        );
    }
}

fn options(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.frontend);
    forward(table, cast, "four bytes of options", &first.clone().options(&[0x94, 4, 0, 0]));
    forward(table, cast, "forty bytes of options", &first.options(&[1; 40]));
}

fn extensions(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.frontend);
    let padding = [0, 0, 1, 4, 0, 0, 0, 0];
    let long = [&[0, 1, 1, 12][..], &[0; 12]].concat();
    let visited = [&[0, 2, 0, 0, 0, 0, 0, 0][..], &[0x20; 16]].concat();
    let mut waypoint = visited.clone();
    waypoint[3] = 1;
    let atomic = [0, 0, 0, 0, 0, 0, 0, 7];
    forward(table, cast, "hop-by-hop options", &first.clone().extension(0, &padding));
    forward(table, cast, "long destination options", &first.clone().extension(60, &long));
    forward(
        table,
        cast,
        "a routing header that has been followed",
        &first.clone().extension(43, &visited),
    );
    forward(table, cast, "an atomic fragment", &first.clone().extension(44, &atomic));
    let all = first.clone().extension(0, &padding).extension(60, &padding).extension(43, &visited);
    forward(
        table,
        cast,
        "extension headers of all kinds",
        &all.extension(44, &atomic).extension(60, &long),
    );
    let eight = (0..8).fold(first.clone(), |frame, _| frame.extension(60, &padding));
    forward(table, cast, "eight extension headers", &eight);
    pass(table, cast, "nine extension headers", &eight.extension(60, &padding));
    pass(table, cast, "a routing header with a way to go", &first.clone().extension(43, &waypoint));
    pass(
        table,
        cast,
        "an authentication header",
        &first.clone().extension(51, &[0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]),
    );
    pass(table, cast, "a no-next-header", &first.extension(59, &padding));
}

fn tags(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.frontend);
    let one = first.clone().tag(0x8100, 0x2064);
    let two = first.clone().tag(0x88a8, 0x0065).tag(0x8100, 0x2064);
    forward(table, cast, "one VLAN tag in band", &one);
    forward(table, cast, "two VLAN tags in band", &two);
    pass(table, cast, "three VLAN tags in band", &two.tag(0x8100, 1));
    let reply = cast.next(cast.backend, cast.client).tag(0x8100, 0x2064);
    let world = cast.world().flows(cast.connection().state(state::ESTABLISHED).both());
    table.cut(
        cast.case("a reply with a VLAN tag in band")
            .world(&world)
            .tc_egress(UPLINK)
            .sends(&reply)
            .becomes(&reply.clone().from(cast.frontend))
            .reply(ONE),
    );
}

fn bare(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.frontend).l3();
    table.cut(
        cast.case("the first packet without a link header")
            .world(&cast.world())
            .tc_ingress_l3(TUNNEL)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([cast.connection().both()]),
    );
    let reply = cast.next(cast.backend, cast.client).l3();
    let world = cast.world().flows(cast.connection().state(state::ESTABLISHED).both());
    table.cut(
        cast.case("a reply without a link header")
            .world(&world)
            .tc_egress_l3(TUNNEL)
            .sends(&reply)
            .becomes(&reply.clone().from(cast.frontend))
            .reply(ONE),
    );
}

/// Returns the frame with data that gives `wanted` of it this checksum.
fn with_checksum(frame: &Frame, wanted: impl Fn(&Frame) -> Frame, checksum: u16) -> Frame {
    let filled = |filler: u16| {
        let mut frame = frame.clone();
        if let Payload::Tcp { data, .. } | Payload::Udp { data, .. } = &mut frame.payload {
            *data = [&filler.to_be_bytes()[..], b"odd"].concat();
        }
        frame
    };
    let field = |frame: &Frame| {
        let segment = frame.network() + if frame.source.is_ipv4() { 20 } else { 40 };
        let offset = segment + if matches!(frame.payload, Payload::Udp { .. }) { 6 } else { 16 };
        let bytes = frame.bytes();
        u16::from_be_bytes([bytes[offset], bytes[offset + 1]])
    };
    // The sum S of all but the filler f: C = ~S without it, and ~(S + f) is wanted: f = ~wanted +
    // C.
    let computed = if checksum == 0xffff { 0 } else { checksum };
    let filler = u32::from(!computed) + u32::from(field(&wanted(&filled(0))));
    let frame = filled((filler % 0xffff) as u16);
    assert_eq!(field(&wanted(&frame)), checksum, "two bytes can make any checksum");
    frame
}

fn checksums(table: &mut Table, cast: &Cast) {
    let first = cast.first(cast.client, cast.frontend);
    let zero = if cast.protocol == UDP { 0xffff } else { 0 };
    let translated = |frame: &Frame| frame.clone().to(cast.backend);
    forward(table, cast, "a checksum that becomes zero", &with_checksum(&first, translated, zero));
    forward(table, cast, "a checksum that was zero", &with_checksum(&first, Clone::clone, zero));
    forward(table, cast, "a checksum that becomes one", &with_checksum(&first, translated, 1));
    forward(
        table,
        cast,
        "a checksum that becomes 0xfffe",
        &with_checksum(&first, translated, 0xfffe),
    );
    if cast.protocol == UDP {
        forward(table, cast, "no checksum", &first.clone().sum(Sum::Absent));
        let reply = Frame::udp(cast.backend, cast.client, b"reply").sum(Sum::Absent);
        let world = cast.world().flows(cast.connection().state(state::ESTABLISHED).both());
        table.add(
            cast.case("a reply without checksum")
                .world(&world)
                .tc_egress(EDGE)
                .sends(&reply)
                .becomes(&reply.clone().from(cast.frontend))
                .reply(ONE),
        );
    }
    let partial = first.sum(Sum::Partial);
    table.add(
        cast.case("a checksum that is left to the device")
            .world(&cast.world())
            .tc_ingress(EDGE)
            .sends(&partial)
            .becomes(&partial.clone().to(cast.backend))
            .opens(ONE)
            .embryonic([cast.connection().both()])
            .partial(),
    );
    let partial = cast.next(cast.backend, cast.client).sum(Sum::Partial);
    let world = cast.world().flows(cast.connection().state(state::ESTABLISHED).both());
    table.add(
        cast.case("a reply's checksum that is left to the device")
            .world(&world)
            .tc_egress(EDGE)
            .sends(&partial)
            .becomes(&partial.clone().from(cast.frontend))
            .reply(ONE)
            .partial(),
    );
}
