//! The BPF object that was built into this binary, and the maps that it defines.

use std::collections::BTreeMap;

use sluice_common::abi::previous;

use super::bpf::MapInfo;
use super::error::Error;

/// The object as the build script found it; empty when there was none.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice.o"));

/// Returns the object's bytes.
///
/// # Errors
///
/// Fails if the binary was built without the object.
pub(super) fn bytes() -> Result<&'static [u8], Error> {
    if OBJECT.is_empty() { Err(Error::NoObject) } else { Ok(OBJECT) }
}

/// A map as the object defines it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// `enum bpf_map_type`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Capacity.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
}

/// Describes how a pinned map differs from the object's definition, or returns [`None`] if it does
/// not.
#[must_use]
pub fn difference(spec: &Spec, pinned: &Spec) -> Option<String> {
    let fields = [
        ("type", spec.kind, pinned.kind),
        ("key size", spec.key_size, pinned.key_size),
        ("value size", spec.value_size, pinned.value_size),
        ("max_entries", spec.max_entries, pinned.max_entries),
        ("flags", spec.flags, pinned.flags),
    ];
    let differing: Vec<String> = fields
        .iter()
        .filter(|(_, wanted, found)| wanted != found)
        .map(|(field, wanted, found)| format!("{field} {found} instead of {wanted}"))
        .collect();
    (!differing.is_empty()).then(|| differing.join(", "))
}

impl From<MapInfo> for Spec {
    fn from(info: MapInfo) -> Self {
        Self {
            kind: info.kind,
            key_size: info.key_size,
            value_size: info.value_size,
            max_entries: info.max_entries,
            flags: info.flags,
        }
    }
}

/// Returns every map of the object, with the capacities in `sizes` instead of the object's.
///
/// # Errors
///
/// Fails if the object cannot be read.
pub(super) fn specs(
    object: &[u8],
    sizes: &BTreeMap<String, u32>,
) -> Result<BTreeMap<String, Spec>, Error> {
    let object =
        aya_obj::Object::parse(object).map_err(|error| Error::Object(error.to_string()))?;
    let specs = object.maps.iter().map(|(name, map)| {
        let spec = Spec {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: sizes.get(name).copied().unwrap_or_else(|| map.max_entries()),
            flags: map.map_flags(),
        };
        (name.clone(), spec)
    });
    // Global data has its own maps (".rodata"), which belong to one load and are not pinned.
    Ok(specs
        .filter(|(name, _)| !name.starts_with('.') && !name.starts_with(previous::PREFIX))
        .collect())
}

/// Returns every map that the object also has in the previous layout, by its name there.
///
/// # Errors
///
/// Fails if the object cannot be read.
pub(super) fn previous_specs(object: &[u8]) -> Result<BTreeMap<String, Spec>, Error> {
    let object =
        aya_obj::Object::parse(object).map_err(|error| Error::Object(error.to_string()))?;
    let specs = object.maps.iter().filter_map(|(name, map)| {
        let spec = Spec {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: map.max_entries(),
            flags: map.map_flags(),
        };
        Some((name.strip_prefix(previous::PREFIX)?.to_owned(), spec))
    });
    Ok(specs.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: Spec = Spec { kind: 1, key_size: 8, value_size: 8, max_entries: 64, flags: 0 };

    #[test]
    fn an_equal_map_has_no_difference() {
        assert_eq!(difference(&HASH, &HASH), None);
    }

    #[test]
    fn every_differing_field_is_named() {
        let pinned = Spec { value_size: 64, max_entries: 32, ..HASH };
        let text = difference(&HASH, &pinned).unwrap_or_default();
        assert_eq!(text, "value size 64 instead of 8, max_entries 32 instead of 64");
    }
}
