//! What sources tell the model.

use std::sync::Arc;

use ipnet::IpNet;

use super::object::{NodeSpec, ObjectName, ServiceSpec, Slice, SliceKind, SourceId};
use super::report::{Note, Subject};

/// Something that a source has learnt. [`None`] in place of an object: it is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A Service.
    Service(ObjectName, Option<ServiceSpec>),
    /// An object with endpoints.
    Slice(SliceKind, ObjectName, Option<Slice>),
    /// A Node.
    Node(Arc<str>, Option<NodeSpec>),
    /// Networks that Services have their addresses from.
    ServiceCidr(Arc<str>, Option<Vec<IpNet>>),
    /// What is wrong with an object or file, in the source's eyes, replacing what it said
    /// about it before. Empty: all is well again.
    Notes(Subject, Vec<Note>),
    /// The source has delivered all that existed when it began.
    Synced,
}

/// A change and who learnt of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The source.
    pub source: SourceId,
    /// The change.
    pub change: Change,
}
