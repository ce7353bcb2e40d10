//! A simulation of the real code: nodes, clients, endpoints and networks in one thread.
//!
//! Everything that decides is Sluice's own: `sluice_common`'s path and engine decide about each
//! packet at each hook, and the agent's model, plan and image fill the maps, one write at a time.
//! Around them stand small machines whose time and chance follow from a seed: hosts that speak TCP
//! and UDP, a network that loses, doubles and delays, forgers and floods.
//!
//! ```text
//! seed -> Scenario -> World: queue of what happens -> Violation, or none
//!         scenario    world, hosts, act, view, agent
//! ```
//!
//! A run is a function of its scenario: a list of events that are made before anything happens, of
//! which each may be left out. [`shrink`] leaves out all that a violation does not need.

pub mod act;
pub mod agent;
pub mod cluster;
pub mod count;
pub mod fault;
pub mod hosts;
pub mod maps;
pub mod node;
pub mod packet;
pub mod random;
pub mod scenario;
pub mod shrink;
pub mod tcp;
pub mod view;
pub mod world;
