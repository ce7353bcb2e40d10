//! Finds netfilter rules that name a frontend, which they see only before it is translated.
//!
//! Sluice's programs come before netfilter, which sees the endpoint. A rule for a node port or a
//! Service's address therefore never applies. The same goes for a rule that matches the original
//! destination by connection tracking.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::Path;

use super::{Check, Outcome};
use crate::node::netlink::text;
use crate::node::nft::attribute::{REGISTER, bitwise, cmp, ct, extension, lookup, payload, range};
use crate::node::nft::{self, Family, Table};
use crate::node::view::View;

/// The usual `--service-node-port-range`.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;
/// The most rules that are listed. The others are counted.
const NAMED_MAX: usize = 5;

/// The frontends on this node, as far as they are known.
#[derive(Clone, Debug, Default)]
pub(super) struct Frontends {
    /// Whether they come from the maps of an agent.
    is_known: bool,
    addresses: BTreeSet<IpAddr>,
    node_ports: BTreeSet<u16>,
}

impl Frontends {
    /// Reads the frontends of an agent that runs, or has run, on this node.
    pub(super) fn read(pin_path: &Path) -> Self {
        let Ok(view) = View::read(pin_path) else { return Self::default() };
        let mut found = Self { is_known: true, ..Self::default() };
        let v4 =
            view.image.v4.services.keys().map(|key| (IpAddr::from(key.address.octets), key.port));
        let v6 =
            view.image.v6.services.keys().map(|key| (IpAddr::from(key.address.octets), key.port));
        for (address, port) in v4.chain(v6) {
            if address.is_unspecified() {
                let _ = found.node_ports.insert(port);
            } else {
                let _ = found.addresses.insert(address);
            }
        }
        found
    }

    fn has_port(&self, ports: &RangeInclusive<u16>) -> bool {
        // A rule for all ports names none.
        let is_all = *ports.start() <= 1 && *ports.end() == u16::MAX;
        let is_usual = ports.start() <= NODE_PORTS.end() && ports.end() >= NODE_PORTS.start();
        !is_all && (is_usual || self.node_ports.range(ports.clone()).next().is_some())
    }

    fn has_address(&self, prefix: &Prefix) -> bool {
        prefix.length != 0 && self.addresses.iter().any(|address| prefix.contains(*address))
    }
}

/// A network's address, and how many of its bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    fn contains(&self, other: IpAddr) -> bool {
        let shared = |one: u128, other: u128, bits: u8| {
            one.checked_shr(u32::from(bits - self.length)).unwrap_or(0)
                == other.checked_shr(u32::from(bits - self.length)).unwrap_or(0)
        };
        match (self.address, other) {
            (IpAddr::V4(one), IpAddr::V4(other)) => {
                shared(u128::from(one.to_bits()), u128::from(other.to_bits()), 32)
            }
            (IpAddr::V6(one), IpAddr::V6(other)) => shared(one.to_bits(), other.to_bits(), 128),
            _ => false,
        }
    }
}

/// The field of a packet that a rule compares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Named {
    Ports(RangeInclusive<u16>),
    Address(Prefix),
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ports(ports) if ports.start() == ports.end() => {
                write!(f, "port {}", ports.start())
            }
            Self::Ports(ports) => write!(f, "ports {}-{}", ports.start(), ports.end()),
            Self::Address(Prefix { address, .. }) => write!(f, "address {address}"),
        }
    }
}

/// The content of a register.
#[derive(Clone, Debug)]
struct Field {
    is_port: bool,
    /// Whether it comes from connection tracking, as the original destination.
    is_original: bool,
    mask: Option<Vec<u8>>,
}

/// A rule, and what it compares the destination with.
#[derive(Clone, Debug, Default)]
pub(super) struct Rule {
    pub(super) chain: String,
    pub(super) handle: u64,
    pub(super) jumps: Vec<String>,
    pub(super) named: Vec<Named>,
    /// As `named`, for the destination in connection tracking.
    pub(super) original: Vec<Named>,
    /// The final verdict, or the name of the last expression or iptables target.
    pub(super) action: String,
}

/// The elements of the sets of one table, by name.
type Sets = BTreeMap<String, Vec<Vec<u8>>>;

/// A rule in the making: its registers, as its expressions fill them.
#[derive(Default)]
struct Reader {
    rule: Rule,
    registers: BTreeMap<u32, Field>,
    /// The first port of a range, until its last one is compared.
    first: Option<u16>,
}

/// Reads a rule's expressions.
fn rule(listed: &nft::Rule, sets: &mut dyn FnMut(&str) -> Vec<Vec<u8>>) -> Rule {
    let rule = Rule { chain: listed.chain.clone(), handle: listed.handle, ..Rule::default() };
    let mut reader = Reader { rule, ..Reader::default() };
    for expression in listed.expressions() {
        let number = |kind| expression.number(kind);
        match expression.name.as_str() {
            "payload" => {
                let place = [payload::BASE, payload::OFFSET, payload::LENGTH].map(number);
                reader.load(number(payload::REGISTER), in_packet(place));
            }
            "ct" => {
                let field = original(number(ct::KEY), expression.value(ct::DIRECTION));
                reader.load(number(ct::REGISTER), field);
            }
            "bitwise" => {
                let mask = expression.bytes(bitwise::MASK).map(<[u8]>::to_vec);
                let field = reader.field(number(bitwise::SOURCE));
                let field = field.map(|field| Field { mask, ..field });
                reader.load(number(bitwise::REGISTER), field);
            }
            "cmp" => reader.compare(&expression),
            "range" => reader.range(&expression),
            "lookup" => reader.lookup(&expression, sets),
            "match" => {
                let info = expression.value(extension::INFO).unwrap_or_default();
                let name = text(expression.value(extension::NAME));
                reader.rule.named.extend(matched(&name, info));
            }
            "immediate" => reader.immediate(&expression),
            "target" => reader.rule.action = text(expression.value(extension::NAME)),
            "reject" | "masq" | "nat" | "redir" | "tproxy" | "notrack" | "queue"
            | "flow_offload" => {
                reader.rule.action.clone_from(&expression.name);
            }
            _ => reader.load(number(REGISTER), None),
        }
    }
    reader.rule
}

impl Reader {
    fn field(&self, register: Option<u32>) -> Option<Field> {
        self.registers.get(&register?).cloned()
    }

    fn load(&mut self, register: Option<u32>, field: Option<Field>) {
        let Some(register) = register else { return };
        match field {
            Some(field) => drop(self.registers.insert(register, field)),
            None => drop(self.registers.remove(&register)),
        }
    }

    fn compare(&mut self, expression: &nft::Expression<'_>) {
        let (Some(field), Some(value)) = (
            self.field(expression.number(cmp::SOURCE)),
            expression.bytes(cmp::VALUE).map(<[u8]>::to_vec),
        ) else {
            return;
        };
        let at = field.is_port.then(|| port(&value)).flatten();
        match (expression.number(cmp::OPERATION), at) {
            (Some(cmp::EQUAL), _) => self.rule.name(&field, &value, &value),
            (Some(cmp::AT_LEAST), Some(first)) => self.first = Some(first),
            (Some(cmp::AT_MOST), Some(_)) => {
                let first: u16 = self.first.take().unwrap_or(0);
                self.rule.name(&field, &first.to_be_bytes(), &value);
            }
            _ => {}
        }
    }

    fn range(&mut self, expression: &nft::Expression<'_>) {
        if let (Some(field), Some(range::WITHIN), Some(from), Some(to)) = (
            self.field(expression.number(range::SOURCE)),
            expression.number(range::OPERATION),
            expression.bytes(range::FROM),
            expression.bytes(range::TO),
        ) {
            self.rule.name(&field, from, to);
        }
    }

    fn lookup(
        &mut self,
        expression: &nft::Expression<'_>,
        sets: &mut dyn FnMut(&str) -> Vec<Vec<u8>>,
    ) {
        if let Some(field) = self.field(expression.number(lookup::SOURCE))
            && expression.number(lookup::FLAGS).unwrap_or(0) & lookup::INVERTED == 0
        {
            for key in sets(&text(expression.value(lookup::SET))) {
                self.rule.name(&field, &key, &key);
            }
        }
    }

    fn immediate(&mut self, expression: &nft::Expression<'_>) {
        let verdict = expression.verdict().unwrap_or_default();
        let rule = &mut self.rule;
        rule.jumps.extend(verdict.chain);
        rule.action = match (verdict.code, rule.jumps.last()) {
            // NF_DROP, NF_ACCEPT, NFT_RETURN, NFT_JUMP, NFT_GOTO.
            (Some(0), _) => "drop".to_owned(),
            (Some(1), _) => "accept".to_owned(),
            (Some(-5), _) => "return".to_owned(),
            (Some(-3 | -4), Some(chain)) => format!("jump {chain}"),
            _ => std::mem::take(&mut rule.action),
        };
        self.load(expression.number(REGISTER), None);
    }
}

/// Returns the field if it is the destination's address or port in a packet.
fn in_packet([base, offset, length]: [Option<u32>; 3]) -> Option<Field> {
    let is_port = match (base?, offset?, length?) {
        (2, 2, 2) => true,
        (1, 16, 1..=4) | (1, 24, 5..=16) => false,
        _ => return None,
    };
    Some(Field { is_port, is_original: false, mask: None })
}

/// Returns the field if it is the original destination in connection tracking: the keys DST,
/// DST_IP, DST_IP6 and PROTO_DST.
fn original(key: Option<u32>, direction: Option<&[u8]>) -> Option<Field> {
    let is_port = match key? {
        9 | 20 | 22 => false,
        12 => true,
        _ => return None,
    };
    (direction? == [0]).then_some(Field { is_port, is_original: true, mask: None })
}

/// Returns the destination ports that an iptables match compares.
fn matched(name: &str, data: &[u8]) -> Vec<Named> {
    let half = |at: usize| Some(u16::from_ne_bytes(data.get(at..at + 2)?.try_into().ok()?));
    // `struct xt_tcp`, `struct xt_udp`: source ports, destination ports, ..., which of them are
    // inverted.
    let inverted = match name {
        "tcp" => data.get(11),
        "udp" => data.get(8),
        // `struct xt_multiport_v1`: which end, number of ports, ports, which of them begin a range,
        // inverted.
        "multiport" => {
            let (Some(1 | 2), Some(count)) = (data.first(), data.get(1)) else { return Vec::new() };
            let ports: Vec<u16> =
                (0..usize::from(*count).min(15)).filter_map(|index| half(2 + 2 * index)).collect();
            let begins = |index: usize| data.get(32 + index).is_some_and(|flag| *flag != 0);
            let mut found = Vec::new();
            let mut index = 0;
            while let Some(first) = ports.get(index) {
                let last =
                    if begins(index) { ports.get(index + 1).unwrap_or(first) } else { first };
                found.push(Named::Ports(*first..=*last));
                index += 1 + usize::from(begins(index));
            }
            return if data.get(47).is_some_and(|inverted| *inverted != 0) {
                Vec::new()
            } else {
                found
            };
        }
        _ => return Vec::new(),
    };
    // Bit 1 is the destination's.
    match (half(4), half(6), inverted) {
        (Some(first), Some(last), Some(inverted)) if inverted & 2 == 0 => {
            vec![Named::Ports(first..=last)]
        }
        _ => Vec::new(),
    }
}

fn port(value: &[u8]) -> Option<u16> {
    value.get(..2)?.try_into().ok().map(u16::from_be_bytes)
}

impl Rule {
    /// Records that a field is compared with a value, or with a range.
    fn name(&mut self, field: &Field, from: &[u8], to: &[u8]) {
        let named = if field.is_port {
            let (Some(from), Some(to)) = (port(from), port(to)) else { return };
            Named::Ports(from..=to)
        } else {
            let Some(prefix) = prefix(from, field.mask.as_deref()) else { return };
            Named::Address(prefix)
        };
        if field.is_original { self.original.push(named) } else { self.named.push(named) }
    }
}

/// Returns the prefix of a value with its mask. A value that is shorter than an address is its
/// beginning.
fn prefix(value: &[u8], mask: Option<&[u8]>) -> Option<Prefix> {
    let bits = match mask {
        Some(mask) => mask.iter().map(|byte| byte.count_ones()).sum::<u32>(),
        None => 8 * u32::try_from(value.len()).ok()?,
    };
    let mut octets = [0; 16];
    octets.get_mut(..value.len())?.copy_from_slice(value);
    let address = if value.len() <= 4 {
        let [a, b, c, d, ..] = octets;
        Ipv4Addr::new(a, b, c, d).into()
    } else {
        Ipv6Addr::from(octets).into()
    };
    Some(Prefix { address, length: u8::try_from(bits).ok()? })
}

/// A chain that a hook leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) name: String,
    pub(super) at: nft::Base,
}

/// A table of nf_tables, with the parts that decide about packets.
#[derive(Clone, Debug)]
pub(super) struct Ruleset {
    pub(super) table: Table,
    pub(super) bases: Vec<Base>,
    pub(super) rules: Vec<Rule>,
}

impl Ruleset {
    /// Returns the table's name, such as `inet filter`.
    pub(super) fn name(&self) -> String {
        format!("{} {}", self.table.family.word(), self.table.name)
    }

    /// Returns these chains, and those that they lead to.
    pub(super) fn reached(&self, mut chains: BTreeSet<String>) -> BTreeSet<String> {
        while let Some(next) = self
            .rules
            .iter()
            .filter(|rule| chains.contains(&rule.chain))
            .flat_map(|rule| &rule.jumps)
            .find(|target| !chains.contains(*target))
        {
            let _ = chains.insert(next.clone());
        }
        chains
    }
}

/// Returns every table whose chains see incoming or forwarded packets, except kube-proxy's own,
/// which another check reports.
pub(super) fn read() -> io::Result<Vec<Ruleset>> {
    let mut tables: BTreeMap<Table, Vec<Base>> = BTreeMap::new();
    for chain in nft::chains()? {
        let bases = tables.entry(chain.table).or_default();
        bases.extend(chain.base.map(|at| Base { name: chain.name, at }));
    }
    let mut rulesets = Vec::new();
    for (table, bases) in tables {
        if table.name == "kube-proxy" {
            continue;
        }
        let mut listed = Vec::new();
        nft::rules(&table, |rule| listed.push(rule))?;
        let mut known = Sets::new();
        let mut sets = |name: &str| {
            let keys = || {
                // A set that was removed in the meantime has none.
                let elements = nft::elements(&table, name).unwrap_or_default();
                elements.into_iter().map(|element| element.key).collect()
            };
            known.entry(name.to_owned()).or_insert_with(keys).clone()
        };
        let rules = listed.iter().map(|listed| rule(listed, &mut sets)).collect();
        rulesets.push(Ruleset { table, bases, rules });
    }
    Ok(rulesets)
}

/// Whether a base chain sees packets before they are routed.
fn is_early(family: Family, base: &Base) -> bool {
    match family {
        // NF_INET_PRE_ROUTING, NF_INET_INGRESS.
        Family::Inet => matches!(base.at.hook, 0 | 5),
        // PREROUTING, or a device's ingress, which comes after Sluice's programs too.
        Family::Ip | Family::Ip6 | Family::Netdev => base.at.hook == 0,
        Family::Bridge => false,
    }
}

/// Returns the rules that name a frontend where they cannot apply.
fn look(rulesets: &[Ruleset], frontends: &Frontends) -> Vec<String> {
    let mut lines = Vec::new();
    for ruleset in rulesets.iter().filter(|ruleset| ruleset.table.family != Family::Bridge) {
        let early = ruleset.bases.iter().filter(|base| is_early(ruleset.table.family, base));
        let chains = ruleset.reached(early.map(|base| base.name.clone()).collect());
        for rule in ruleset.rules.iter().filter(|rule| !rule.chain.starts_with("KUBE-")) {
            let named = if chains.contains(&rule.chain) { &rule.named[..] } else { &[] };
            let found = named.iter().chain(&rule.original).find(|named| match named {
                Named::Ports(ports) => frontends.has_port(ports),
                Named::Address(prefix) => frontends.has_address(prefix),
            });
            if let Some(named) = found {
                lines.push(format!(
                    "{} {} handle {} ({named})",
                    ruleset.name(),
                    rule.chain,
                    rule.handle
                ));
            }
        }
    }
    lines
}

/// Returns the check.
pub(super) fn check(found: Option<&io::Result<Vec<Ruleset>>>, frontends: &Frontends) -> Check {
    const NAME: &str = "early-rules";
    let lines = match found {
        None => return Check::new(NAME, Outcome::Skip, "only root can list rules"),
        Some(Err(error)) => {
            return Check::new(
                NAME,
                Outcome::Skip,
                format!("cannot list netfilter's rules: {error}"),
            );
        }
        Some(Ok(rulesets)) => look(rulesets, frontends),
    };
    if lines.is_empty() {
        let known = if frontends.is_known {
            "no rule matches a node port or a Service's address before translation"
        } else {
            "no rule matches a node port before translation (addresses of Services are known once an agent has run)"
        };
        return Check::new(NAME, Outcome::Yes, known);
    }
    let mut named = lines.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
    if lines.len() > NAMED_MAX {
        named = format!("{named} and {} more", lines.len() - NAMED_MAX);
    }
    Check::new(NAME, Outcome::Warn, format!("{named}: these rules never apply, since Sluice translates first"))
        .next("match the endpoint's address and port in a FORWARD chain, or limit clients by loadBalancerSourceRanges or --nodeport-addresses (docs/compatibility.md)")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frontends() -> Frontends {
        Frontends {
            is_known: true,
            addresses: [[203, 0, 113, 7].into()].into(),
            node_ports: [80].into(),
        }
    }

    #[test]
    fn a_port_is_a_node_ports_by_the_usual_range_or_by_the_maps() {
        let frontends = frontends();
        for (ports, has) in [
            (30_080..=30_080, true),
            (1..=u16::MAX, false),
            (0..=u16::MAX, false),
            (2..=u16::MAX, true),
            (22..=22, false),
            (80..=80, true),
            (32_768..=60_999, false),
        ] {
            assert_eq!(frontends.has_port(&ports), has, "{ports:?}");
        }
    }

    #[test]
    fn an_address_is_a_frontends_by_its_prefix() {
        let frontends = frontends();
        for (value, mask, has) in [
            (&[203, 0, 113, 7][..], None, true),
            (&[203, 0, 113, 8], None, false),
            (&[203, 0, 113], None, true),
            (&[203, 0, 112, 0], Some(&[255, 255, 254, 0][..]), true),
            (&[0, 0, 0, 0], Some(&[0, 0, 0, 0]), false),
        ] {
            let prefix = prefix(value, mask).expect("an address");
            assert_eq!(frontends.has_address(&prefix), has, "{prefix:?}");
        }
    }

    #[test]
    fn ports_of_iptables_matches_are_read() {
        let halves =
            |ports: &[u16]| ports.iter().flat_map(|port| port.to_ne_bytes()).collect::<Vec<u8>>();
        let tcp = [halves(&[0, u16::MAX, 30_001, 30_002]), vec![0; 4]].concat();
        assert_eq!(matched("tcp", &tcp), [Named::Ports(30_001..=30_002)]);
        let inverted = [halves(&[0, u16::MAX, 30_001, 30_002]), vec![0, 0, 0, 2]].concat();
        assert_eq!(matched("tcp", &inverted), []);
        let mut multiport = [vec![1, 3], halves(&[80, 30_000, 30_010]), vec![0; 40]].concat();
        multiport[33] = 1;
        assert_eq!(
            matched("multiport", &multiport),
            [Named::Ports(80..=80), Named::Ports(30_000..=30_010)]
        );
        assert_eq!(matched("owner", &tcp), []);
    }
}
