//! What is answered. Its JSON form is a contract, written down in `docs/explain.md`: fields are
//! added, never changed.

use std::net::IpAddr;

use serde::Serialize;

/// What becomes of the packet or call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes to a backend.
    Forward,
    /// It is dropped without an answer.
    Drop,
    /// It is answered with a reset, an ICMP error or (a call) a refusal.
    Reject,
    /// It is not translated, and goes on as it is.
    Pass,
}

impl Verdict {
    /// The word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Drop => "drop",
            Self::Reject => "reject",
            Self::Pass => "pass",
        }
    }

    /// The exit code of `sluice explain`.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// It does.
    Kept,
    /// It sees another one, by which answers come back here.
    Masqueraded,
}

impl Source {
    /// The word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Masqueraded => "masqueraded",
        }
    }
}

/// The frontend that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
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

/// Where a backend listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Endpoint {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
}

/// A backend that clients of this class may reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// Its part of the slots, hence of new clients: 0 to 1.
    pub share: f64,
}

/// Session affinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Affinity {
    /// How long a client stays with its backend after its last flow began.
    pub seconds: u32,
}

/// Something that decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What kind of step: one word.
    pub step: &'static str,
    /// What was found, for people.
    pub text: String,
    /// The Kubernetes object behind it, as `Kind namespace/name`.
    pub object: Option<String>,
    /// The field of the object.
    pub field: Option<String>,
}

/// What happens to a packet or call.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// What becomes of it.
    pub verdict: Verdict,
    /// Why: a word of [`sluice_common::Reason`].
    pub reason: &'static str,
    /// The Service, as `namespace/name`.
    pub service: Option<String>,
    /// Its port: the name, of an unnamed port the number.
    pub port: Option<String>,
    /// The frontend that was asked for.
    pub frontend: Option<Frontend>,
    /// The backend that this tuple gets.
    pub backend: Option<Endpoint>,
    /// Every backend that the client may reach; empty unless forwarded.
    pub candidates: Vec<Candidate>,
    /// Whether the backend sees the client's address; absent unless forwarded.
    pub source: Option<Source>,
    /// The service port's affinity.
    pub affinity: Option<Affinity>,
    /// What decided, in order.
    pub steps: Vec<Step>,
    /// What happens to the call, where a call is translated before there is a packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<Box<Answer>>,
}
