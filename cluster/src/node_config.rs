//! The configuration of a node's containerd, kubelet and CNI.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use crate::Cni;
use crate::addresses::{DNS_SERVICE, NodeNumber};
use crate::images::PAUSE;
use crate::node::{self, CNI_PLUGINS, CONTAINERD, PROGRAMS, STATE, Spec};

/// The directory of the configuration, in the node's own `/run`.
const DIRECTORY: &str = "/run/node";

/// Returns the command line of containerd.
pub(crate) fn containerd_command() -> Vec<String> {
    vec![
        format!("/run/{CONTAINERD}/containerd"),
        "--config".into(),
        format!("{DIRECTORY}/containerd.toml"),
    ]
}

/// Returns the command line of the kubelet.
pub(crate) fn kubelet_command(number: NodeNumber) -> Vec<String> {
    let kubeconfig = Path::new("/run").join(STATE).join(node::directory(number)).join("kubeconfig");
    let flags = [
        ("config", format!("{DIRECTORY}/kubelet.json")),
        ("kubeconfig", kubeconfig.display().to_string()),
        ("hostname-override", number.name()),
        ("node-ip", format!("{},{}", number.ipv4(), number.ipv6())),
        ("root-dir", "/var/lib/kubelet".to_owned()),
        ("cert-dir", "/var/lib/kubelet/pki".to_owned()),
        (
            "node-labels",
            format!(
                "topology.kubernetes.io/zone={},topology.kubernetes.io/region=lab",
                number.zone()
            ),
        ),
    ];
    std::iter::once(format!("/run/{PROGRAMS}/kubelet"))
        .chain(flags.map(|(flag, value)| format!("--{flag}={value}")))
        .collect()
}

/// Writes the configuration files.
pub(crate) fn write(spec: &Spec) -> Result<()> {
    let number = NodeNumber(spec.number);
    let cni = PathBuf::from(DIRECTORY).join("cni");
    fs::create_dir_all(&cni).with_context(|| format!("cannot make {}", cni.display()))?;
    for (file, content) in [
        ("containerd.toml", containerd(&cni)),
        ("kubelet.json", kubelet()),
        ("cni/10-sluice.conflist", plugins(number, spec.cni)),
    ] {
        let path = Path::new(DIRECTORY).join(file);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn containerd(cni: &Path) -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
# None of these is of use here; some say so at every start.
disabled_plugins = [
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.differ.v1.erofs",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.internal.v1.tracing",
]
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
# Where the machine itself is a container or a small VM, nobody may lower it.
restrict_oom_score_adj = true
# A profile would be loaded into the machine's kernel, and stay.
disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = false
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/run/{CNI_PLUGINS}"]
conf_dir = "{}"
"#,
        cni.display()
    )
}

fn kubelet() -> String {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        // Some machines still have cgroups v1 next to v2.
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "failSwapOn": false,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "resolvConf": "/etc/resolv.conf",
        "clusterDNS": [DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("/run/{STATE}/pki/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        // All nodes share one disk and one memory, so none may start evicting pods.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
            "nodefs.inodesFree": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "serializeImagePulls": false,
        "syncFrequency": "10s",
        "volumeStatsAggPeriod": "1h",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
    })
    .to_string()
}

fn plugins(number: NodeNumber, cni: Cni) -> String {
    let ipam = json!({
        "type": "host-local",
        "dataDir": "/run/cni-ipam",
        "ranges": [[{"subnet": number.pods_ipv4()}], [{"subnet": number.pods_ipv6()}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    });
    let main = match cni {
        Cni::Ptp => json!({"type": "ptp", "mtu": 1500, "ipam": ipam}),
        Cni::Bridge => json!({
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "hairpinMode": true,
            "mtu": 1500,
            "ipam": ipam,
        }),
    };
    let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    json!({"cniVersion": "0.4.0", "name": "sluice", "plugins": [main, portmap]}).to_string()
}
