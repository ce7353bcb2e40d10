//! The assignment of load balancers' addresses to Services.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, bail};

use super::service::{Family, Service};
use crate::addresses::{load_balancer_ipv4, load_balancer_ipv6};

/// Addresses in use, by the uids of their Services. An address that was given back is reused as
/// late as possible, so that clients that still know it reach nobody.
#[derive(Default)]
pub(super) struct Pool {
    given: BTreeMap<String, Vec<IpAddr>>,
    last: u8,
}

impl Pool {
    /// Returns the addresses of a Service, in the order of its families, and those that it no
    /// longer has.
    ///
    /// # Errors
    /// If all are in use.
    pub(super) fn give(&mut self, service: &Service) -> Result<(Vec<IpAddr>, Vec<IpAddr>)> {
        let before = self.given.get(service.uid()).cloned().unwrap_or_else(|| self.shown(service));
        let mut addresses = Vec::new();
        for family in service.families() {
            let kept = before.iter().find(|address| Family::of(address) == *family);
            addresses.push(kept.map_or_else(|| self.free(*family), |kept| Ok(*kept))?);
        }
        let _earlier = self.given.insert(service.uid().to_owned(), addresses.clone());
        let released = before.into_iter().filter(|address| !addresses.contains(address)).collect();
        Ok((addresses, released))
    }

    /// Takes a Service's addresses back.
    pub(super) fn take(&mut self, uid: &str) -> Vec<IpAddr> {
        self.given.remove(uid).unwrap_or_default()
    }

    /// Takes back all addresses of the Services that are not wanted.
    pub(super) fn retain(&mut self, mut wanted: impl FnMut(&str) -> bool) -> Vec<IpAddr> {
        let gone: Vec<_> = self.given.keys().filter(|uid| !wanted(uid)).cloned().collect();
        gone.iter().flat_map(|uid| self.take(uid)).collect()
    }

    /// Takes over the addresses that an earlier process gave the Service.
    fn shown(&self, service: &Service) -> Vec<IpAddr> {
        let ours = |address: &IpAddr| {
            numbers().any(|number| address_of(Family::of(address), number) == *address)
        };
        service
            .ingress()
            .into_iter()
            .filter(|address| ours(address) && !self.is_given(address))
            .collect()
    }

    fn free(&mut self, family: Family) -> Result<IpAddr> {
        let after_last = (self.last..u8::MAX).skip(1).chain(numbers());
        for number in after_last {
            let address = address_of(family, number);
            if !self.is_given(&address) {
                self.last = number;
                return Ok(address);
            }
        }
        bail!("all addresses of load balancers are in use")
    }

    fn is_given(&self, address: &IpAddr) -> bool {
        self.given.values().flatten().any(|given| given == address)
    }
}

/// Of the addresses' last digits.
fn numbers() -> impl Iterator<Item = u8> {
    1..u8::MAX
}

fn address_of(family: Family, number: u8) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::from(load_balancer_ipv4(number)).into(),
        Family::Ipv6 => Ipv6Addr::from(load_balancer_ipv6(number)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::service::tests::service;
    use super::*;

    fn given(pool: &mut Pool, uid: &str, families: &[&str], shown: &[&str]) -> Result<Vec<String>> {
        let (addresses, _) = pool.give(&service(uid, families, shown)?)?;
        Ok(addresses.iter().map(IpAddr::to_string).collect())
    }

    #[test]
    fn a_service_keeps_its_addresses_and_an_address_rests_after_use() -> Result<()> {
        let mut pool = Pool::default();
        assert_eq!(given(&mut pool, "1", &["IPv4"], &[])?, ["10.20.0.1"]);
        assert_eq!(given(&mut pool, "1", &["IPv4"], &[])?, ["10.20.0.1"]);
        assert_eq!(pool.take("1").len(), 1);
        assert_eq!(given(&mut pool, "2", &["IPv4"], &[])?, ["10.20.0.2"]);
        Ok(())
    }

    #[test]
    fn what_a_service_shows_of_ours_stays_its_own() -> Result<()> {
        let mut pool = Pool::default();
        assert_eq!(
            given(&mut pool, "1", &["IPv6", "IPv4"], &["10.20.0.7", "192.0.2.1"])?,
            ["fd20::1", "10.20.0.7"]
        );
        assert_eq!(given(&mut pool, "2", &["IPv4"], &["10.20.0.7"])?, ["10.20.0.2"]);
        Ok(())
    }

    #[test]
    fn a_family_that_goes_gives_its_address_back() -> Result<()> {
        let mut pool = Pool::default();
        let _both = given(&mut pool, "1", &["IPv4", "IPv6"], &[])?;
        let (kept, released) = pool.give(&service("1", &["IPv4"], &[])?)?;
        assert_eq!((kept.len(), released), (1, vec!["fd20::2".parse()?]));
        assert_eq!(pool.retain(|_| false), kept);
        Ok(())
    }

    #[test]
    fn all_addresses_of_a_family_can_be_given_once() -> Result<()> {
        let mut pool = Pool::default();
        for number in 0..254 {
            let _one = given(&mut pool, &number.to_string(), &["IPv4"], &[])?;
        }
        assert!(given(&mut pool, "one too many", &["IPv4"], &[]).is_err());
        let _taken = pool.take("100");
        assert_eq!(given(&mut pool, "again", &["IPv4"], &[])?, ["10.20.0.101"]);
        Ok(())
    }
}
