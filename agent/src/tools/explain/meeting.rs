//! The result of a packet at a hook.

use sluice_common::abi::Class;
use sluice_common::engine::adapter::Action;
use sluice_common::packet::answer::IcmpError;
use sluice_common::path::{Decision, Hook};

use super::objects::Owner;
use super::record::Asked;
use super::world::Side;

/// The result of a packet at a hook.
pub(super) struct Meeting<F: Side> {
    pub(super) hook: Hook,
    pub(super) ifindex: u32,
    pub(super) decision: Decision<F>,
    pub(super) asked: Vec<Asked<F>>,
    /// The action on the packet.
    pub(super) action: Action,
    /// The ICMP error that answers the packet, with the MTU in it.
    pub(super) answered: Option<(IcmpError, u32)>,
    /// The packet's length with the IP header.
    pub(super) length: u32,
}

/// The requested service port, and the class of the client.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) owner: Owner,
    pub(super) service_port: u32,
    /// The kind of the frontend, one of [`sluice_common::abi::frontend`].
    pub(super) kind: u32,
    pub(super) class: Class,
}
