//! Explains what would happen to a packet on this node, and why: `sluice explain`.
//!
//! [`explain`] runs the packet's own path, [`sluice_common::path`] and
//! [`sluice_common::path::socket`], over tables in memory. The steps of the answer are the lookups
//! that the path has made, with their results. The module has no rules of its own about backends:
//! the maps decide who may be reached.
//!
//! A [`World`] is those tables with their surroundings. It is made of manifests ([`Manifests`],
//! without a kernel), or of the maps of this node (`live`).

mod answer;
mod frame;
mod live;
mod manifests;
mod meeting;
mod objects;
mod passage;
mod question;
mod record;
mod story;
mod walk;
mod world;

pub use answer::{Affinity, Answer, Candidate, Endpoint, Frontend, Source, Step, Verdict};
pub use live::Live;
pub use manifests::{ApplyError, Manifests, Options, ReadError, Supposed};
pub use question::{Client, Question, Way};
pub use walk::{Error, explain};
pub use world::{NamedDevice, Routing, World};
