//! The maps that the plan fills, each declared once.
//!
//! An entry of `plan_maps!` adds a map to the image and gives it a type that implements
//! [`PlanMap`], by which the draft, the diff and `sluice diff` name it. A table of a family also
//! gets its variant of [`FamilyWrite`] and implements [`Table`].

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::marker::PhantomData;

use sluice_common::{Family, V4, V6, abi};

use super::{SourceKey, Stack, Write};

/// A map of the plan.
pub trait PlanMap {
    /// Its key in an image.
    type Key: Ord + Clone;
    /// Its value in an image.
    type Value: Clone + PartialEq;

    /// Its name in the kernel.
    const NAME: &'static str;

    /// Returns the map's content in an image.
    fn of(image: &Image) -> &BTreeMap<Self::Key, Self::Value>;
    /// Returns the map's content in an image, to be changed.
    fn of_mut(image: &mut Image) -> &mut BTreeMap<Self::Key, Self::Value>;
}

/// A map of a family whose entries are inserted and removed whole.
pub trait Table: PlanMap<Key: Copy> {
    /// The family.
    type Family: Stack;
    /// The value as a write holds it: boxed if it would make every write larger.
    type Written: From<Self::Value> + Borrow<Self::Value>;

    /// Wraps a write to this map.
    fn write(write: EntryWrite<Self::Key, Self::Written>) -> Write;
    /// Returns the write to this map that `write` holds, if it holds one.
    fn written(write: &FamilyWrite<Self::Family>) -> Option<&EntryWrite<Self::Key, Self::Written>>;
}

/// One write to a [`Table`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryWrite<K, V> {
    /// Inserts an entry, or replaces it.
    Insert {
        /// The key.
        key: K,
        /// The value.
        value: V,
    },
    /// Removes an entry.
    Remove {
        /// The key.
        key: K,
    },
}

impl<K: Ord + Copy, V> EntryWrite<K, V> {
    fn apply<T: Copy>(&self, map: &mut BTreeMap<K, T>)
    where
        V: Borrow<T>,
    {
        let _ = match self {
            Self::Insert { key, value } => map.insert(*key, *value.borrow()),
            Self::Remove { key } => map.remove(key),
        };
    }
}

/// Declares all maps of the plan; see the call below for the form of an entry.
macro_rules! plan_maps {
    (
        tables {
            $($(#[$table_doc:meta])*
            $table:ident as $Table:ident: $TableKey:ty => $TableValue:ty, written as $Written:ty;)*
        }
        arrays {
            $($(#[$array_doc:meta])*
            $array:ident as $Array:ident: $ArrayKey:ty => $ArrayValue:ty;)*
        }
        shared {
            $($(#[$shared_doc:meta])*
            $shared:ident as $Shared:ident: $name:literal, $SharedKey:ty => $SharedValue:ty;)*
        }
    ) => {
        /// The content of all maps of the plan. Equal images are equal maps.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Image {
            /// The IPv4 maps.
            pub v4: FamilyImage<V4>,
            /// The IPv6 maps.
            pub v6: FamilyImage<V6>,
            $($(#[$shared_doc])* pub $shared: BTreeMap<$SharedKey, $SharedValue>,)*
        }

        /// The maps of one family.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct FamilyImage<F: Family> {
            $($(#[$table_doc])* pub $table: BTreeMap<$TableKey, $TableValue>,)*
            $($(#[$array_doc])* pub $array: BTreeMap<$ArrayKey, $ArrayValue>,)*
        }

        impl<F: Family> Default for FamilyImage<F> {
            fn default() -> Self {
                Self { $($table: BTreeMap::new(),)* $($array: BTreeMap::new(),)* }
            }
        }

        /// One step in the maps of one family.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum FamilyWrite<F: Family> {
            $(
                #[doc = concat!("Inserts or removes an entry of `", stringify!($table), "`.")]
                $Table(EntryWrite<$TableKey, $Written>),
            )*
            /// Stores a backend that no slot refers to.
            Backend {
                /// Its id.
                id: u32,
                /// The backend.
                backend: abi::Backend<F::Address>,
            },
            /// Changes a backend's flags: one atomic store.
            BackendFlags {
                /// Its id.
                id: u32,
                /// Bits of [`abi::backend`].
                flags: u32,
            },
            /// Zeroes a backend that no slot refers to.
            ClearBackend {
                /// Its id.
                id: u32,
            },
        }

        impl<F: Family> FamilyImage<F> {
            pub(super) fn apply(&mut self, write: &FamilyWrite<F>) {
                match write {
                    $(FamilyWrite::$Table(write) => write.apply(&mut self.$table),)*
                    FamilyWrite::Backend { id, backend } => {
                        let _ = self.backends.insert(*id, *backend);
                    }
                    FamilyWrite::BackendFlags { id, flags } => {
                        if let Some(backend) = self.backends.get_mut(id) {
                            backend.flags = *flags;
                        }
                    }
                    FamilyWrite::ClearBackend { id } => {
                        let _ = self.backends.remove(id);
                    }
                }
            }
        }

        /// The names of all maps of the plan, in both families.
        pub const NAMES: &[&str] = &[
            $($Table::<V4>::NAME, $Table::<V6>::NAME,)*
            $($Array::<V4>::NAME, $Array::<V6>::NAME,)*
            $($Shared::NAME,)*
        ];

        $(family_map! { $table as $Table: $TableKey => $TableValue })*
        $(family_map! { $array as $Array: $ArrayKey => $ArrayValue })*

        $(
            impl<F: Stack> Table for $Table<F> {
                type Family = F;
                type Written = $Written;

                fn write(write: EntryWrite<$TableKey, $Written>) -> Write {
                    F::write(FamilyWrite::$Table(write))
                }

                fn written(write: &FamilyWrite<F>) -> Option<&EntryWrite<$TableKey, $Written>> {
                    if let FamilyWrite::$Table(write) = write { Some(write) } else { None }
                }
            }
        )*

        $(
            #[doc = concat!("The map `", $name, "`.")]
            #[derive(Clone, Copy, Debug)]
            pub struct $Shared;

            impl PlanMap for $Shared {
                type Key = $SharedKey;
                type Value = $SharedValue;

                const NAME: &'static str = $name;

                fn of(image: &Image) -> &BTreeMap<$SharedKey, $SharedValue> {
                    &image.$shared
                }

                fn of_mut(image: &mut Image) -> &mut BTreeMap<$SharedKey, $SharedValue> {
                    &mut image.$shared
                }
            }
        )*
    };
}

/// Names a map that each family has one of.
macro_rules! family_map {
    ($map:ident as $Map:ident: $Key:ty => $Value:ty) => {
        #[doc = concat!("The map `", stringify!($map), "` of a family.")]
        #[derive(Clone, Copy, Debug)]
        pub struct $Map<F>(PhantomData<F>);

        impl<F: Stack> PlanMap for $Map<F> {
            type Key = $Key;
            type Value = $Value;

            const NAME: &'static str = if F::VERSION == V6::VERSION {
                concat!(stringify!($map), "_v6")
            } else {
                concat!(stringify!($map), "_v4")
            };

            fn of(image: &Image) -> &BTreeMap<$Key, $Value> {
                &F::of(image).$map
            }

            fn of_mut(image: &mut Image) -> &mut BTreeMap<$Key, $Value> {
                &mut F::of_mut(image).$map
            }
        }
    };
}

plan_maps! {
    tables {
        /// Frontend -> service port; the map `services`.
        services as Services: abi::ServiceKey<F::Address> => abi::Service,
            written as abi::Service;
        /// Endpoint -> frontends that lead to it; the map `origins`.
        origins as Origins: abi::OriginKey<F::Address> => abi::Origins<F::Address>,
            written as Box<abi::Origins<F::Address>>;
        /// Sources that a service port lets in -> [`PERMITTED`](super::PERMITTED); the map
        /// `source_ranges`.
        source_ranges as SourceRanges: SourceKey<F::Address> => u32, written as u32;
        /// Address of this node -> what is done there; the map `node_addresses`.
        node_addresses as NodeAddresses: F::Address => abi::NodeAddress,
            written as abi::NodeAddress;
    }
    arrays {
        /// Backend id -> endpoint; the map `backends`.
        backends as Backends: u32 => abi::Backend<F::Address>;
    }
    shared {
        /// Service-port id -> its ranges, affinity and policies; the map `ports`. Has the keys of
        /// `names`.
        ports as Ports: "ports", u32 => abi::ServicePort;
        /// Service-port id -> whose it is; the map `names`.
        names as Names: "names", u32 => abi::Name;
        /// First slot of a range -> the backend id in each of its slots; the map `slots`.
        ///
        /// Ranges begin at multiples of [`abi::SLOTS_PER_BLOCK`], so no two share a block.
        slots as Slots: "slots", u32 => Vec<u32>;
        /// Lane -> bits of [`abi::listing`], none of them zero; the map `addresses`.
        ///
        /// A lane may belong to several addresses: its bits are those of all of them.
        lanes as Lanes: "addresses", u32 => u8;
        /// Word -> a bit for each port number that a node port has, none of the words zero; the
        /// map `node_ports`.
        node_ports as NodePorts: "node_ports", u32 => u64;
    }
}
