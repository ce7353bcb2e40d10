//! Determines the MTUs of routes that programs need: a pure function of the main table's routes.
//!
//! If a program queries the kernel for a route, the kernel considers the device's MTU and what was
//! learned of the path. Of the MTUs in routes, it considers only locked ones.

use std::collections::BTreeMap;

use ipnet::IpNet;
use sluice_common::abi::RouteMtu;

/// The main table's routes.
#[derive(Clone, Debug, Default)]
pub(super) struct Routes(BTreeMap<IpNet, (u32, RouteMtu)>);

impl Routes {
    /// Adds a route. Of two routes to one network, the one with the lower metric counts.
    pub(super) fn add(&mut self, to: IpNet, metric: u32, route: RouteMtu) {
        let known = self.0.entry(to.trunc()).or_insert((metric, route));
        if metric < known.0 {
            *known = (metric, route);
        }
    }

    /// Returns the routes with an MTU, and those within them by the same device that have none.
    pub(super) fn for_programs(&self) -> BTreeMap<IpNet, RouteMtu> {
        let mut told = BTreeMap::new();
        // The routes that contain the next one, the closest last. Networks sort before their parts.
        let mut around: Vec<(IpNet, RouteMtu)> = Vec::new();
        for (to, (_, route)) in &self.0 {
            while around.last().is_some_and(|(network, _)| !network.contains(to)) {
                let _ = around.pop();
            }
            let would_count = around.last().is_some_and(|(_, other)| {
                other.mtu != 0
                    && (other.device == 0 || route.device == 0 || other.device == route.device)
            });
            if route.mtu != 0 || would_count {
                let _ = told.insert(*to, *route);
                around.push((*to, *route));
            }
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Routes as `network metric device mtu`.
    fn told(routes: &[&str]) -> Vec<String> {
        let mut found = Routes::default();
        for route in routes {
            let words: Vec<&str> = route.split(' ').collect();
            let number = |at: usize| words[at].parse().expect("a number");
            let route = RouteMtu { device: number(2), mtu: number(3) };
            found.add(words[0].parse().expect("a network"), number(1), route);
        }
        found
            .for_programs()
            .iter()
            .map(|(to, route)| format!("{to} {} {}", route.device, route.mtu))
            .collect()
    }

    #[test]
    fn without_an_mtu_nothing_is_told() {
        assert_eq!(told(&["0.0.0.0/0 0 2 0", "10.0.0.0/8 0 2 0", "10.1.2.3/32 0 3 0"]), [""; 0]);
    }

    #[test]
    fn what_lies_within_a_route_with_an_mtu_is_told_where_the_mtu_would_count_for_it() {
        let routes = [
            "0.0.0.0/0 0 2 1400",
            "10.0.0.0/8 0 2 0",
            // Within one without; by another device; by several devices; within those.
            "10.1.0.0/16 0 2 0",
            "172.16.0.0/12 0 3 0",
            "192.168.0.0/16 0 0 1300",
            "192.168.7.0/24 0 5 0",
            "203.0.113.0/24 0 0 0",
        ];
        let expected = [
            "0.0.0.0/0 2 1400",
            "10.0.0.0/8 2 0",
            "192.168.0.0/16 0 1300",
            "192.168.7.0/24 5 0",
            "203.0.113.0/24 0 0",
        ];
        assert_eq!(told(&routes), expected);
    }

    #[test]
    fn a_route_that_is_left_out_shields_nothing() {
        let routes = ["0.0.0.0/0 0 2 1400", "10.0.0.0/8 0 3 0", "10.1.0.0/16 0 2 0"];
        assert_eq!(told(&routes), ["0.0.0.0/0 2 1400", "10.1.0.0/16 2 0"]);
    }

    #[test]
    fn an_mtu_within_one_without_is_told() {
        let routes = ["10.0.0.0/8 0 2 0", "10.1.2.3/32 0 2 1400", "10.1.2.4/32 0 2 0"];
        assert_eq!(told(&routes), ["10.1.2.3/32 2 1400"]);
    }

    #[test]
    fn of_two_routes_to_one_network_the_lower_metric_counts() {
        let routes = ["10.1.2.3/32 20 2 1400", "10.1.2.3/32 10 2 1300", "10.1.2.3/32 30 2 0"];
        assert_eq!(told(&routes), ["10.1.2.3/32 2 1300"]);
        assert_eq!(told(&["10.1.2.3/32 20 2 1400", "10.1.2.3/32 10 2 0"]), [""; 0]);
    }
}
