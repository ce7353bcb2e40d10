//! Translates kube-proxy's configuration file and flags into flags of `sluice agent`.
//!
//! The file is first turned into kube-proxy's flags, and those are translated. Flags on the command
//! line take precedence over the file. Settings that have no meaning here are ignored and reported.
//! Those that would mislead are refused.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::Value;

use super::Usage;

/// A command line in the agent's flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Expanded {
    /// The words, beginning with the program's name.
    pub(super) words: Vec<OsString>,
    /// The kube-proxy settings that have no meaning here.
    pub(super) meaningless: Vec<String>,
    /// The configuration file.
    pub(super) config: Option<PathBuf>,
}

/// Values of kube-proxy's flags, by flag without dashes.
type Flags = BTreeMap<String, String>;

/// kube-proxy flags for which the agent has another flag, alone or together with others.
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

/// Flags that kube-proxy and the agent have by the same name, and that the configuration file may
/// set.
const SAME: [&str; 12] = [
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
];

/// kube-proxy flags that have no meaning here.
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

/// kube-proxy flags that need no value.
const SWITCHES: [&str; 5] = [
    "bind-address-hard-fail",
    "iptables-localhost-nodeports",
    "ipvs-strict-arp",
    "masquerade-all",
    "profiling",
];

/// The kube-proxy flag for each field of a KubeProxyConfiguration; empty if the field has no
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

/// Translates a command line.
///
/// # Errors
///
/// Fails if the configuration file cannot be read, or asks for something that Sluice does not
/// support.
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
    for (name, value) in translate(flags)? {
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

/// The flags of a command line, by kind.
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
                    "--{name} is a flag of kube-proxy; see `sluice cleanup` and `sluice agent --help`"
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
                    .ok_or_else(|| Usage(format!("--{name} needs a value")))?
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

/// Returns a configuration file as kube-proxy flags.
fn read(text: &str, meaningless: &mut Vec<String>) -> anyhow::Result<Flags> {
    let config: Value = serde_saphyr::from_str(text).context("it is not YAML")?;
    let word = |name: &str| config.get(name).and_then(Value::as_str).unwrap_or_default();
    if word("kind") != "KubeProxyConfiguration"
        || !word("apiVersion").starts_with("kubeproxy.config.k8s.io/")
    {
        bail!(
            "its kind is {:?} of {:?}; expected a KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1",
            word("kind"),
            word("apiVersion")
        );
    }
    let mut found = Vec::new();
    flatten("", &config, &mut found);
    // kube-proxy's default mode, which decides about other defaults.
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
            // Counts only in its own mode.
            Some((field @ ("iptables.masqueradeAll" | "nftables.masqueradeAll"), _))
                if !(field.starts_with(mode)
                    || mode == "ipvs" && field.starts_with("iptables")) => {}
            Some((field, "")) => meaningless.push((*field).to_owned()),
            Some((_, flag)) => drop(flags.insert((*flag).to_owned(), value)),
        }
    }
    meaningless.dedup();
    // kube-proxy's defaults.
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

/// Collects the fields that have a value, by path. Most values that are zero or empty mean the
/// default.
fn flatten(path: &str, value: &Value, found: &mut Vec<(String, String)>) {
    let mut add = |text: String| found.push((path.to_owned(), text));
    match value {
        Value::Bool(yes) if *yes || path.ends_with("localhostNodePorts") => add(yes.to_string()),
        // 0 has a meaning in these fields.
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

/// kube-proxy's flags in translation to the agent's. A value may be empty.
struct Translation {
    flags: Flags,
    all: Vec<(&'static str, String)>,
}

impl Translation {
    fn take(&mut self, name: &str) -> Option<String> {
        self.flags.remove(name).filter(|value| !value.is_empty())
    }

    fn is_taken_as(&mut self, name: &str, wanted: &str) -> bool {
        self.take(name).is_some_and(|value| value == wanted)
    }

    fn node(&mut self) {
        for (name, own) in [("hostname-override", "node-name"), ("master", "api")] {
            let value = self.take(name);
            self.all.extend(value.map(|value| (own, value)));
        }
        if let Some(address) = self
            .take("bind-address")
            .filter(|address| !matches!(address.as_str(), "0.0.0.0" | "::"))
        {
            self.all.push(("node-addresses", address));
        }
        if self.is_taken_as("masquerade-all", "true") {
            self.all.push(("masquerade", "all".to_owned()));
        }
    }

    fn detect_local(&mut self) -> anyhow::Result<()> {
        let bridge = self.take("pod-bridge-interface");
        let prefix = self.take("pod-interface-name-prefix");
        let Some(mode) = self.take("detect-local-mode") else { return Ok(()) };
        let device = |flag: &str, name: Option<String>| {
            name.map(|name| format!("{flag}={name}"))
                .with_context(|| format!("detectLocalMode {mode} names no device: set detectLocal"))
        };
        let detection = match mode.as_str() {
            // Without a CIDR kube-proxy detects nothing, and so does `auto`.
            "ClusterCIDR" => "auto".to_owned(),
            "NodeCIDR" => "node-cidr".to_owned(),
            "BridgeInterface" => device("bridge-interface", bridge)?,
            "InterfaceNamePrefix" => device("interface-name-prefix", prefix)?,
            _ => bail!(
                "detectLocalMode {mode:?}: expected ClusterCIDR, NodeCIDR, BridgeInterface or \
                 InterfaceNamePrefix"
            ),
        };
        self.all.push(("detect-local", detection));
        Ok(())
    }

    fn node_ports(&mut self) -> anyhow::Result<()> {
        let localhost =
            self.take("iptables-localhost-nodeports").is_none_or(|value| value == "true");
        let given = self.take("nodeport-addresses");
        let addresses = match (self.take("proxy-mode").as_deref(), given) {
            (_, Some(given)) => given,
            // These modes serve node ports at all addresses by default.
            (Some("iptables"), None) if localhost => "all,localhost".to_owned(),
            (Some("iptables" | "ipvs"), None) => "all".to_owned(),
            (Some("nftables") | None, None) => return Ok(()),
            (Some(mode), None) => bail!("mode {mode:?}: expected iptables, ipvs or nftables"),
        };
        self.all.push(("nodeport-addresses", addresses));
        Ok(())
    }

    fn monitoring(&mut self) {
        for (port, at) in
            [("healthz-port", "healthz-bind-address"), ("metrics-port", "metrics-bind-address")]
        {
            let Some(port) = self.take(port) else { continue };
            let address = match (port.as_str(), at) {
                ("0", _) => "off".to_owned(),
                (port, "healthz-bind-address") => format!("0.0.0.0:{port},[::]:{port}"),
                (port, _) => format!("127.0.0.1:{port}"),
            };
            self.all.push((at, address));
        }
    }

    fn logging(&mut self) -> anyhow::Result<()> {
        if let Some(level) = self.take("v") {
            let level: u32 =
                level.parse().with_context(|| format!("-v {level}: expected a number"))?;
            self.all.extend((level >= 4).then(|| ("verbose", String::new())));
        }
        if self.is_taken_as("logging-format", "json") {
            self.all.push(("log-format", "json".to_owned()));
        }
        Ok(())
    }

    /// Takes the flags that both have by the same name.
    fn same(&mut self) {
        for name in SAME {
            let value = self.take(name);
            self.all.extend(value.map(|value| (name, value)));
        }
    }
}

/// Returns kube-proxy's flags as the agent's. A value may be empty.
fn translate(flags: Flags) -> anyhow::Result<Vec<(&'static str, String)>> {
    let mut translation = Translation { flags, all: Vec::new() };
    translation.node();
    translation.detect_local()?;
    translation.node_ports()?;
    translation.monitoring();
    translation.logging()?;
    translation.same();
    Ok(translation.all)
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
    fn what_is_set_is_honoured_and_what_has_no_meaning_is_reported() {
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
    fn kube_proxys_flags_are_understood_and_the_agents_take_precedence() {
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
            ("sluice agent --detect-local-mode=X", "expected ClusterCIDR"),
            ("sluice agent --proxy-mode=kernelspace", "expected iptables"),
            ("sluice agent --config /none", "cannot read"),
            ("sluice agent --config", "needs a value"),
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
