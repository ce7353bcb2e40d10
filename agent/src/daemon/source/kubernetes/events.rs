//! Writes `events.k8s.io/v1` Events about objects.

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, ListParams, PostParams};
use kube::{Api, Client};

use super::{chain, resource};
use crate::daemon::kubernetes_events::{EventWriter, ObjectEvent, Outcome};
use crate::daemon::source::decode::Kind;

/// The `reportingController` of Sluice's Events.
const CONTROLLER: &str = "sluice";
/// The `action` of Sluice's Events: what was being done.
const ACTION: &str = "Programming";
/// The namespace of Events about objects without a namespace, by Kubernetes' convention.
const DEFAULT_NAMESPACE: &str = "default";

/// Writes Events in the name of a node.
#[derive(Clone)]
pub struct Events {
    client: Client,
    node: String,
}

impl Events {
    /// Makes a writer for a node.
    pub fn new(client: Client, node: &str) -> Self {
        Self { client, node: node.to_owned() }
    }

    /// Returns the object as an Event refers to it, or [`None`] if the API server does not have it.
    ///
    /// It is looked up when there is something to write, with the permission to list that the agent
    /// has anyway. So no uid has to be stored with every object.
    async fn regarding(
        &self,
        object_event: &ObjectEvent,
    ) -> Result<Option<ObjectReference>, kube::Error> {
        let finding = &object_event.finding;
        let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.as_str() == finding.kind) else {
            return Ok(None);
        };
        let resource = resource(kind);
        let client = self.client.clone();
        let api: Api<DynamicObject> = if finding.name.namespace.is_empty() {
            Api::all_with(client, &resource)
        } else {
            Api::namespaced_with(client, &finding.name.namespace, &resource)
        };
        let this =
            ListParams::default().fields(&format!("metadata.name={}", finding.name.name)).limit(1);
        let found = api.list_metadata(&this).await?.items.into_iter().next();
        Ok(found.map(|object| ObjectReference {
            api_version: Some(resource.api_version.clone()),
            kind: Some(resource.kind.clone()),
            name: object.metadata.name,
            namespace: object.metadata.namespace,
            uid: object.metadata.uid,
            ..ObjectReference::default()
        }))
    }

    fn event(&self, object_event: &ObjectEvent, regarding: ObjectReference) -> Event {
        let finding = &object_event.finding;
        let uid = regarding.uid.as_deref().unwrap_or_default();
        let namespace = regarding.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
        Event {
            metadata: ObjectMeta {
                name: Some(object_event.event_name(uid, &self.node)),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(Timestamp::now())),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(self.node.clone()),
            action: Some(ACTION.to_owned()),
            reason: Some(finding.reason.to_owned()),
            note: Some(object_event.note.clone()),
            type_: Some(if finding.is_notice { "Normal" } else { "Warning" }.to_owned()),
            regarding: Some(regarding),
            ..Event::default()
        }
    }

    async fn create(&self, object_event: &ObjectEvent) -> Result<Outcome, kube::Error> {
        let Some(regarding) = self.regarding(object_event).await? else {
            return Ok(Outcome::NoObject);
        };
        let event = self.event(object_event, regarding);
        let namespace = event.metadata.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        match api.create(&PostParams::default(), &event).await {
            Ok(_) => Ok(Outcome::Written),
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(Outcome::Exists),
            Err(error) => Err(error),
        }
    }
}

impl EventWriter for Events {
    async fn write(&self, object_event: &ObjectEvent) -> Outcome {
        self.create(object_event).await.unwrap_or_else(|error| Outcome::Failed(chain(&error)))
    }
}
