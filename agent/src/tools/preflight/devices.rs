//! Checks devices as the agent would see them: roles, XDP in their drivers, the CNI's kind, MTUs.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{Check, Outcome};
use crate::node::devices::{Facts, Link, Role, Survey};
use crate::node::netlink::{self, Attributes, NETLINK_GENERIC, NLM_F_ACK, find};

/// Drivers that supported XDP before kernels reported it (Linux 6.3).
const KNOWN: [&str; 22] = [
    "bnxt_en",
    "dpaa2-eth",
    "ena",
    "gve",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "mlx4_en",
    "mlx5_core",
    "mvneta",
    "mvpp2",
    "nfp",
    "qede",
    "sfc",
    "stmmaceth",
    "tun",
    "virtio_net",
    "vmxnet3",
];
/// `NETDEV_XDP_ACT_BASIC`: programs can be attached in the driver.
const BASIC: u64 = 1;
/// The most names in a row.
const NAMES_MAX: usize = 6;

/// The driver of a device, as the device itself reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Driver {
    /// Its name.
    pub(super) name: Option<String>,
    /// Bits of `NETDEV_XDP_ACT_*`, if the kernel reports them.
    pub(super) features: Option<u64>,
}

/// Queries the driver of every uplink.
pub(super) fn ask(survey: &Survey) -> BTreeMap<u32, Driver> {
    let uplinks = survey.devices.values().filter(|device| device.role == Role::Uplink);
    let family = family("netdev");
    uplinks
        .map(|device| {
            let features = family.and_then(|family| features(family, device.index));
            (device.index, Driver { name: driver(&device.name).ok(), features })
        })
        .collect()
}

/// Returns the number of a generic netlink family.
fn family(name: &str) -> Option<u16> {
    const CONTROL: u16 = 16;
    const GET_FAMILY: u8 = 3;
    const FAMILY_ID: u16 = 1;
    const FAMILY_NAME: u16 = 2;
    let name = Attributes::default().text(FAMILY_NAME, name);
    let message = netlink::message(CONTROL, NLM_F_ACK, &[GET_FAMILY, 1, 0, 0], &name);
    let mut found = None;
    // A kernel without the family answers with an error.
    let _ = netlink::ask(NETLINK_GENERIC, &message, |payload| {
        let id = payload.get(4..).and_then(|attributes| find(attributes, FAMILY_ID));
        found = id.and_then(|id| id.try_into().ok()).map(u16::from_ne_bytes);
    });
    found
}

/// Returns the XDP features of a device's driver.
fn features(family: u16, device: u32) -> Option<u64> {
    const DEVICE_GET: u8 = 1;
    const IFINDEX: u16 = 1;
    const XDP_FEATURES: u16 = 3;
    let index = Attributes::default().with(IFINDEX, &device.to_ne_bytes());
    let message = netlink::message(family, NLM_F_ACK, &[DEVICE_GET, 1, 0, 0], &index);
    let mut found = None;
    let _ = netlink::ask(NETLINK_GENERIC, &message, |payload| {
        let value = payload.get(4..).and_then(|attributes| find(attributes, XDP_FEATURES));
        found = value.and_then(|value| value.try_into().ok()).map(u64::from_ne_bytes);
    });
    found
}

#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    others: [u8; 160],
}

#[repr(C)]
struct DeviceRequest {
    name: [u8; 16],
    data: *mut DriverInfo,
    pad: [u64; 2],
}

/// Returns the name of a device's driver, as `ethtool -i` does.
fn driver(device: &str) -> io::Result<String> {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    const GET_DRIVER_INFO: u32 = 3;
    let name = CString::new(device).map_err(io::Error::other)?;
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = DriverInfo { command: GET_DRIVER_INFO, driver: [0; 32], others: [0; 160] };
    let mut request = DeviceRequest { name: [0; 16], data: &raw mut info, pad: [0; 2] };
    // Names are shorter, so the last byte stays zero.
    for (to, from) in request.name.iter_mut().take(15).zip(name.as_bytes()) {
        *to = *from;
    }
    // SAFETY: the request is a `struct ifreq` whose data points to a live `struct ethtool_drvinfo`,
    // or a longer one.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let end = info.driver.iter().position(|byte| *byte == 0).unwrap_or(info.driver.len());
    Ok(String::from_utf8_lossy(info.driver.get(..end).unwrap_or_default()).into_owned())
}

/// Returns all checks of devices.
pub(super) fn checks(
    facts: &Facts,
    survey: &Survey,
    drivers: &BTreeMap<u32, Driver>,
) -> Vec<Check> {
    let mut checks: Vec<Check> = [Role::Uplink, Role::Edge, Role::Fabric]
        .into_iter()
        .map(|role| devices(survey, role))
        .collect();
    for (index, driver) in drivers {
        let device = survey.devices.get(index);
        checks.extend(device.map(|device| xdp(driver, device.veth).of(&device.name)));
    }
    checks.push(shape(facts, survey));
    let filtered = |name| {
        std::fs::read_to_string(format!("/proc/sys/net/bridge/{name}"))
            .ok()
            .map(|text| text.trim() == "1")
    };
    checks.push(bridge_netfilter(
        facts,
        filtered("bridge-nf-call-iptables").or(filtered("bridge-nf-call-ip6tables")),
    ));
    checks.push(mtu(facts, survey));
    checks
}

/// Returns a few names, and the number of the others.
fn names<'a>(all: impl Iterator<Item = &'a str>) -> String {
    let all: Vec<&str> = all.collect();
    match all.len() {
        0..=NAMES_MAX => all.join(", "),
        count => format!("{} and {} more", all[..NAMES_MAX].join(", "), count - NAMES_MAX),
    }
}

fn devices(survey: &Survey, role: Role) -> Check {
    let found: Vec<&str> = survey
        .devices
        .values()
        .filter(|device| device.role == role)
        .map(|device| device.name.as_str())
        .collect();
    let check = |result, what: String| Check::new("devices", result, what).of(role.word());
    match (role, found.is_empty()) {
        (_, false) => check(Outcome::Yes, names(found.into_iter())),
        (Role::Uplink, true) => {
            check(Outcome::Warn, "none: no device has a global address or the default route".to_owned())
                .next("give the agent --uplink DEVICE if external clients should reach node ports and load balancer addresses")
        }
        (Role::Edge, true) => {
            let what = "none so far: they come with pods, and are attached within milliseconds. Pods \
                        without one (macvlan, ipvlan, SR-IOV) are served with --socket-path machine alone";
            check(Outcome::Yes, what.to_owned())
        }
        (Role::Fabric | Role::Own | Role::Loopback, true) => check(Outcome::Skip, "none".to_owned()),
    }
}

/// Returns whether XDP would be used on an uplink.
fn xdp(driver: &Driver, is_veth: bool) -> Check {
    let name = driver.name.as_deref().filter(|name| !name.is_empty()).unwrap_or("unknown");
    let check = |result, what: String| Check::new("xdp", result, what);
    if is_veth {
        return check(
            Outcome::Skip,
            "a veth: tc is used, since the far end may drop what XDP sends".to_owned(),
        )
        .next("use --xdp native if the far end has a program or GRO");
    }
    match driver.features {
        Some(bits) if bits & BASIC != 0 => {
            check(Outcome::Yes, format!("in the driver {name} (reported by the driver, not tried)"))
        }
        Some(_) => check(Outcome::Skip, format!("the driver {name} has no XDP: tc is used")),
        None if KNOWN.contains(&name) => check(
            Outcome::Yes,
            format!("the driver {name} is known to have XDP (this kernel does not report it)"),
        ),
        None => check(
            Outcome::Skip,
            format!(
                "the driver {name} is not known to have XDP: the agent tries it, and uses tc otherwise"
            ),
        ),
    }
}

/// Returns how pods are connected.
fn shape(facts: &Facts, survey: &Survey) -> Check {
    let edges: Vec<_> =
        survey.devices.values().filter(|device| device.role == Role::Edge).collect();
    let bridges: Vec<u32> =
        edges.iter().map(|edge| edge.entry.bridge).filter(|bridge| *bridge != 0).collect();
    let bridged = bridges.len();
    let name = |index: &u32| facts.links.get(index).map_or("?", |link| link.name.as_str());
    let mut bridges = bridges;
    bridges.sort_unstable();
    bridges.dedup();
    let on = names(bridges.iter().map(name));
    match (bridged, edges.len() - bridged) {
        (0, 0) => Check::new(
            "cni",
            Outcome::Skip,
            "no pod shows the kind; bridged and routed veths all work, with and without overlays",
        ),
        (count, 0) => Check::new("cni", Outcome::Yes, format!("{count} pods on the bridge {on}")),
        (0, count) => {
            Check::new("cni", Outcome::Yes, format!("{count} routed pods, one veth each"))
        }
        (bridged, routed) => Check::new(
            "cni",
            Outcome::Yes,
            format!("{bridged} pods on the bridge {on}, {routed} routed ones"),
        ),
    }
}

fn bridge_netfilter(facts: &Facts, filtered: Option<bool>) -> Check {
    let has_bridge = facts.links.values().any(|link| link.kind == "bridge");
    match (has_bridge, filtered) {
        (false, _) => Check::new("bridge-nf", Outcome::Skip, "no bridge"),
        (true, Some(true)) => Check::new(
            "bridge-nf",
            Outcome::Yes,
            "bridged packets pass iptables, with real addresses",
        ),
        (true, Some(false) | None) => Check::new(
            "bridge-nf",
            Outcome::Yes,
            "bridged packets bypass iptables, which Sluice does not need",
        ),
    }
}

/// Returns the bytes that a tunnel over IPv4 adds to each packet, or [`None`] if that depends.
fn overhead(link: &Link) -> Option<u32> {
    match link.kind.as_str() {
        "vxlan" | "geneve" => Some(50),
        "wireguard" => Some(60),
        "ipip" | "sit" => Some(20),
        "gre" | "vti" => Some(24),
        "gretap" => Some(38),
        "ip6tnl" => Some(40),
        _ => None,
    }
}

/// Finds overlays whose wrapped packets do not fit an uplink.
fn mtu(facts: &Facts, survey: &Survey) -> Check {
    let of = |role| survey.devices.values().filter(move |device| device.role == role);
    let Some(uplink) = of(Role::Uplink).min_by_key(|device| device.entry.mtu) else {
        return Check::new("mtu", Outcome::Skip, "no uplink to compare with");
    };
    let wrapped: Vec<(&Link, u32)> = of(Role::Fabric)
        .filter_map(|device| facts.links.get(&device.index))
        .filter_map(|link| Some((link, overhead(link)?)))
        .collect();
    let too_big: Vec<&(&Link, u32)> =
        wrapped.iter().filter(|(link, overhead)| link.mtu + overhead > uplink.entry.mtu).collect();
    let Some((link, overhead)) = too_big.first() else {
        let overlays = if wrapped.is_empty() {
            "no overlay".to_owned()
        } else {
            format!("{} overlays fit", wrapped.len())
        };
        return Check::new(
            "mtu",
            Outcome::Yes,
            format!("{} of the uplink {}; {overlays}", uplink.entry.mtu, uplink.name),
        );
    };
    let fitting = uplink.entry.mtu.saturating_sub(*overhead);
    Check::new(
        "mtu",
        Outcome::Warn,
        format!(
            "{} bytes of {} and {overhead} of its header do not fit the {} of {}: large packets are fragmented or lost",
            link.mtu, link.name, uplink.entry.mtu, uplink.name
        ),
    )
    .next(format!("set the CNI's MTU to {fitting} (ip link set dev {} mtu {fitting} until then)", link.name))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::node::devices::{LinkAddress, Peer, Rules, survey};

    fn link(index: u32, name: &str, kind: &str, mtu: u32) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: kind.to_owned(),
            layer: 1,
            up: true,
            mtu,
            ..Link::default()
        }
    }

    fn node(more: impl IntoIterator<Item = Link>) -> (Facts, Survey) {
        let address: IpAddr = "192.0.2.1".parse().expect("an address");
        let address = LinkAddress {
            address,
            prefix: 24,
            scope: 0,
            secondary: false,
            deprecated: false,
            unusable: false,
        };
        let links = [link(2, "eth0", "", 1500)].into_iter().chain(more);
        let facts = Facts {
            links: links.map(|link| (link.index, link)).collect(),
            addresses: [(2, vec![address])].into(),
            default_routes: [2].into(),
        };
        let survey = survey(&facts, &Rules::default(), &Survey::default());
        (facts, survey)
    }

    #[test]
    fn an_overlay_that_does_not_fit_is_named_with_what_would() {
        let (facts, survey) = node([link(3, "flannel.1", "vxlan", 1500)]);
        let check = mtu(&facts, &survey);
        assert_eq!(check.result, Outcome::Warn);
        assert!(check.next.is_some_and(|next| next.contains("1450")), "{}", check.what);
        let (facts, survey) = node([link(3, "flannel.1", "vxlan", 1450)]);
        assert_eq!(mtu(&facts, &survey).what, "1500 of the uplink eth0; 1 overlays fit");
    }

    #[test]
    fn the_shape_of_a_cni_is_known_by_its_veths() {
        let bridged =
            Link { master: 3, peer: Some(Peer::Known(0)), ..link(4, "veth1", "veth", 1500) };
        let routed = Link { peer: Some(Peer::Known(0)), ..link(5, "cali1", "veth", 1500) };
        let (facts, survey) = node([link(3, "cni0", "bridge", 1500), bridged]);
        assert_eq!(shape(&facts, &survey).what, "1 pods on the bridge cni0");
        let (facts, survey) = node([routed]);
        assert_eq!(shape(&facts, &survey).what, "1 routed pods, one veth each");
        assert_eq!(devices(&survey, Role::Edge).what, "cali1");
        let (facts, survey) = node([]);
        assert_eq!(shape(&facts, &survey).result, Outcome::Skip);
    }

    #[test]
    fn xdp_is_used_where_a_driver_says_so_or_is_known() {
        let driver = |name: &str, features| Driver { name: Some(name.to_owned()), features };
        for (driver, is_veth, expected) in [
            (driver("virtio_net", Some(7)), false, Outcome::Yes),
            (driver("r8169", Some(0)), false, Outcome::Skip),
            (driver("ixgbe", None), false, Outcome::Yes),
            (driver("r8169", None), false, Outcome::Skip),
            (driver("veth", Some(7)), true, Outcome::Skip),
            (Driver::default(), false, Outcome::Skip),
        ] {
            assert_eq!(xdp(&driver, is_veth).result, expected, "{driver:?}");
        }
    }

    #[test]
    fn a_node_without_an_uplink_is_warned_of() {
        assert_eq!(devices(&Survey::default(), Role::Uplink).result, Outcome::Warn);
        assert_eq!(mtu(&Facts::default(), &Survey::default()).result, Outcome::Skip);
    }
}
