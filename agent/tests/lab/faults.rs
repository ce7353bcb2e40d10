//! Faults of a node under load: connections that stay open and new ones all the time, from a pod,
//! from the host and from outside. None may break, none may be refused. `SLUICE_LAB_FULL=1` takes
//! the full sizes: two thousand connections, five hundred new ones a second, a minute of each
//! fault.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::{
    Cluster, Plan, SOON, WEB, external_ip, load_of, number, reasons, skip, status, under_load,
    until, until_backends, until_within, word,
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sluice_lab::{LoadSize, Node, again_and_again};

const SECOND: Duration = Duration::from_secs(1);

const HALF_A_YEAR: i64 = 183 * 24 * 3600;

/// Returns the last status that a node's agent has written.
fn last(node: &Node) -> Result<Value> {
    Ok(status(node)?.get("last").cloned().unwrap_or_default())
}

/// Returns the duration of a fault.
fn lasting() -> Duration {
    Duration::from_secs(LoadSize::of_this_run().seconds)
}

#[test]
fn an_agent_that_is_killed_every_second_breaks_nothing() -> Result<()> {
    if skip("an_agent_that_is_killed_every_second") {
        return Ok(());
    }
    let (mut cluster, mut load) = under_load("kill-9", &Plan::default(), LoadSize::of_this_run())?;
    let times = again_and_again(SECOND, lasting(), || {
        cluster.agent().kill9()?;
        cluster.agent().restart()
    })?;
    cluster.agent().wait_ready(3 * SOON)?;
    // The agent still follows changes.
    let node = cluster.node().clone();
    cluster.manifests.write(&cluster.web().backends(&cluster.backends[..1]))?;
    until_backends(&node, "web", 1)?;
    println!(
        "killed {times} times: {:?}",
        load.unharmed("when the agent was killed every second")?
    );
    Ok(())
}

#[test]
fn a_device_that_flaps_and_devices_that_come_and_go_break_nothing() -> Result<()> {
    if skip("a_device_that_flaps") {
        return Ok(());
    }
    let (mut cluster, mut load) =
        under_load("flapping", &Plan::default(), LoadSize::of_this_run())?;
    let (node, router) = (cluster.node().clone(), cluster.lab.router().clone());
    let mut pods = Vec::new();
    let mut round = 0;
    let times = again_and_again(SECOND, lasting(), || {
        // Packets under way are lost with the wire, and TCP sends them again after seconds, which
        // must not fall into the next loss.
        let is_uplinks_turn = round % 5 == 0;
        round += 1;
        if is_uplinks_turn {
            let _ = router.ip(&format!("link set {} down", node.uplink_peer()))?;
        }
        let _ = node
            .ip("link add flap0 type veth peer name flap1\nlink set flap0 up\nlink set flap1 up")?;
        std::thread::sleep(Duration::from_millis(200));
        if is_uplinks_turn {
            let _ = router.ip(&format!("link set {} up", node.uplink_peer()))?;
        }
        let _ = node.ip("link set flap0 down\nlink set flap0 up\nlink del flap0")?;
        if pods.len() < 5 {
            pods.push(node.pod(&format!("late-{}", pods.len()))?);
        }
        Ok(())
    })?;
    cluster.agent().wait_ready(SOON)?;
    println!("{times} times: {:?}", load.unharmed("when devices flapped")?);
    let devices =
        status(&node)?.get("devices").and_then(Value::as_array).cloned().unwrap_or_default();
    ensure!(
        devices.iter().any(|device| word(device, "name") == node.uplink())
            && devices.len() >= 3 + pods.len(),
        "{devices:?}"
    );
    Ok(())
}

#[test]
fn more_connections_end_than_the_flow_table_holds_and_nothing_breaks() -> Result<()> {
    if skip("more_connections_end_than_the_flow_table_holds") {
        return Ok(());
    }
    // In each family a third of the connections that stay are translated per packet and take two
    // entries. The rest of the table would soon be full of ended connections, if those had a place
    // there.
    let size = LoadSize::of_this_run();
    let entries = (size.held * 5 / 4).max(size.rate * u32::try_from(size.seconds)? / 4);
    let flows_max = format!("--flows-max={}", entries / 2);
    let plan = Plan { args: vec![Box::leak(flows_max.into_boxed_str())], ..Plan::default() };
    let (cluster, mut load) = under_load("full-table", &plan, size)?;
    std::thread::sleep(lasting());
    let node = cluster.node().clone();
    let found = reasons(&node)?;
    println!(
        "{entries} entries a family: {:?}; {found:?}",
        load.unharmed("when the flow tables were full")?
    );
    for reason in ["flows_full", "ports_exhausted"] {
        ensure!(!found.contains_key(reason), "{found:?}");
    }
    let maps = status(&node)?.get("maps").and_then(Value::as_array).cloned().unwrap_or_default();
    let flows =
        maps.iter().find(|map| word(map, "map") == "flows_v4").context("no map flows_v4")?;
    ensure!(
        number(flows, "entries") * 4 < u64::from(entries) * 3,
        "what has ended takes room: {flows}"
    );
    // Two of three new connections are translated per packet, half of them in each family, with two
    // entries each.
    ensure!(
        load.now().opened * 2 / 3 > u64::from(entries - size.held * 2 / 3),
        "too few connections to fill it"
    );
    Ok(())
}

/// A small file system that is mounted over a node's folder of pins and holds its agent's state
/// directory as well.
struct SmallDisk {
    at: PathBuf,
    /// The state directory that the agent uses.
    state: PathBuf,
    filler: Option<File>,
}

impl SmallDisk {
    fn mount(cluster: &Cluster) -> Result<Self> {
        let node = cluster.node();
        let (at, state) = (node.bpffs(), sluice::node::status::state_dir(&node.pin_path()));
        let target = std::ffi::CString::new(at.as_os_str().as_bytes())?;
        // SAFETY: every string ends with a zero and outlives the call.
        let refused = unsafe {
            libc::mount(
                c"tmpfs".as_ptr(),
                target.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                c"size=256k".as_ptr().cast(),
            )
        };
        ensure!(refused == 0, "cannot mount a small tmpfs: {}", std::io::Error::last_os_error());
        let this = Self { at: at.clone(), state: state.clone(), filler: None };
        fs::create_dir_all(at.join("state"))?;
        fs::create_dir_all(&state)?;
        let source = std::ffi::CString::new(at.join("state").as_os_str().as_bytes())?;
        let target = std::ffi::CString::new(state.as_os_str().as_bytes())?;
        // SAFETY: as above.
        let refused = unsafe {
            libc::mount(
                source.as_ptr(),
                target.as_ptr(),
                c"".as_ptr(),
                libc::MS_BIND,
                std::ptr::null(),
            )
        };
        ensure!(
            refused == 0,
            "cannot lay the state directory there: {}",
            std::io::Error::last_os_error()
        );
        Ok(this)
    }

    /// Writes until nothing more fits.
    fn fill(&mut self) -> Result<()> {
        let mut file = File::options().create(true).append(true).open(self.at.join("filler"))?;
        for size in [4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        ensure!(fs::write(self.at.join("probe"), [0; 64]).is_err(), "there is still room");
        self.filler = Some(file);
        Ok(())
    }

    fn make_room(&mut self) -> Result<()> {
        self.filler = None;
        fs::remove_file(self.at.join("filler")).context("cannot make room")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        self.filler = None;
        for path in [self.state.clone(), self.at.join("sluice"), self.at.clone()] {
            if let Ok(path) = std::ffi::CString::new(path.as_os_str().as_bytes()) {
                // SAFETY: the string ends with a zero. What is not mounted is refused.
                let _ = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
            }
        }
        let _ = fs::remove_dir(&self.state);
    }
}

#[test]
fn a_full_disk_breaks_nothing_and_keeps_no_agent_from_its_work() -> Result<()> {
    if skip("a_full_disk_breaks_nothing") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("full-disk", &Plan::default())?;
    let mut disk = SmallDisk::mount(&cluster)?;
    cluster.start_agents(&["--socket-path=host"])?;
    let node = cluster.node().clone();
    let mut load = load_of(&cluster, LoadSize::of_this_run())?;
    disk.fill()?;

    // There is room for the status alone.
    cluster.manifests.write(&cluster.web().backends(&cluster.backends[..1]))?;
    until_backends(&node, "web", 1)?;
    until("the status to tell of the change", || {
        let counts = last(&node)?.get("counts").cloned().unwrap_or_default();
        Ok((number(&counts, "backends") == 8).then_some(()))
    })?;
    let _ = load.unharmed("with a full disk")?;

    // There is room for nothing at all.
    cluster.agent().kill9()?;
    let _ = fs::remove_file(disk.at.join("state/status.json"));
    disk.fill()?;
    cluster.agent().restart()?;
    cluster.manifests.write(&cluster.web())?;
    until_backends(&node, "web", 2)?;
    let _ = load.unharmed("with a full disk and a new agent")?;
    let log = cluster.agent().log();
    ensure!(log.matches("cannot write the status").count() == 1, "{log}");
    ensure!(cluster.agent().process().poll()?.is_none(), "the agent has ended: {log}");

    disk.make_room()?;
    cluster.agent().wait_ready(SOON)?;
    println!("{:?}", load.unharmed("when there was room again")?);
    Ok(())
}

/// Returns the path of the library that shows one process another time.
fn libfaketime() -> Result<PathBuf> {
    for folder in ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"] {
        let path = Path::new(folder).join("faketime/libfaketimeMT.so.1");
        if path.exists() {
            return Ok(path);
        }
    }
    bail!("there is no libfaketime: apt-get install faketime")
}

#[test]
fn a_clock_that_jumps_breaks_nothing() -> Result<()> {
    if skip("a_clock_that_jumps") {
        return Ok(());
    }
    let mut cluster = Cluster::without_agents("clock", &Plan::default())?;
    let clock = cluster.lab.state().join("clock");
    let jump = |to: &str| fs::write(&clock, to).context("cannot set the agent's clock");
    jump("+0")?;
    cluster.start_agents(&["--socket-path=host"])?;
    let node = cluster.node().clone();
    cluster.agent().options().environment = vec![
        ("LD_PRELOAD".to_owned(), libfaketime()?.display().to_string()),
        ("FAKETIME_TIMESTAMP_FILE".to_owned(), clock.display().to_string()),
        ("FAKETIME_NO_CACHE".to_owned(), "1".to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC".to_owned(), "1".to_owned()),
        ("FAKETIME_DONT_RESET".to_owned(), "1".to_owned()),
    ];
    cluster.agent().restart()?;
    cluster.agent().wait_ready(3 * SOON)?;
    let mut load = load_of(&cluster, LoadSize::of_this_run())?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    // Ten years ahead, then two years behind, then back: in one step each, under a running agent.
    for (jumps, year, count) in [("+10y", 10, 1), ("-2y", -2, 2), ("+0", 0, 1)] {
        jump(jumps)?;
        cluster.manifests.write(&cluster.web().backends(&cluster.backends[..count]))?;
        until_backends(&node, "web", count)?;
        let _ = load.unharmed(&format!("when the clock jumped by {jumps}"))?;
        // The agent has in fact seen another time.
        let seen = until("the status to tell of the change", || {
            let at =
                last(&node)?.get("last_sync").map(|sync| number(sync, "at")).unwrap_or_default();
            let years =
                (at.cast_signed() - now.cast_signed() + HALF_A_YEAR).div_euclid(2 * HALF_A_YEAR);
            Ok((years == year).then_some(()))
        });
        seen.context(jumps)?;
        cluster.agent().wait_ready(SOON)?;
    }
    println!("{:?}", load.unharmed("when the clock was right again")?);
    Ok(())
}

#[test]
fn a_node_that_is_renamed_and_then_has_another_address_breaks_nothing() -> Result<()> {
    if skip("a_node_that_is_renamed") {
        return Ok(());
    }
    let (mut cluster, mut load) = under_load("renamed", &Plan::default(), LoadSize::of_this_run())?;
    let (node, router) = (cluster.node().clone(), cluster.lab.router().clone());
    cluster.agent().options().node_name = Some("another".to_owned());
    cluster.agent().restart()?;
    cluster.agent().wait_ready(3 * SOON)?;
    let found = last(&node)?;
    ensure!(word(&found, "node") == "another", "{found}");
    let _ = load.unharmed("when the node was renamed")?;

    let (old, new) = (node.ipv4(), "192.0.2.211");
    let uplink = node.uplink();
    // Otherwise the new address would go with the old one.
    node.sysctl(&format!("net/ipv4/conf/{uplink}/promote_secondaries"), "1")?;
    let _ = node.ip(&format!("addr add {new}/24 dev {uplink}"))?;
    let _ = router.ip(&format!("route replace {}/32 via {new}", external_ip(WEB)[0]))?;
    let gateway = "192.0.2.1";
    let _ =
        node.ip(&format!("addr del {old}/24 dev {uplink}\nroute replace default via {gateway}"))?;
    let serving = until_within(SOON, "the new address to be the node's", || {
        let policy = last(&node)?.get("policy").cloned().unwrap_or_default();
        let has = |field: &str, address: &str| {
            policy
                .get(field)
                .and_then(Value::as_array)
                .is_some_and(|all| all.iter().any(|found| found.as_str() == Some(address)))
        };
        let moved = has("primary", new) && has("serving", new) && !has("primary", &old.to_string());
        Ok(moved.then_some(policy))
    })?;
    println!("{serving}: {:?}", load.unharmed("when the node had another address")?);
    Ok(())
}
