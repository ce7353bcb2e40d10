//! Reads where kube-proxy has sent clients of Services with session affinity. That is in nftables
//! sets, and in lists of the iptables match `recent`, one per endpoint. Their names are made of
//! hashes, so the name is computed for each of our backends.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use sha2::{Digest, Sha256};
use sluice_common::abi::{Affinity, AffinityKey, Name, TICK_SHIFT, Ticks};
use sluice_core::image::{Image, Stack};

use crate::node::dataplane::{KernelStack, Maps, Visit};
use crate::node::nft;

/// The directory in which the kernel shows the lists of the match `recent`.
const RECENT: &str = "/proc/net/xt_recent";
/// The longest name of a set.
const SET_NAME_MAX: usize = 240;

/// The time since a client last opened a connection, as far as that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Age {
    /// Milliseconds until the entry expires.
    Left(u64),
    /// A stamp of the kernel's clock. Its start and rate are unknown, so it only gives an order.
    Stamp(u64),
}

/// The clients of each set or list.
type Lists = HashMap<String, Vec<(IpAddr, Age)>>;

/// Returns the first base32 digits (RFC 4648) of a hash. Eight digits are five bytes.
fn digits(text: &str, count: usize) -> String {
    const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let hash = Sha256::digest(text.as_bytes());
    let bit = |index: usize| hash.get(index / 8).map_or(0, |byte| byte >> (7 - index % 8) & 1);
    let digit = |index: usize| (0..5).fold(0, |digit, at| digit << 1 | bit(index * 5 + at));
    (0..count)
        .filter_map(|index| ALPHABET.get(usize::from(digit(index))).map(|c| char::from(*c)))
        .collect()
}

fn word(bytes: &[u8]) -> &str {
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    std::str::from_utf8(bytes).unwrap_or_default()
}

/// Returns the names of an endpoint's set and list.
fn names(of: &Name, protocol: &str, endpoint: SocketAddr) -> [String; 2] {
    let (namespace, service, port) = (word(&of.namespace), word(&of.service), word(&of.port));
    let address = endpoint.ip().to_string().replace(':', ".");
    let base = format!("{namespace}/{service}/{protocol}/{port}__{address}/{}", endpoint.port());
    let mut set = format!("{}-{base}", digits(&base, 8));
    let room = SET_NAME_MAX;
    if set.len() > room {
        set = format!("{}...", set.get(..room - 3).unwrap_or_default());
    }
    let colon = if port.is_empty() { "" } else { ":" };
    let list = digits(&format!("{namespace}/{service}{colon}{port}{protocol}{endpoint}"), 16);
    [format!("affinity-{set}"), format!("KUBE-SEP-{list}")]
}

/// Parses a line of a list: `src=10.244.1.7 ttl: 64 last_seen: 4295123456 oldest_pkt: 2 ...`.
fn line(line: &str) -> Option<(IpAddr, Age)> {
    let mut words = line.split_ascii_whitespace();
    let client = words.next()?.strip_prefix("src=")?.parse().ok()?;
    let stamp = words.skip_while(|word| *word != "last_seen:").nth(1)?.parse().ok()?;
    Some((client, Age::Stamp(stamp)))
}

/// Reads all lists of the match `recent` that belong to endpoints.
fn recent(folder: &Path, lists: &mut Lists) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if let Ok(name) = entry.file_name().into_string()
            && name.starts_with("KUBE-SEP-")
            && let Ok(text) = fs::read_to_string(entry.path())
        {
            lists.entry(name).or_default().extend(text.lines().filter_map(line));
        }
    }
}

fn client(key: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(key).map(|octets| Ipv4Addr::from(octets).into());
    v4.or_else(|_| <[u8; 16]>::try_from(key).map(|octets| Ipv6Addr::from(octets).into())).ok()
}

/// Reads all sets.
fn sets(lists: &mut Lists) -> io::Result<()> {
    for table in nft::tables()?
        .into_iter()
        .filter(|table| table.family.is_ip() && table.name == "kube-proxy")
    {
        for set in nft::sets(&table)?.into_iter().filter(|set| set.starts_with("affinity-")) {
            let elements = nft::elements(&table, &set)?;
            let visits = elements.iter().filter_map(|element| {
                Some((client(&element.key)?, Age::Left(element.expires_ms.unwrap_or(u64::MAX))))
            });
            lists.entry(set).or_default().extend(visits);
        }
    }
    Ok(())
}

/// Returns when a client has last opened a connection, in ticks.
fn seen(age: Age, affinity_seconds: u32, now: Ticks) -> Ticks {
    let idle_ms = match age {
        Age::Left(left) => (u64::from(affinity_seconds) * 1000).saturating_sub(left),
        // Unknown: such a client may stay for up to twice its time, once.
        Age::Stamp(_) => 0,
    };
    now.wrapping_sub(((idle_ms * 1_000_000) >> TICK_SHIFT) as Ticks)
}

/// Returns the affinity entries for a family's maps. If two endpoints know a client, the more
/// recent one counts.
fn visits<F: Stack>(image: &Image, lists: &Lists, now: Ticks) -> Vec<Visit<F>> {
    let mut found: HashMap<(u32, IpAddr), (u64, Visit<F>)> = HashMap::new();
    for (id, backend) in &F::of(image).backends {
        let (Some(name), Some(port)) =
            (image.names.get(&backend.service_port), image.ports.get(&backend.service_port))
        else {
            continue;
        };
        let protocol = match i32::from(name.protocol) {
            libc::IPPROTO_TCP => "tcp",
            libc::IPPROTO_UDP => "udp",
            _ => "sctp",
        };
        if port.affinity_seconds == 0 {
            continue;
        }
        let endpoint = SocketAddr::new(F::ip(backend.address), backend.port);
        let its = names(name, protocol, endpoint);
        for (client, age) in its.iter().filter_map(|name| lists.get(name)).flatten() {
            let Some(address) = F::address(*client) else { continue };
            let key = AffinityKey { service_port: backend.service_port, client: address };
            let seen = seen(*age, port.affinity_seconds, now);
            let entry = Affinity::new(*id, seen, backend.generation, 0);
            let (Age::Left(order) | Age::Stamp(order)) = *age;
            let known = found.get(&(backend.service_port, *client)).map(|(order, _)| *order);
            if known.is_none_or(|before| before < order) {
                let _ = found.insert((backend.service_port, *client), (order, (key, entry)));
            }
        }
    }
    found.into_values().map(|(_, visit)| visit).collect()
}

fn add<F: KernelStack>(
    maps: &Maps,
    image: &Image,
    lists: &Lists,
    now: Ticks,
) -> anyhow::Result<usize> {
    let mut visits = visits::<F>(image, lists, now);
    let known: BTreeSet<AffinityKey<F::Address>> =
        F::maps(maps).read_affinity()?.into_iter().map(|(key, _)| key).collect();
    visits.retain(|(key, _)| !known.contains(key));
    F::maps(maps).add_affinity(&visits)?;
    Ok(visits.len())
}

/// Lets clients keep the backends that kube-proxy has sent them to, unless the maps already have an
/// entry for them. Returns the number of clients.
///
/// # Errors
///
/// Fails if the sets cannot be listed, or the maps cannot be written.
pub(super) fn import(maps: &Maps, image: &Image, now: Ticks) -> anyhow::Result<usize> {
    use sluice_common::{V4, V6};
    if image.ports.values().all(|port| port.affinity_seconds == 0) {
        return Ok(0);
    }
    let mut lists = Lists::new();
    sets(&mut lists)?;
    recent(Path::new(RECENT), &mut lists);
    if lists.is_empty() {
        return Ok(0);
    }
    Ok(add::<V4>(maps, image, &lists, now)? + add::<V6>(maps, image, &lists, now)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(port: &str) -> Name {
        let bytes = |text: &str| {
            let mut bytes = [0; 64];
            bytes[..text.len()].copy_from_slice(text.as_bytes());
            bytes
        };
        Name {
            namespace: bytes("ns1"),
            service: bytes("svc1"),
            port: bytes(port),
            number: 80,
            protocol: 6,
            family: 4,
        }
    }

    #[test]
    fn sets_and_lists_are_named_as_kube_proxy_names_them() {
        let endpoint = "10.180.0.1:80".parse().expect("an endpoint");
        // These are examples from kube-proxy's own tests.
        assert_eq!(
            names(&name("p80"), "tcp", endpoint),
            ["affinity-5OJB2KTY-ns1/svc1/tcp/p80__10.180.0.1/80", "KUBE-SEP-SXIVWICOYRO3J4NJ"]
        );
        let [set, _] = names(&name("p80"), "tcp", "[fd00:244::1]:80".parse().expect("an endpoint"));
        assert!(set.ends_with("-ns1/svc1/tcp/p80__fd00.244..1/80"), "{set}");
    }

    #[test]
    fn a_list_is_read_line_by_line() {
        let text =
            "src=10.244.1.7 ttl: 64 last_seen: 4295123456 oldest_pkt: 2 4295120000, 4295123456";
        assert_eq!(line(text), Some((IpAddr::from([10, 244, 1, 7]), Age::Stamp(4_295_123_456))));
        assert_eq!(line("nonsense"), None);
    }

    #[test]
    fn the_remaining_time_gives_the_elapsed_time() {
        let second = |age| 10_000 - seen(age, 10_800, 10_000);
        assert_eq!(second(Age::Left(10_800_000)), 0);
        assert_eq!(second(Age::Left(10_700_000)), 93, "100 s are 93 ticks");
        assert_eq!(second(Age::Left(u64::MAX)), 0);
        assert_eq!(second(Age::Stamp(5)), 0);
    }
}
