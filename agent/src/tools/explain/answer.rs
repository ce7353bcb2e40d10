//! The answer. Its JSON form is a contract, documented in `docs/explain.md`: fields are added,
//! never changed.

use std::net::IpAddr;

use serde::Serialize;

use crate::node::dataplane::Failures;

/// The fate of the packet or call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes to a backend.
    Forward,
    /// It is dropped without an answer.
    Drop,
    /// It is answered with a reset, an ICMP error or, for a call, a refusal.
    Reject,
    /// It is not translated and continues unchanged.
    Pass,
}

impl Verdict {
    /// Returns the verdict's name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Drop => "drop",
            Self::Reject => "reject",
            Self::Pass => "pass",
        }
    }

    /// Returns the exit code of `sluice explain`.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Forward | Self::Pass => 0,
            Self::Reject => 3,
            Self::Drop => 4,
        }
    }
}

/// Whether the backend sees the client's own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The backend sees the client's address.
    Kept,
    /// The backend sees another address, so that replies return to this node.
    Masqueraded,
}

impl Source {
    /// Returns the name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Masqueraded => "masqueraded",
        }
    }
}

/// The requested frontend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Frontend {
    /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalIP`.
    pub kind: &'static str,
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: &'static str,
}

/// The address and port of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, schemars::JsonSchema)]
pub struct Endpoint {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
}

/// A backend that clients of this class may reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Candidate {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The share of slots, and so of new clients: 0 to 1.
    pub share: f64,
    /// TCP connections from this node that were translated at the socket; 0 if the answer comes
    /// from manifests.
    pub connects: u64,
    /// Number of them that were refused or not answered.
    pub failed: u64,
    /// Flows that were opened to it; 0 if the answer comes from manifests.
    pub flows: u64,
    /// How many of them failed to begin.
    pub failures: Failures,
}

/// Session affinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Affinity {
    /// The seconds for which a client stays with its backend after its last flow began.
    pub seconds: u32,
}

/// A step of the decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Step {
    /// The kind of step, as one word.
    pub step: &'static str,
    /// The finding, as text for people.
    pub text: String,
    /// The Kubernetes object behind it, as `Kind namespace/name`.
    pub object: Option<String>,
    /// The field of the object.
    pub field: Option<String>,
}

/// The fate of a packet or call.
#[derive(Clone, Debug, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Answer {
    /// The verdict.
    pub verdict: Verdict,
    /// The name of the [`sluice_common::Reason`].
    pub reason: &'static str,
    /// The Service, as `namespace/name`.
    pub service: Option<String>,
    /// The Service's port: its name, or the number of an unnamed port.
    pub port: Option<String>,
    /// The requested frontend.
    pub frontend: Option<Frontend>,
    /// The backend that this tuple gets.
    pub backend: Option<Endpoint>,
    /// Every backend that the client may reach; empty unless the packet is forwarded.
    pub candidates: Vec<Candidate>,
    /// Whether the backend sees the client's address; absent unless the packet is forwarded.
    pub source: Option<Source>,
    /// The service port's affinity.
    pub affinity: Option<Affinity>,
    /// The steps of the decision, in order.
    pub steps: Vec<Step>,
    /// The fate of the call, if it is translated before a packet exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<Box<Answer>>,
}
