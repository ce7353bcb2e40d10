//! The API server: Services, EndpointSlices, our own Node and (where it has them) ServiceCIDRs,
//! watched.
//!
//! Each kind has a watcher of its own, which lists, watches, and lists again when the server has
//! forgotten where we were. Objects that vanished in between are removed when the new list is
//! complete. While the server is away nothing changes: what it said last still holds.
//!
//! Objects are taken in loosely: one that cannot be decoded is reported and keeps
//! its last good form; to decode lists strictly would lose all others with it.

mod connection;
mod events;
mod requests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use futures::{Stream, StreamExt, TryStreamExt as _};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::utils::Backoff as KubeBackoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Config};
use sluice_core::model::object::ObjectName;
use sluice_core::model::report::{Flaw, Note, Subject};
use sluice_core::model::{Change, Event, SourceId};
use tokio::sync::mpsc;

pub use events::Events;
pub use requests::Requests;

use super::Pulse;
use super::decode::{
    Decoder, HEADLESS_LABEL, Kind, Meta, PROXY_NAME_LABEL, TRIGGER_ANNOTATION, change,
};
use crate::node::backoff::Backoff;

/// A watch ends and begins anew after this long; if then nothing comes for some seconds, the
/// connection is taken for dead. A cut line is noticed within half a minute (see `connection`),
/// a server that hangs in less than five.
const WATCH_SECONDS: u32 = 240;
/// A response that stands still for so long is given up: more than a watch may be silent.
const READ_TIMEOUT: Duration = Duration::from_secs(270);
/// Waiting times between tries to watch what the server may not have at all.
const PATIENCE: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_mins(5));
/// Objects a page of a list holds. A slice of 100 endpoints is some 250 kB in memory until it is
/// trimmed.
const PAGE: u32 = 100;

/// How the API server is found, and what of it is wanted.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// A kubeconfig; else `$KUBECONFIG`, `~/.kube/config`, or the pod's own account.
    pub kubeconfig: Option<PathBuf>,
    /// The server's address, instead of the one configured.
    pub api: Option<String>,
    /// The node's name.
    pub node: Option<String>,
    /// Serve objects with this proxy name, instead of those without one.
    pub proxy_name: Option<String>,
    /// Whether ServiceCIDRs are wanted, where the server has them (Kubernetes 1.33) and lets us see
    /// them: not where they are given, and not beside another proxy, whose Services have their
    /// addresses in them too.
    pub service_cidrs: bool,
    /// Where requests are counted.
    pub requests: Requests,
}

/// The API server cannot even be tried.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no usable configuration.
    #[error("no configuration for the API server (tried {tried}): {cause}")]
    Config {
        /// Where it was looked for.
        tried: String,
        /// Why that failed.
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The address given is none.
    #[error("{address:?} is not the address of an API server: {cause}")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        cause: http::uri::InvalidUri,
    },
    /// The client cannot be made, for example from unreadable certificates.
    #[error("cannot make a client for {address}: {cause}")]
    Client {
        /// The server.
        address: String,
        /// Why.
        cause: Box<kube::Error>,
    },
}

/// Prepares a client. The server need not be reachable.
///
/// # Errors
///
/// When there is no configuration, or it is unusable.
pub async fn connect(settings: &Settings) -> Result<Client, ConnectError> {
    let mut config = match &settings.kubeconfig {
        Some(path) => {
            let tried = path.display().to_string();
            let failed =
                |cause| ConnectError::Config { tried: tried.clone(), cause: Box::new(cause) };
            let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .map_err(failed)?
        }
        None => Config::infer().await.map_err(|cause| ConnectError::Config {
            tried: "$KUBECONFIG, ~/.kube/config, the pod's service account".into(),
            cause: Box::new(cause),
        })?,
    };
    if let Some(address) = &settings.api {
        config.cluster_url = address
            .parse()
            .map_err(|cause| ConnectError::Address { address: address.clone(), cause })?;
    }
    config.read_timeout = Some(READ_TIMEOUT);
    config.reset_reader_on_write = true;
    let address = config.cluster_url.to_string();
    let host = config.cluster_url.authority().map(ToString::to_string).unwrap_or_default();
    let client = connection::client(config)
        .map_err(|cause| ConnectError::Client { address, cause: Box::new(cause) })?;
    Ok(settings.requests.counting(&client, &host))
}

/// What is asked for.
fn kinds(settings: &Settings) -> Vec<(Kind, watcher::Config)> {
    let labels = match &settings.proxy_name {
        Some(name) => format!("{PROXY_NAME_LABEL}={name},!{HEADLESS_LABEL}"),
        None => format!("!{PROXY_NAME_LABEL},!{HEADLESS_LABEL}"),
    };
    let mut kinds = vec![
        (Kind::Service, watcher::Config::default().labels(&labels)),
        (Kind::EndpointSlice, watcher::Config::default().labels(&labels)),
    ];
    if settings.service_cidrs {
        kinds.push((Kind::ServiceCidr, watcher::Config::default()));
    }
    if let Some(node) = &settings.node {
        let own = watcher::Config::default().fields(&format!("metadata.name={node}"));
        kinds.push((Kind::Node, own));
    }
    kinds
}

/// The API server could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("listing {kind} at the API server failed: {cause}")]
pub struct ListError {
    /// The kind of objects.
    kind: &'static str,
    /// Why.
    cause: String,
}

/// Lists everything once: what a watch would deliver before anything changes.
///
/// # Errors
///
/// When a list fails. ServiceCIDRs may: not every server has them.
pub async fn list(client: Client, settings: &Settings) -> Result<Vec<Event>, ListError> {
    let kinds = kinds(settings);
    let mut missing: Vec<Kind> = kinds.iter().map(|(kind, _)| *kind).collect();
    let streams = kinds.into_iter().map(|(kind, config)| objects(client.clone(), kind, config));
    let mut stream = futures::stream::select_all(streams);
    let mut intake = Intake::default();
    let mut changes = Vec::new();
    while !missing.is_empty() {
        let Some((kind, event)) = stream.next().await else { break };
        let is_last = match event {
            Ok(event) => {
                let is_last = matches!(event, watcher::Event::InitDone);
                changes.append(&mut intake.take(kind, event));
                is_last
            }
            Err(_) if kind == Kind::ServiceCidr => true,
            Err(error) => return Err(ListError { kind: kind.word(), cause: chain(&error) }),
        };
        missing.retain(|other| !(is_last && *other == kind));
    }
    Ok(changes.into_iter().map(|change| Event { source: SourceId::Kubernetes, change }).collect())
}

/// Watches the API server until nobody listens any more.
pub async fn watch(client: Client, settings: Settings, sink: mpsc::Sender<Event>, pulse: Pulse) {
    // A watch that goes on after a failure may have nothing to tell: that it goes on has to be
    // heard too.
    let (heard, mut answers) = mpsc::unbounded_channel();
    let streams = kinds(&settings).into_iter().map(|(kind, config)| {
        objects(connection::telling(&client, kind, heard.clone()), kind, config)
    });
    let mut stream = futures::stream::select_all(streams);
    let mut intake = Intake::default();
    let mut missed = false;
    loop {
        let next = tokio::select! {
            // An answer comes before the events in it.
            biased;
            Some(kind) = answers.recv() => {
                if intake.recovered(kind) && pulse.heard() {
                    let well = Change::Notes(Subject::Source(SourceId::Kubernetes), Vec::new());
                    let _ = sink.send(Event { source: SourceId::Kubernetes, change: well }).await;
                }
                continue;
            }
            next = stream.next() => next,
            () = sink.closed() => return,
        };
        let Some((kind, event)) = next else { return };
        let changes = match event {
            Ok(event) => {
                // A list that begins is no answer yet: nothing has been asked.
                let answered = !matches!(event, watcher::Event::Init);
                let mut changes = intake.take(kind, event);
                if answered && intake.recovered(kind) && pulse.heard() {
                    changes.push(Change::Notes(Subject::Source(SourceId::Kubernetes), Vec::new()));
                }
                if changes.contains(&Change::Synced) {
                    pulse.synced();
                }
                changes
            }
            // It answers, and has forgotten where we were: the new list that follows makes up for
            // it.
            Err(watcher::Error::WatchError(status)) if status.code == 410 => {
                tracing::info!("watching {} starts over: {}", kind.word(), status.message);
                Vec::new()
            }
            // The node works without: a server that is away shows itself by the other kinds.
            Err(error) if kind == Kind::ServiceCidr => {
                if !std::mem::replace(&mut missed, true) {
                    tracing::info!(
                        "watching {} failed: {}; until it works (or with --service-cidr) what goes to an address that no Service has is not dropped",
                        kind.word(),
                        chain(&error)
                    );
                }
                Vec::new()
            }
            Err(error) => {
                let why = format!("watching {} failed: {}", kind.word(), chain(&error));
                tracing::warn!("{why}; trying again");
                pulse.failed(why.clone());
                intake.failed(kind);
                vec![Change::Notes(
                    Subject::Source(SourceId::Kubernetes),
                    vec![Note::new(
                        Flaw::Unreachable,
                        kind.word(),
                        format!("{why}; what it said last still holds"),
                    )],
                )]
            }
        };
        for change in changes {
            if sink.send(Event { source: SourceId::Kubernetes, change }).await.is_err() {
                return;
            }
        }
    }
}

type Watched = (Kind, Result<watcher::Event<DynamicObject>, watcher::Error>);

/// A stream of one kind's events that backs off after failures and never ends.
fn objects(
    client: Client,
    kind: Kind,
    config: watcher::Config,
) -> impl Stream<Item = Watched> + Send + Unpin + use<> {
    let api: Api<DynamicObject> = Api::all_with(client, &resource(kind));
    let config = config.timeout(WATCH_SECONDS).page_size(PAGE);
    let events = watcher(api, config).map_ok(trim);
    if kind == Kind::ServiceCidr {
        return events.backoff(Patience(PATIENCE)).map(move |event| (kind, event)).boxed();
    }
    events.default_backoff().map(move |event| (kind, event)).boxed()
}

/// A kind, as the API server knows it.
fn resource(kind: Kind) -> ApiResource {
    let (group, version) = match kind {
        Kind::EndpointSlice => ("discovery.k8s.io", "v1"),
        Kind::ServiceCidr => ("networking.k8s.io", "v1"),
        Kind::Service | Kind::Endpoints | Kind::Node => ("", "v1"),
    };
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind.word()))
}

/// Waits longer and longer. Never reset: a list that begins counts as a success already.
struct Patience(Backoff);

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.0.failed())
    }
}

impl KubeBackoff for Patience {
    fn reset(&mut self) {}
}

/// Lets go at once what nobody reads.
fn trim(event: watcher::Event<DynamicObject>) -> watcher::Event<DynamicObject> {
    event.modify(|object| {
        object.metadata.managed_fields = None;
        if let Some(annotations) = &mut object.metadata.annotations {
            annotations.retain(|name, _| name == TRIGGER_ANNOTATION);
        }
        object.metadata.owner_references = None;
    })
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}

/// What is known of one kind.
#[derive(Debug, Default)]
struct Known {
    names: BTreeSet<ObjectName>,
    /// What the list that is under way has shown so far.
    seen: Option<BTreeSet<ObjectName>>,
    listed: bool,
    failing: bool,
}

/// Turns watch events into changes.
#[derive(Debug, Default)]
struct Intake {
    decoder: Decoder,
    services: Known,
    slices: Known,
    nodes: Known,
    service_cidrs: Known,
    noted: BTreeSet<Subject>,
    synced: bool,
}

impl Intake {
    fn known(&mut self, kind: Kind) -> &mut Known {
        match kind {
            Kind::Service => &mut self.services,
            Kind::EndpointSlice | Kind::Endpoints => &mut self.slices,
            Kind::Node => &mut self.nodes,
            Kind::ServiceCidr => &mut self.service_cidrs,
        }
    }

    fn failed(&mut self, kind: Kind) {
        self.known(kind).failing = true;
    }

    /// Notes a success; whether by now no kind fails.
    fn recovered(&mut self, kind: Kind) -> bool {
        self.known(kind).failing = false;
        ![&self.services, &self.slices, &self.nodes].iter().any(|known| known.failing)
    }

    fn take(&mut self, kind: Kind, event: watcher::Event<DynamicObject>) -> Vec<Change> {
        match event {
            watcher::Event::Apply(object) | watcher::Event::InitApply(object) => {
                self.apply(kind, object)
            }
            watcher::Event::Delete(object) => self.remove(kind, &name(&object)),
            watcher::Event::Init => {
                self.known(kind).seen = Some(BTreeSet::new());
                Vec::new()
            }
            watcher::Event::InitDone => self.listed(kind),
        }
    }

    fn apply(&mut self, kind: Kind, object: DynamicObject) -> Vec<Change> {
        let name = name(&object);
        let optional = |texts: BTreeMap<String, String>| {
            texts.into_iter().map(|(key, value)| (key, Some(value))).collect()
        };
        let meta = Meta {
            name: object.metadata.name,
            namespace: object.metadata.namespace,
            labels: object.metadata.labels.map(optional),
            annotations: object.metadata.annotations.map(optional),
            creation_timestamp: object.metadata.creation_timestamp.map(|time| time.0.to_string()),
            deletion_timestamp: object.metadata.deletion_timestamp.map(|time| time.0.to_string()),
        };
        let known = self.known(kind);
        let _ = known.names.insert(name.clone());
        if let Some(seen) = &mut known.seen {
            let _ = seen.insert(name.clone());
        }
        let subject = Subject::object(kind.word(), &name);
        match self.decoder.decode(kind, &meta, object.data) {
            Ok(object) => {
                let mut changes = vec![change(kind, name, Some(object))];
                if self.noted.remove(&subject) {
                    changes.push(Change::Notes(subject, Vec::new()));
                }
                changes
            }
            Err(error) => {
                let _ = self.noted.insert(subject.clone());
                let note = Note::new(
                    Flaw::Undecodable,
                    "",
                    format!("{error}; it keeps its last good form"),
                );
                vec![Change::Notes(subject, vec![note])]
            }
        }
    }

    fn remove(&mut self, kind: Kind, name: &ObjectName) -> Vec<Change> {
        let known = self.known(kind);
        let _ = known.names.remove(name);
        if let Some(seen) = &mut known.seen {
            let _ = seen.remove(name);
        }
        let mut changes = vec![change(kind, name.clone(), None)];
        let subject = Subject::object(kind.word(), name);
        if self.noted.remove(&subject) {
            changes.push(Change::Notes(subject, Vec::new()));
        }
        changes
    }

    /// A list is complete: what it did not show is gone.
    fn listed(&mut self, kind: Kind) -> Vec<Change> {
        let known = self.known(kind);
        known.listed = true;
        let seen = known.seen.take().unwrap_or_default();
        let gone: Vec<ObjectName> = known.names.difference(&seen).cloned().collect();
        let mut changes: Vec<Change> =
            gone.iter().flat_map(|name| self.remove(kind, name)).collect();
        if !self.synced && self.services.listed && self.slices.listed {
            self.synced = true;
            changes.push(Change::Synced);
        }
        changes
    }
}

fn name(object: &DynamicObject) -> ObjectName {
    let text = |text: &Option<String>| text.as_deref().unwrap_or_default().into();
    ObjectName { namespace: text(&object.metadata.namespace), name: text(&object.metadata.name) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(name: &str, body: serde_json::Value) -> DynamicObject {
        let mut object = body;
        object["metadata"] = json!({"name": name, "namespace": "default"});
        serde_json::from_value(object).expect("an object")
    }

    fn good(name: &str) -> DynamicObject {
        service(name, json!({"spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]}}))
    }

    #[test]
    fn what_vanished_while_nobody_watched_goes_when_the_new_list_is_complete() {
        let mut intake = Intake::default();
        let mut take = |event| intake.take(Kind::Service, event);
        assert_eq!(take(watcher::Event::Init), []);
        let _ = take(watcher::Event::InitApply(good("a")));
        let _ = take(watcher::Event::InitApply(good("b")));
        assert_eq!(take(watcher::Event::InitDone), [], "slices are not listed yet");
        assert_eq!(take(watcher::Event::Init), []);
        assert!(matches!(
            take(watcher::Event::InitApply(good("b"))).as_slice(),
            [Change::Service(_, Some(_))]
        ));
        let gone = ObjectName::new("default", "a");
        assert_eq!(take(watcher::Event::InitDone), [Change::Service(gone, None)]);
        let _ = intake.take(Kind::EndpointSlice, watcher::Event::Init);
        assert_eq!(intake.take(Kind::EndpointSlice, watcher::Event::InitDone), [Change::Synced]);
        let _ = intake.take(Kind::EndpointSlice, watcher::Event::Init);
        assert_eq!(
            intake.take(Kind::EndpointSlice, watcher::Event::InitDone),
            [],
            "once is enough"
        );
    }

    #[test]
    fn an_object_that_cannot_be_decoded_keeps_its_form_and_is_reported_until_it_can() {
        let mut intake = Intake::default();
        let _ = intake.take(Kind::Service, watcher::Event::Init);
        let _ = intake.take(Kind::Service, watcher::Event::InitApply(good("a")));
        let _ = intake.take(Kind::Service, watcher::Event::InitDone);
        let bad = service("a", json!({"spec": {"ports": "none"}}));
        let changes = intake.take(Kind::Service, watcher::Event::Apply(bad.clone()));
        assert!(
            matches!(changes.as_slice(), [Change::Notes(_, notes)] if notes.len() == 1),
            "{changes:?}"
        );
        let _ = intake.take(Kind::Service, watcher::Event::Init);
        let _ = intake.take(Kind::Service, watcher::Event::InitApply(bad));
        assert_eq!(
            intake.take(Kind::Service, watcher::Event::InitDone),
            [],
            "it was in the list: not gone"
        );
        let changes = intake.take(Kind::Service, watcher::Event::Apply(good("a")));
        assert!(
            matches!(changes.as_slice(), [Change::Service(_, Some(_)), Change::Notes(_, notes)] if notes.is_empty())
        );
    }
}
