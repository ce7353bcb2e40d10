//! Decides which Service gets a frontend that several claim: the oldest, or else the first by name.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::object::{ObjectName, Protocol};

/// An address with a port and protocol, which Services can claim.
pub type Frontend = (IpAddr, u16, Protocol);

/// A claim. The least claim wins; an unknown age counts as newest.
type Claim = (bool, Option<i64>, ObjectName);

/// The consequences of a Service's new claims.
#[derive(Debug)]
pub(super) struct Changed {
    /// The Services that win or lose a frontend, or contest another one.
    pub(super) services: BTreeSet<ObjectName>,
    /// The frontends that are new, gone, or now belong to another Service.
    pub(super) frontends: Vec<Frontend>,
}

/// All claims of all Services.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    claimants: BTreeMap<Frontend, BTreeSet<Claim>>,
    services: BTreeMap<ObjectName, (Option<i64>, BTreeSet<Frontend>)>,
}

impl Claims {
    /// Replaces a Service's claims, and returns what that changes.
    pub(super) fn set(
        &mut self,
        name: &ObjectName,
        created: Option<i64>,
        frontends: BTreeSet<Frontend>,
    ) -> Changed {
        let (old_created, old) = self.services.remove(name).unwrap_or_default();
        let mut affected = BTreeSet::new();
        let mut changed = Vec::new();
        let unchanged = old_created == created;
        for frontend in old.union(&frontends) {
            let (had, has) = (old.contains(frontend), frontends.contains(frontend));
            if had && has && unchanged {
                continue;
            }
            let claimants = self.claimants.entry(*frontend).or_default();
            let before = claimants.first().map(|(_, _, name)| name.clone());
            if had {
                let _ = claimants.remove(&claim(old_created, name));
            }
            if has {
                let _ = claimants.insert(claim(created, name));
            }
            let after = claimants.first().map(|(_, _, name)| name.clone());
            if before == after {
                affected.extend(after);
            } else {
                changed.push(*frontend);
                affected.extend(before);
                affected.extend(claimants.iter().map(|(_, _, name)| name.clone()));
            }
            if claimants.is_empty() {
                let _ = self.claimants.remove(frontend);
            }
        }
        if !frontends.is_empty() {
            let _ = self.services.insert(name.clone(), (created, frontends));
        }
        Changed { services: affected, frontends: changed }
    }

    /// Returns the Service that gets a frontend.
    pub(super) fn winner(&self, frontend: &Frontend) -> Option<&ObjectName> {
        self.claimants.get(frontend)?.first().map(|(_, _, name)| name)
    }

    /// Returns the Services that claim a frontend in vain.
    pub(super) fn losers(&self, frontend: &Frontend) -> impl Iterator<Item = &ObjectName> {
        self.claimants.get(frontend).into_iter().flatten().skip(1).map(|(_, _, name)| name)
    }
}

fn claim(created: Option<i64>, name: &ObjectName) -> Claim {
    (created.is_none(), created, name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frontend() -> BTreeSet<Frontend> {
        [(IpAddr::from([10, 0, 0, 1]), 80, Protocol::Tcp)].into()
    }

    #[test]
    fn the_older_wins_and_an_unknown_age_is_newest() {
        let (young, old, ageless) = (
            ObjectName::new("a", "young"),
            ObjectName::new("b", "old"),
            ObjectName::new("a", "ageless"),
        );
        let mut claims = Claims::default();
        let _ = claims.set(&ageless, None, frontend());
        let _ = claims.set(&young, Some(2), frontend());
        let Changed { services, frontends } = claims.set(&old, Some(1), frontend());
        assert_eq!(services, [young.clone(), old.clone(), ageless.clone()].into());
        let frontend = *frontend().first().expect("one");
        assert_eq!(frontends, [frontend]);
        assert_eq!(claims.winner(&frontend), Some(&old));
        assert_eq!(claims.losers(&frontend).collect::<Vec<_>>(), [&young, &ageless]);
        let _ = claims.set(&old, Some(1), BTreeSet::new());
        assert_eq!(claims.winner(&frontend), Some(&young));
    }
}
