//! Flows that no endpoint takes, per packet: refused, dropped, or answered by an ICMP error.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sluice_lab::{Namespace, Node, Port, Service};

use crate::support::{
    Cluster, HTTP, HTTP_TARGET, Pair, Plan, SOON, WEB, addresses_of_node, cluster_ip, listed,
    number, reaches, skip, status, until_backends, until_within, word,
};

/// Nobody listens at this port of the backends.
const CLOSED: u16 = 8_088;
/// Node ports: of a closed TCP port, a closed UDP port, a backend on another node with a closed
/// port, and a backend that drops.
const NODE_TCP: u16 = 30_080;
const NODE_UDP: u16 = 30_053;
const NODE_AWAY: u16 = 30_081;
const NODE_HOLE: u16 = 30_082;

/// Returns how many flows to the backends of one family failed in one way.
fn failures(node: &Node, service: &str, family: usize, way: &str) -> Result<u64> {
    let of_family = |row: &&Value| word(row, "backend").starts_with('[') == (family == 1);
    let rows = listed(node, &["backends", service])?;
    Ok(rows.iter().filter(of_family).map(|row| number(&row["failures"], way)).sum())
}

/// Opens a TCP connection, which has to fail like this.
fn connect_fails(client: &Namespace, to: SocketAddr, wanted: ErrorKind) -> Result<()> {
    let wait = Duration::from_millis(1_500);
    match client.enter(|| TcpStream::connect_timeout(&to, wait))? {
        Err(error) if error.kind() == wanted => Ok(()),
        result => bail!("{} to {to}: {result:?}, not {wanted:?}", client.name()),
    }
}

/// Sends datagrams from one socket until an ICMP error has come back for so many of them.
fn send_fails(client: &Namespace, to: SocketAddr, datagrams: u32) -> Result<()> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    client.enter(|| -> Result<()> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(SOON))?;
        socket.connect(to)?;
        for _ in 0..datagrams {
            let _ = socket.send(b"anybody?")?;
            match socket.recv(&mut [0; 64]) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                result => bail!("to {to}: {result:?}, not refused"),
            }
        }
        Ok(())
    })?
}

/// Writes the services that fail.
fn write_services(cluster: &Cluster) -> Result<()> {
    let service = |name: &str, host: u8| {
        let [v4, v6] = cluster_ip(host);
        Service::new(name).cluster_ip(v4).cluster_ip(v6)
    };
    let [near, far] = &cluster.backends[..] else { bail!("two backends") };
    let hole = cluster.node().pod("hole")?;
    hole.nft(
        "table inet hole {\n chain input {\n type filter hook input priority 0\n \
         tcp dport 8080 drop\n }\n}\n",
    )?;
    let closed = service("closed", 40)
        .port(Port::tcp("http", HTTP, CLOSED).node_port(NODE_TCP))
        .port(Port::udp("dns", HTTP, CLOSED).node_port(NODE_UDP));
    let away = service("away", 41).port(Port::tcp("http", HTTP, CLOSED).node_port(NODE_AWAY));
    let drops =
        service("drops", 42).port(Port::tcp("http", HTTP, HTTP_TARGET).node_port(NODE_HOLE));
    for (service, backend) in [(closed, near), (away, far), (drops, &hole)] {
        cluster.manifests.write(&service.backends([backend]))?;
    }
    for service in ["closed", "away", "drops"] {
        until_backends(cluster.node(), service, 1)?;
    }
    Ok(())
}

#[test]
fn flows_that_no_endpoint_takes_are_counted_on_every_way() -> Result<()> {
    if skip("flows_that_no_endpoint_takes") {
        return Ok(());
    }
    let args = vec!["--socket-path", "off"];
    let mut cluster = Cluster::new("failures", &Plan { near: 1, far: 1, args, ..Plan::default() })?;
    write_services(&cluster)?;
    let (node, outside) = (cluster.node(), &cluster.outside);
    let node_addresses: Pair = addresses_of_node(node);
    for family in [0, 1] {
        let at_node = |port: u16| SocketAddr::new(node_addresses[family], port);
        let vip = |host: u8| SocketAddr::new(cluster_ip(host)[family], HTTP);
        let counted = |service: &str, way: &str| failures(node, service, family, way);
        // A reset is counted at once, whoever the client is and however it is masqueraded.
        for _ in 0..3 {
            connect_fails(outside, at_node(NODE_TCP), ErrorKind::ConnectionRefused)?;
        }
        ensure!(counted("closed:http", "refused")? == 3, "from outside, to a node port");
        connect_fails(&cluster.client, vip(40), ErrorKind::ConnectionRefused)?;
        ensure!(counted("closed:http", "refused")? == 4, "from a pod");
        connect_fails(node, vip(40), ErrorKind::ConnectionRefused)?;
        ensure!(counted("closed:http", "refused")? == 5, "from the host");
        for count in 1..=2 {
            connect_fails(outside, at_node(NODE_AWAY), ErrorKind::ConnectionRefused)?;
            ensure!(counted("away:http", "refused")? == count, "from another node's endpoint");
        }
        // An ICMP error counts once for a flow, however many datagrams it has.
        send_fails(outside, at_node(NODE_UDP), 3)?;
        ensure!(counted("closed:dns", "unreachable")? == 1, "one flow from outside");
        send_fails(&cluster.client, vip(40), 2)?;
        send_fails(node, vip(40), 1)?;
        ensure!(counted("closed:dns", "unreachable")? == 3, "three flows");
        // Silence is counted when the client has waited, or has given up.
        connect_fails(outside, at_node(NODE_HOLE), ErrorKind::TimedOut)?;
        connect_fails(&cluster.client, vip(42), ErrorKind::TimedOut)?;
        until_within(3 * SOON, "two flows without an answer", || {
            Ok((counted("drops:http", "unanswered")? >= 2).then_some(()))
        })?;
        for (service, way, count) in [
            ("closed:http", "refused", 5),
            ("closed:http", "unanswered", 0),
            ("closed:http", "unreachable", 0),
            ("closed:dns", "unreachable", 3),
            ("closed:dns", "unanswered", 0),
            ("away:http", "refused", 2),
            ("drops:http", "unanswered", 2),
        ] {
            let now = counted(service, way)?;
            ensure!(now == count, "{service}: {now} {way}, not {count}, family {family}");
        }
    }
    everybody_sees_them(&cluster)?;
    none_of_them_is_healthy_traffic(&cluster)?;
    a_service_that_nobody_reaches_is_a_problem_until_somebody_does(&mut cluster)
}

/// Tables, `explain` and metrics show what was counted.
fn everybody_sees_them(cluster: &Cluster) -> Result<()> {
    let node = cluster.node();
    for command in [&["backends", "closed:http"][..], &["services"]] {
        let table = node.sluice(command)?;
        let rows = table.lines().filter(|row| row.contains("closed") && row.contains("5 of 5"));
        ensure!(rows.count() == 2, "{command:?} does not show 5 of 5 for both families:\n{table}");
    }
    let client = SocketAddr::new(cluster.outside.ipv4().into(), 4_001).to_string();
    let vip = SocketAddr::new(node.ipv4().into(), NODE_HOLE).to_string();
    let told = node.sluice(&["explain", "tcp", &client, &vip, "--from", "external"])?;
    ensure!(told.contains("failed 2 of 2 through this node: 2 unanswered"), "{told}");
    let text = node.run("curl", ["-sS", "-m", "5", "http://127.0.0.1:10249/metrics"])?;
    let value = |port: &str, family: &str| {
        let labels = format!("port=\"{port}\",protocol=\"TCP\",family=\"{family}\"");
        let line = text.lines().find(|line| {
            line.starts_with("sluice_service_failed_total")
                && line.contains("service=\"closed\"")
                && line.contains(&labels)
                && line.contains("path=\"packet\"")
        });
        line.and_then(|line| line.rsplit_once(' ')).map(|(_, value)| value.to_owned())
    };
    for family in ["IPv4", "IPv6"] {
        let found = value("http", family).context("no metric")?;
        ensure!((found.parse::<f64>()? - 5.0).abs() < 0.5, "{family}: {found}");
    }
    Ok(())
}

/// Connections that are answered, and datagrams, are no failures.
fn none_of_them_is_healthy_traffic(cluster: &Cluster) -> Result<()> {
    let node = cluster.node();
    let names = cluster.names();
    reaches(&cluster.client, cluster_ip(WEB), &names, None)?;
    let rows = listed(node, &["services"])?;
    let flows: u64 = rows
        .iter()
        .filter(|row| word(row, "service") == "web")
        .map(|row| number(row, "flows"))
        .sum();
    ensure!(flows > 40, "{flows} flows");
    // When a later flow has waited long enough, so have these.
    let hole = SocketAddr::new(node.ipv4().into(), NODE_HOLE);
    connect_fails(&cluster.outside, hole, ErrorKind::TimedOut)?;
    until_within(3 * SOON, "one more flow without an answer", || {
        Ok((failures(node, "drops:http", 0, "unanswered")? == 3).then_some(()))
    })?;
    for family in [0, 1] {
        for way in ["refused", "unanswered", "unreachable"] {
            ensure!(failures(node, "web", family, way)? == 0, "{way}");
        }
    }
    Ok(())
}

/// `sluice status` names such a Service with its endpoint, and the agent says so once.
fn a_service_that_nobody_reaches_is_a_problem_until_somebody_does(
    cluster: &mut Cluster,
) -> Result<()> {
    let node = cluster.node().clone();
    let problems = || -> Result<Vec<Value>> {
        let reports = status(&node)?["last"]["reports"].as_array().cloned().unwrap_or_default();
        Ok(reports.into_iter().filter(|row| word(row, "flaw") == "endpoints_fail").collect())
    };
    let vip = SocketAddr::new(cluster_ip(40)[0], HTTP);
    let found = until_within(6 * SOON, "a problem", || {
        connect_fails(&cluster.client, vip, ErrorKind::ConnectionRefused)?;
        Ok(problems()?.into_iter().find(|row| word(row, "subject") == "Service default/closed"))
    })?;
    let endpoint = SocketAddr::new(cluster.backends[0].ipv4().into(), CLOSED).to_string();
    let message = word(&found, "message");
    ensure!(message.contains(&format!("{endpoint} (")) && message.contains("refused"), "{found}");
    let table = node.sluice_output(&["status"])?;
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    ensure!(table.contains("endpoints_fail"), "{table}");
    // The same Service with a port that somebody listens at.
    let [v4, v6] = cluster_ip(40);
    let mended = Service::new("closed")
        .cluster_ip(v4)
        .cluster_ip(v6)
        .port(Port::tcp("http", HTTP, HTTP_TARGET))
        .backends([&cluster.backends[0]]);
    cluster.manifests.write(&mended)?;
    until_within(6 * SOON, "the problem's end", || {
        let _ = cluster.client.enter(|| TcpStream::connect_timeout(&vip, SOON))?;
        let reports = problems()?;
        Ok(reports.iter().all(|row| word(row, "subject") != "Service default/closed").then_some(()))
    })?;
    let log = cluster.agent().log();
    for (line, count) in [
        ("WARN Service default/closed:http: none of ", 1),
        ("no longer: Service default/closed:http: ", 1),
    ] {
        let found = log.matches(line).count();
        ensure!(found == count, "{line:?} {found} times:\n{log}");
    }
    Ok(())
}
