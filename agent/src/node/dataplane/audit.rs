//! Compares the kernel's maps and pins with what they should be, cheaply enough to be repeated all
//! the time.
//!
//! An array is mapped into memory and compared element by element. A table is compared by the
//! number of its entries and the sum of their hashes, which does not depend on their order: to look
//! up each entry in an image of 250 000 costs ten times as much. A comparison is about one point in
//! time, so its caller must be the only one that writes the maps.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use sluice_common::abi::{SLOTS_PER_BLOCK, ServicePort};
use sluice_common::{V4, V6};
use sluice_core::image::Image;
use sluice_core::image::map::{self, PlanMap};

use super::bpf::{self, Table};
use super::error::Error;
use super::kernel::{Kernel, KernelStack};
use super::pins::Pins;

/// A comparison of one map with an image.
type Check = fn(&Kernel, &Image) -> Result<bool, Error>;

/// The comparisons of all maps of the plan.
const CHECKS: [Check; 15] = [
    |kernel, image| table::<map::Services<V4>, _>(&kernel.maps().v4.services, image),
    |kernel, image| table::<map::Services<V6>, _>(&kernel.maps().v6.services, image),
    |kernel, image| Ok(backends::<V4>(kernel, image)),
    |kernel, image| Ok(backends::<V6>(kernel, image)),
    |kernel, image| table::<map::Origins<V4>, _>(&kernel.maps().v4.origins, image),
    |kernel, image| table::<map::Origins<V6>, _>(&kernel.maps().v6.origins, image),
    |kernel, image| table::<map::SourceRanges<V4>, _>(&kernel.maps().v4.source_ranges, image),
    |kernel, image| table::<map::SourceRanges<V6>, _>(&kernel.maps().v6.source_ranges, image),
    |kernel, image| table::<map::NodeAddresses<V4>, _>(&kernel.maps().v4.node_addresses, image),
    |kernel, image| table::<map::NodeAddresses<V6>, _>(&kernel.maps().v6.node_addresses, image),
    |kernel, image| table::<map::Names, _>(&kernel.maps().names, image),
    |kernel, image| Ok(ports(kernel, image)),
    |kernel, image| Ok(slots(kernel, image)),
    |kernel, image| Ok(addresses(kernel, image)),
    |kernel, image| Ok(node_ports(kernel, image)),
];

impl Kernel {
    /// The number of steps in which [`Self::holds`] compares all maps of the plan.
    pub const AUDIT_STEPS: usize = CHECKS.len();

    /// Whether the maps of one step hold exactly an image.
    ///
    /// # Errors
    ///
    /// Fails if a map cannot be read.
    pub fn holds(&self, step: usize, image: &Image) -> Result<bool, Error> {
        CHECKS.get(step).map_or(Ok(true), |check| check(self, image))
    }
}

/// The number of entries of a table, and the sum of their hashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Digest {
    entries: usize,
    sum: u64,
}

impl Digest {
    fn add<K: aya::Pod, V: aya::Pod>(&mut self, key: &K, value: &V) {
        self.entries += 1;
        self.sum = self.sum.wrapping_add(mix(mix(0, key), value));
    }
}

/// Adds the bytes of a value to a hash.
fn mix<T: aya::Pod>(mut hash: u64, value: &T) -> u64 {
    const PRIME: u64 = 0x9e37_79b9_7f4a_7c15;
    // SAFETY: the value is live, and a `Pod` is plain bytes without padding.
    let bytes = unsafe {
        std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>())
    };
    let (words, rest) = bytes.as_chunks::<8>();
    let last = rest.iter().fold(0_u64, |word, byte| word << 8 | u64::from(*byte));
    for word in words.iter().map(|word| u64::from_le_bytes(*word)).chain([last]) {
        hash = (hash ^ word).wrapping_mul(PRIME);
        hash ^= hash >> 29;
    }
    hash
}

/// Whether a table holds an image's entries and no others.
fn table<M, K>(table: &Table<K, M::Value>, image: &Image) -> Result<bool, Error>
where
    M: PlanMap<Key: Copy + Into<K>, Value: aya::Pod>,
    K: aya::Pod,
{
    let mut found = Digest::default();
    table
        .for_each(|key, value| found.add(key, value))
        .map_err(|cause| Error::map("read", M::NAME, cause))?;
    let mut wanted = Digest::default();
    for (key, value) in M::of(image) {
        let key: K = (*key).into();
        wanted.add(&key, value);
    }
    Ok(found == wanted)
}

fn backends<F: KernelStack>(kernel: &Kernel, image: &Image) -> bool {
    let found = F::maps(kernel.maps()).backends.filled();
    found
        .filter(|(id, backend)| *id != 0 && backend.generation != 0)
        .eq(F::of(image).backends.iter().map(|(id, backend)| (*id, *backend)))
}

fn ports(kernel: &Kernel, image: &Image) -> bool {
    let ports = &kernel.maps().ports;
    let is_held = |(id, port): (&u32, &ServicePort)| ports.get(*id) == Some(*port);
    image.ports.iter().all(is_held)
}

fn slots(kernel: &Kernel, image: &Image) -> bool {
    let slots = &kernel.maps().slots;
    image.slots.iter().all(|(start, ids)| slots.holds_words(start / SLOTS_PER_BLOCK, ids))
}

fn addresses(kernel: &Kernel, image: &Image) -> bool {
    let mut wanted: Vec<(u32, u64)> = Vec::new();
    for (lane, bits) in &image.lanes {
        let (word, bits) = (lane / 16, u64::from(*bits) << (lane % 16 * 4));
        match wanted.last_mut() {
            Some((last, all)) if *last == word => *all |= bits,
            Some(_) | None => wanted.push((word, bits)),
        }
    }
    kernel.maps().addresses.filled().filter(|(_, bits)| *bits != 0).eq(wanted)
}

fn node_ports(kernel: &Kernel, image: &Image) -> bool {
    let found = kernel.maps().node_ports.filled().filter(|(_, bits)| *bits != 0);
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
            entries.iter().for_each(|(key, value)| digest.add(key, value));
            digest
        };
        let all = digest(&[(1, 10), (2, 20), (3, 30)]);
        assert_eq!(digest(&[(3, 30), (1, 10), (2, 20)]), all);
        for other in
            [&[(1, 10), (2, 20)][..], &[(1, 20), (2, 10), (3, 30)], &[(1, 10), (2, 20), (3, 31)]]
        {
            assert_ne!(digest(other), all, "{other:?}");
        }
        // Bytes after the last whole word count too.
        assert_ne!(mix(0, &[1_u8; 9]), mix(0, &[1, 1, 1, 1, 1, 1, 1, 1, 2_u8]));
    }
}
