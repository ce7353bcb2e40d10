//! Tests that need nothing but the compiler: laws, scenarios, and texts for people.

mod explain;
mod kubernetes;
mod manifests;
mod plan;
mod properties;
mod room;
mod scale;
mod scenarios;
mod vectors;
