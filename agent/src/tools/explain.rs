//! What a packet would meet on this node, and why: `sluice explain`.
//!
//! [`explain`] runs the packet's own path, [`sluice_common::path`] and
//! [`sluice_common::path::socket`], over tables in memory, and tells from the questions that the
//! path asked, with their answers, what happened in which order. It knows no rule of its own about
//! backends: who may be reached is what the maps say.
//!
//! A [`World`] is those tables and what lies around them: of manifests ([`Manifests`], without a
//! kernel), or of the maps of this node (`live`).

mod answer;
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
