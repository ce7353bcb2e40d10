//! Compares the kernel's maps and pins with what they should be, cheaply enough to be repeated all
//! the time.
//!
//! A map is compared by the number of its entries and the sum of their hashes, which does not
//! depend on their order. To look up each of 250 000 entries in an image costs ten times as much,
//! and what the image adds up to is kept until it changes. A comparison is about one point in time,
//! so its caller must be the only one that writes the maps.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use sluice_common::abi::{
    Ipv4Address, Ipv6Address, OriginKey, SLOTS_PER_BLOCK, ServiceKey, ServicePort,
};
use sluice_common::{V4, V6};
use sluice_core::image::Image;
use sluice_core::image::map::{self, PlanMap};

use super::bpf::{self, Table};
use super::error::Error;
use super::kernel::{Kernel, KernelStack};
use super::maps::{Maps, SourceRangeKey};
use super::pins::Pins;

/// How one map is compared with an image.
enum Check {
    /// By the digests of both.
    Digest(fn(&Maps) -> Result<Digest, Error>, fn(&Image) -> Digest),
    /// Entry by entry.
    Entries(fn(&Maps, &Image) -> bool),
}

/// The comparisons of all maps of the plan.
const CHECKS: [Check; 15] = [
    Check::Digest(|maps| table::<map::Services<V4>, _>(&maps.v4.services), wanted_services::<V4>),
    Check::Digest(|maps| table::<map::Services<V6>, _>(&maps.v6.services), wanted_services::<V6>),
    Check::Digest(backends::<V4>, wanted_backends::<V4>),
    Check::Digest(backends::<V6>, wanted_backends::<V6>),
    Check::Digest(|maps| table::<map::Origins<V4>, _>(&maps.v4.origins), wanted_origins::<V4>),
    Check::Digest(|maps| table::<map::Origins<V6>, _>(&maps.v6.origins), wanted_origins::<V6>),
    Check::Digest(
        |maps| table::<map::SourceRanges<V4>, _>(&maps.v4.source_ranges),
        wanted::<map::SourceRanges<V4>, SourceRangeKey<Ipv4Address>>,
    ),
    Check::Digest(
        |maps| table::<map::SourceRanges<V6>, _>(&maps.v6.source_ranges),
        wanted::<map::SourceRanges<V6>, SourceRangeKey<Ipv6Address>>,
    ),
    Check::Digest(
        |maps| table::<map::NodeAddresses<V4>, _>(&maps.v4.node_addresses),
        wanted::<map::NodeAddresses<V4>, Ipv4Address>,
    ),
    Check::Digest(
        |maps| table::<map::NodeAddresses<V6>, _>(&maps.v6.node_addresses),
        wanted::<map::NodeAddresses<V6>, Ipv6Address>,
    ),
    Check::Digest(|maps| table::<map::Names, _>(&maps.names), wanted::<map::Names, u32>),
    Check::Entries(ports),
    Check::Entries(slots),
    Check::Digest(addresses, wanted_addresses),
    Check::Entries(node_ports),
];

/// What an image adds up to in each step, until the image changes.
#[derive(Debug, Default)]
pub struct Digests([Option<Digest>; CHECKS.len()]);

impl Digests {
    /// Forgets all: the image has changed.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

impl Kernel {
    /// The number of steps in which [`Self::holds`] compares all maps of the plan.
    pub const AUDIT_STEPS: usize = CHECKS.len();

    /// Whether the maps of one step hold exactly an image.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read.
    pub fn holds(&self, step: usize, image: &Image, known: &mut Digests) -> Result<bool, Error> {
        let (Some(check), Some(known)) = (CHECKS.get(step), known.0.get_mut(step)) else {
            return Ok(true);
        };
        match check {
            Check::Digest(found, wanted) => {
                let wanted = *known.get_or_insert_with(|| wanted(image));
                Ok(found(self.maps())? == wanted)
            }
            Check::Entries(check) => Ok(check(self.maps(), image)),
        }
    }
}

/// The number of entries of a map, and the sum of their hashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Digest {
    entries: usize,
    sum: u64,
}

impl Digest {
    fn add<K: aya::Pod, V: aya::Pod>(&mut self, key: &K, value: &V) {
        self.entries += 1;
        let hash = fold(hash(key) ^ KEY, hash(value));
        self.sum = self.sum.wrapping_add(hash);
    }
}

/// Sets a key apart from a value of the same bytes.
const KEY: u64 = 0x9e37_79b9_7f4a_7c15;

/// Returns both halves of a product, one laid over the other.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b ^ 0xa076_1d64_78bd_642f);
    product as u64 ^ (product >> 64) as u64
}

/// Returns the hash of a value's bytes. No word waits for the one before it.
fn hash<T: aya::Pod>(value: &T) -> u64 {
    // SAFETY: the value is live, and a `Pod` is plain bytes without padding.
    let bytes = unsafe {
        std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>())
    };
    let (words, rest) = bytes.as_chunks::<8>();
    let last = rest.iter().fold(0_u64, |word, byte| word << 8 | u64::from(*byte));
    let words = words.iter().map(|word| u64::from_le_bytes(*word)).chain([last]);
    words.zip(1_u64..).fold(0, |sum, (word, place)| {
        sum.wrapping_add(fold(word.wrapping_add(KEY.wrapping_mul(place)), place))
    })
}

/// Adds up a table.
fn table<M, K>(table: &Table<K, M::Value>) -> Result<Digest, Error>
where
    M: PlanMap<Value: aya::Pod>,
    K: aya::Pod,
{
    let mut found = Digest::default();
    table
        .for_each(|key, value| found.add(key, value))
        .map_err(|cause| Error::map("read", M::NAME, cause))?;
    Ok(found)
}

/// Adds up what an image wants of a table; `K` is the kernel's form of the key.
fn wanted<M, K>(image: &Image) -> Digest
where
    M: PlanMap<Key: Copy + Into<K>, Value: aya::Pod>,
    K: aya::Pod,
{
    let mut wanted = Digest::default();
    for (key, value) in M::of(image) {
        let key: K = (*key).into();
        wanted.add(&key, value);
    }
    wanted
}

fn wanted_services<F: KernelStack>(image: &Image) -> Digest {
    wanted::<map::Services<F>, ServiceKey<F::Address>>(image)
}

fn wanted_origins<F: KernelStack>(image: &Image) -> Digest {
    wanted::<map::Origins<F>, OriginKey<F::Address>>(image)
}

#[expect(clippy::unnecessary_wraps, reason = "as the other checks, of which some may fail")]
fn backends<F: KernelStack>(maps: &Maps) -> Result<Digest, Error> {
    let backends = &F::maps(maps).backends;
    let mut found = Digest::default();
    for id in 1..backends.len() {
        if let Some(backend) = backends.get(id).filter(|backend| backend.generation != 0) {
            found.add(&id, &backend);
        }
    }
    Ok(found)
}

fn wanted_backends<F: KernelStack>(image: &Image) -> Digest {
    wanted::<map::Backends<F>, u32>(image)
}

fn ports(maps: &Maps, image: &Image) -> bool {
    let is_held = |(id, port): (&u32, &ServicePort)| maps.ports.get(*id) == Some(*port);
    image.ports.iter().all(is_held)
}

fn slots(maps: &Maps, image: &Image) -> bool {
    image.slots.iter().all(|(start, ids)| maps.slots.holds_words(start / SLOTS_PER_BLOCK, ids))
}

#[expect(clippy::unnecessary_wraps, reason = "as the other checks, of which some may fail")]
fn addresses(maps: &Maps) -> Result<Digest, Error> {
    let mut found = Digest::default();
    for word in 0..maps.addresses.len() {
        if let Some(bits) = maps.addresses.get(word).filter(|bits| *bits != 0) {
            found.add(&word, &bits);
        }
    }
    Ok(found)
}

fn wanted_addresses(image: &Image) -> Digest {
    let mut wanted = Digest::default();
    let mut lanes = image.lanes.iter().peekable();
    while let Some((lane, bits)) = lanes.next() {
        let word = lane / 16;
        let place = |lane: u32, bits: u8| u64::from(bits) << (lane % 16 * 4);
        let mut all = place(*lane, *bits);
        while let Some((lane, bits)) = lanes.next_if(|(lane, _)| *lane / 16 == word) {
            all |= place(*lane, *bits);
        }
        wanted.add(&word, &all);
    }
    wanted
}

fn node_ports(maps: &Maps, image: &Image) -> bool {
    let found = maps.node_ports.filled().filter(|(_, bits)| *bits != 0);
    found.eq(image.node_ports.iter().map(|(word, bits)| (*word, *bits)))
}

/// A map that should be pinned.
#[derive(Debug)]
struct Pinned {
    name: String,
    fd: OwnedFd,
    id: u32,
}

/// All maps that should be pinned, kept open so that they can be pinned again.
#[derive(Debug)]
pub(super) struct MapPins(Vec<Pinned>);

impl MapPins {
    /// Opens the maps of these names that are pinned in a folder.
    pub(super) fn open<'a>(
        folder: &Path,
        names: impl Iterator<Item = &'a String>,
    ) -> Result<Self, Error> {
        let open = |name: &String| -> Result<Pinned, Error> {
            let path = folder.join(name);
            let opened = bpf::object_get(&path).and_then(|fd| {
                let id = bpf::map_info(fd.as_fd())?.id;
                Ok(Pinned { name: name.clone(), fd, id })
            });
            opened.map_err(|cause| Error::pin("open the pinned map", path, cause))
        };
        names.map(open).collect::<Result<_, _>>().map(Self)
    }

    /// Pins the maps again that are not pinned, or whose pin is another map's. Returns for each the
    /// name, what was found, and whether that worked.
    pub(super) fn restore(&self, pins: &Pins) -> Vec<(String, &'static str, Result<(), Error>)> {
        let folder = pins.maps();
        let mut found = Vec::new();
        for Pinned { name, fd, id } in &self.0 {
            let path = folder.join(name);
            let there = bpf::object_get(&path).and_then(|fd| bpf::map_info(fd.as_fd()));
            let what = match there {
                Ok(info) if info.id == *id => continue,
                Ok(_) => "another map is pinned in its place",
                Err(error) if error.kind() == io::ErrorKind::NotFound => "the pin is gone",
                Err(_) => "the pin cannot be opened",
            };
            let pin = || {
                pins.make_folders()?;
                match std::fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(Error::pin("remove", &path, error));
                    }
                    Ok(()) | Err(_) => {}
                }
                bpf::object_pin(fd.as_fd(), &path)
                    .map_err(|cause| Error::pin("pin the map", &path, cause))
            };
            found.push((name.clone(), what, pin()));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_depends_on_every_entry_and_not_on_their_order() {
        let digest = |entries: &[(u32, u64)]| {
            let mut digest = Digest::default();
            for (key, value) in entries {
                digest.add(key, value);
            }
            digest
        };
        let all = digest(&[(1, 10), (2, 20), (3, 30)]);
        assert_eq!(digest(&[(3, 30), (1, 10), (2, 20)]), all);
        for other in
            [&[(1, 10), (2, 20)][..], &[(1, 20), (2, 10), (3, 30)], &[(1, 10), (2, 20), (3, 31)]]
        {
            assert_ne!(digest(other), all, "{other:?}");
        }
        // Bytes after the last whole word count too, and so does the place of a word.
        assert_ne!(hash(&[1_u8; 9]), hash(&[1, 1, 1, 1, 1, 1, 1, 1, 2_u8]));
        assert_ne!(hash(&[1_u64, 2]), hash(&[2_u64, 1]));
        assert_ne!(hash(&[0_u64; 2]), hash(&[0_u64; 3]));
    }
}
