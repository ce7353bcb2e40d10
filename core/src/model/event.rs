//! Changes that sources report to the model.

use std::sync::Arc;

use ipnet::IpNet;

use super::object::{NodeSpec, ObjectName, ServiceSpec, Slice, SliceKind, SourceId};
use super::report::{Note, Subject};

/// A change that a source has observed. [`None`] in place of an object means that it is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A Service.
    Service(ObjectName, Option<ServiceSpec>),
    /// An object with endpoints.
    Slice(SliceKind, ObjectName, Option<Slice>),
    /// A Node.
    Node(Arc<str>, Option<NodeSpec>),
    /// A ServiceCIDR: networks that Services get their addresses from.
    ServiceCidr(Arc<str>, Option<Vec<IpNet>>),
    /// The source's notes about an object or file, which replace its earlier ones. Empty if nothing
    /// is wrong any more.
    Notes(Subject, Vec<Note>),
    /// The source has delivered everything that existed when it began.
    Synced,
}

/// A change and the source that observed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The source.
    pub source: SourceId,
    /// The change.
    pub change: Change,
}
