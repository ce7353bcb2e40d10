//! Packets along a flow, from the first on.

use sluice_common::Reason;
use sluice_common::abi::{backend, flow, frontend, listing, state};

use crate::packets::case::{Case, End, Program};
use crate::packets::frame::{ACK, FIN, Frame, PSH, RST, SYN, TCP, UDP};
use crate::packets::world::{Cast, EDGE, GENERATION, ONE, SPARE, TUNNEL, UPLINK, mac};

/// Frames for [`Case::every_prefix`].
pub(crate) fn cut() -> Vec<Case> {
    let mut cases = Vec::new();
    for cast in Cast::all() {
        let title = cast.title();
        let proven = cast.world().flows(cast.connection().state(state::ESTABLISHED).both());
        let question = cast.next(cast.client, cast.frontend);
        cases.push(Case::new(format!("{title}: a packet to a frontend"), &proven, Program::Ingress, EDGE, &question));
        cases.push(Case::new(format!("{title}: the same for XDP"), &proven, Program::Xdp, UPLINK, &question.at(mac(UPLINK))));
        let answer = cast.next(cast.backend, cast.client);
        cases.push(Case::new(format!("{title}: a reply"), &proven, Program::Egress, EDGE, &answer));
    }
    cases
}

/// The cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for cast in Cast::all() {
        opening(&mut cases, &cast);
    }
    cases
}

fn opening(cases: &mut Vec<Case>, cast: &Cast) {
    let title = cast.title();
    let Cast { client, frontend, backend, .. } = *cast;
    let connection = cast.connection();
    let world = cast.world();
    let first = cast.first(client, frontend);
    let to_backend = first.clone().to(backend);
    cases.push(
        Case::new(format!("{title}: the first packet to a frontend opens a flow"), &world, Program::Ingress, EDGE, &first)
            .becomes(&to_backend)
            .opens(ONE)
            .embryonic([connection.both()]),
    );
}
