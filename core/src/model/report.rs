//! Reports of what is wrong with objects, for the log, `sluice status`, metrics and Events.

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use super::object::{ObjectName, SourceId};

/// The subject of a report.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// A Kubernetes object.
    Object {
        /// The kind, as in a manifest.
        kind: String,
        /// Its name.
        name: ObjectName,
    },
    /// A document in a file.
    Document {
        /// The file's path.
        path: String,
        /// The document's position in the file, from 1; 0 for the file as a whole.
        index: usize,
    },
    /// A source as a whole.
    Source(SourceId),
}

impl Subject {
    /// Creates the subject of an object.
    pub fn object(kind: &str, name: &ObjectName) -> Self {
        Self::Object { kind: kind.to_owned(), name: name.clone() }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object { kind, name } => write!(formatter, "{kind} {name}"),
            Self::Document { path, index: 0 } => write!(formatter, "{path}"),
            Self::Document { path, index } => write!(formatter, "{path} document {index}"),
            Self::Source(SourceId::Manifests) => write!(formatter, "the manifests' folder"),
            Self::Source(SourceId::Kubernetes) => write!(formatter, "the API server"),
        }
    }
}

/// The severity of a flaw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Part of an object has no effect.
    Problem,
    /// All of it has effect, though perhaps not the intended one.
    Notice,
}

/// Declares the flaws, each with its name, word, level and sentence.
macro_rules! flaws {
    ($($(#[doc = $doc:literal])* $name:ident = $word:literal, $level:ident;)*) => {
        /// A problem with an object: at once a metric's label, a word in `sluice status` and, as it
        /// is written here, the reason of Events.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Flaw { $($(#[doc = $doc])* $name,)* }

        impl Flaw {
            /// Every flaw, in order.
            pub const ALL: &'static [Flaw] = &[$(Flaw::$name,)*];

            /// Returns the word for metrics and the CLI.
            pub const fn word(self) -> &'static str {
                match self { $(Flaw::$name => $word,)* }
            }

            /// Returns the reason of Events that report it.
            pub const fn reason(self) -> &'static str {
                match self { $(Flaw::$name => stringify!($name),)* }
            }

            /// Returns its severity.
            pub const fn level(self) -> Level {
                match self { $(Flaw::$name => Level::$level,)* }
            }
        }
    };
}

flaws! {
    /// The document is not YAML: its objects keep their last good form.
    BrokenDocument = "broken_document", Problem;
    /// The file cannot be read: its objects keep their last good form.
    Unreadable = "unreadable", Problem;
    /// The object cannot be decoded: it keeps its last good form.
    Undecodable = "undecodable", Problem;
    /// The object has no name.
    NoName = "no_name", Problem;
    /// A name is longer than Kubernetes allows, or empty where it must not be.
    BadName = "bad_name", Problem;
    /// Objects of this kind have no meaning here.
    UnknownKind = "unknown_kind", Notice;
    /// The same object comes from two places; the first counts.
    DuplicateObject = "duplicate_object", Problem;
    /// The Service has no ClusterIP, and nothing here assigns one.
    NoClusterIp = "no_cluster_ip", Notice;
    /// The text is not an address.
    BadAddress = "bad_address", Problem;
    /// The address cannot be a frontend's or endpoint's.
    ForbiddenAddress = "forbidden_address", Problem;
    /// The address is not of the family that the object declares.
    WrongFamily = "wrong_family", Problem;
    /// The value is out of bounds; another one counts.
    BadValue = "bad_value", Problem;
    /// There is no address.
    MissingAddress = "missing_address", Problem;
    /// The slice holds addresses of a type that is not served.
    UnsupportedAddressType = "unsupported_address_type", Problem;
    /// The number is no port.
    BadPort = "bad_port", Problem;
    /// Two ports of the Service are the same.
    DuplicatePort = "duplicate_port", Problem;
    /// The protocol is not served.
    UnsupportedProtocol = "unsupported_protocol", Problem;
    /// The endpoint is a frontend of a Service, its own or another: packets would go round in
    /// circles.
    Loop = "loop", Problem;
    /// None of the Service's source ranges is of a frontend's family: everybody may use that one.
    OpenToAll = "open_to_all", Notice;
    /// The slice mirrors an Endpoints object of the past: its Service has slices from its selector.
    StaleMirror = "stale_mirror", Notice;
    /// Endpoints have several addresses: the first one counts.
    SurplusAddresses = "surplus_addresses", Notice;
    /// The health check port is a node port of a Service, which gets what load balancers ask.
    HealthCheckShadowed = "health_check_shadowed", Problem;
    /// A node port is the health check port of a Service, which does not get what load balancers
    /// ask.
    ShadowsHealthCheck = "shadows_health_check", Notice;
    /// No label says to which Service the slice belongs.
    NoServiceLabel = "no_service_label", Notice;
    /// An older Service has the same frontend.
    ClaimLost = "claim_lost", Problem;
    /// A newer Service claims the same frontend in vain.
    ClaimContested = "claim_contested", Notice;
    /// Whoever may write Services may take the address: nobody else has a say in external IPs.
    ExternalIp = "external_ip", Notice;
    /// The agent is set not to serve the external IP.
    ExternalIpRefused = "external_ip_refused", Problem;
    /// Something else on this node serves the VIP.
    LeftAlone = "left_alone", Notice;
    /// A traffic policy keeps clients from the endpoints that there are, all of them on other
    /// nodes.
    NoLocalEndpoint = "no_local_endpoint", Notice;
    /// More endpoints than a table has slots: some get no traffic.
    TooManyEndpoints = "too_many_endpoints", Problem;
    /// The table is smaller than it should be, since the arena is full: shares are less even.
    SmallTable = "small_table", Notice;
    /// A map is full: the part is left out.
    NoRoom = "no_room", Problem;
    /// The source cannot be reached: what it said last still holds.
    Unreachable = "unreachable", Problem;
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Note {
    /// The field's path; empty if it is the whole.
    pub field: String,
    /// The problem.
    pub flaw: Flaw,
    /// The finding and its consequence, as text.
    pub message: String,
}

impl Note {
    /// Creates a note on a field.
    pub fn new(flaw: Flaw, field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), flaw, message: message.into() }
    }
}

/// A note with its subject and the time at which it was first made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The subject.
    pub subject: Subject,
    /// The problem.
    pub note: Note,
    /// The time at which it was first noticed.
    pub since: SystemTime,
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Note { field, flaw, message } = &self.note;
        write!(formatter, "{}: {}: ", self.subject, flaw.word())?;
        if !field.is_empty() {
            write!(formatter, "{field}: ")?;
        }
        write!(formatter, "{message}")
    }
}

/// The author of notes, which replaces only its own ones.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Author {
    /// A source, about what it read.
    Source(SourceId, Subject),
    /// The model, about one object with endpoints.
    Slice(super::SliceKey),
    /// The model, about a Service and the endpoints that were joined to it.
    Service(ObjectName),
    /// The plan, about a Service.
    Plan(ObjectName),
}

/// The number of notes of one kind about one subject that are kept; more are only counted.
const KEPT: usize = 8;

/// Collects notes. Of many similar ones, some are kept and the rest are counted.
#[derive(Debug, Default)]
pub struct Notebook {
    notes: BTreeMap<(Subject, Flaw), (Vec<Note>, usize)>,
}

impl Notebook {
    /// Adds a note; `text` is called only if it is kept.
    pub fn add(&mut self, subject: &Subject, flaw: Flaw, text: impl FnOnce() -> (String, String)) {
        let (notes, more) = self.notes.entry((subject.clone(), flaw)).or_default();
        if notes.len() < KEPT {
            let (field, message) = text();
            notes.push(Note { field, flaw, message });
        } else {
            *more += 1;
        }
    }

    /// Returns the notes, in order.
    pub fn finish(self) -> Vec<(Subject, Note)> {
        let mut all = Vec::new();
        for ((subject, flaw), (notes, more)) in self.notes {
            all.extend(notes.into_iter().map(|note| (subject.clone(), note)));
            if more > 0 {
                all.push((subject, Note::new(flaw, "", format!("and {more} more like these"))));
            }
        }
        all
    }
}

/// All that is wrong now.
#[derive(Clone, Debug, Default)]
pub struct Reports {
    current: BTreeMap<Author, Vec<Report>>,
}

impl Reports {
    /// Replaces the notes of an author, and returns the new reports. A note that stays keeps its
    /// time.
    pub fn set(
        &mut self,
        author: Author,
        notes: Vec<(Subject, Note)>,
        now: SystemTime,
    ) -> Vec<Report> {
        let old = self.current.remove(&author).unwrap_or_default();
        let mut fresh = Vec::new();
        let reports: Vec<Report> = notes
            .into_iter()
            .map(|(subject, note)| {
                let before = old.iter().find(|old| old.subject == subject && old.note == note);
                let since = before.map_or(now, |old| old.since);
                let report = Report { subject, note, since };
                if before.is_none() {
                    fresh.push(report.clone());
                }
                report
            })
            .collect();
        if !reports.is_empty() {
            let _ = self.current.insert(author, reports);
        }
        fresh
    }

    /// Returns all reports, in a stable order.
    pub fn iter(&self) -> impl Iterator<Item = &Report> {
        self.current.values().flatten()
    }

    /// Returns the number of reports of each flaw.
    pub fn counts(&self) -> BTreeMap<Flaw, usize> {
        let mut counts = BTreeMap::new();
        for report in self.iter() {
            *counts.entry(report.note.flaw).or_default() += 1;
        }
        counts
    }
}
