//! Clients that are their own backend.

use std::net::SocketAddr;

use sluice_common::Reason;
use sluice_common::abi::{flow, state};
use sluice_common::path::mark;

use super::Table;
use super::reject::time_exceeded;
use crate::packets::case::{Case, End, Program};
use crate::packets::frame::{ACK, Frame, SYN, TCP};
use crate::packets::world::{Cast, Connection, EDGE, NET_OVERLAY, ONE, TUNNEL};

/// Adds the cases.
pub(super) fn add(table: &mut Table) {
    for cast in Cast::all() {
        let title = cast.title();
        let client = SocketAddr::new(cast.backend.ip(), 40_001);
        let mirror = SocketAddr::new(cast.frontend.ip(), 40_001);
        let connection = Connection {
            client,
            seen_as: mirror,
            flags: flow::LOCAL | flow::HAIRPIN,
            ..cast.connection()
        };
        let first = cast.first(client, cast.frontend);
        let turned = first.clone().from(mirror).to(cast.backend).ttl(60).turned();
        table.add(
            Case::new(
                format!("{title}: a client that is its own backend is turned back"),
                &cast.world(),
                Program::Ingress,
                EDGE,
                &first,
            )
            .becomes(&turned)
            .ends(End::Redirect)
            .opens(ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST),
        );
        let bare = cast.backend_in(NET_OVERLAY);
        let of_bare = SocketAddr::new(bare.backend.ip(), client.port());
        table.add(
            Case::new(
                format!("{title}: the same without a link header"),
                &bare.world(),
                Program::IngressBare,
                TUNNEL,
                &first.clone().from(of_bare).bare(),
            )
            .becomes(&turned.to(bare.backend).bare())
            .ends(End::Redirect)
            .opens(ONE)
            .embryonic([Connection { client: of_bare, backend: bare.backend, ..connection }.both()])
            .marks(mark::HOST),
        );
        table.add(
            Case::new(
                format!("{title}: the same with a TTL of one"),
                &cast.world(),
                Program::Ingress,
                EDGE,
                &first.clone().ttl(1),
            )
            .becomes(&time_exceeded(&first.clone().ttl(1)).turned())
            .ends(End::Redirect)
            .reason(Reason::TtlExceeded, ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST),
        );
        let mut limited = cast.world();
        let _ = limited.rejects.insert(client.ip(), 100);
        table.add(
            Case::new(
                format!("{title}: the same of a client that had too many answers"),
                &limited,
                Program::Ingress,
                EDGE,
                &first.clone().ttl(1),
            )
            .dropped(Reason::TtlExceeded, ONE)
            .embryonic([connection.both()])
            .marks(mark::HOST),
        );
        let world = cast.world().embryonic(connection.both());
        let answer = match cast.protocol {
            TCP => Frame::tcp(cast.backend, mirror, SYN | ACK, &[]),
            _ => Frame::udp(cast.backend, mirror, b"odd"),
        };
        let case = Case::new(
            format!("{title}: its own answer is turned back to it"),
            &world,
            Program::Ingress,
            EDGE,
            &answer,
        )
        .becomes(&answer.clone().from(cast.frontend).to(client).ttl(60).turned())
        .ends(End::Redirect)
        .reply(ONE);
        table.add(match cast.protocol {
            TCP => case.embryonic([connection.answered().both()]),
            _ => case.embryonic([connection.state(state::ESTABLISHED).both()]),
        });
        let proven = cast.world().flows(connection.state(state::ESTABLISHED).both());
        let question = cast.next(client, cast.frontend);
        table.add(
            Case::new(
                format!("{title}: a packet of its proven flow"),
                &proven,
                Program::Ingress,
                EDGE,
                &question,
            )
            .becomes(&question.clone().from(mirror).to(cast.backend).ttl(60).turned())
            .ends(End::Redirect)
            .forward(ONE),
        );
        let entering = question.from(mirror).to(cast.backend);
        table.add(Case::new(
            format!("{title}: what was turned back enters the link"),
            &proven,
            Program::Egress,
            EDGE,
            &entering,
        ));
        // The client says that its port is closed, about an answer of its own.
        let quoted = Frame::udp(cast.frontend, client, b"quote");
        let quoted = if cast.protocol == TCP {
            Frame::tcp(cast.frontend, client, ACK, b"quote")
        } else {
            quoted
        };
        let kind = if cast.client.is_ipv4() { (3, 3) } else { (1, 4) };
        let error = Frame::icmp(client.ip(), cast.frontend.ip(), kind, 0, &quoted.packet());
        let inner = quoted.from(cast.backend).to(mirror);
        let translated = Frame::icmp(mirror.ip(), cast.backend.ip(), kind, 0, &inner.packet());
        table.add(
            Case::new(
                format!("{title}: an ICMP error from itself to itself"),
                &proven,
                Program::Ingress,
                EDGE,
                &error,
            )
            .becomes(&translated.ttl(60).turned())
            .ends(End::Redirect)
            .reason(Reason::IcmpError, ONE),
        );
    }
}
