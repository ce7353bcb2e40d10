//! The conntrack table that another proxy leaves behind: its stale UDP entries are removed, and no
//! others.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;

use crate::support::{
    DNS, DNS_TARGET, ECHO_TARGET, Pair, SOON, addresses_of_client, addresses_of_node,
    addresses_of_pod, cluster_ip, skip, until,
};
use anyhow::{Context, Result, ensure};
use sluice::node::conntrack::{Cleaned, Progress, UdpFrontends, clean, keep_clean};
use sluice_core::model::object::IpFamily;
use sluice_lab::{Lab, Namespace, Node, NodeOptions, Running, Serve};
use tokio::sync::watch;

const NODE_PORT: u16 = 30_053;
/// VIPs whose entries lead to a serving endpoint, to one that no longer serves, to nobody, and to
/// nobody in a zone of its own.
const SERVED: u8 = 10;
const MOVED: u8 = 11;
const UNSERVED: u8 = 12;
const ZONED: u8 = 13;

/// The identity of an entry in these tests: protocol, original destination, zone.
type Entry = (String, SocketAddr, u16);

fn entries(node: &Namespace, family: IpFamily) -> Result<BTreeSet<Entry>> {
    let family = family.word().to_lowercase();
    let listed = node.run("conntrack", ["-L", "-f", &family])?;
    let of_ports = listed.lines().filter(|line| line.starts_with("udp") || line.starts_with("tcp"));
    of_ports.map(|line| entry(line).with_context(|| line.to_owned())).collect()
}

fn entry(line: &str) -> Option<Entry> {
    let field =
        |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let destination = SocketAddr::new(field("dst")?.parse().ok()?, field("dport")?.parse().ok()?);
    let zone = field("zone").map_or(Some(0), |zone| zone.parse().ok())?;
    Some((line.split(' ').next()?.to_owned(), destination, zone))
}

fn udp(address: IpAddr, port: u16) -> Entry {
    ("udp".to_owned(), SocketAddr::new(address, port), 0)
}

/// Sends a datagram from a new socket, and waits for an answer if one is expected.
fn ask(from: &Namespace, to: SocketAddr, is_answered: bool) -> Result<()> {
    from.enter(|| -> Result<()> {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(SOON))?;
        let _ = socket.send_to(b"x", to)?;
        if is_answered {
            let _ = socket.recv_from(&mut [0; 256])?;
        }
        Ok(())
    })?
    .with_context(|| format!("{} asks {to}", from.name()))
}

/// Returns the rules that another proxy would have in nftables.
fn rules(moved: Pair, served: Pair) -> String {
    let of_family = |index: usize, word: &str| {
        let [in_zone, at_served, at_moved] =
            [ZONED, SERVED, MOVED].map(|number| cluster_ip(number)[index]);
        let (to_served, to_moved) =
            (SocketAddr::new(served[index], DNS_TARGET), SocketAddr::new(moved[index], DNS_TARGET));
        let to_moved_tcp = SocketAddr::new(moved[index], ECHO_TARGET);
        format!(
            "table {word} other {{
                chain zones {{
                    type filter hook prerouting priority raw;
                    {word} daddr {in_zone} ct zone set 7
                }}
                chain services {{
                    type nat hook prerouting priority dstnat;
                    {word} daddr {at_served} udp dport {DNS} dnat to {to_served}
                    {word} daddr {at_moved} udp dport {DNS} dnat to {to_moved}
                    {word} daddr {at_moved} tcp dport {DNS} dnat to {to_moved_tcp}
                    fib daddr type local udp dport {NODE_PORT} dnat to {to_moved}
                }}
            }}\n"
        )
    };
    of_family(0, "ip") + &of_family(1, "ip6")
}

/// A node with another proxy's entries of each kind.
struct Bench {
    node: Node,
    frontends: UdpFrontends,
    /// Entries that have to stay, of each family.
    stays: [BTreeSet<Entry>; 2],
    /// Entries that have to go.
    goes: [BTreeSet<Entry>; 2],
    /// Connections that are kept open, because their entries would go with them.
    _connections: Vec<TcpStream>,
    _servers: Vec<Running>,
    _lab: Lab,
}

impl Bench {
    /// Builds the node and sends the packets that make the entries.
    fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let node = lab.node("n1", &NodeOptions::default())?;
        let (client, served, moved) =
            (node.pod("client")?, node.pod("served")?, node.pod("moved")?);
        let outside = lab.client("outside")?;
        let (mut servers, mut connections) = (Vec::new(), Vec::new());
        for pod in [&served, &moved] {
            servers.push(pod.serve(Serve::UdpEcho, DNS_TARGET)?);
            servers.push(pod.serve(Serve::TcpEcho, ECHO_TARGET)?);
        }
        node.nft(&rules(addresses_of_pod(&moved), addresses_of_pod(&served)))?;
        let (mut stays, mut goes) =
            ([BTreeSet::new(), BTreeSet::new()], [BTreeSet::new(), BTreeSet::new()]);
        let mut frontends = UdpFrontends::default();
        for index in 0..2 {
            let vip = |number| cluster_ip(number)[index];
            let (own, pod) = (addresses_of_node(&node)[index], addresses_of_pod(&served)[index]);
            let far = addresses_of_client(&outside)[index];
            let serving = BTreeSet::from([(pod, DNS_TARGET)]);
            let mut frontend = |address, port, serving: &BTreeSet<(IpAddr, u16)>| {
                let _ = frontends.vips.insert((address, port), serving.clone());
            };
            frontend(vip(SERVED), DNS, &serving);
            frontend(vip(MOVED), DNS, &serving);
            frontend(vip(UNSERVED), DNS, &BTreeSet::new());
            frontend(vip(ZONED), DNS, &BTreeSet::new());
            // Like a VIP of ours, which conntrack sees answer by itself.
            frontend(pod, DNS_TARGET, &BTreeSet::new());
            frontends.node_ports.entry(NODE_PORT).or_default().extend(serving);
            let _ = frontends.node_addresses.insert(own);
            for (address, port, is_answered, is_stale) in [
                (vip(SERVED), DNS, true, false),
                (vip(MOVED), DNS, true, true),
                (vip(UNSERVED), DNS, false, true),
                (vip(UNSERVED), DNS + 1, false, false),
                (pod, DNS_TARGET, true, false),
                (own, NODE_PORT, true, true),
                (far, NODE_PORT, false, false),
            ] {
                ask(&client, SocketAddr::new(address, port), is_answered)?;
                let side = if is_stale { &mut goes[index] } else { &mut stays[index] };
                let _ = side.insert(udp(address, port));
            }
            ask(&client, SocketAddr::new(vip(ZONED), DNS), false)?;
            let _ = goes[index].insert(("udp".to_owned(), SocketAddr::new(vip(ZONED), DNS), 7));
            // TCP at the same frontend.
            let tcp = SocketAddr::new(vip(MOVED), DNS);
            connections.push(client.enter(|| TcpStream::connect_timeout(&tcp, SOON))??);
            let _ = stays[index].insert(("tcp".to_owned(), tcp, 0));
        }
        let bench = Self {
            node,
            frontends,
            stays,
            goes,
            _connections: connections,
            _servers: servers,
            _lab: lab,
        };
        for (index, family) in IpFamily::ALL.into_iter().enumerate() {
            let listed = entries(&bench.node, family)?;
            let expected = bench.stays[index].union(&bench.goes[index]).cloned().collect();
            ensure!(listed.is_superset(&expected), "{listed:?} lacks some of {expected:?}");
        }
        Ok(bench)
    }

    /// Whether exactly the stale entries are gone.
    fn is_clean(&self) -> Result<bool> {
        let mut is_clean = true;
        for (index, family) in IpFamily::ALL.into_iter().enumerate() {
            let listed = entries(&self.node, family)?;
            let lost: Vec<_> = self.stays[index].difference(&listed).collect();
            ensure!(lost.is_empty(), "entries that are not stale have gone: {lost:?}");
            is_clean &= self.goes[index].is_disjoint(&listed);
        }
        Ok(is_clean)
    }
}

#[test]
fn conntrack_loses_exactly_the_stale_entries_of_udp() -> Result<()> {
    if skip("conntrack_loses_exactly_the_stale_entries_of_udp") {
        return Ok(());
    }
    let bench = Bench::new("stale")?;
    // More entries than fit one part of the listing, so that entries are removed during it.
    let sources = 20_000..21_000_u16;
    for vip in cluster_ip(UNSERVED) {
        let any: IpAddr =
            if vip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        bench.node.enter(|| -> io::Result<()> {
            for source in sources.clone() {
                let _ = UdpSocket::bind((any, source))?.send_to(b"x", (vip, DNS))?;
            }
            Ok(())
        })??;
    }
    for (index, family) in IpFamily::ALL.into_iter().enumerate() {
        let cleaned = bench.node.enter(|| clean(&bench.frontends, family))??;
        println!("{}: {cleaned:?}", family.word());
        ensure!(cleaned.deleted == (sources.len() + bench.goes[index].len()) as u64, "{cleaned:?}");
        ensure!(cleaned.seen >= cleaned.deleted + 4 && !cleaned.interrupted, "{cleaned:?}");
        let again = bench.node.enter(|| clean(&bench.frontends, family))??;
        ensure!(again.deleted == 0 && again.seen >= 4, "{again:?}");
    }
    ensure!(bench.is_clean()?, "stale entries are left");
    Ok(())
}

#[test]
fn conntrack_is_cleaned_at_the_start_and_when_frontends_change_or_go() -> Result<()> {
    if skip("conntrack_is_cleaned_at_the_start_and_when_frontends_change_or_go") {
        return Ok(());
    }
    let bench = Bench::new("keep")?;
    let (sender, frontends) = watch::channel(Arc::new(bench.frontends.clone()));
    let (told_sender, told) = watch::channel(Progress::default());
    std::thread::scope(|scope| {
        // The agent's tasks all run in one network namespace; here that is the node's.
        let cleaner = scope.spawn(|| {
            bench.node.enter(|| -> Result<()> {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_time().build()?;
                runtime.block_on(keep_clean(frontends, told_sender));
                Ok(())
            })?
        });
        let result = (|| {
            until("the stale entries go at the start", || Ok(bench.is_clean()?.then_some(())))?;
            let first = told.borrow().clone();
            let expected = [0, 1].map(|index| bench.goes[index].len() as u64);
            ensure!(first.deleted == expected && first.problem.is_none(), "{first:?}");
            // The last frontend goes, and with it its backend.
            let mut changed = bench.frontends.clone();
            let gone = cluster_ip(SERVED)[0];
            let _ = changed.vips.remove(&(gone, DNS));
            let _ = sender.send_replace(Arc::new(changed));
            until("an entry of a frontend that is gone goes", || {
                let listed = entries(&bench.node, IpFamily::V4)?;
                Ok((!listed.contains(&udp(gone, DNS))).then_some(()))
            })?;
            ensure!(
                entries(&bench.node, IpFamily::V6)?.is_superset(&bench.stays[1]),
                "too much has gone"
            );
            Ok(())
        })();
        drop(sender);
        cleaner.join().expect("the cleaner panicked")?;
        result
    })
}

#[test]
fn conntrack_that_is_not_there_leaves_nothing_to_do() -> Result<()> {
    if skip("conntrack_that_is_not_there_leaves_nothing_to_do") {
        return Ok(());
    }
    let lab = Lab::new("none")?;
    let node = lab.node("n1", &NodeOptions::default())?;
    let vips = cluster_ip(SERVED).map(|vip| ((vip, DNS), BTreeSet::new()));
    let frontends = UdpFrontends { vips: BTreeMap::from(vips), ..UdpFrontends::default() };
    for family in IpFamily::ALL {
        let cleaned = node.enter(|| clean(&frontends, family))??;
        ensure!(cleaned == Cleaned::default(), "{cleaned:?}");
    }
    Ok(())
}
