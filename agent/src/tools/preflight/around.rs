//! Finds what packets bypass that go around the stack (`--accelerate on`): netfilter's rules, and
//! programs after Sluice's.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use sluice_core::policy::Accelerate;

use super::early::{Base, Rule, Ruleset};
use super::{Check, Outcome};
use crate::node::kube_proxy::rules::HOLDING;
use crate::node::nft::Family;

const NAME: &str = "accelerate";
/// The most rules of a chain that are listed. The others are counted.
const LISTED_MAX: usize = 3;

/// The parts of the stack that such packets bypass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Skipped {
    /// Base chains with their rules, for people.
    chains: Vec<String>,
    /// The chains that drop forwarded packets, and by which rule.
    drops: Vec<String>,
    /// Tables of legacy iptables, whose rules nf_tables does not list.
    legacy: BTreeSet<String>,
    /// The programs after Sluice's at the ingress of each device.
    programs: BTreeMap<String, BTreeSet<String>>,
}

/// Returns the name of a hook that a packet passes between Sluice's two programs.
fn hook(family: Family, base: &Base) -> Option<&'static str> {
    match (family, base.at.hook) {
        (Family::Inet, 5) | (Family::Netdev, 0) => Some("ingress"),
        (Family::Netdev, _) => None,
        (_, 0) => Some("prerouting"),
        (_, 2) => Some("forward"),
        (_, 4) => Some("postrouting"),
        _ => None,
    }
}

/// Describes a rule: `handle 7 (port 80) drop`.
fn describe(rule: &Rule) -> String {
    let named = rule.named.first().map_or(String::new(), |named| format!(" ({named})"));
    let action = if rule.action.is_empty() { String::new() } else { format!(" {}", rule.action) };
    format!("{} handle {}{named}{action}", rule.chain, rule.handle)
}

fn drops(rule: &Rule) -> bool {
    matches!(rule.action.as_str(), "drop" | "reject" | "DROP" | "REJECT")
}

impl Skipped {
    /// Collects what is bypassed from tables and other findings.
    pub(super) fn new(
        rulesets: &[Ruleset],
        legacy: BTreeSet<String>,
        programs: BTreeMap<String, BTreeSet<String>>,
    ) -> Self {
        let mut skipped = Self { legacy, programs, ..Self::default() };
        for ruleset in rulesets.iter().filter(|ruleset| ruleset.table.name != HOLDING) {
            for base in &ruleset.bases {
                let Some(hook) = hook(ruleset.table.family, base) else { continue };
                let chains = ruleset.reached([base.name.clone()].into());
                let rules: Vec<&Rule> =
                    ruleset.rules.iter().filter(|rule| chains.contains(&rule.chain)).collect();
                if rules.is_empty() && !base.at.drops {
                    continue;
                }
                let chain = format!("{} {}", ruleset.name(), base.name);
                let mut few: Vec<String> =
                    rules.iter().take(LISTED_MAX).map(|rule| describe(rule)).collect();
                if rules.len() > LISTED_MAX {
                    few.push("...".to_owned());
                }
                if base.at.drops {
                    few.push("policy drop".to_owned());
                }
                skipped.chains.push(format!(
                    "{chain} ({hook}, priority {}, {} rules: {})",
                    base.at.priority,
                    rules.len(),
                    few.join(", ")
                ));
                if hook == "forward" {
                    let first = rules.iter().find(|rule| drops(rule)).map(|rule| describe(rule));
                    let by = first.or_else(|| base.at.drops.then(|| "policy drop".to_owned()));
                    skipped.drops.extend(by.map(|by| format!("{chain}: {by}")));
                }
            }
        }
        skipped
    }

    /// Returns everything that is bypassed, for people, or [`None`] if there is nothing.
    fn words(&self) -> Option<String> {
        let mut parts = self.chains.clone();
        if !self.legacy.is_empty() {
            let tables: Vec<&str> = self.legacy.iter().map(String::as_str).collect();
            parts.push(format!("legacy iptables tables {}", tables.join(", ")));
        }
        for (device, programs) in &self.programs {
            let names: Vec<&str> = programs.iter().map(String::as_str).collect();
            parts.push(format!(
                "programs after Sluice's at the ingress of {device}: {}",
                names.join(", ")
            ));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

/// Returns the legacy iptables tables that packets pass between Sluice's programs.
pub(super) fn legacy() -> BTreeSet<String> {
    let of = |file: &str, word: &str| {
        let names = std::fs::read_to_string(format!("/proc/net/{file}")).unwrap_or_default();
        names.lines().map(|name| format!("{name} ({word})")).collect::<Vec<_>>()
    };
    of("ip_tables_names", "IPv4").into_iter().chain(of("ip6_tables_names", "IPv6")).collect()
}

/// Returns the check.
pub(super) fn check(accelerate: Accelerate, found: Option<Result<&Skipped, &io::Error>>) -> Check {
    let skipped = match found {
        None => return Check::new(NAME, Outcome::Skip, "only root can list rules"),
        Some(Err(error)) => {
            return Check::new(
                NAME,
                Outcome::Skip,
                format!("cannot list netfilter's rules: {error}"),
            );
        }
        Some(Ok(skipped)) => skipped,
    };
    let words = skipped.words();
    let words = words.as_deref().unwrap_or("no netfilter rule, and no program after Sluice's");
    if accelerate == Accelerate::Off {
        let what = format!(
            "off: packets pass the stack; with `on`, packets of Services would bypass: {words}"
        );
        return Check::new(NAME, Outcome::Yes, what);
    }
    let what = format!("on: packets of Services bypass: {words}");
    if skipped.drops.is_empty() && skipped.programs.is_empty() && skipped.legacy.is_empty() {
        return Check::new(NAME, Outcome::Yes, what);
    }
    let why = if skipped.drops.is_empty() {
        "check that nothing depends on these, or leave --accelerate off".to_owned()
    } else {
        format!(
            "{} would not stop packets of Services: leave --accelerate off, or filter elsewhere (docs/security.md)",
            skipped.drops.join(", ")
        )
    };
    Check::new(NAME, Outcome::Warn, what).next(why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::nft::{self, Table};
    use Accelerate::{Off, On};

    fn rule(chain: &str, handle: u64, action: &str, jumps: &[&str]) -> Rule {
        Rule {
            chain: chain.to_owned(),
            handle,
            action: action.to_owned(),
            jumps: jumps.iter().map(|chain| (*chain).to_owned()).collect(),
            ..Rule::default()
        }
    }

    fn base(name: &str, hook: u32, drops: bool) -> Base {
        Base { name: name.to_owned(), at: nft::Base { hook, priority: -1, drops } }
    }

    fn ruleset(family: Family, bases: Vec<Base>, rules: Vec<Rule>) -> Ruleset {
        Ruleset { table: Table { family, name: "t".to_owned() }, bases, rules }
    }

    fn skipped(rulesets: &[Ruleset]) -> Skipped {
        Skipped::new(rulesets, BTreeSet::new(), BTreeMap::new())
    }

    #[test]
    fn chains_between_our_programs_are_named_with_their_rules() {
        let found = skipped(&[
            ruleset(
                Family::Ip,
                vec![base("FORWARD", 2, false), base("INPUT", 1, true), base("empty", 4, false)],
                vec![
                    rule("FORWARD", 1, "jump more", &["more"]),
                    rule("more", 2, "accept", &[]),
                    rule("more", 3, "DROP", &[]),
                    rule("more", 4, "", &[]),
                    rule("INPUT", 5, "drop", &[]),
                ],
            ),
            ruleset(
                Family::Netdev,
                vec![base("in", 0, false), base("out", 1, true)],
                vec![rule("in", 1, "drop", &[])],
            ),
        ]);
        assert_eq!(
            found.chains,
            [
                "ip t FORWARD (forward, priority -1, 4 rules: FORWARD handle 1 jump more, more handle 2 accept, more handle 3 DROP, ...)",
                "netdev t in (ingress, priority -1, 1 rules: in handle 1 drop)",
            ]
        );
        assert_eq!(found.drops, ["ip t FORWARD: more handle 3 DROP"]);
    }

    #[test]
    fn a_policy_that_drops_counts_without_a_rule() {
        let found = skipped(&[ruleset(Family::Inet, vec![base("f", 2, true)], Vec::new())]);
        assert_eq!(found.drops, ["inet t f: policy drop"]);
        let own = Ruleset {
            table: Table { family: Family::Inet, name: HOLDING.to_owned() },
            ..ruleset(Family::Inet, vec![base("f", 2, true)], Vec::new())
        };
        assert_eq!(skipped(&[own]), Skipped::default());
    }

    #[test]
    fn only_what_is_on_and_skips_something_that_stops_packets_is_warned_of() {
        let drops = skipped(&[ruleset(Family::Ip6, vec![base("f", 2, true)], Vec::new())]);
        let counts = skipped(&[ruleset(
            Family::Ip6,
            vec![base("f", 2, false)],
            vec![rule("f", 1, "", &[])],
        )]);
        let programs = Skipped {
            programs: [("eth0".to_owned(), ["guard".to_owned()].into())].into(),
            ..Skipped::default()
        };
        for (accelerate, found, result) in [
            (Off, &drops, Outcome::Yes),
            (On, &drops, Outcome::Warn),
            (On, &counts, Outcome::Yes),
            (On, &programs, Outcome::Warn),
            (Off, &programs, Outcome::Yes),
            (On, &Skipped::default(), Outcome::Yes),
        ] {
            let check = check(accelerate, Some(Ok(found)));
            assert_eq!(check.result, result, "{check:?}");
            assert_eq!(check.next.is_some(), result == Outcome::Warn, "{check:?}");
        }
        assert!(
            check(On, Some(Ok(&drops)))
                .next
                .is_some_and(|next| next.contains("ip6 t f: policy drop"))
        );
        assert_eq!(check(On, None).result, Outcome::Skip);
    }
}
