//! The watched API server: a small one of the test's own, which can go away and lose its history.

use std::collections::BTreeSet;
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use sluice::daemon::source::Pulse;
use sluice::daemon::source::kubernetes::{self, Settings};
use sluice_core::model::report::{Flaw, Note, Subject};
use sluice_core::model::{Change, Event, SourceId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, mpsc};
use tokio::time::timeout;

/// The objects of the server.
#[derive(Default)]
struct World {
    services: BTreeSet<&'static str>,
    /// Raised when it loses its history: watches from before must list again.
    version: u32,
    down: bool,
    /// The networks of its one ServiceCIDR, or [`None`] if it does not know the kind.
    service_cidrs: Option<Vec<&'static str>>,
    requests: Vec<String>,
}

#[derive(Clone)]
struct Server {
    world: Arc<Mutex<World>>,
    /// Events for the watches of Services; [`None`] cuts all connections.
    events: broadcast::Sender<Option<Value>>,
}

fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "resourceVersion": "1", "managedFields": [{"manager": "x"}]},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]},
    })
}

impl Server {
    async fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("bound"));
        let world = World { services: ["a", "b"].into(), version: 1, ..World::default() };
        let server = Self { world: Arc::new(Mutex::new(world)), events: broadcast::channel(16).0 };
        let accepting = server.clone();
        drop(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if !accepting.world().down {
                    drop(tokio::spawn(accepting.clone().serve(stream)));
                }
            }
        }));
        (server, address)
    }

    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.world.lock().expect("no test thread has failed")
    }

    async fn serve(self, mut stream: TcpStream) {
        let mut events = self.events.subscribe();
        let mut buffer = Vec::new();
        loop {
            while !buffer.windows(4).any(|window| window == b"\r\n\r\n") {
                let cut = async { while !matches!(events.recv().await, Ok(None) | Err(_)) {} };
                let read = tokio::select! {
                    read = stream.read_buf(&mut buffer) => read,
                    () = cut => return,
                };
                if !matches!(read, Ok(count) if count > 0) {
                    return;
                }
            }
            let target =
                String::from_utf8_lossy(&buffer).split(' ').nth(1).unwrap_or_default().to_owned();
            buffer.clear();
            self.world().requests.push(target.clone());
            let services = target.starts_with("/api/v1/services");
            if target.contains("watch=") {
                let _ = self.watch(&mut stream, services, &target, &mut events).await;
                return;
            }
            let service_cidrs = self.world().service_cidrs.clone();
            let items: Vec<Value> = if services {
                self.world().services.iter().map(|name| service(name)).collect()
            } else if !target.starts_with("/apis/networking.k8s.io/v1/servicecidrs") {
                Vec::new()
            } else if let Some(cidrs) = service_cidrs {
                vec![json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}})]
            } else {
                let head = "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n";
                if stream.write_all(head.as_bytes()).await.is_err() {
                    return;
                }
                continue;
            };
            let version = self.world().version.to_string();
            let list = json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items});
            let body = list.to_string();
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            if stream.write_all((head + &body).as_bytes()).await.is_err() {
                return;
            }
        }
    }

    async fn watch(
        &self,
        stream: &mut TcpStream,
        services: bool,
        target: &str,
        events: &mut broadcast::Receiver<Option<Value>>,
    ) -> std::io::Result<()> {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await?;
        let current = format!("resourceVersion={}", self.world().version);
        if !target.contains(&current) {
            let status = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Expired",
                "code": 410, "message": "too old resource version",
            });
            send(stream, &json!({"type": "ERROR", "object": status})).await?;
            return stream.write_all(b"0\r\n\r\n").await;
        }
        while let Ok(Some(event)) = events.recv().await {
            if services {
                send(stream, &event).await?;
            }
        }
        Ok(())
    }
}

async fn send(stream: &mut TcpStream, event: &Value) -> std::io::Result<()> {
    let line = format!("{event}\n");
    stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await
}

async fn next(events: &mut mpsc::Receiver<Event>) -> Change {
    let event = timeout(Duration::from_secs(20), events.recv())
        .await
        .expect("a change in time")
        .expect("the source lives");
    assert_eq!(event.source, SourceId::Kubernetes);
    event.change
}

/// Skips to the first change of a kind.
async fn skip_to<T>(
    events: &mut mpsc::Receiver<Event>,
    wanted: impl Fn(&Change) -> Option<T>,
) -> T {
    loop {
        if let Some(found) = wanted(&next(events).await) {
            return found;
        }
    }
}

fn gone(change: &Change) -> Option<String> {
    let Change::Service(name, None) = change else { return None };
    Some(name.name.to_string())
}

/// Returns the notes about the server itself.
fn said(change: &Change) -> Option<&[Note]> {
    let Change::Notes(Subject::Source(SourceId::Kubernetes), notes) = change else { return None };
    Some(notes)
}

/// Returns a client of the server.
async fn connect(address: String, service_cidrs: bool) -> (kubernetes::Server, Settings) {
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = directory.path().join("config");
    let text = "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: \"http://192.0.2.1:1\"}}]\n\
                contexts: [{name: c, context: {cluster: c, user: u}}]\ncurrent-context: c\nusers: [{name: u, user: {}}]\n";
    fs::write(&kubeconfig, text).expect("written");
    let settings = Settings {
        kubeconfig: Some(kubeconfig),
        api: Some(address),
        service_cidrs,
        ..Settings::default()
    };
    (kubernetes::server(&settings).await.expect("a client"), settings)
}

/// Returns a source that watches the server: its events and its health.
async fn watching(address: String, service_cidrs: bool) -> (mpsc::Receiver<Event>, Pulse) {
    let (server, settings) = connect(address, service_cidrs).await;
    let (sink, events) = mpsc::channel(64);
    let pulse = Pulse::default();
    drop(tokio::spawn(kubernetes::watch(server, settings, sink, pulse.clone())));
    (events, pulse)
}

#[tokio::test]
async fn service_cidrs_are_reported_if_there_are_any_and_nobody_waits_for_them() {
    let (server, address) = Server::start().await;
    let (mut events, pulse) = watching(address, true).await;
    let mut changes = vec![next(&mut events).await];
    while changes.last() != Some(&Change::Synced) {
        changes.push(next(&mut events).await);
    }
    while !server.world().requests.iter().any(|target| target.contains("servicecidrs")) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        !changes.iter().any(|change| said(change).is_some_and(|notes| !notes.is_empty())),
        "{changes:?}"
    );
    assert!(pulse.health().failure.is_none());

    server.world().service_cidrs = Some(vec!["10.96.0.0/12"]);
    let told = |change: &Change| {
        let Change::ServiceCidr(name, Some(networks)) = change else { return None };
        Some((name.to_string(), networks.iter().map(ToString::to_string).collect::<Vec<_>>()))
    };
    // Requested again a little later.
    let expected = ("kubernetes".to_owned(), vec!["10.96.0.0/12".to_owned()]);
    assert_eq!(skip_to(&mut events, told).await, expected);
    assert!(pulse.health().failure.is_none());
}

#[tokio::test]
async fn a_server_that_goes_away_and_loses_its_history_removes_nothing() {
    let (server, address) = Server::start().await;
    let (mut events, pulse) = watching(address, false).await;

    let mut listed = BTreeSet::new();
    loop {
        let change = next(&mut events).await;
        if change == Change::Synced {
            break;
        }
        let Change::Service(name, Some(_)) = &change else { panic!("{change:?}") };
        let _ = listed.insert(name.name.to_string());
    }
    assert_eq!(listed, ["a".to_owned(), "b".to_owned()].into());
    assert!(pulse.health().synced);
    let selector = "labelSelector=%21service.kubernetes.io%2Fservice-proxy-name%2C%21service.kubernetes.io%2Fheadless";
    let lists = server.world().requests.clone();
    assert!(
        lists
            .iter()
            .filter(|target| !target.contains("watch="))
            .all(|target| target.contains(selector)),
        "{lists:?}"
    );

    // An event.
    while !server
        .world()
        .requests
        .iter()
        .any(|target| target.starts_with("/api/v1/services") && target.contains("watch="))
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let _ = server.world().services.insert("c");
    let _ = server.events.send(Some(json!({"type": "ADDED", "object": service("c")})));
    assert!(
        matches!(next(&mut events).await, Change::Service(name, Some(_)) if &*name.name == "c")
    );

    // The server goes away; nothing is removed, but it is reported.
    server.world().down = true;
    let _ = server.events.send(None);
    let flaw = skip_to(&mut events, |change| {
        assert_eq!(gone(change), None);
        said(change)?.first().map(|note| note.flaw)
    })
    .await;
    assert_eq!(flaw, Flaw::Unreachable);
    assert!(pulse.health().failure.is_some());

    // It returns without its history, and meanwhile a Service was deleted.
    {
        let mut world = server.world();
        let _ = world.services.remove("a");
        (world.version, world.down) = (7, false);
    }
    assert_eq!(skip_to(&mut events, gone).await, "a");
    if pulse.health().failure.is_some() {
        skip_to(&mut events, |change| said(change).filter(|notes| notes.is_empty()).map(drop))
            .await;
    }
    assert!(pulse.health().failure.is_none());
}

#[tokio::test]
async fn one_list_has_all_that_a_watch_delivers_first() {
    let (server, address) = Server::start().await;
    let (kubernetes::Server { client, .. }, settings) = connect(address, true).await;
    let names = |events: &[Event]| {
        let name = |event: &Event| {
            if let Change::Service(name, Some(_)) = &event.change {
                Some(name.name.to_string())
            } else if let Change::ServiceCidr(name, Some(_)) = &event.change {
                Some(format!("networks of {name}"))
            } else {
                None
            }
        };
        events.iter().filter_map(name).collect::<BTreeSet<String>>()
    };
    // The server does not know ServiceCIDRs.
    let events = kubernetes::list(client.clone(), &settings).await.expect("listed");
    assert_eq!(names(&events), ["a".to_owned(), "b".to_owned()].into());
    assert!(events.iter().any(|event| event.change == Change::Synced), "{events:?}");

    server.world().service_cidrs = Some(vec!["10.96.0.0/12"]);
    let events = kubernetes::list(client.clone(), &settings).await.expect("listed");
    assert!(names(&events).contains("networks of kubernetes"), "{events:?}");

    server.world().down = true;
    let _ = server.events.send(None);
    let error = kubernetes::list(client, &settings).await.expect_err("nobody answers").to_string();
    assert!(error.starts_with("listing ") && error.contains("at the API server failed"), "{error}");
}
