//! Finds and removes kube-proxy's rules in netfilter, and makes the table that replaces them while
//! connections depend on them.
//!
//! A translated connection continues by its conntrack entry, without consulting rules again. But
//! the kernel consults entries only while the network namespace has chains of type nat at the
//! hooks, and tracks connections only while some rule requires it. When the last such table goes,
//! every translated connection stalls. So a table of our own exists next to kube-proxy's from the
//! start: four empty chains and one rule.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use anyhow::Context;

use super::legacy::legacy_rules;
use crate::node::nft::{self, Batch, Chain, Family, Jump, Table};

/// Our own table's name.
pub(crate) const HOLDING: &str = "sluice-takeover";
/// The table of kube-proxy's nftables mode.
const KUBE_PROXY: &str = "kube-proxy";
/// The chain that shows that kube-proxy runs in its iptables mode.
const SERVICES: &str = "KUBE-SERVICES";
/// The chain that accepts established connections that a host's own rules would drop. It is removed
/// last.
const FORWARD: &str = "KUBE-FORWARD";
/// Chains that other software (the CNI's portmap plugin) may use, and that are removed only if it
/// does not.
const MASQUERADE: [&str; 2] = ["KUBE-MARK-MASQ", "KUBE-POSTROUTING"];
/// The chains of kube-proxy's iptables mode, without those of the kubelet.
const CHAINS: [&str; 9] = [
    SERVICES,
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    FORWARD,
    MASQUERADE[0],
    MASQUERADE[1],
    "KUBE-LOAD-BALANCER",
];
/// The prefixes of the names of its chains for one Service or endpoint.
const PREFIXES: [&str; 7] =
    ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-", "KUBE-SRC-"];
/// The tables of iptables in which it has chains.
const TABLES: [&str; 3] = ["nat", "filter", "mangle"];

/// The rules of kube-proxy that were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// The tables of its nftables mode.
    tables: BTreeSet<Table>,
    /// Its chains in iptables' tables.
    chains: BTreeSet<Chain>,
    /// Whether it has chains in legacy iptables, which netlink does not show.
    legacy: bool,
    /// Whether our own table exists.
    pub(crate) holding: bool,
}

impl Found {
    /// Whether there are rules by which it balances.
    pub(crate) fn balances(&self) -> bool {
        !self.tables.is_empty()
            || self.legacy
            || self.chains.iter().any(|chain| chain.name == SERVICES)
    }

    /// Whether it ran in its iptables mode.
    pub(crate) fn is_iptables(&self) -> bool {
        self.legacy || self.chains.iter().any(|chain| chain.name == SERVICES)
    }

    /// Whether rules have to be removed by hand.
    pub(crate) fn is_legacy(&self) -> bool {
        self.legacy
    }

    /// Describes the rules, or returns [`None`] if there are none.
    pub(crate) fn words(&self) -> Option<String> {
        let mut words: Vec<String> = self
            .tables
            .iter()
            .map(|table| format!("the nftables table {} {}", table.family.word(), table.name))
            .collect();
        for family in [Family::Ip, Family::Ip6] {
            let count = self.chains.iter().filter(|chain| chain.table.family == family).count();
            if count != 0 {
                words.push(format!("{count} {} chains of iptables", family.word()));
            }
        }
        if self.legacy {
            words.push("chains of legacy iptables".to_owned());
        }
        (!words.is_empty()).then(|| words.join(", "))
    }
}

fn is_its_chain(chain: &Chain) -> bool {
    matches!(chain.table.family, Family::Ip | Family::Ip6)
        && TABLES.contains(&chain.table.name.as_str())
        && (CHAINS.contains(&chain.name.as_str())
            || PREFIXES.iter().any(|prefix| chain.name.starts_with(prefix)))
}

fn is_legacy() -> bool {
    let tables = fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
    let rules = || legacy_rules().unwrap_or_default();
    tables.lines().any(|table| table == "nat")
        && rules().windows(SERVICES.len()).any(|window| window == SERVICES.as_bytes())
}

/// Finds kube-proxy's rules in the current network namespace.
///
/// # Errors
///
/// Fails if the kernel refuses a listing.
pub(crate) fn find() -> io::Result<Found> {
    let tables = nft::tables()?;
    Ok(Found {
        holding: tables.contains(&holding()),
        tables: tables
            .into_iter()
            .filter(|table| table.family.is_ip() && table.name == KUBE_PROXY)
            .collect(),
        chains: nft::chains()?.into_iter().filter(is_its_chain).collect(),
        legacy: is_legacy(),
    })
}

/// Finds kube-proxy's rules, with an error that says what was tried.
pub(crate) fn listed() -> anyhow::Result<Found> {
    find().context("cannot list netfilter's rules")
}

fn holding() -> Table {
    Table { family: Family::Inet, name: HOLDING.to_owned() }
}

/// Makes our own table.
///
/// # Errors
///
/// Fails if the kernel refuses: before Linux 5.2 it has no chains of type nat for both families at
/// once.
pub(crate) fn hold() -> io::Result<()> {
    /// The hooks, with the priorities that other such chains have there.
    const HOOKS: [(&str, u32, i32); 4] =
        [("prerouting", 0, -100), ("input", 1, 100), ("output", 3, -100), ("postrouting", 4, 100)];
    let table = holding();
    let mut batch = Batch::default();
    batch.make_table(&table);
    for (name, hook, priority) in HOOKS {
        batch.make_nat_chain(&table, name, hook, priority);
    }
    batch.ask_for_connection(&table, HOOKS[0].0);
    batch.commit()
}

/// Removes our own table, and returns whether it existed.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub(crate) fn let_go() -> io::Result<bool> {
    if !nft::tables()?.contains(&holding()) {
        return Ok(false);
    }
    let mut batch = Batch::default();
    batch.delete_table(&holding());
    batch.commit().map(|()| true)
}

/// Removes kube-proxy's rules, atomically for each table. The chain that accepts established
/// connections is removed only with `all`. Rules in legacy iptables stay.
///
/// # Errors
///
/// Fails if the kernel refuses; the tables before that one are clean then.
pub(crate) fn remove(found: &Found, all: bool) -> io::Result<()> {
    let mut batch = Batch::default();
    for table in &found.tables {
        batch.delete_table(table);
    }
    if !found.tables.is_empty() {
        batch.commit()?;
    }
    let tables: BTreeSet<&Table> = found.chains.iter().map(|chain| &chain.table).collect();
    for table in tables {
        let its: Vec<&Chain> = found.chains.iter().filter(|chain| chain.table == *table).collect();
        let jumps = nft::jumps(table)?;
        let going = going(&its, &jumps, all);
        let mut batch = Batch::default();
        let leads_there = |jump: &&Jump| going.iter().any(|chain| chain.name == jump.to);
        let is_from_others = |jump: &&Jump| !going.iter().any(|chain| chain.name == jump.chain);
        let to_delete: Vec<&Jump> =
            jumps.iter().filter(leads_there).filter(is_from_others).collect();
        if going.is_empty() {
            continue;
        }
        for jump in to_delete {
            batch.delete_rule(jump);
        }
        for chain in &going {
            batch.flush(chain);
        }
        for chain in &going {
            batch.delete_chain(chain);
        }
        batch.commit()?;
    }
    Ok(())
}

/// Returns the chains of a table that are removed: not those that other chains jump to, except from
/// iptables' own chains.
fn going<'c>(its: &[&'c Chain], jumps: &[Jump], all: bool) -> Vec<&'c Chain> {
    const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
    let is_its = |name: &str| its.iter().any(|chain| chain.name == name);
    let is_used = |name: &str| {
        jumps.iter().any(|jump| {
            jump.to == name && !is_its(&jump.chain) && !BUILT_IN.contains(&jump.chain.as_str())
        })
    };
    let masquerades = MASQUERADE.iter().any(|name| is_used(name));
    its.iter()
        .filter(|chain| {
            let name = chain.name.as_str();
            (all || name != FORWARD)
                && !(masquerades && MASQUERADE.contains(&name))
                && !is_used(name)
        })
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(table: &str, name: &str) -> Chain {
        let table = Table { family: Family::Ip, name: table.to_owned() };
        Chain { table, name: name.to_owned(), base: None }
    }

    fn jump(from: &str, to: &str) -> Jump {
        let table = Table { family: Family::Ip, name: "nat".to_owned() };
        Jump { table, chain: from.to_owned(), handle: 1, to: to.to_owned() }
    }

    fn names<'c>(chains: &[&'c Chain]) -> Vec<&'c str> {
        chains.iter().map(|chain| chain.name.as_str()).collect()
    }

    #[test]
    fn the_kubelets_chains_and_other_tables_are_not_kube_proxys() {
        for (table, name, its) in [
            ("nat", "KUBE-SERVICES", true),
            ("nat", "KUBE-SEP-ABCDEFGHIJKLMNOP", true),
            ("filter", "KUBE-FORWARD", true),
            ("mangle", "KUBE-PROXY-CANARY", true),
            ("mangle", "KUBE-KUBELET-CANARY", false),
            ("filter", "KUBE-FIREWALL", false),
            ("mangle", "KUBE-IPTABLES-HINT", false),
            ("nat", "PREROUTING", false),
            ("nat", "CNI-HOSTPORT-DNAT", false),
            ("mine", "KUBE-SERVICES", false),
        ] {
            assert_eq!(is_its_chain(&chain(table, name)), its, "{table} {name}");
        }
    }

    #[test]
    fn a_chain_that_others_use_stays() {
        let (services, mark, post) = (
            chain("nat", "KUBE-SERVICES"),
            chain("nat", "KUBE-MARK-MASQ"),
            chain("nat", "KUBE-POSTROUTING"),
        );
        let its = [&services, &mark, &post];
        let own = [jump("PREROUTING", "KUBE-SERVICES"), jump("KUBE-SERVICES", "KUBE-MARK-MASQ")];
        assert_eq!(
            names(&going(&its, &own, true)),
            ["KUBE-SERVICES", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"]
        );
        let others = [jump("CNI-HOSTPORT-SETMARK", "KUBE-MARK-MASQ")];
        assert_eq!(names(&going(&its, &others, true)), ["KUBE-SERVICES"]);
    }

    #[test]
    fn what_accepts_established_connections_goes_last() {
        let (services, forward) =
            (chain("filter", "KUBE-SERVICES"), chain("filter", "KUBE-FORWARD"));
        assert_eq!(names(&going(&[&services, &forward], &[], false)), ["KUBE-SERVICES"]);
        assert_eq!(
            names(&going(&[&services, &forward], &[], true)),
            ["KUBE-SERVICES", "KUBE-FORWARD"]
        );
    }
}
