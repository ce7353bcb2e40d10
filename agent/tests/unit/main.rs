//! What needs nothing but the compiler: laws, scenarios, and what people read.

mod explain;
mod kubernetes;
mod manifests;
mod plan;
mod properties;
mod room;
mod scale;
mod scenarios;
mod vectors;
