//! Routes to single addresses.

#![expect(clippy::wildcard_enum_match_arm, reason = "netlink has far more attributes than we read")]

use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::packet_route::route::{RouteAttribute, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

/// Builds a route, or a query for one, to a single address.
pub(super) fn host_route(address: IpAddr) -> RouteMessageBuilder<IpAddr> {
    let length = if address.is_ipv4() { 32 } else { 128 };
    // The length fits the family: this cannot be refused.
    RouteMessageBuilder::<IpAddr>::new().destination_prefix(address, length).unwrap_or_default()
}

/// Returns the device by which packets to an address leave, or [`None`] if there is no route.
pub(super) async fn route_to(handle: &Handle, address: IpAddr) -> Option<u32> {
    let question = host_route(address).build();
    let answer = handle.route().get(question).execute().try_next().await.ok().flatten()?;
    if !matches!(answer.header.kind, RouteType::Unicast | RouteType::Local) {
        return None;
    }
    answer.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(device) => Some(*device),
        _ => None,
    })
}
