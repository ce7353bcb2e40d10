//! Objects of a real API server, and slices made by the real controllers, reach the maps; packets
//! follow.
//!
//! test-threads: 3

use crate::support::control_plane::{ELSEWHERE, NEWCOMER, SLICE_ENDPOINTS};
use crate::support::objects::{Pod, Space};
use crate::support::view::{IN_TIME, expect, programmed, status};
use crate::support::{START, cluster, wait_for};
use serde_json::{Value, json};
use sluice_lab::Serve;

/// Returns a Service of pods by their label `app` and their port `web`.
fn selecting(app: &str, vip: &str) -> Value {
    json!({"clusterIP": vip, "selector": {"app": app}, "ports": [{"port": 80, "targetPort": "web"}]})
}

#[test]
fn nothing_is_programmed_before_all_lists_are_in() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "first");
    space.bare_service("web", "10.96.1.1");
    space.slice("web-a", "web", 8080, &["10.244.99.1"]);
    space.bare_service("lone", "10.96.1.2");
    let node = cluster.node("first");

    // It may read one kind and not the other.
    let (services, all) =
        (["services"].as_slice(), ["services", "endpointslices", "nodes"].as_slice());
    cluster.plane.give_rights(NEWCOMER, services).expect("rights");
    let mut agent = cluster.start_agent(&node, NEWCOMER, &[]);
    let is_refused = || {
        let status = status(&node);
        let problem = status.pointer("/last/sources/0/problem").and_then(Value::as_str);
        if problem.is_some_and(|problem| problem.contains("EndpointSlice")) {
            Ok(())
        } else {
            Err(status.to_string())
        }
    };
    wait_for("the refusal in the status", START, is_refused);
    let before = status(&node);
    assert_eq!(before.pointer("/ready"), Some(&json!(false)), "{before}");
    assert_eq!(before.pointer("/last/sources/0/synced"), Some(&json!(false)), "{before}");
    assert_eq!(programmed(&node, "first"), Ok([].into()));
    cluster.plane.give_rights(NEWCOMER, all).expect("rights");
    let whole: &[(&str, &[&str])] =
        &[("10.96.1.1:80", &["10.244.99.1:8080"]), ("10.96.1.2:80", &[])];
    expect(&node, "first", whole);
    agent.wait_ready(START).expect("ready");

    // Nor does a new agent remove what it finds before it has received everything.
    agent.stop().expect("stopped");
    cluster.plane.give_rights(NEWCOMER, services).expect("rights");
    space.delete("services", "lone");
    agent.restart().expect("started");
    wait_for("a list of Services, and none of slices", START, is_refused);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(programmed(&node, "first").map(|all| all.len()), Ok(2), "{}", agent.log());
    cluster.plane.give_rights(NEWCOMER, all).expect("rights");
    expect(&node, "first", &[("10.96.1.1:80", &["10.244.99.1:8080"])]);
}

#[test]
fn services_come_change_and_go() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "services");
    let node = cluster.node("services");
    let _agent = cluster.agent(&node);
    let maps = |wanted: &[(&str, &[&str])]| expect(&node, "services", wanted);

    space.bare_service("web", "10.96.2.1");
    maps(&[("10.96.2.1:80", &[])]);
    space.slice("web-a", "web", 8080, &["10.244.99.1"]);
    maps(&[("10.96.2.1:80", &["10.244.99.1:8080"])]);

    // Another port, then a further address.
    space.edit("services", "web", &json!({"spec": {"ports": [{"port": 81, "targetPort": 8080}]}}));
    maps(&[("10.96.2.1:81", &["10.244.99.1:8080"])]);
    space.edit("services", "web", &json!({"spec": {"type": "LoadBalancer"}}));
    let ingress = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}});
    space.edit("services", "web/status", &json!({"status": ingress}));
    maps(&[("10.96.2.1:81", &["10.244.99.1:8080"]), ("203.0.113.7:81", &["10.244.99.1:8080"])]);

    // A Service that no proxy serves any more, and then one that they do again.
    let named = json!({
        "type": "ExternalName", "externalName": "example.com",
        "clusterIP": null, "clusterIPs": null,
    });
    space.edit("services", "web", &json!({"spec": named}));
    maps(&[]);
    let numbered = json!({"type": "ClusterIP", "externalName": null, "clusterIP": "10.96.2.2"});
    space.edit("services", "web", &json!({"spec": numbered}));
    maps(&[("10.96.2.2:81", &["10.244.99.1:8080"])]);

    // Deleted and created again immediately, with another address.
    space.delete("services", "web");
    space.bare_service("web", "10.96.2.3");
    maps(&[("10.96.2.3:80", &["10.244.99.1:8080"])]);
    space.delete("services", "web");
    maps(&[]);
}

#[test]
fn backends_follow_the_pods() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "pods");
    let node = cluster.node("pods");
    let _agent = cluster.agent(&node);
    let backends = |wanted: &[&str]| expect(&node, "pods", &[("10.96.3.1:80", wanted)]);
    space.service("web", &selecting("web", "10.96.3.1"));
    let pod =
        |name, ip| space.pod(&Pod { name, node: ELSEWHERE, ips: &[ip], app: "web", port: 8080 });

    pod("a", "10.244.99.1");
    pod("b", "10.244.99.2");
    backends(&[]);
    space.set_ready("a", true);
    backends(&["10.244.99.1:8080"]);
    space.set_ready("b", true);
    backends(&["10.244.99.1:8080", "10.244.99.2:8080"]);
    space.set_ready("a", false);
    backends(&["10.244.99.2:8080"]);
    space.set_ready("a", true);
    backends(&["10.244.99.1:8080", "10.244.99.2:8080"]);

    // A terminating pod gets no new connection while another one is ready, and all of them if it is
    // the last.
    space.delete("pods", "a");
    backends(&["10.244.99.2:8080"]);
    space.delete("pods", "b");
    backends(&["10.244.99.1:8080", "10.244.99.2:8080"]);
    space.end_pod("a");
    backends(&["10.244.99.2:8080"]);
    space.end_pod("b");
    backends(&[]);

    // Some Services want traffic for pods that are not ready.
    space.edit("services", "web", &json!({"spec": {"publishNotReadyAddresses": true}}));
    pod("c", "10.244.99.3");
    backends(&["10.244.99.3:8080"]);

    // With the Service's selector the backends change at once.
    pod("d", "10.244.99.4");
    space.edit("pods", "d", &json!({"metadata": {"labels": {"app": "other"}}}));
    backends(&["10.244.99.3:8080"]);
    space.edit("services", "web", &json!({"spec": {"selector": {"app": "other"}}}));
    backends(&["10.244.99.4:8080"]);

    // The real controller deletes a namespace's pods before its Services.
    space.end_pod("c");
    space.end_pod("d");
    space.delete_all();
    expect(&node, "pods", &[]);
}

#[test]
fn pods_of_many_slices_are_all_served() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "slices");
    let node = cluster.node("slices");
    space.service("web", &selecting("web", "10.96.4.1"));
    let ips: Vec<String> =
        (1..=2 * SLICE_ENDPOINTS + 1).map(|host| format!("10.244.99.{host}")).collect();
    for (index, ip) in ips.iter().enumerate() {
        space.ready_pod(&Pod {
            name: &format!("p{index}"),
            node: ELSEWHERE,
            ips: &[ip],
            app: "web",
            port: 8080,
        });
    }
    let slices = cluster.plane.wait_for_object(&space.path("endpointslices", ""), |slices| {
        let items = slices["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        items.iter().filter_map(|slice| slice["endpoints"].as_array()).map(Vec::len).sum::<usize>()
            == ips.len()
    });
    assert!(
        slices["items"].as_array().is_some_and(|items| items.len() >= 3),
        "the controller splits: {slices}"
    );
    let _agent = cluster.agent(&node);
    let check = |ips: &[String]| {
        let backends: Vec<String> = ips.iter().map(|ip| format!("{ip}:8080")).collect();
        let backends: Vec<&str> = backends.iter().map(String::as_str).collect();
        expect(&node, "slices", &[("10.96.4.1:80", &backends)]);
    };
    check(&ips);
    for index in 1..ips.len() {
        space.end_pod(&format!("p{index}"));
    }
    check(ips.get(..1).unwrap_or_default());
}

#[test]
fn named_ports_that_differ_lead_to_each_pods_own_and_packets_get_there() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "traffic");
    let node = cluster.node("traffic");
    let (old, new, asker) = (
        node.pod("web-old").expect("a pod"),
        node.pod("web-new").expect("a pod"),
        node.pod("asker").expect("a pod"),
    );
    let _servers = [old.serve(Serve::Http, 8080), new.serve(Serve::Http, 9090)]
        .map(|server| server.expect("a server"));
    let _agent = cluster.agent(&node);

    space.service(
        "web",
        &json!({
            "clusterIP": "10.96.5.1", "clusterIPs": ["10.96.5.1", "fd00:a60::a:501"], "ipFamilyPolicy": "RequireDualStack",
            "ipFamilies": ["IPv4", "IPv6"], "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80, "targetPort": "web"}],
        }),
    );
    for (pod, port) in [(&old, 8080), (&new, 9090)] {
        let (ipv4, ipv6) = (pod.ipv4().to_string(), pod.ipv6().to_string());
        let ips = [ipv4.as_str(), &ipv6];
        space.ready_pod(&Pod { name: pod.name(), node: node.name(), ips: &ips, app: "web", port });
    }
    let address = |pod: &sluice_lab::Pod, port| {
        (format!("{}:{port}", pod.ipv4()), format!("[{}]:{port}", pod.ipv6()))
    };
    let ((old4, old6), (new4, new6)) = (address(&old, 8080), address(&new, 9090));
    expect(
        &node,
        "traffic",
        &[("10.96.5.1:80", &[&old4, &new4]), ("[fd00:a60::a:501]:80", &[&old6, &new6])],
    );

    for vip in ["10.96.5.1", "[fd00:a60::a:501]"] {
        let url = format!("http://{vip}:80/");
        let from_pod =
            asker.run("curl", ["-sS", "--globoff", "--max-time", "5", &url]).expect("an answer");
        assert!(from_pod.contains("web-old") || from_pod.contains("web-new"), "{from_pod}");
        let from_host =
            node.run("curl", ["-sS", "--globoff", "--max-time", "5", &url]).expect("an answer");
        assert!(from_host.contains("web-old") || from_host.contains("web-new"), "{from_host}");
        let replies = asker.http_get(&url, 40).expect("forty answers");
        for name in ["web-old", "web-new"] {
            assert!(
                replies.iter().any(|reply| reply.name == name),
                "{name} has its share: {replies:?}"
            );
        }
    }

    // A rollout replaces the old one.
    space.delete("pods", "web-old");
    expect(&node, "traffic", &[("10.96.5.1:80", &[&new4]), ("[fd00:a60::a:501]:80", &[&new6])]);
    let replies = asker.http_get("http://10.96.5.1:80/", 20).expect("answers");
    assert!(replies.iter().all(|reply| reply.name == "web-new"), "{replies:?}");
}

#[test]
fn the_api_servers_own_service_works_from_pods() {
    let Some(cluster) = cluster() else { return };
    let node = cluster.node("own");
    let asker = node.pod("own-asker").expect("a pod");
    let _agent = cluster.agent(&node);
    let server = format!("{}:6443", cluster.plane.host().ipv4());
    wait_for("the API server among the backends", IN_TIME, || {
        let found = programmed(&node, "default")?;
        let backends = found.get("10.96.0.1:443").cloned().unwrap_or_default();
        if backends == [server.clone()].into() { Ok(()) } else { Err(format!("{found:?}")) }
    });
    let url = "https://10.96.0.1/readyz";
    assert_eq!(asker.run("curl", ["-sSk", "--max-time", "5", url]).expect("an answer"), "ok");
}

#[test]
fn endpoints_written_by_hand_are_served_as_the_controller_mirrors_them() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "mirrored");
    let node = cluster.node("mirrored");
    let _agent = cluster.agent(&node);
    let backends = |wanted: &[&str]| expect(&node, "mirrored", &[("10.96.6.1:80", wanted)]);

    let spec = json!({"clusterIP": "10.96.6.1", "ports": [{"name": "sql", "port": 80}]});
    space.service("outside", &spec);
    let port = json!([{"name": "sql", "port": 5432}]);
    let subsets = |addresses: Value| json!([{"addresses": addresses, "ports": port}]);
    space.create(
        "endpoints",
        &json!({"metadata": {"name": "outside"}, "subsets": subsets(json!([{"ip": "198.51.100.1"}]))}),
    );
    backends(&["198.51.100.1:5432"]);
    let two = subsets(json!([{"ip": "198.51.100.1"}, {"ip": "198.51.100.2"}]));
    space.edit("endpoints", "outside", &json!({"subsets": two}));
    backends(&["198.51.100.1:5432", "198.51.100.2:5432"]);
    let one_ready = json!([{
        "addresses": [{"ip": "198.51.100.2"}], "notReadyAddresses": [{"ip": "198.51.100.1"}], "ports": port,
    }]);
    space.edit("endpoints", "outside", &json!({"subsets": one_ready}));
    backends(&["198.51.100.2:5432"]);
    space.delete("endpoints", "outside");
    backends(&[]);
}

#[test]
fn objects_of_other_proxies_and_headless_ones_are_left_alone() {
    let Some(cluster) = cluster() else { return };
    let space = Space::new(&cluster, "labels");
    let (node, other_node) = (cluster.node("labels"), cluster.node("other"));
    let _agent = cluster.agent(&node);
    let mut other = cluster.start_agent(&other_node, "agent", &["--proxy-name", "other"]);
    other.wait_ready(START).expect("the other agent gets ready");
    let web: &[(&str, &[&str])] = &[("10.96.7.1:80", &["10.244.99.1:8080"])];

    // A headless Service's slices have a label from the real controller.
    space.service(
        "headless",
        &json!({"clusterIP": "None", "selector": {"app": "web"}, "ports": [{"port": 80}]}),
    );
    space.service("web", &selecting("web", "10.96.7.1"));
    space.ready_pod(&Pod {
        name: "a",
        node: ELSEWHERE,
        ips: &["10.244.99.1"],
        app: "web",
        port: 8080,
    });
    expect(&node, "labels", web);
    let slices = cluster.plane.wait_for_object(&space.path("endpointslices", ""), |slices| {
        slices["items"].as_array().is_some_and(|items| items.len() == 2)
    });
    assert!(slices.to_string().contains("service.kubernetes.io/headless"), "{slices}");

    // The controller copies the label to the Service's slices.
    let label = |name: &str, value: Value| json!({"metadata": {"labels": {name: value}}});
    let proxy_name = "service.kubernetes.io/service-proxy-name";
    space.edit("services", "web", &label(proxy_name, json!("other")));
    expect(&node, "labels", &[]);
    expect(&other_node, "labels", web);
    space.edit("services", "web", &label(proxy_name, json!("nobody")));
    expect(&other_node, "labels", &[]);
    space.edit("services", "web", &label(proxy_name, Value::Null));
    expect(&node, "labels", web);
    space.edit("services", "web", &label("service.kubernetes.io/headless", json!("")));
    expect(&node, "labels", &[]);
    space.edit("services", "web", &label("service.kubernetes.io/headless", Value::Null));
    expect(&node, "labels", web);
    assert_eq!(programmed(&other_node, "labels"), Ok([].into()));
}
