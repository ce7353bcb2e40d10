//! Lists and changes nf_tables by netlink: tables, chains, rules and sets, and atomic batches of
//! changes. The node's image has no `nft`.

pub(crate) mod attribute;
mod batch;

use std::io;

use self::attribute::{
    chain, data, element, elements as element_list, expression, hook, immediate, message, rule,
    set, table, verdict,
};
use super::netlink::{self, Attributes, NETLINK_NETFILTER, NLM_F_DUMP, attributes, find, text};
pub(crate) use batch::Batch;

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;

/// The family of a table's packets (`NFPROTO_*`), without ARP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Family {
    Inet,
    Ip,
    Netdev,
    Bridge,
    Ip6,
}

impl Family {
    const ALL: [Self; 5] = [Self::Inet, Self::Ip, Self::Netdev, Self::Bridge, Self::Ip6];

    fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Ip => 2,
            Self::Netdev => 5,
            Self::Bridge => 7,
            Self::Ip6 => 10,
        }
    }

    /// Returns the name in `nft`.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Netdev => "netdev",
            Self::Bridge => "bridge",
            Self::Ip6 => "ip6",
        }
    }

    /// Whether it is for IP packets at the stack's hooks.
    pub(crate) fn is_ip(self) -> bool {
        matches!(self, Self::Inet | Self::Ip | Self::Ip6)
    }

    fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.number() == number)
    }

    /// Returns the `struct nfgenmsg`.
    fn header(self) -> [u8; 4] {
        [self.number(), 0, 0, 0]
    }
}

/// A table's name, with its family.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Table {
    pub(crate) family: Family,
    pub(crate) name: String,
}

/// A chain of a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Chain {
    pub(crate) table: Table,
    pub(crate) name: String,
    /// The hook that leads to it, if there is one.
    pub(crate) base: Option<Base>,
}

/// The attachment of a chain to a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Base {
    /// The hook's number, in the table's family.
    pub(crate) hook: u32,
    pub(crate) priority: i32,
    /// Whether packets that no rule decides about are dropped.
    pub(crate) drops: bool,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) chain: String,
    pub(crate) handle: u64,
    expressions: Vec<u8>,
}

/// A part of a rule.
#[derive(Clone, Debug)]
pub(crate) struct Expression<'r> {
    /// `cmp`, `lookup`, ...
    pub(crate) name: String,
    data: &'r [u8],
}

/// The verdict of an expression.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// `NF_*` or `NFT_*`.
    pub(crate) code: Option<i32>,
    /// The target chain.
    pub(crate) chain: Option<String>,
}

/// A rule that jumps to another chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Jump {
    pub(crate) table: Table,
    pub(crate) chain: String,
    pub(crate) handle: u64,
    pub(crate) to: String,
}

/// An element of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) key: Vec<u8>,
    /// The milliseconds until it expires; [`None`] if it does not.
    pub(crate) expires_ms: Option<u64>,
}

impl Rule {
    /// Returns its expressions, in order.
    pub(crate) fn expressions(&self) -> impl Iterator<Item = Expression<'_>> {
        attributes(&self.expressions).filter_map(|(_, one)| {
            let data = find(one, expression::DATA)?;
            Some(Expression { name: text(find(one, expression::NAME)), data })
        })
    }

    /// Returns the chain that it jumps to.
    fn jumps_to(&self) -> Option<String> {
        self.expressions().find_map(|one| one.verdict()?.chain)
    }
}

impl Expression<'_> {
    /// Returns the value of one of its attributes.
    pub(crate) fn value(&self, kind: u16) -> Option<&[u8]> {
        find(self.data, kind)
    }

    /// Returns the number in one of its attributes.
    pub(crate) fn number(&self, kind: u16) -> Option<u32> {
        number(self.value(kind))
    }

    /// Returns the bytes for a register in one of its attributes.
    pub(crate) fn bytes(&self, kind: u16) -> Option<&[u8]> {
        find(self.value(kind)?, data::VALUE)
    }

    /// Returns its verdict, if it is an `immediate` with one.
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        if self.name != "immediate" {
            return None;
        }
        let decided = find(self.value(immediate::DATA)?, data::VERDICT)?;
        Some(Verdict {
            code: number(find(decided, verdict::CODE)).map(u32::cast_signed),
            chain: find(decided, verdict::CHAIN).map(|chain| text(Some(chain))),
        })
    }
}

/// Returns a number in network byte order.
fn number(bytes: Option<&[u8]>) -> Option<u32> {
    bytes?.try_into().ok().map(u32::from_be_bytes)
}

/// Returns a number of eight bytes in network byte order.
fn long_number(bytes: Option<&[u8]>) -> Option<u64> {
    bytes?.try_into().ok().map(u64::from_be_bytes)
}

/// Requests a listing, which is empty if the kernel has no nf_tables.
fn dump(
    kind: u16,
    header: [u8; 4],
    names: &Attributes,
    mut each: impl FnMut(u8, &[u8]),
) -> io::Result<()> {
    let message = netlink::message(SUBSYSTEM << 8 | kind, NLM_F_DUMP, &header, names);
    let listed = netlink::ask(NETLINK_NETFILTER, &message, |payload| {
        if let (Some(family), Some(rest)) = (payload.first(), payload.get(4..)) {
            each(*family, rest);
        }
    });
    match listed {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::ENOENT)
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// Lists every table of the network namespace.
pub(crate) fn tables() -> io::Result<Vec<Table>> {
    let mut tables = Vec::new();
    dump(message::GET_TABLE, [0; 4], &Attributes::default(), |family, found| {
        if let Some(family) = Family::of(family) {
            tables.push(Table { family, name: text(find(found, table::NAME)) });
        }
    })?;
    Ok(tables)
}

/// Lists every chain of the network namespace.
pub(crate) fn chains() -> io::Result<Vec<Chain>> {
    let mut chains = Vec::new();
    dump(message::GET_CHAIN, [0; 4], &Attributes::default(), |family, found| {
        if let Some(family) = Family::of(family) {
            let table = Table { family, name: text(find(found, chain::TABLE)) };
            chains.push(Chain { table, name: text(find(found, chain::NAME)), base: base(found) });
        }
    })?;
    Ok(chains)
}

fn base(found: &[u8]) -> Option<Base> {
    const DROP: u32 = 0;
    let at = find(found, chain::HOOK)?;
    Some(Base {
        hook: number(find(at, hook::NUMBER))?,
        priority: number(find(at, hook::PRIORITY)).unwrap_or_default().cast_signed(),
        drops: number(find(found, chain::POLICY)) == Some(DROP),
    })
}

/// Calls `each` with every rule of a table.
pub(crate) fn rules(table: &Table, mut each: impl FnMut(Rule)) -> io::Result<()> {
    let names = Attributes::default().text(rule::TABLE, &table.name);
    dump(message::GET_RULE, table.family.header(), &names, |_, found| {
        // Some kernels also list the rules of other tables.
        if text(find(found, rule::TABLE)) != table.name {
            return;
        }
        let handle = long_number(find(found, rule::HANDLE));
        if let (Some(handle), Some(expressions)) = (handle, find(found, rule::EXPRESSIONS)) {
            let chain = text(find(found, rule::CHAIN));
            each(Rule { chain, handle, expressions: expressions.to_vec() });
        }
    })
}

/// Lists the rules of a table that jump to another chain.
pub(crate) fn jumps(table: &Table) -> io::Result<Vec<Jump>> {
    let mut jumps = Vec::new();
    rules(table, |rule| {
        if let Some(to) = rule.jumps_to() {
            jumps.push(Jump { table: table.clone(), chain: rule.chain, handle: rule.handle, to });
        }
    })?;
    Ok(jumps)
}

/// Lists the names of a table's sets.
pub(crate) fn sets(table: &Table) -> io::Result<Vec<String>> {
    let mut sets = Vec::new();
    let names = Attributes::default().text(set::TABLE, &table.name);
    dump(message::GET_SET, table.family.header(), &names, |_, found| {
        if text(find(found, set::TABLE)) == table.name {
            sets.push(text(find(found, set::NAME)));
        }
    })?;
    Ok(sets)
}

/// Lists the elements of a set; for an interval, its ends.
pub(crate) fn elements(table: &Table, set: &str) -> io::Result<Vec<Element>> {
    let mut elements = Vec::new();
    let names =
        Attributes::default().text(element_list::TABLE, &table.name).text(element_list::SET, set);
    dump(message::GET_ELEMENTS, table.family.header(), &names, |_, list| {
        let Some(all) = find(list, element_list::ELEMENTS) else { return };
        for (_, one) in attributes(all) {
            let expires_ms = long_number(find(one, element::EXPIRATION));
            if let Some(key) = find(one, element::KEY).and_then(|key| find(key, data::VALUE)) {
                elements.push(Element { key: key.to_vec(), expires_ms });
            }
        }
    })?;
    Ok(elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_leads_to_the_chain_of_its_verdict() {
        let expression = |name: &str, inside: &Attributes| {
            let one =
                Attributes::default().text(expression::NAME, name).nest(expression::DATA, inside);
            Attributes::default().nest(attribute::LIST_ELEMENT, &one)
        };
        // NFT_JUMP.
        let decided = Attributes::default()
            .with(verdict::CODE, &(-3_i32).to_be_bytes())
            .text(verdict::CHAIN, "more");
        let value = Attributes::default().nest(data::VERDICT, &decided);
        let inside = Attributes::default().nest(immediate::DATA, &value);
        for (name, to) in [("immediate", Some("more")), ("dynset", None)] {
            let expressions = expression(name, &inside).bytes().to_vec();
            let rule = Rule { chain: "some".to_owned(), handle: 1, expressions };
            assert_eq!(rule.jumps_to().as_deref(), to, "{name}");
        }
    }
}
