//! Health checks as a load balancer makes them: over sockets on loopback, with an address of 127/8
//! for each test.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::*;

const SOON: Duration = Duration::from_secs(10);

/// Running servers and their inputs.
struct Bench {
    checks: watch::Sender<BTreeMap<ObjectName, HealthCheck>>,
    addresses: watch::Sender<Addresses>,
    healthy: Arc<AtomicBool>,
    failures: watch::Receiver<Failures>,
    serving: JoinHandle<()>,
}

impl Bench {
    fn start(addresses: Addresses) -> Self {
        let (checks, checks_receiver) = watch::channel(BTreeMap::new());
        let (addresses, addresses_receiver) = watch::channel(addresses);
        let (told, failures) = watch::channel(Failures::new());
        let healthy = Arc::new(AtomicBool::new(true));
        let asked = Arc::clone(&healthy);
        let inputs = Inputs {
            checks: checks_receiver,
            addresses: addresses_receiver,
            is_healthy: Arc::new(move || asked.load(Ordering::Relaxed)),
            room: Room::default(),
        };
        let serving = tokio::spawn(serve(inputs, told));
        Self { checks, addresses, healthy, failures, serving }
    }

    fn at(address: &str) -> Self {
        Self::start(listed(&[address]))
    }

    fn check(&self, service: &str, port: u16, local: usize) {
        self.checks.send_modify(|checks| {
            let _ = checks.insert(name(service), HealthCheck { port, local });
        });
    }

    fn forget(&self, service: &str) {
        self.checks.send_modify(|checks| {
            let _ = checks.remove(&name(service));
        });
    }

    async fn until_failures(&mut self, is_so: impl Fn(&Failures) -> bool) -> Failures {
        let found = timeout(SOON, self.failures.wait_for(|failures| is_so(failures))).await;
        found.expect("no such failures").expect("the servers ended").clone()
    }
}

fn name(service: &str) -> ObjectName {
    ObjectName::new("shop", service)
}

fn listed(addresses: &[&str]) -> Addresses {
    Addresses::Listed(
        addresses.iter().map(|address| address.parse().expect("an address")).collect(),
    )
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("an address"), port)
}

/// Returns a port that is free at the moment.
async fn free_port(address: &str) -> u16 {
    let listener = TcpListener::bind(at(address, 0)).await.expect("a loopback address");
    listener.local_addr().expect("a bound socket").port()
}

/// Sends a request line, and returns the answer, or [`None`] if nobody listens.
async fn ask(to: SocketAddr, line: &str) -> Option<String> {
    let mut stream = TcpStream::connect(to).await.ok()?;
    let request =
        format!("{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    let _ = timeout(SOON, stream.read_to_string(&mut answer)).await.ok()?.ok()?;
    Some(answer)
}

/// Asks until the answer is as expected.
async fn until_answer(to: SocketAddr, is_so: impl Fn(Option<&str>) -> bool) -> Option<String> {
    let started = Instant::now();
    loop {
        let answer = ask(to, "GET /").await;
        if is_so(answer.as_deref()) {
            return answer;
        }
        assert!(started.elapsed() < SOON, "{to} still answers {answer:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn is_ok(answer: Option<&str>) -> bool {
    answer.is_some_and(|answer| answer.starts_with("HTTP/1.1 200 "))
}

fn is_of(service: &str) -> impl Fn(Option<&str>) -> bool {
    let line = format!("\"name\": \"{service}\"");
    move |answer| answer.is_some_and(|answer| answer.contains(&line))
}

#[tokio::test]
async fn every_method_and_path_gets_the_same_answer() {
    let bench = Bench::at("127.71.0.1");
    let to = at("127.71.0.1", free_port("127.71.0.1").await);
    bench.check("web", to.port(), 2);
    let get = until_answer(to, is_ok).await.expect("an answer");
    let (head, body) = get.split_once("\r\n\r\n").expect("a head");
    assert_eq!(
        body,
        "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"
    );
    for header in [
        "content-type: application/json",
        "x-content-type-options: nosniff",
        "x-load-balancing-endpoint-weight: 2",
        &format!("content-length: {}", body.len()),
    ] {
        assert!(head.lines().any(|line| line == header), "{header} is missing: {head}");
    }
    for line in ["GET /healthz?x=1", "POST /", "PUT /any/path", "DELETE /", "OPTIONS *"] {
        let answer = ask(to, line).await.unwrap_or_default();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with(body), "{line}: {answer}");
    }
    let without_body = ask(to, "HEAD /").await.unwrap_or_default();
    assert!(
        without_body.starts_with("HTTP/1.1 200 ") && without_body.ends_with("\r\n\r\n"),
        "{without_body}"
    );
    assert!(without_body.contains(&format!("content-length: {}", body.len())), "{without_body}");
}

#[tokio::test]
async fn a_kept_connection_hears_of_counts_and_health() {
    let bench = Bench::at("127.71.0.2");
    let to = at("127.71.0.2", free_port("127.71.0.2").await);
    bench.check("web", to.port(), 1);
    let _ = until_answer(to, is_ok).await;
    let mut stream = TcpStream::connect(to).await.expect("a listener");
    let mut buffer = vec![0; 1024];
    for (local, healthy, status, body) in [
        (1, true, "200 OK", "\"serviceProxyHealthy\": true"),
        (0, true, "503 Service Unavailable", "\"localEndpoints\": 0"),
        (3, false, "503 Service Unavailable", "\"serviceProxyHealthy\": false"),
        (3, true, "200 OK", "\"localEndpoints\": 3"),
    ] {
        bench.check("web", to.port(), local);
        bench.healthy.store(healthy, Ordering::Relaxed);
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("a kept connection");
        let length =
            timeout(SOON, stream.read(&mut buffer)).await.expect("an answer").expect("an answer");
        let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(body),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn a_port_that_changes_or_goes_is_closed_at_once() {
    let mut bench = Bench::at("127.71.0.3");
    let (first, second) = (
        at("127.71.0.3", free_port("127.71.0.3").await),
        at("127.71.0.3", free_port("127.71.0.3").await),
    );
    bench.check("web", first.port(), 1);
    let _ = until_answer(first, is_ok).await;
    let mut kept = TcpStream::connect(first).await.expect("a listener");
    kept.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("a connection");
    let mut rest = vec![0; 1024];
    let length = timeout(SOON, kept.read(&mut rest)).await.expect("an answer").expect("an answer");
    assert!(length > 0);
    bench.check("web", second.port(), 1);
    let _ = until_answer(second, is_ok).await;
    assert_eq!(ask(first, "GET /").await, None, "the old port still answers");
    let end = timeout(Duration::from_secs(2), kept.read(&mut rest))
        .await
        .expect("an idle connection ends");
    assert_eq!(end.expect("a clean end"), 0);
    bench.forget("web");
    let _ = until_answer(second, |answer| answer.is_none()).await;
    assert_eq!(bench.until_failures(|_| true).await, Failures::new());
    // Ports change hands in one step.
    bench.check("a", first.port(), 1);
    bench.check("b", second.port(), 1);
    let _ = until_answer(second, is_of("b")).await;
    bench.checks.send_modify(|checks| {
        checks.values_mut().zip([second, first]).for_each(|(check, at)| check.port = at.port());
    });
    let _ = until_answer(first, is_of("b")).await;
    let _ = until_answer(second, is_of("a")).await;
    assert_eq!(bench.until_failures(|_| true).await, Failures::new());
}

#[tokio::test]
async fn a_taken_port_is_reported_and_tried_again() {
    let mut bench = Bench::at("127.71.0.4");
    let other = TcpListener::bind(at("127.71.0.4", 0)).await.expect("a loopback address");
    let to = other.local_addr().expect("a bound socket");
    bench.check("web", to.port(), 1);
    let failures = bench.until_failures(|failures| !failures.is_empty()).await;
    let failure = failures.get(&name("web")).expect("a failure of the Service");
    assert_eq!(failure.port, to.port());
    assert!(
        failure.to_string().contains(&format!("cannot listen on {to}: Address already in use")),
        "{failure}"
    );
    drop(other);
    let _ = bench.until_failures(Failures::is_empty).await;
    let _ = until_answer(to, is_ok).await;
}

#[tokio::test]
async fn of_two_services_with_one_port_the_first_by_name_has_it() {
    let mut bench = Bench::at("127.71.0.5");
    let to = at("127.71.0.5", free_port("127.71.0.5").await);
    bench.check("b", to.port(), 1);
    let _ = until_answer(to, is_of("b")).await;
    bench.check("a", to.port(), 1);
    let failures = bench.until_failures(|failures| !failures.is_empty()).await;
    assert_eq!(failures.keys().collect::<Vec<_>>(), [&name("b")]);
    assert!(
        failures[&name("b")].to_string().contains("the Service shop/a has the same"),
        "{failures:?}"
    );
    let _ = until_answer(to, is_of("a")).await;
    bench.forget("a");
    let _ = until_answer(to, is_of("b")).await;
    let _ = bench.until_failures(Failures::is_empty).await;
}

#[tokio::test]
async fn an_address_that_is_not_there_does_not_keep_others_from_answering() {
    // 192.0.2.0/24 is on no device. A link-local address cannot be listened on without a device.
    let mut bench = Bench::start(listed(&["127.71.0.6", "192.0.2.77", "fe80::1"]));
    let to = at("127.71.0.6", free_port("127.71.0.6").await);
    bench.check("web", to.port(), 1);
    let failures = bench.until_failures(|failures| !failures.is_empty()).await;
    let causes = &failures[&name("web")].causes;
    assert!(causes.len() == 1 && causes[0].contains("192.0.2.77"), "{causes:?}");
    let _ = until_answer(to, is_ok).await;
    let _ = bench.addresses.send_replace(listed(&["127.71.0.6"]));
    let _ = bench.until_failures(Failures::is_empty).await;
    let _ = until_answer(to, is_ok).await;
    let _ = bench.addresses.send_replace(listed(&["127.71.0.7"]));
    let _ = until_answer(at("127.71.0.7", to.port()), is_ok).await;
    assert_eq!(ask(to, "GET /").await, None, "an address that is no longer listed still answers");
}

#[tokio::test]
async fn all_addresses_are_served_by_a_listener_a_family() {
    let mut bench = Bench::start(Addresses::All);
    let port = free_port("0.0.0.0").await;
    bench.check("web", port, 1);
    let _ = until_answer(at("127.71.0.8", port), is_ok).await;
    if TcpListener::bind("[::1]:0").await.is_ok() {
        let _ = until_answer(at("::1", port), is_ok).await;
    }
    assert_eq!(bench.until_failures(|_| true).await, Failures::new());
    let Bench { checks, addresses, serving, .. } = bench;
    drop((checks, addresses));
    timeout(SOON, serving).await.expect("the servers end with their inputs").expect("no panic");
    assert_eq!(ask(at("127.71.0.8", port), "GET /").await, None);
}

#[tokio::test]
async fn silent_clients_keep_nobody_waiting_and_give_way() {
    let bench = Bench::at("127.71.0.9");
    let to = at("127.71.0.9", free_port("127.71.0.9").await);
    bench.check("web", to.port(), 1);
    let _ = until_answer(to, is_ok).await;
    // More than there is room for. Without a bound they would be closed only when their header had
    // not arrived for five seconds.
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(to).await.expect("a listener"));
    }
    let answer = timeout(Duration::from_secs(3), ask(to, "GET /")).await;
    assert!(is_ok(answer.expect("an answer before any header is late").as_deref()));
    let mut closed = 0;
    for stream in &mut silent {
        let read = timeout(Duration::from_millis(1), stream.read(&mut [0; 1])).await;
        closed += usize::from(read.is_ok());
    }
    assert!((237..300).contains(&closed), "{closed} of 300 were closed, 64 have room");
}

#[test]
fn a_service_without_a_port_has_no_listener() {
    let checks = BTreeMap::from([(name("web"), HealthCheck { port: 0, local: 1 })]);
    let (listeners, failures) = plan(&checks, &Addresses::All.to_listen_on());
    assert!(listeners.is_empty() && failures.is_empty());
}
