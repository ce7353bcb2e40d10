//! kube-proxy's configuration file and flags, in the words of `sluice agent`.
//!
//! Both are brought into one form, kube-proxy's flags, and from there into ours. A flag that a
//! person gives counts more than the file. What kube-proxy has and has no meaning here is left out
//! and told; what would mislead is refused.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::Value;

use super::Usage;

/// A command line in our words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Expanded {
    /// The words, the program's name first.
    pub(super) words: Vec<OsString>,
    /// kube-proxy's settings that have no meaning here.
    pub(super) meaningless: Vec<String>,
    /// The configuration file.
    pub(super) config: Option<PathBuf>,
}

/// kube-proxy's flags (without dashes) -> values.
type Flags = BTreeMap<String, String>;

/// Flags of kube-proxy's that are the agent's by another name, or several of them together.
const TRANSLATED: [&str; 12] = [
    "bind-address",
    "detect-local-mode",
    "healthz-port",
    "hostname-override",
    "iptables-localhost-nodeports",
    "logging-format",
    "masquerade-all",
    "master",
    "metrics-port",
    "pod-bridge-interface",
    "pod-interface-name-prefix",
    "proxy-mode",
];

/// Flags of kube-proxy's that have no meaning here.
const MEANINGLESS: [&str; 28] = [
    "bind-address-hard-fail",
    "config-sync-period",
    "feature-gates",
    "iptables-masquerade-bit",
    "iptables-min-sync-period",
    "iptables-sync-period",
    "ipvs-exclude-cidrs",
    "ipvs-min-sync-period",
    "ipvs-scheduler",
    "ipvs-strict-arp",
    "ipvs-sync-period",
    "ipvs-tcp-timeout",
    "ipvs-tcpfin-timeout",
    "ipvs-udp-timeout",
    "kube-api-burst",
    "kube-api-content-type",
    "kube-api-qps",
    "log-flush-frequency",
    "log-json-info-buffer-size",
    "log-json-split-stream",
    "log-text-info-buffer-size",
    "log-text-split-stream",
    "log_backtrace_at",
    "log_dir",
    "one-output",
    "profiling",
    "show-hidden-metrics-for-version",
    "vmodule",
];

/// Flags of kube-proxy's that need no value.
const SWITCHES: [&str; 5] = [
    "bind-address-hard-fail",
    "iptables-localhost-nodeports",
    "ipvs-strict-arp",
    "masquerade-all",
    "profiling",
];

/// Fields of a KubeProxyConfiguration -> the flag of kube-proxy's that says the same; empty: no
/// meaning here.
const FIELDS: [(&str, &str); 55] = [
    ("bindAddress", "bind-address"),
    ("bindAddressHardFail", ""),
    ("clientConnection.acceptContentTypes", ""),
    ("clientConnection.burst", ""),
    ("clientConnection.contentType", ""),
    ("clientConnection.kubeconfig", "kubeconfig"),
    ("clientConnection.qps", ""),
    ("clusterCIDR", "cluster-cidr"),
    ("configSyncPeriod", ""),
    ("conntrack.max", ""),
    ("conntrack.maxPerCore", "conntrack-max-per-core"),
    ("conntrack.min", "conntrack-min"),
    ("conntrack.tcpBeLiberal", "conntrack-tcp-be-liberal"),
    ("conntrack.tcpCloseWaitTimeout", "conntrack-tcp-timeout-close-wait"),
    ("conntrack.tcpEstablishedTimeout", "conntrack-tcp-timeout-established"),
    ("conntrack.udpStreamTimeout", "conntrack-udp-timeout-stream"),
    ("conntrack.udpTimeout", "conntrack-udp-timeout"),
    ("detectLocal.bridgeInterface", "pod-bridge-interface"),
    ("detectLocal.interfaceNamePrefix", "pod-interface-name-prefix"),
    ("detectLocalMode", "detect-local-mode"),
    ("enableProfiling", ""),
    ("featureGates", ""),
    ("healthzBindAddress", "healthz-bind-address"),
    ("hostnameOverride", "hostname-override"),
    ("iptables.localhostNodePorts", "iptables-localhost-nodeports"),
    ("iptables.masqueradeAll", "masquerade-all"),
    ("iptables.masqueradeBit", ""),
    ("iptables.minSyncPeriod", ""),
    ("iptables.syncPeriod", ""),
    ("ipvs.excludeCIDRs", ""),
    ("ipvs.minSyncPeriod", ""),
    ("ipvs.scheduler", ""),
    ("ipvs.strictARP", ""),
    ("ipvs.syncPeriod", ""),
    ("ipvs.tcpFinTimeout", ""),
    ("ipvs.tcpTimeout", ""),
    ("ipvs.udpTimeout", ""),
    ("logging.flushFrequency", ""),
    ("logging.format", "logging-format"),
    ("logging.options", ""),
    ("logging.verbosity", "v"),
    ("logging.vmodule", ""),
    ("metricsBindAddress", "metrics-bind-address"),
    ("mode", "proxy-mode"),
    ("nftables.masqueradeAll", "masquerade-all"),
    ("nftables.masqueradeBit", ""),
    ("nftables.minSyncPeriod", ""),
    ("nftables.syncPeriod", ""),
    ("nodePortAddresses", "nodeport-addresses"),
    ("oomScoreAdj", "oom-score-adj"),
    ("portRange", ""),
    ("resourceContainer", ""),
    ("showHiddenMetricsForVersion", ""),
    ("udpIdleTimeout", ""),
    ("windowsRunAsService", ""),
];

/// Brings a command line into our words.
///
/// # Errors
///
/// When the configuration file cannot be read, or asks for what is not served.
pub(super) fn expand(words: Vec<OsString>) -> anyhow::Result<Expanded> {
    let Some(at) = words.iter().position(|word| word == "agent") else {
        return Ok(Expanded { words, ..Expanded::default() });
    };
    let (before, given) = words.split_at(at + 1);
    let mut taken = Taken::default();
    taken.take(given)?;
    let mut meaningless = taken.meaningless;
    let mut flags = Flags::new();
    if let Some(file) = &taken.config {
        let text = std::fs::read_to_string(file).with_context(|| {
            format!("cannot read the configuration --config {}", file.display())
        })?;
        flags = read(&text, &mut meaningless)
            .with_context(|| format!("cannot use the configuration --config {}", file.display()))?;
    }
    flags.extend(taken.flags);
    let mut all = before.to_vec();
    let is_given = |name: &str| {
        taken.own.iter().any(|word| {
            let word = word.as_encoded_bytes();
            word.strip_prefix(b"--").is_some_and(|word| {
                word == name.as_bytes()
                    || word.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.starts_with(b"="))
            })
        })
    };
    for (name, value) in ours(flags)? {
        if !is_given(name) {
            all.push(
                if value.is_empty() { format!("--{name}") } else { format!("--{name}={value}") }
                    .into(),
            );
        }
    }
    all.extend(taken.own);
    Ok(Expanded { words: all, meaningless, config: taken.config })
}

/// What was found on a command line.
#[derive(Default)]
struct Taken {
    flags: Flags,
    own: Vec<OsString>,
    meaningless: Vec<String>,
    config: Option<PathBuf>,
}

impl Taken {
    fn take(&mut self, words: &[OsString]) -> Result<(), Usage> {
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let text = word.to_str().unwrap_or_default();
            let Some((name, value)) =
                text.strip_prefix("--").map(|text| match text.split_once('=') {
                    Some((name, value)) => (name, Some(value.to_owned())),
                    None => (text, None),
                })
            else {
                self.own.push(word.clone());
                continue;
            };
            let is_meaningless = MEANINGLESS.contains(&name);
            if matches!(name, "cleanup" | "init-only" | "write-config-to") {
                return Err(Usage(format!(
                    "--{name} is kube-proxy's; see `sluice cleanup` and `sluice agent --help`"
                )));
            }
            if !is_meaningless && !TRANSLATED.contains(&name) && name != "config" && name != "v" {
                self.own.push(word.clone());
                continue;
            }
            let value = match value {
                Some(value) => value,
                None if SWITCHES.contains(&name) => "true".to_owned(),
                None => words
                    .next()
                    .and_then(|word| word.to_str())
                    .ok_or_else(|| Usage(format!("--{name} wants a value")))?
                    .to_owned(),
            };
            if is_meaningless {
                self.meaningless.push(format!("--{name}"));
            } else if name == "config" {
                self.config = Some(PathBuf::from(value));
            } else {
                let _ = self.flags.insert(name.to_owned(), value);
            }
        }
        Ok(())
    }
}

/// A configuration file as flags of kube-proxy's.
fn read(text: &str, meaningless: &mut Vec<String>) -> anyhow::Result<Flags> {
    let config: Value = serde_saphyr::from_str(text).context("it is no YAML")?;
    let word = |name: &str| config.get(name).and_then(Value::as_str).unwrap_or_default();
    if word("kind") != "KubeProxyConfiguration"
        || !word("apiVersion").starts_with("kubeproxy.config.k8s.io/")
    {
        bail!(
            "its kind is {:?} of {:?}; a KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1 is wanted",
            word("kind"),
            word("apiVersion")
        );
    }
    let mut found = Vec::new();
    flatten("", &config, &mut found);
    // kube-proxy's mode where none is said, which tells what else it does.
    let mode = match word("mode") {
        "" => "iptables",
        mode => mode,
    };
    let mut flags = Flags::from([("proxy-mode".to_owned(), mode.to_owned())]);
    for (path, value) in found {
        let field = FIELDS.iter().find(|(field, _)| {
            path == *field || path.strip_prefix(field).is_some_and(|rest| rest.starts_with('.'))
        });
        match field {
            None if path == "kind" || path == "apiVersion" => {}
            None => meaningless.push(format!("{path} (unknown)")),
            // Only that of its own mode.
            Some((field @ ("iptables.masqueradeAll" | "nftables.masqueradeAll"), _))
                if !(field.starts_with(mode)
                    || mode == "ipvs" && field.starts_with("iptables")) => {}
            Some((field, "")) => meaningless.push((*field).to_owned()),
            Some((_, flag)) => drop(flags.insert((*flag).to_owned(), value)),
        }
    }
    meaningless.dedup();
    // What kube-proxy does where nothing is said.
    for (flag, value) in [
        ("conntrack-max-per-core", "32768"),
        ("conntrack-min", "131072"),
        ("conntrack-tcp-timeout-established", "24h"),
        ("conntrack-tcp-timeout-close-wait", "1h"),
        ("oom-score-adj", "-999"),
    ] {
        let _ = flags.entry(flag.to_owned()).or_insert_with(|| value.to_owned());
    }
    Ok(flags)
}

/// Fields with a value, by their path. What is zero or empty is as good as not said.
fn flatten(path: &str, value: &Value, found: &mut Vec<(String, String)>) {
    let mut add = |text: String| found.push((path.to_owned(), text));
    match value {
        Value::Bool(yes) if *yes || path.ends_with("localhostNodePorts") => add(yes.to_string()),
        // Zero of these has a meaning.
        Value::Number(number)
            if number.as_f64() != Some(0.0)
                || path.starts_with("conntrack.")
                || path == "oomScoreAdj" =>
        {
            add(number.to_string());
        }
        Value::String(text) if !text.is_empty() && text != "0s" => add(text.clone()),
        Value::Array(all) if !all.is_empty() => {
            add(all.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {}
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                flatten(&path, value, found);
            }
        }
    }
}

/// kube-proxy's flags as ours; a value may be empty.
fn ours(mut flags: Flags) -> anyhow::Result<Vec<(&'static str, String)>> {
    let mut all = Vec::new();
    let mut take = |name: &str| flags.remove(name).filter(|value| !value.is_empty());
    for (name, own) in [("hostname-override", "node-name"), ("master", "api")] {
        all.extend(take(name).map(|value| (own, value)));
    }
    if let Some(address) =
        take("bind-address").filter(|address| !matches!(address.as_str(), "0.0.0.0" | "::"))
    {
        all.push(("node-addresses", address));
    }
    if take("masquerade-all").is_some_and(|value| value == "true") {
        all.push(("masquerade", "all".to_owned()));
    }
    let (bridge, prefix) = (take("pod-bridge-interface"), take("pod-interface-name-prefix"));
    if let Some(mode) = take("detect-local-mode") {
        let device = |flag: &str, name: Option<String>| {
            name.map(|name| format!("{flag}={name}"))
                .with_context(|| format!("detectLocalMode {mode} names no device: set detectLocal"))
        };
        all.push((
            "detect-local",
            match mode.as_str() {
                // Without a CIDR kube-proxy detects nothing, and so does `auto`.
                "ClusterCIDR" => "auto".to_owned(),
                "NodeCIDR" => "node-cidr".to_owned(),
                "BridgeInterface" => device("bridge-interface", bridge)?,
                "InterfaceNamePrefix" => device("interface-name-prefix", prefix)?,
                _ => bail!(
                    "detectLocalMode {mode:?}: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix is wanted"
                ),
            },
        ));
    }
    let localhost = take("iptables-localhost-nodeports").is_none_or(|value| value == "true");
    let node_ports = take("nodeport-addresses");
    match (take("proxy-mode").as_deref(), node_ports) {
        (_, Some(given)) => all.push(("nodeport-addresses", given)),
        // These modes serve node ports at all addresses where nothing is said.
        (Some("iptables"), None) if localhost => {
            all.push(("nodeport-addresses", "all,localhost".to_owned()));
        }
        (Some("iptables" | "ipvs"), None) => all.push(("nodeport-addresses", "all".to_owned())),
        (Some("nftables") | None, None) => {}
        (Some(mode), None) => bail!("mode {mode:?}: iptables, ipvs or nftables is wanted"),
    }
    for (port, at) in
        [("healthz-port", "healthz-bind-address"), ("metrics-port", "metrics-bind-address")]
    {
        if let Some(port) = take(port) {
            let everywhere = at == "healthz-bind-address";
            let address = if everywhere {
                format!("0.0.0.0:{port},[::]:{port}")
            } else {
                format!("127.0.0.1:{port}")
            };
            all.push((at, if port == "0" { "off".to_owned() } else { address }));
        }
    }
    if let Some(level) = take("v") {
        let level: u32 =
            level.parse().with_context(|| format!("-v {level}: a number is wanted"))?;
        all.extend((level >= 4).then(|| ("verbose", String::new())));
    }
    if take("logging-format").is_some_and(|format| format == "json") {
        all.push(("log-format", "json".to_owned()));
    }
    // What both have by the same name.
    for name in [
        "kubeconfig",
        "cluster-cidr",
        "healthz-bind-address",
        "metrics-bind-address",
        "conntrack-max-per-core",
        "conntrack-min",
        "conntrack-tcp-be-liberal",
        "conntrack-tcp-timeout-close-wait",
        "conntrack-tcp-timeout-established",
        "conntrack-udp-timeout",
        "conntrack-udp-timeout-stream",
        "oom-score-adj",
    ] {
        all.extend(take(name).map(|value| (name, value)));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> (Expanded, PathBuf, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("config.yaml");
        std::fs::write(
            &file,
            format!(
                "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{text}"
            ),
        )
        .expect("a file");
        (
            line(&format!("sluice agent --config {}", file.display())).expect("a configuration"),
            file,
            folder,
        )
    }

    fn line(line: &str) -> anyhow::Result<Expanded> {
        expand(line.split(' ').map(OsString::from).collect())
    }

    fn texts(expanded: &Expanded) -> Vec<&str> {
        expanded.words.iter().filter_map(|word| word.to_str()).collect()
    }

    /// As kubeadm writes it.
    const KUBEADM: &str = "bindAddress: 0.0.0.0\nbindAddressHardFail: false\n\
        clientConnection: {acceptContentTypes: '', burst: 0, contentType: '', kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}\n\
        clusterCIDR: 10.244.0.0/16,fd00:10:244::/48\nconfigSyncPeriod: 0s\n\
        conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null, udpStreamTimeout: 0s, udpTimeout: 0s}\n\
        detectLocal: {bridgeInterface: '', interfaceNamePrefix: ''}\ndetectLocalMode: ''\nenableProfiling: false\n\
        healthzBindAddress: ''\nhostnameOverride: ''\n\
        iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}\n\
        ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: '', strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s, tcpTimeout: 0s, udpTimeout: 0s}\n\
        logging: {flushFrequency: 0, options: {json: {infoBufferSize: '0'}, text: {infoBufferSize: '0'}}, verbosity: 0}\n\
        metricsBindAddress: ''\nmode: ''\nnftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}\n\
        nodePortAddresses: null\noomScoreAdj: null\nportRange: ''\nshowHiddenMetricsForVersion: ''\n\
        winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: '', rootHnsEndpointName: '', sourceVip: ''}\n";

    #[test]
    fn kubeadms_file_says_where_the_api_server_is_which_mode_was_and_what_is_done_by_default() {
        let (expanded, file, _folder) = config(KUBEADM);
        assert_eq!(
            texts(&expanded),
            [
                "sluice",
                "agent",
                "--nodeport-addresses=all,localhost",
                "--kubeconfig=/var/lib/kube-proxy/kubeconfig.conf",
                "--cluster-cidr=10.244.0.0/16,fd00:10:244::/48",
                "--conntrack-max-per-core=32768",
                "--conntrack-min=131072",
                "--conntrack-tcp-timeout-close-wait=1h",
                "--conntrack-tcp-timeout-established=24h",
                "--oom-score-adj=-999",
            ]
        );
        assert_eq!(expanded.config, Some(file));
        assert_eq!(expanded.meaningless, ["logging.options"]);
    }

    #[test]
    fn what_is_set_is_honoured_and_what_has_no_meaning_is_told() {
        let (expanded, ..) = config(
            "mode: nftables\nhostnameOverride: n7\nbindAddress: 192.0.2.7\nhealthzBindAddress: '[::]:10300'\n\
             metricsBindAddress: 127.0.0.1\nnodePortAddresses: [10.0.0.0/8, primary]\n\
             nftables: {masqueradeAll: true, minSyncPeriod: 1s}\niptables: {masqueradeAll: false}\n\
             detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}\n\
             conntrack: {maxPerCore: 0, min: 4096, tcpEstablishedTimeout: 24h0m0s, tcpBeLiberal: true}\n\
             oomScoreAdj: -998\nlogging: {format: json, verbosity: 5}\nfeatureGates: {A: true}\nnovelty: 1\n",
        );
        for word in [
            "--node-name=n7",
            "--node-addresses=192.0.2.7",
            "--healthz-bind-address=[::]:10300",
            "--metrics-bind-address=127.0.0.1",
            "--nodeport-addresses=10.0.0.0/8,primary",
            "--masquerade=all",
            "--detect-local=bridge-interface=cni0",
            "--conntrack-max-per-core=0",
            "--conntrack-min=4096",
            "--conntrack-tcp-timeout-established=24h0m0s",
            "--conntrack-tcp-be-liberal=true",
            "--oom-score-adj=-998",
            "--log-format=json",
            "--verbose",
        ] {
            assert!(texts(&expanded).contains(&word), "{word}: {expanded:?}");
        }
        assert_eq!(
            expanded.meaningless,
            ["featureGates", "nftables.minSyncPeriod", "novelty (unknown)"]
        );
    }

    #[test]
    fn kube_proxys_flags_are_understood_and_ours_count_more() {
        let flags = "sluice --pin-path /x agent --hostname-override=n7 --master https://a:6443 --masquerade-all --proxy-mode=ipvs \
                     --v=2 --ipvs-scheduler rr --healthz-port=0 --masquerade kube-proxy --cluster-cidr 10.0.0.0/8";
        let expanded = line(flags).expect("flags");
        assert_eq!(
            texts(&expanded).join(" "),
            "sluice --pin-path /x agent --node-name=n7 --api=https://a:6443 --nodeport-addresses=all --healthz-bind-address=off \
             --masquerade kube-proxy --cluster-cidr 10.0.0.0/8"
        );
        assert_eq!(expanded.meaningless, ["--ipvs-scheduler"]);
        // Other commands are left alone.
        let other = line("sluice explain --v 1").expect("words");
        assert_eq!(texts(&other), ["sluice", "explain", "--v", "1"]);
    }

    #[test]
    fn what_would_mislead_is_refused() {
        for (words, expected) in [
            ("sluice agent --cleanup", "sluice cleanup"),
            ("sluice agent --detect-local-mode=BridgeInterface", "names no device"),
            ("sluice agent --detect-local-mode=X", "is wanted"),
            ("sluice agent --proxy-mode=kernelspace", "is wanted"),
            ("sluice agent --config /none", "cannot read"),
            ("sluice agent --config", "wants a value"),
        ] {
            let error = line(words).expect_err(words);
            assert!(format!("{error:#}").contains(expected), "{words}: {error:#}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("pod.yaml");
        std::fs::write(&file, "apiVersion: v1\nkind: Pod\n").expect("a file");
        let error = line(&format!("sluice agent --config={}", file.display())).expect_err("a pod");
        assert!(format!("{error:#}").contains("KubeProxyConfiguration"), "{error:#}");
    }
}
