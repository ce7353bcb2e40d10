//! Decides which endpoints a client may reach, and what happens to one that may reach none.
//!
//! It is pure, and does exactly what kube-proxy does (`CategorizeEndpoints` of
//! `pkg/proxy/topology.go`), since workloads rely on it. Some of that may be unexpected:
//!
//! - Hints are taken verbatim, and count only if every ready endpoint has one. The mode falls back
//!   to the whole cluster, never the choice of a single endpoint.
//! - Hints apply only to clients that may reach the whole cluster. Local endpoints stay local,
//!   whatever zone they are hinted for.
//! - Terminating endpoints stand in for ready ones, separately among all endpoints and among the
//!   local ones.

use std::sync::Arc;

use sluice_common::abi::Class;

/// An endpoint of a service port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "they are conditions of an endpoint, any of which may hold"
)]
pub struct Member<'a> {
    /// Whether it accepts new connections.
    pub ready: bool,
    /// Whether it answers, perhaps while it terminates.
    pub serving: bool,
    /// Whether it is terminating.
    pub terminating: bool,
    /// Whether its object says that it runs on this node.
    pub local: bool,
    /// The zones that it is hinted for.
    pub zones: &'a [Arc<str>],
    /// The nodes that it is hinted for.
    pub nodes: &'a [Arc<str>],
}

impl Member<'_> {
    /// Whether it is terminating and still answers.
    fn lingers(&self) -> bool {
        self.serving && self.terminating
    }
}

/// The traffic policies of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    /// Whether it has `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// Whether it has `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// Whether the service port has an external address: a node port, an external IP or one of a
    /// load balancer.
    pub external: bool,
}

impl Policies {
    /// Whether any client may reach every endpoint. With an external address, at least the clients
    /// on this node may.
    fn uses_cluster(self) -> bool {
        !self.internal_local || self.external
    }

    /// Whether any client may reach only the endpoints of this node.
    fn uses_local(self) -> bool {
        self.internal_local || self.external_local && self.external
    }
}

/// The location of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place<'a> {
    /// This node's name.
    pub node: Option<&'a str>,
    /// This node's zone.
    pub zone: Option<&'a str>,
}

/// The kind of hints that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// None: the whole cluster serves.
    Cluster,
    /// Endpoints hinted for this node serve.
    SameNode,
    /// Endpoints hinted for this node's zone serve.
    SameZone,
}

impl Place<'_> {
    /// Returns the kind of hints that count here, given the ready endpoints.
    pub fn mode(&self, members: &[Member<'_>]) -> Mode {
        let mut ready = members.iter().filter(|member| member.ready).peekable();
        if ready.peek().is_none() {
            return Mode::Cluster;
        }
        let all_and_here = |mode, hinted: fn(&Member<'_>) -> bool| {
            ready.clone().all(hinted) && ready.clone().any(|member| self.serves(member, mode))
        };
        if all_and_here(Mode::SameNode, |member| !member.nodes.is_empty()) {
            Mode::SameNode
        } else if all_and_here(Mode::SameZone, |member| !member.zones.is_empty()) {
            Mode::SameZone
        } else {
            Mode::Cluster
        }
    }

    /// Whether an endpoint serves clients here.
    fn serves(&self, member: &Member<'_>, mode: Mode) -> bool {
        let among =
            |names: &[Arc<str>], name: Option<&str>| names.iter().any(|hint| Some(&**hint) == name);
        match mode {
            Mode::Cluster => true,
            Mode::SameNode => among(member.nodes, self.node),
            Mode::SameZone => among(member.zones, self.zone),
        }
    }
}

/// The endpoints of a service port, grouped by the clients that may reach them: for each member,
/// whether it is in the set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Categories {
    /// The endpoints for clients that may reach every one; empty if there are no such clients.
    pub cluster: Vec<bool>,
    /// The endpoints for clients that may reach only this node's; empty if there are no such
    /// clients.
    pub local: Vec<bool>,
    /// The endpoints that any client may reach.
    pub reachable: Vec<bool>,
    /// Whether there are endpoints anywhere, so that a client without one is kept from them.
    pub any: bool,
}

/// Groups the endpoints of a service port.
pub fn categorize(members: &[Member<'_>], policies: Policies, place: Place<'_>) -> Categories {
    let set =
        |wanted: &dyn Fn(&Member<'_>) -> bool| members.iter().map(wanted).collect::<Vec<bool>>();
    let nobody = || vec![false; members.len()];

    let mut cluster = nobody();
    let mut mode = Mode::Cluster;
    if policies.uses_cluster() {
        mode = place.mode(members);
        cluster = set(&|member| member.ready && place.serves(member, mode));
        if !cluster.contains(&true) {
            cluster = set(&|member| member.lingers());
        }
    }
    let mut any = cluster.contains(&true);
    if !policies.uses_local() {
        return Categories { reachable: cluster.clone(), cluster, local: nobody(), any };
    }

    any |= members.iter().any(|member| member.ready || member.lingers());
    let mut local = set(&|member| member.local && member.ready);
    let lingering = !local.contains(&true);
    if lingering {
        local = set(&|member| member.local && member.lingers());
    }
    let reachable = if !policies.uses_cluster() {
        local.clone()
    } else if mode == Mode::Cluster && !(lingering && local.contains(&true)) {
        cluster.clone()
    } else {
        cluster.iter().zip(&local).map(|(cluster, local)| *cluster || *local).collect()
    };
    Categories { cluster, local, reachable, any }
}

/// The endpoints that new flows of a class of clients may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// For each member, whether flows may be sent there.
    pub members: Vec<bool>,
    /// Whether flows without a member are dropped, because there are endpoints elsewhere, and not
    /// rejected.
    pub drops: bool,
}

impl Categories {
    /// Returns the choice for each [`Class`] of clients.
    ///
    /// A service port without external addresses has no clients outside; these count as internal.
    pub fn choices(&self, policies: Policies) -> [Choice; 3] {
        let choice = |local: bool| {
            let members = if local { &self.local } else { &self.cluster };
            Choice { members: members.clone(), drops: self.any && !members.contains(&true) }
        };
        let internal = choice(policies.internal_local);
        if !policies.external {
            return [internal.clone(), internal.clone(), internal];
        }
        let mut choices = [internal, Choice::default(), Choice::default()];
        // The policy concerns clients from elsewhere, not pods and processes of this node.
        choices[Class::ExternalInside as usize] = choice(false);
        choices[Class::ExternalOutside as usize] = choice(policies.external_local);
        choices
    }
}
