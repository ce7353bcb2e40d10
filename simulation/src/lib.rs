//! A simulation of the real code: nodes, clients, endpoints and networks in one thread.
//!
//! All decisions are made by Sluice's own code: the path and engine of `sluice_common` decide about
//! each packet at each hook, and the agent's model, plan and image fill the maps, one write at a
//! time. The rest is simulated, with time and chance derived from a seed: hosts that speak TCP,
//! SCTP and UDP, bridges, a network that loses, duplicates and delays packets, forgers and floods.
//!
//! ```text
//! seed -> Scenario -> World: a queue of events -> Violation, or none
//!         scenario    world, hosts, act, view, agent
//! ```
//!
//! A run is a function of its scenario: a list of events that is made before the run starts. Each
//! event may be left out; [`shrink`] leaves out all that a violation does not need.

pub mod act;
pub mod agent;
pub mod cluster;
pub mod connection;
pub mod count;
pub mod fault;
pub mod hosts;
pub mod layouts;
pub mod maps;
pub mod node;
pub mod packet;
pub mod random;
pub mod scenario;
pub mod sctp;
pub mod shrink;
pub mod socket;
pub mod tcp;
pub mod view;
pub mod world;
