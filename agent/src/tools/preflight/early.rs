//! Rules of netfilter that name a frontend before it is translated.
//!
//! Sluice's programs come before netfilter, which sees the endpoint where such a rule waits for a
//! node port or a Service's address: the rule never applies to what it names. The same goes for a
//! rule that asks connection tracking for the original destination.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::Path;

use super::{Check, Outcome};
use crate::node::dataplane::clsact::{attributes, find, text};
use crate::node::nft::dump;
use crate::node::view::View;

/// The usual `--service-node-port-range`.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;
/// Rules that are named at most; the others are counted.
const NAMED_MAX: usize = 5;

/// `NFPROTO_*`.
pub(super) const INET: u8 = 1;
pub(super) const IPV4: u8 = 2;
pub(super) const NETDEV: u8 = 5;
pub(super) const BRIDGE: u8 = 7;
pub(super) const IPV6: u8 = 10;

/// What is served on this node as far as it is known.
#[derive(Clone, Debug, Default)]
pub(super) struct Frontends {
    /// Whether the maps of an agent tell.
    is_known: bool,
    addresses: BTreeSet<IpAddr>,
    node_ports: BTreeSet<u16>,
}

impl Frontends {
    /// Those of an agent that runs, or has run, on this node.
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

/// A network's address and how many bits of it count.
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

/// What of a packet a rule compares.
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

/// What a register holds.
#[derive(Clone, Debug)]
struct Field {
    is_port: bool,
    /// Asked of connection tracking: its original destination.
    is_original: bool,
    mask: Option<Vec<u8>>,
}

/// A rule and what it compares the destination with.
#[derive(Clone, Debug, Default)]
pub(super) struct Rule {
    pub(super) chain: String,
    pub(super) handle: u64,
    pub(super) jumps: Vec<String>,
    pub(super) named: Vec<Named>,
    /// As `named`, of what connection tracking says.
    pub(super) original: Vec<Named>,
    /// What it does at last: a verdict, or what an expression or a target of iptables' is called.
    pub(super) action: String,
}

/// Elements of the sets of one table by name.
type Sets = BTreeMap<String, Vec<Vec<u8>>>;

/// Reads a rule's expressions.
fn rule(message: &[u8], sets: &mut dyn FnMut(&str) -> Vec<Vec<u8>>) -> Option<Rule> {
    let handle = u64::from_be_bytes(find(message, 3)?.try_into().ok()?);
    let mut rule = Rule { chain: text(find(message, 2)), handle, ..Rule::default() };
    let mut registers: BTreeMap<u32, Field> = BTreeMap::new();
    let mut least = None;
    for (_, expression) in attributes(find(message, 4)?) {
        let name = text(find(expression, 1));
        let Some(data) = find(expression, 2) else { continue };
        let number =
            |kind| find(data, kind).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
        let value = |kind| find(find(data, kind)?, 1).map(<[u8]>::to_vec);
        match name.as_str() {
            "payload" => load(&mut registers, number(1), payload(number(2), number(3), number(4))),
            "ct" => load(&mut registers, number(1), original(number(2), find(data, 3))),
            "bitwise" => {
                let field = number(1).and_then(|source| registers.get(&source).cloned());
                load(
                    &mut registers,
                    number(2),
                    field.map(|field| Field { mask: value(4), ..field }),
                );
            }
            "cmp" => {
                let (Some(field), Some(value)) =
                    (number(1).and_then(|from| registers.get(&from)), value(3))
                else {
                    continue;
                };
                // NFT_CMP_EQ, NFT_CMP_LTE, NFT_CMP_GTE.
                match (number(2), field.is_port.then(|| port(&value)).flatten()) {
                    (Some(0), _) => rule.name(field, &value, &value),
                    (Some(5), Some(first)) => least = Some(first),
                    (Some(3), Some(_)) => {
                        let first: u16 = least.take().unwrap_or(0);
                        rule.name(field, &first.to_be_bytes(), &value);
                    }
                    _ => {}
                }
            }
            "range" => {
                if let (Some(field), Some(0), Some(from), Some(to)) =
                    (number(1).and_then(|from| registers.get(&from)), number(2), value(3), value(4))
                {
                    rule.name(field, &from, &to);
                }
            }
            "lookup" => {
                // NFT_LOOKUP_F_INV: all but those.
                if let Some(field) = number(2).and_then(|from| registers.get(&from))
                    && number(5).unwrap_or(0) & 1 == 0
                {
                    for key in sets(&text(find(data, 1))) {
                        rule.name(field, &key, &key);
                    }
                }
            }
            "match" => {
                rule.named.extend(matched(&text(find(data, 1)), find(data, 3).unwrap_or_default()));
            }
            "immediate" => {
                let target = find(data, 2)
                    .and_then(|data| find(data, 2))
                    .and_then(|verdict| find(verdict, 2));
                rule.jumps.extend(target.map(|target| text(Some(target))));
                let verdict = find(data, 2)
                    .and_then(|data| find(data, 2))
                    .and_then(|verdict| find(verdict, 1));
                let verdict = verdict.and_then(|code| code.try_into().ok()).map(i32::from_be_bytes);
                rule.action = match (verdict, rule.jumps.last()) {
                    // NF_DROP, NF_ACCEPT, NFT_RETURN, NFT_JUMP, NFT_GOTO.
                    (Some(0), _) => "drop".to_owned(),
                    (Some(1), _) => "accept".to_owned(),
                    (Some(-5), _) => "return".to_owned(),
                    (Some(-3 | -4), Some(chain)) => format!("jump {chain}"),
                    _ => std::mem::take(&mut rule.action),
                };
                load(&mut registers, number(1), None);
            }
            "target" => rule.action = text(find(data, 1)),
            "reject" | "masq" | "nat" | "redir" | "tproxy" | "notrack" | "queue"
            | "flow_offload" => {
                rule.action = name;
            }
            // Of whatever else loads a register, the first attribute names it.
            _ => load(&mut registers, number(1), None),
        }
    }
    Some(rule)
}

fn load(registers: &mut BTreeMap<u32, Field>, register: Option<u32>, field: Option<Field>) {
    let Some(register) = register else { return };
    match field {
        Some(field) => drop(registers.insert(register, field)),
        None => drop(registers.remove(&register)),
    }
}

/// The destination's address or port in a packet.
fn payload(base: Option<u32>, offset: Option<u32>, length: Option<u32>) -> Option<Field> {
    let is_port = match (base?, offset?, length?) {
        (2, 2, 2) => true,
        (1, 16, 1..=4) | (1, 24, 5..=16) => false,
        _ => return None,
    };
    Some(Field { is_port, is_original: false, mask: None })
}

/// The original destination, as connection tracking knows it: keys DST, DST_IP, DST_IP6 and
/// PROTO_DST.
fn original(key: Option<u32>, direction: Option<&[u8]>) -> Option<Field> {
    let is_port = match key? {
        9 | 20 | 22 => false,
        12 => true,
        _ => return None,
    };
    (direction? == [0]).then_some(Field { is_port, is_original: true, mask: None })
}

/// Destination ports that a match of iptables' compares.
fn matched(name: &str, data: &[u8]) -> Vec<Named> {
    let half = |at: usize| Some(u16::from_ne_bytes(data.get(at..at + 2)?.try_into().ok()?));
    // `struct xt_tcp`, `struct xt_udp`: source ports, destination ports, ..., which are inverted.
    let inverted = match name {
        "tcp" => data.get(11),
        "udp" => data.get(8),
        // `struct xt_multiport_v1`: of which end, how many, ports, which of them begin a range,
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
    // Bit 1: the destination's.
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
    /// Notes that a field is compared with a value, or all from one to another.
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

/// The prefix that a value and its mask are; a value that is shorter than an address is its
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

fn word(family: u8) -> &'static str {
    match family {
        INET => "inet",
        IPV4 => "ip",
        IPV6 => "ip6",
        BRIDGE => "bridge",
        _ => "netdev",
    }
}

/// A chain that a hook leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) name: String,
    /// The hook's number, in its family.
    pub(super) hook: u32,
    pub(super) priority: i32,
    /// Whether what no rule decides about is dropped.
    pub(super) drops: bool,
}

/// A table of nf_tables, with what of it tells where packets go.
#[derive(Clone, Debug)]
pub(super) struct Ruleset {
    pub(super) family: u8,
    pub(super) table: String,
    pub(super) bases: Vec<Base>,
    pub(super) rules: Vec<Rule>,
}

impl Ruleset {
    /// `inet filter`.
    pub(super) fn name(&self) -> String {
        format!("{} {}", word(self.family), self.table)
    }

    /// The chains that some lead to, themselves among them.
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

/// Every table whose chains see packets that come in or are forwarded, kube-proxy's own left out:
/// another check tells of it.
pub(super) fn read() -> io::Result<Vec<Ruleset>> {
    let mut tables: BTreeMap<(u8, String), Vec<Base>> = BTreeMap::new();
    // NFT_MSG_GETCHAIN; table, name, hook, policy.
    dump(4, [0, 0, 0, 0], &[], |family, chain| {
        if ![INET, IPV4, NETDEV, BRIDGE, IPV6].contains(&family) {
            return;
        }
        let found = tables.entry((family, text(find(chain, 1)))).or_default();
        let word = |bytes: Option<&[u8]>| {
            bytes.and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes)
        };
        let Some(hook) = find(chain, 4) else { return };
        if let Some(number) = word(find(hook, 1)) {
            found.push(Base {
                name: text(find(chain, 3)),
                hook: number,
                priority: word(find(hook, 2)).unwrap_or_default().cast_signed(),
                drops: word(find(chain, 5)) == Some(0),
            });
        }
    })?;
    let mut rulesets = Vec::new();
    for ((family, table), bases) in tables {
        if table == "kube-proxy" {
            continue;
        }
        let mut messages = Vec::new();
        // NFT_MSG_GETRULE; not every kernel leaves out the rules of other tables.
        dump(7, [family, 0, 0, 0], &[(1, &table)], |_, message| {
            if text(find(message, 1)) == table {
                messages.push(message.to_vec());
            }
        })?;
        let mut known = Sets::new();
        let mut sets = |name: &str| {
            known.entry(name.to_owned()).or_insert_with(|| elements(family, &table, name)).clone()
        };
        let rules = messages.iter().filter_map(|message| rule(message, &mut sets)).collect();
        rulesets.push(Ruleset { family, table, bases, rules });
    }
    Ok(rulesets)
}

/// Whether a base chain sees packets before they are routed.
fn is_early(family: u8, base: &Base) -> bool {
    match family {
        // NF_INET_PRE_ROUTING, NF_INET_INGRESS.
        INET => matches!(base.hook, 0 | 5),
        // PREROUTING; a device's ingress, which is behind our programs too.
        IPV4 | IPV6 | NETDEV => base.hook == 0,
        _ => false,
    }
}

/// The rules that name a frontend where they cannot apply.
fn look(rulesets: &[Ruleset], frontends: &Frontends) -> Vec<String> {
    let mut lines = Vec::new();
    for ruleset in rulesets.iter().filter(|ruleset| ruleset.family != BRIDGE) {
        let early = ruleset.bases.iter().filter(|base| is_early(ruleset.family, base));
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

/// The keys of a set; of an interval the ends.
fn elements(family: u8, table: &str, set: &str) -> Vec<Vec<u8>> {
    let mut keys = Vec::new();
    // NFT_MSG_GETSETELEM. A set that is gone meanwhile has none.
    let _ = dump(13, [family, 0, 0, 0], &[(1, table), (2, set)], |_, list| {
        for (_, element) in find(list, 3).into_iter().flat_map(attributes) {
            keys.extend(find(element, 1).and_then(|key| find(key, 1)).map(<[u8]>::to_vec));
        }
    });
    keys
}

/// What follows from them.
pub(super) fn check(found: Option<&io::Result<Vec<Ruleset>>>, frontends: &Frontends) -> Check {
    const NAME: &str = "early-rules";
    let lines = match found {
        None => return Check::new(NAME, Outcome::Skip, "rules can be listed by root only"),
        Some(Err(error)) => {
            return Check::new(
                NAME,
                Outcome::Skip,
                format!("netfilter's rules cannot be listed: {error}"),
            );
        }
        Some(Ok(rulesets)) => look(rulesets, frontends),
    };
    if lines.is_empty() {
        let known = if frontends.is_known {
            "no rule names a node port or a Service's address before it is translated"
        } else {
            "no rule names a node port before it is translated (addresses of Services are known once an agent has run)"
        };
        return Check::new(NAME, Outcome::Yes, known);
    }
    let mut named = lines.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
    if lines.len() > NAMED_MAX {
        named = format!("{named} and {} more", lines.len() - NAMED_MAX);
    }
    Check::new(NAME, Outcome::Warn, format!("{named}: such a rule never applies, since Sluice translates before it"))
        .next("let such a rule name the endpoint's address and port in a FORWARD chain, or limit clients by loadBalancerSourceRanges or --nodeport-addresses (docs/compatibility.md)")
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
