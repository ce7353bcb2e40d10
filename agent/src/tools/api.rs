//! What the commands answer, as types: the same for `-o json`, for tables and for whatever serves
//! it next.
//!
//! A list is `{"apiVersion", "kind", "items"}`, anything else `{"apiVersion", "kind", ...}`. Fields
//! are added, and neither renamed nor removed, while [`VERSION`] stays. [`schema()`] describes all
//! of it; `docs/schema.json` is that.

mod backends;
mod flows;
mod schema;
mod services;

use serde::Serialize;

pub(crate) use backends::{Backend, backends};
pub(crate) use flows::{Flow, flows, monotonic_ns};
pub(crate) use schema::Schemas;
pub use schema::schema;
pub(crate) use services::{Service, services};

/// The version of the answers' form.
pub const VERSION: &str = "sluice.dev/v1";

/// Something that a command answers.
pub(crate) trait Kind: Serialize {
    /// The kind, as Kubernetes names kinds.
    const KIND: &'static str;
    /// The kind of a list of these.
    const LIST: &'static str;
}

/// A list of things of one kind.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct List<'a, T> {
    api_version: &'static str,
    kind: &'static str,
    items: &'a [T],
}

impl<'a, T: Kind> List<'a, T> {
    pub(crate) fn new(items: &'a [T]) -> Self {
        Self { api_version: VERSION, kind: T::LIST, items }
    }
}

/// One thing.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Object<'a, T> {
    api_version: &'static str,
    kind: &'static str,
    #[serde(flatten)]
    body: &'a T,
}

impl<'a, T: Kind> Object<'a, T> {
    pub(crate) fn new(body: &'a T) -> Self {
        Self { api_version: VERSION, kind: T::KIND, body }
    }
}

/// Gives types their kinds.
macro_rules! kinds {
    ($($type:ty = $kind:literal;)*) => {
        $(impl $crate::tools::api::Kind for $type {
            const KIND: &'static str = $kind;
            const LIST: &'static str = concat!($kind, "List");
        })*
    };
}
pub(crate) use kinds;
