//! The table of cases.

mod accelerated;
mod affinity;
mod as_node;
mod broken;
mod claim;
mod clash;
mod classes;
mod failures;
mod forged;
mod fragments;
mod hairpin;
mod host;
mod icmp;
mod masquerade;
mod masqueraded;
mod node_ports;
mod plain;
mod recovery;
mod reject;
mod sctp;
mod shapes;
mod sockets;
mod source_ranges;
mod takeover;
mod unserved;
mod xdp;

pub(crate) use host::moved;

use super::case::Case;

/// The cases that are collected.
#[derive(Debug, Default)]
pub(crate) struct Table {
    cases: Vec<Case>,
    cut: Vec<Case>,
}

impl Table {
    fn add(&mut self, case: Case) {
        self.cases.push(case);
    }

    /// Adds a case that also runs once for every length at which its packet can be cut off.
    fn cut(&mut self, case: Case) {
        self.cut.push(case.clone());
        self.cases.push(case);
    }

    /// As [`Table::cut`], for a packet that is still whole without its last bytes, which are
    /// padding.
    fn cut_padded(&mut self, case: Case, padding: usize) {
        if padding == 0 { self.cut(case) } else { self.add(case) }
    }
}

fn table() -> Table {
    let mut table = Table::default();
    plain::add(&mut table);
    takeover::add(&mut table);
    recovery::add(&mut table);
    shapes::add(&mut table);
    broken::add(&mut table);
    icmp::add(&mut table);
    failures::add(&mut table);
    hairpin::add(&mut table);
    host::add(&mut table);
    clash::add(&mut table);
    reject::add(&mut table);
    xdp::add(&mut table);
    fragments::add(&mut table);
    sctp::add(&mut table);
    node_ports::add(&mut table);
    classes::add(&mut table);
    source_ranges::add(&mut table);
    unserved::add(&mut table);
    affinity::add(&mut table);
    masquerade::add(&mut table);
    masqueraded::add(&mut table);
    claim::add(&mut table);
    as_node::add(&mut table);
    accelerated::add(&mut table);
    forged::add(&mut table);
    sockets::add(&mut table);
    table
}

/// Returns all cases except those of [`large`].
pub(crate) fn all() -> Vec<Case> {
    table().cases
}

/// Returns the cases whose flows need large maps.
pub(crate) fn large() -> Vec<Case> {
    let mut table = Table::default();
    claim::add_large(&mut table);
    table.cases
}

/// Returns all cases, some of them once more for each length at which they can be cut off.
pub(crate) fn with_prefixes() -> Vec<Case> {
    let Table { mut cases, cut } = table();
    cases.extend(cut.iter().flat_map(Case::every_prefix));
    cases
}
