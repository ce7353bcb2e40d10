//! SCTP is treated like TCP, except for its checksum and for the answer where nobody serves.

use sluice_common::Reason;
use sluice_common::abi::state;
use sluice_common::path::mark;

use super::Table;
use super::masquerade::{LOCAL, REMOTE, leaves};
use super::reject::unreachable;
use crate::packets::case::{End, Program};
use crate::packets::frame::{
    ABORT, COOKIE_ACK, COOKIE_ECHO, DATA, Frame, INIT_ACK, SCTP, SHUTDOWN, SHUTDOWN_ACK,
    SHUTDOWN_COMPLETE, Sum,
};
use crate::packets::world::{Cast, EDGE, EMPTY, NET_PODS, ONE, UPLINK, mac};

/// Flag of an ABORT whose sender knows no such connection.
const T: u8 = 1;

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::of(SCTP) {
        opening(table, &cast);
        handshake(table, &cast);
        states(table, &cast);
        checksums(table, &cast);
        rejects(table, &cast);
        masqueraded(table, &cast);
        errors(table, &cast);
        recovery(table, &cast);
        no_recovery(table, &cast);
    }
}

/// An INIT opens a flow.
fn opening(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    for (program, ifindex) in [(Program::Ingress, EDGE), (Program::Xdp, UPLINK)] {
        let first = cast.first(cast.client, cast.frontend).at(mac(ifindex));
        table.cut(
            cast.case(format!("an INIT opens a flow, {}", program.name()))
                .world(&cast.world())
                .at(program, ifindex)
                .sends(&first)
                .becomes(&first.clone().to(cast.backend))
                .opens(ONE)
                .embryonic([connection.both()]),
        );
    }
}

/// The handshake's chunks, of which the COOKIE ACK alone proves the flow.
fn handshake(table: &mut Table, cast: &Cast) {
    let connection = cast.connection();
    let world = cast.world().embryonic(connection.both());
    let answer = Frame::sctp(cast.backend, cast.client, (INIT_ACK, 0), &[0x1b; 32]);
    table.add(
        cast.case("an INIT ACK proves nothing")
            .world(&world)
            .tc_egress(EDGE)
            .sends(&answer)
            .becomes(&answer.clone().from(cast.frontend))
            .reply(ONE),
    );
    let echo = Frame::sctp(cast.client, cast.frontend, (COOKIE_ECHO, 0), &[0xc; 9])
        .chunk((DATA, 3), b"with data");
    table.add(
        cast.case("a COOKIE ECHO proves nothing")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&echo)
            .becomes(&echo.clone().to(cast.backend))
            .forward(ONE),
    );
    let taken =
        Frame::sctp(cast.backend, cast.client, (COOKIE_ACK, 0), &[]).chunk((DATA, 3), b"with data");
    table.add(
        cast.case("a COOKIE ACK proves the flow")
            .world(&world)
            .tc_egress(EDGE)
            .sends(&taken)
            .becomes(&taken.clone().from(cast.frontend))
            .reply(ONE)
            .embryonic([])
            .flows([connection.state(state::ESTABLISHED).both()]),
    );
    let again = cast.first(cast.client, cast.frontend);
    table.add(
        cast.case("an INIT again")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&again)
            .becomes(&again.clone().to(cast.backend))
            .forward(ONE),
    );
}

/// The effect of chunks on a flow.
fn states(table: &mut Table, cast: &Cast) {
    let flow = cast.connection().state(state::ESTABLISHED);
    let world = cast.world().flows(flow.both());
    for (what, chunk, forward, reply) in [
        ("DATA", (DATA, 3), 0, 0),
        ("a COOKIE ACK", (COOKIE_ACK, 0), 0, 0),
        ("a SHUTDOWN", (SHUTDOWN, 0), 0, 0),
        ("a SHUTDOWN ACK", (SHUTDOWN_ACK, 0), state::FIN_FORWARD, state::FIN_REPLY),
        ("a SHUTDOWN COMPLETE", (SHUTDOWN_COMPLETE, 0), state::FIN_FORWARD, state::FIN_REPLY),
        ("an ABORT", (ABORT, 0), state::RESET_FORWARD, state::RESET_REPLY),
    ] {
        let packet = Frame::sctp(cast.client, cast.frontend, chunk, b"????");
        table.add(
            cast.case(format!("{what} from the client"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&packet)
                .becomes(&packet.clone().to(cast.backend))
                .forward(ONE)
                .flows([flow.state(state::ESTABLISHED | forward).both()]),
        );
        let packet = Frame::sctp(cast.backend, cast.client, chunk, b"????");
        let after = flow.state(state::ESTABLISHED | reply).both();
        let case = cast
            .case(format!("{what} from the backend"))
            .world(&world)
            .tc_egress(EDGE)
            .sends(&packet)
            .becomes(&packet.clone().from(cast.frontend))
            .reply(ONE);
        let has_ended = reply == state::RESET_REPLY;
        table.add(if has_ended { case.flows([]).embryonic([after]) } else { case.flows([after]) });
    }
    // The ports of an ended connection may be reused immediately.
    let ended = flow.state(state::ESTABLISHED | state::FIN_FORWARD | state::FIN_REPLY);
    let first = cast.first(cast.client, cast.frontend);
    table.add(
        cast.case("an INIT after the end opens a new flow")
            .world(&cast.world().flows(ended.both()))
            .tc_ingress(EDGE)
            .sends(&first)
            .becomes(&first.clone().to(cast.backend))
            .opens(ONE)
            .flows([])
            .embryonic([cast.connection().both()]),
    );
}

fn checksums(table: &mut Table, cast: &Cast) {
    let flow = cast.connection().state(state::ESTABLISHED);
    let world = cast.world().flows(flow.both());
    for length in [0, 1, 3, 255, 256, 257, 1_400] {
        let data: Vec<u8> = (0_u32..length).map(|at| (at * 7 % 251) as u8).collect();
        for (program, ifindex) in [(Program::Ingress, EDGE), (Program::Xdp, UPLINK)] {
            let packet = Frame::sctp(cast.client, cast.frontend, (DATA, 3), &data).at(mac(ifindex));
            table.add(
                cast.case(format!("{length} bytes of data, {}", program.name()))
                    .world(&world)
                    .at(program, ifindex)
                    .sends(&packet)
                    .becomes(&packet.clone().to(cast.backend))
                    .forward(ONE),
            );
        }
    }
    for (what, packet) in [
        ("without checksum", cast.next(cast.client, cast.frontend).sum(Sum::Absent)),
        ("with padding", cast.next(cast.client, cast.frontend).padded(6)),
        ("with a VLAN tag", cast.next(cast.client, cast.frontend).tag(0x8100, 5)),
    ] {
        table.add(
            cast.case(format!("a packet {what}"))
                .world(&world)
                .tc_ingress(EDGE)
                .sends(&packet)
                .becomes(&packet.clone().to(cast.backend))
                .forward(ONE),
        );
    }
    let short = Frame::other(cast.client.ip(), cast.frontend.ip(), SCTP, &[0; 15]);
    table.add(
        cast.case("fifteen bytes of a header")
            .world(&world)
            .tc_ingress(EDGE)
            .sends(&short)
            .reason(Reason::Truncated, 0),
    );
}

/// Without a backend, the client gets an ICMP error, as with kube-proxy's REJECT for all protocols
/// but TCP.
fn rejects(table: &mut Table, cast: &Cast) {
    for (what, packet) in [
        ("an INIT", cast.first(cast.client, cast.empty)),
        ("DATA", cast.next(cast.client, cast.empty)),
    ] {
        table.add(
            cast.case(format!("{what} to a service without backends is answered with unreachable"))
                .world(&cast.world())
                .tc_ingress(EDGE)
                .sends(&packet)
                .becomes(&unreachable(&packet).turned())
                .ends(End::Redirect)
                .reason(Reason::NoBackendUnreachable, EMPTY),
        );
    }
}

fn masqueraded(table: &mut Table, cast: &Cast) {
    let title = cast.title();
    for (what, place) in [("remote", REMOTE), ("local", LOCAL)] {
        let (cast, world) = place.set(&cast.client_in(NET_PODS));
        let near = place.masqueraded(&cast).state(state::ESTABLISHED);
        let far = place.source(&cast).state(state::ESTABLISHED);
        let name = format!("{title}: a masqueraded INIT leaves, {what}");
        table.add(leaves(name, &cast, &place.met(&cast, &world), place, &place.source(&cast)));
        let world = world.flows(near.both()).flows(far.both()).marks(mark::MASQUERADED);
        let add = |name: &str, program, ifindex, frame: Frame, becomes: Frame| {
            let case = cast
                .case(format!("{name}, {what}"))
                .world(&world)
                .at(program, ifindex)
                .sends(&frame);
            case.becomes(&becomes)
        };
        let question = cast.next(cast.client, cast.frontend);
        let becomes = question.clone().to(cast.backend);
        let case = add("a masqueraded packet comes in", Program::Ingress, EDGE, question, becomes);
        table.add(case.forward(ONE));
        let sent = cast.next(cast.client, cast.backend);
        let becomes = sent.clone().from(far.seen_as);
        table.add(add("a masqueraded packet leaves", Program::Egress, place.device, sent, becomes));
        let answer = cast.next(cast.backend, far.seen_as).at(mac(place.device));
        let becomes = answer.clone().to(cast.client);
        table.add(add(
            "a masqueraded reply comes in",
            Program::Ingress,
            place.device,
            answer,
            becomes,
        ));
        let answer = cast.next(cast.backend, cast.client);
        let becomes = answer.clone().from(cast.frontend);
        let case = add("a masqueraded reply leaves", Program::Egress, EDGE, answer, becomes);
        table.add(case.reply(ONE));
    }
}

/// ICMP errors quote as little as eight bytes: ports and tag.
fn errors(table: &mut Table, cast: &Cast) {
    let flow = cast.connection().state(state::ESTABLISHED);
    let world = cast.world().flows(flow.both());
    let kind = if cast.frontend.is_ipv4() { (3, 3) } else { (1, 4) };
    let network = if cast.frontend.is_ipv4() { 20 } else { 40 };
    for bytes in [8, 28] {
        let quote = |frame: &Frame| {
            let mut quote = frame.packet()[..network + bytes].to_vec();
            if bytes > 8 {
                // The checksum of a quote is neither read nor made.
                quote[network + 8..network + 12].fill(0x5c);
            }
            quote
        };
        let sent = cast.next(cast.client, cast.backend);
        let error = Frame::icmp(cast.backend.ip(), cast.client.ip(), kind, 0, &quote(&sent));
        let told = Frame::icmp(
            cast.frontend.ip(),
            cast.client.ip(),
            kind,
            0,
            &quote(&cast.next(cast.client, cast.frontend)),
        );
        table.add(
            cast.case(format!("an error that quotes {bytes} bytes"))
                .world(&world)
                .tc_egress(EDGE)
                .sends(&error)
                .becomes(&told)
                .reason(Reason::IcmpError, ONE),
        );
    }
}

/// A client that does not know the connection of a reply sends an ABORT with T, as TCP's client
/// sends a bare reset.
fn recovery(table: &mut Table, cast: &Cast) {
    let flow = cast.connection().state(state::ESTABLISHED);
    let abort = Frame::sctp(cast.client, cast.backend, (ABORT, T), &[]);
    table.add(
        cast.case("an ABORT with T makes a lost reply entry again")
            .world(&cast.world().flows(flow.forward()))
            .tc_ingress(EDGE)
            .sends(&abort)
            .dropped(Reason::ReplyRecovered, ONE)
            .flows([flow.both()]),
    );
    // An ABORT with T reflects the tag of the packet that it answers: the guess is for packets with
    // this tag.
    let guess = flow.state(state::GUESS).heard(0x5152_5354);
    table.add(
        cast.case("an ABORT with T, both entries lost, the client's slot tells")
            .world(&cast.world())
            .tc_ingress(EDGE)
            .sends(&abort)
            .dropped(Reason::ReplyRecovered, ONE)
            .embryonic([guess.both()]),
    );
    let answer = cast.next(cast.backend, cast.client);
    table.add(
        cast.case("a guess, and the backend sends with the tag that was reflected")
            .world(&cast.world().embryonic(guess.both()))
            .tc_egress(EDGE)
            .sends(&answer)
            .becomes(&answer.clone().from(cast.frontend))
            .reply(ONE)
            .embryonic([guess.state(state::GUESS | state::MATCHED).both()]),
    );
    table.add(
        cast.case("a guess, and the backend sends with another tag")
            .world(&cast.world().embryonic(guess.heard(7).both()))
            .tc_egress(EDGE)
            .sends(&answer),
    );
}

/// An ABORT without T does not show that anything is lost, and data makes lost entries again.
fn no_recovery(table: &mut Table, cast: &Cast) {
    let flow = cast.connection().state(state::ESTABLISHED);
    let abort = Frame::sctp(cast.client, cast.backend, (ABORT, 0), &[]);
    table.add(
        cast.case("an ABORT of a direct connection")
            .world(&cast.world().flows(flow.forward()))
            .tc_ingress(EDGE)
            .sends(&abort),
    );
    let lost = cast.next(cast.client, cast.frontend);
    table.add(
        cast.case("data without a flow")
            .world(&cast.world())
            .tc_ingress(EDGE)
            .sends(&lost)
            .becomes(&lost.clone().to(cast.backend))
            .reason(Reason::Recovered, ONE)
            .embryonic([flow.state(0).both()]),
    );
}
