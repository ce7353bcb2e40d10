//! Watches the API server for Services, EndpointSlices, the agent's own Node and, if it has them,
//! ServiceCIDRs.
//!
//! Each kind has a watcher of its own. It lists, watches, and lists again when the server has
//! forgotten its position. Objects that vanished in between are removed when the new list is
//! complete. While the server is away nothing changes: its last state still holds.
//!
//! Objects are parsed loosely. One that cannot be decoded is reported and keeps its last good form.
//! Decoding lists strictly would lose all other objects with it.

mod connection;
mod events;
mod outage;
mod requests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use futures::{Stream, StreamExt, TryStreamExt as _};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::utils::Backoff as KubeBackoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Config};
use sluice_core::model::object::ObjectName;
use sluice_core::model::report::{Flaw, Note, Subject};
use sluice_core::model::{Change, Event, SourceId};
use tokio::sync::mpsc;

pub use events::Events;
pub use kube::Client;
pub use requests::Requests;

use super::Pulse;
use super::decode::{
    Decoder, HEADLESS_LABEL, Kind, Meta, PROXY_NAME_LABEL, TRIGGER_ANNOTATION, change,
};
use crate::node::backoff::Backoff;
use outage::{Failed, Outage};

/// A watch is restarted after this long. If the server then sends nothing for some seconds, the
/// connection counts as dead. A cut line is noticed within half a minute (see `connection`), and a
/// server that hangs in less than five minutes.
const WATCH_SECONDS: u32 = 240;
/// A response that sends nothing for this long is given up. A watch may be silent for less.
const READ_TIMEOUT: Duration = Duration::from_secs(270);
/// The pauses between retries to watch a kind that the server may not have at all.
const PATIENCE: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_mins(5));
/// Objects per page of a list. A slice of 100 endpoints takes some 250 kB of memory until it is
/// trimmed.
const PAGE: u32 = 100;

/// The connection to the API server, and the objects to read.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// A kubeconfig; otherwise `$KUBECONFIG`, `~/.kube/config`, or the pod's own account.
    pub kubeconfig: Option<PathBuf>,
    /// The server's address, instead of the configured one.
    pub api: Option<String>,
    /// The node's name.
    pub node: Option<String>,
    /// Serve only objects with this proxy name, instead of those without one.
    pub proxy_name: Option<String>,
    /// Whether to read ServiceCIDRs, if the server has them (Kubernetes 1.33) and grants access.
    /// They are not read if networks are given, or next to another proxy, whose Services have
    /// addresses in them too.
    pub service_cidrs: bool,
    /// The counter of requests.
    pub requests: Requests,
}

/// A client for the API server cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no usable configuration.
    #[error("no configuration for the API server (tried {tried}): {cause}")]
    Config {
        /// The places that were searched.
        tried: String,
        /// The cause.
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The given address is not valid.
    #[error("{address:?} is not the address of an API server: {cause}")]
    Address {
        /// The given address.
        address: String,
        /// The cause.
        cause: http::uri::InvalidUri,
    },
    /// The client cannot be made, for example from unreadable certificates.
    #[error("cannot make a client for {address}: {cause}")]
    Client {
        /// The server.
        address: String,
        /// The cause.
        cause: Box<kube::Error>,
    },
}

/// Makes a client. The server need not be reachable.
///
/// # Errors
///
/// Fails if there is no configuration, or it is unusable.
pub async fn connect(settings: &Settings) -> Result<Client, ConnectError> {
    server(settings).await.map(|server| server.client)
}

/// A client with the server's address, for people.
#[derive(Clone)]
pub struct Server {
    /// The client.
    pub client: Client,
    /// The server's address.
    pub address: String,
}

/// Makes a client, as [`connect`] does, with the server's address.
///
/// # Errors
///
/// When there is no configuration, or it is unusable.
pub async fn server(settings: &Settings) -> Result<Server, ConnectError> {
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
    let client = connection::client(config).map_err(|cause| ConnectError::Client {
        address: address.clone(),
        cause: Box::new(cause),
    })?;
    let client = settings.requests.counting(&client, &host);
    Ok(Server { client, address: address.trim_end_matches('/').to_owned() })
}

/// Returns the kinds to watch, with the selection of objects.
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

/// A list of the API server failed.
#[derive(Debug, thiserror::Error)]
#[error("listing {kind} at the API server failed: {cause}")]
pub struct ListError {
    /// The kind of objects.
    kind: &'static str,
    /// The cause.
    cause: String,
}

/// Lists everything once, as a watch would deliver it before the first change.
///
/// # Errors
///
/// Fails if a list cannot be read, except that of ServiceCIDRs, which not every server has.
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
            Err(error) => return Err(ListError { kind: kind.as_str(), cause: chain(&error) }),
        };
        missing.retain(|other| !(is_last && *other == kind));
    }
    Ok(changes.into_iter().map(|change| Event { source: SourceId::Kubernetes, change }).collect())
}

/// Watches the API server until the receiver is gone.
pub async fn watch(server: Server, settings: Settings, sink: mpsc::Sender<Event>, pulse: Pulse) {
    let Server { client, address } = server;
    // A watch that recovers from a failure may have no events. So the connection reports each
    // request that succeeds.
    let (succeeded, mut successes) = mpsc::unbounded_channel();
    let streams = kinds(&settings).into_iter().map(|(kind, config)| {
        objects(connection::reporting(&client, kind, succeeded.clone()), kind, config)
    });
    let mut stream = futures::stream::select_all(streams);
    let mut watch = Watch {
        intake: Intake::default(),
        outage: Outage::new(&address),
        pulse,
        is_cidr_failure_logged: false,
    };
    loop {
        let changes = tokio::select! {
            // A success comes before the events in it.
            biased;
            Some(kind) = successes.recv() => watch.on_success(kind),
            next = stream.next() => match next {
                Some((kind, Ok(event))) => watch.on_event(kind, event),
                Some((kind, Err(error))) => watch.on_error(kind, &error),
                None => return,
            },
            () = sink.closed() => return,
        };
        for change in changes {
            if sink.send(Event { source: SourceId::Kubernetes, change }).await.is_err() {
                return;
            }
        }
    }
}

/// The state of the watch of all kinds.
struct Watch {
    intake: Intake,
    outage: Outage,
    pulse: Pulse,
    is_cidr_failure_logged: bool,
}

impl Watch {
    /// Takes in that a request has succeeded.
    fn on_success(&mut self, kind: Kind) -> Vec<Change> {
        let is_over = self.outage.succeeded(kind);
        if self.outage.is_failing() {
            self.pulse.answered();
        } else {
            let _ = self.pulse.succeeded();
        }
        if is_over {
            vec![Change::Notes(Subject::Source(SourceId::Kubernetes), Vec::new())]
        } else {
            Vec::new()
        }
    }

    fn on_event(&mut self, kind: Kind, event: watcher::Event<DynamicObject>) -> Vec<Change> {
        // The begin of a list is not a success: nothing has been requested yet.
        let is_success = !matches!(event, watcher::Event::Init);
        let mut changes = self.intake.take(kind, event);
        if is_success {
            changes.append(&mut self.on_success(kind));
        }
        if changes.contains(&Change::Synced) {
            self.pulse.synced();
        }
        changes
    }

    fn on_error(&mut self, kind: Kind, error: &watcher::Error) -> Vec<Change> {
        // The server answers, and has forgotten our position. The new list that follows makes up
        // for it.
        if let watcher::Error::WatchError(status) = error
            && status.code == 410
        {
            tracing::info!("watching {} starts over: {}", kind.as_str(), status.message);
            return Vec::new();
        }
        // The node works without ServiceCIDRs. A server that is away shows by the other kinds.
        if kind == Kind::ServiceCidr {
            if outage::is_status(error)
                && !std::mem::replace(&mut self.is_cidr_failure_logged, true)
            {
                tracing::info!(
                    "watching {} failed: {}; until it works, or with --service-cidr, packets to \
                     addresses that no Service has are not dropped",
                    kind.as_str(),
                    chain(error)
                );
            }
            return Vec::new();
        }
        let Failed { text, is_news } = self.outage.failed(kind, error);
        self.pulse.failed(text.clone());
        if !is_news {
            return Vec::new();
        }
        let what = format!("{text}; its last state still holds");
        vec![Change::Notes(
            Subject::Source(SourceId::Kubernetes),
            vec![Note::new(Flaw::Unreachable, "", what)],
        )]
    }
}

type Watched = (Kind, Result<watcher::Event<DynamicObject>, watcher::Error>);

/// Returns a stream of one kind's events, which backs off after failures and never ends.
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

/// Returns the API resource of a kind.
fn resource(kind: Kind) -> ApiResource {
    let (group, version) = match kind {
        Kind::EndpointSlice => ("discovery.k8s.io", "v1"),
        Kind::ServiceCidr => ("networking.k8s.io", "v1"),
        Kind::Service | Kind::Endpoints | Kind::Node => ("", "v1"),
    };
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind.as_str()))
}

/// Waits longer each time. It is never reset, because the begin of a list counts as a success
/// already.
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

/// Drops fields that nobody reads.
fn trim(event: watcher::Event<DynamicObject>) -> watcher::Event<DynamicObject> {
    event.modify(|object| {
        object.metadata.managed_fields = None;
        if let Some(annotations) = &mut object.metadata.annotations {
            annotations.retain(|name, _| name == TRIGGER_ANNOTATION);
        }
        object.metadata.owner_references = None;
    })
}

/// Returns an error's text with its causes.
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

/// The known objects of one kind.
#[derive(Debug, Default)]
struct Known {
    names: BTreeSet<ObjectName>,
    /// The objects that the list under way has shown so far.
    seen: Option<BTreeSet<ObjectName>>,
    listed: bool,
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
        let subject = Subject::object(kind.as_str(), &name);
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
        let subject = Subject::object(kind.as_str(), name);
        if self.noted.remove(&subject) {
            changes.push(Change::Notes(subject, Vec::new()));
        }
        changes
    }

    /// Takes in the end of a list: objects that it did not show are gone.
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
