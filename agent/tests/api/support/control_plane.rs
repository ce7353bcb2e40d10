//! etcd, kube-apiserver and kube-controller-manager, as processes of an outside client of the lab.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sluice_lab::{Client, Lab, Running};

use super::wait_for;

/// The user who may do anything.
pub(crate) const ADMIN: &str = "admin";
/// The user with the rights of an agent.
pub(crate) const AGENT: &str = "agent";
/// A user without any right at first.
pub(crate) const NEWCOMER: &str = "newcomer";
/// A node that is an object and nothing else.
pub(crate) const ELSEWHERE: &str = "elsewhere";
/// The API server's port.
pub(crate) const PORT: u16 = 6443;

/// Number of endpoints that the real controller puts into a slice: few, so that few pods make many
/// slices.
pub(crate) const SLICE_ENDPOINTS: usize = 8;

const ETCD: &str = "http://127.0.0.1:2379";
/// Longer than the start takes on a busy machine.
const START: Duration = Duration::from_mins(1);

/// A control plane, ended when this is dropped.
pub(crate) struct ControlPlane {
    host: Client,
    programs: PathBuf,
    folder: PathBuf,
    runtime: tokio::runtime::Runtime,
    processes: Mutex<Processes>,
}

/// The processes, in the order in which they are to end.
#[derive(Default)]
struct Processes {
    controllers: Option<Running>,
    server: Option<Running>,
    etcd: Option<Running>,
}

impl ControlPlane {
    /// Starts etcd, the API server and the controllers; the API server is ready when this returns.
    pub(crate) fn start(lab: &Lab, programs: PathBuf) -> Result<Self> {
        let folder = lab.state().join("control-plane");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let this = Self {
            host: lab.client("api")?,
            programs,
            folder,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build()?,
            processes: Mutex::default(),
        };
        this.write_credentials()?;
        let etcd = this.spawn(
            "etcd",
            &[
                format!("--data-dir={}", this.folder.join("etcd").display()),
                "--unsafe-no-fsync".into(),
                format!("--listen-client-urls={ETCD}"),
                format!("--advertise-client-urls={ETCD}"),
                "--listen-peer-urls=http://127.0.0.1:2380".into(),
                "--log-level=warn".into(),
            ],
        )?;
        this.processes().etcd = Some(etcd);
        this.start_server(&[])?;
        this.give_rights(AGENT, &["services", "endpointslices", "nodes"])?;
        this.allow_events(AGENT)?;
        this.add_node(ELSEWHERE)?;
        Ok(this)
    }

    fn processes(&self) -> MutexGuard<'_, Processes> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, program: &str, args: &[String]) -> Result<Running> {
        self.host.spawn(self.programs.join(program), args)
    }

    /// Returns the host on which everything runs.
    pub(crate) fn host(&self) -> &Client {
        &self.host
    }

    /// Returns the API server's address, by a port of its host.
    pub(crate) fn url(&self, port: u16) -> String {
        format!("https://{}:{port}", self.host.ipv4())
    }

    /// Returns the path of a user's kubeconfig for the API server.
    pub(crate) fn kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.join(format!("{user}.yaml"))
    }

    fn write_credentials(&self) -> Result<()> {
        let key = self.folder.join("service-accounts.key");
        let _ = self.host.run(
            "openssl",
            ["genrsa".as_ref(), "-out".as_ref(), key.as_os_str(), "2048".as_ref()],
        )?;
        let mut tokens = String::new();
        for (user, groups) in
            [(ADMIN, "system:masters"), (AGENT, "agents"), (NEWCOMER, "newcomers")]
        {
            writeln!(tokens, "{user}-token,{user},{user},{groups}")
                .context("cannot write the tokens")?;
            let config = json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "lab",
                "clusters": [{"name": "lab", "cluster": {
                    "server": self.url(PORT),
                    // The objects that the API server creates on its first start.
                    "certificate-authority": self.folder.join("certificates/apiserver.crt"),
                }}],
                "users": [{"name": user, "user": {"token": format!("{user}-token")}}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user}}],
            });
            fs::write(self.kubeconfig(user), config.to_string())?;
        }
        fs::write(self.folder.join("tokens.csv"), tokens).context("cannot write the tokens")
    }

    /// Starts the API server, and the controllers with its first start. It is ready when this
    /// returns.
    pub(crate) fn start_server(&self, args: &[&str]) -> Result<()> {
        let file = |name: &str| self.folder.join(name).display().to_string();
        let mut all = vec![
            format!("--etcd-servers={ETCD}"),
            format!("--advertise-address={}", self.host.ipv4()),
            format!("--secure-port={PORT}"),
            format!("--cert-dir={}", file("certificates")),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--authorization-mode=RBAC".into(),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", file("service-accounts.key")),
            format!("--service-account-signing-key-file={}", file("service-accounts.key")),
            "--service-cluster-ip-range=10.96.0.0/16,fd00:a60::a:0/112".into(),
            // As in every cluster in which a Service proxy can be deployed.
            "--allow-privileged".into(),
            // No controller here creates the accounts that pods would need.
            "--disable-admission-plugins=ServiceAccount".into(),
        ];
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        let mut server = self.spawn("kube-apiserver", &all)?;
        server.wait_until("it is ready", START, |_| {
            self.request("GET", "/readyz", None).is_ok().then_some(())
        })?;
        let mut processes = self.processes();
        processes.server = Some(server);
        if processes.controllers.is_none() {
            processes.controllers = Some(self.spawn(
                "kube-controller-manager",
                &[
                    format!("--kubeconfig={}", self.kubeconfig(ADMIN).display()),
                    "--controllers=endpointslice-controller,endpointslice-mirroring-controller,namespace-controller".into(),
                    "--leader-elect=false".into(),
                    "--secure-port=0".into(),
                    format!("--max-endpoints-per-slice={SLICE_ENDPOINTS}"),
                    "--kube-api-qps=500".into(),
                    "--kube-api-burst=500".into(),
                ],
            )?);
        }
        Ok(())
    }

    /// Kills the API server as on a machine that loses power: it closes no connection itself.
    pub(crate) fn kill_server(&self) -> Result<()> {
        let server = self.processes().server.take();
        server.context("the API server is not running")?.kill().map(drop)
    }

    /// Ends the API server cleanly.
    pub(crate) fn stop_server(&self) -> Result<()> {
        let server = self.processes().server.take();
        server.context("the API server is not running")?.stop().map(drop)
    }

    /// Sends a request to the API server as the administrator, on a connection of its own.
    ///
    /// # Errors
    /// If it cannot be reached, or refuses.
    pub(crate) fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header(
                "content-type",
                if method == "PATCH" { "application/merge-patch+json" } else { "application/json" },
            )
            .body(body.map(|body| body.to_string().into_bytes()).unwrap_or_default())?;
        let kubeconfig = self.kubeconfig(ADMIN);
        let ask = async { anyhow::Ok(client(&kubeconfig).await?.request_text(request).await?) };
        let text = self
            .host
            .enter(|| self.runtime.block_on(ask))?
            .with_context(|| format!("{method} {path} failed"))?;
        // Some answers, as that of /readyz, are no JSON.
        Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Makes a Node object: the controllers want to know where pods are.
    pub(crate) fn add_node(&self, name: &str) -> Result<()> {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        self.request("POST", "/api/v1/nodes", Some(&node)).map(drop)
    }

    /// Lets a user see objects of some kinds; with every call instead of what was allowed before.
    pub(crate) fn give_rights(&self, user: &str, kinds: &[&str]) -> Result<()> {
        let rule = json!({"apiGroups": ["", "discovery.k8s.io"], "resources": kinds, "verbs": ["get", "list", "watch"]});
        self.bind(user, user, &rule)
    }

    /// Lets a user write Events.
    fn allow_events(&self, user: &str) -> Result<()> {
        let rule =
            json!({"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]});
        self.bind(&format!("{user}-events"), user, &rule)
    }

    fn bind(&self, role_name: &str, user: &str, rule: &Value) -> Result<()> {
        let rbac = "/apis/rbac.authorization.k8s.io/v1";
        let role = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": role_name},
            "rules": [rule],
        });
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": role_name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role_name},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        });
        for (kind, object) in [("clusterroles", role), ("clusterrolebindings", binding)] {
            let one = format!("{rbac}/{kind}/{role_name}");
            if self.request("GET", &one, None).is_ok() {
                let _ = self.request("PUT", &one, Some(&object))?;
            } else {
                let _ = self.request("POST", &format!("{rbac}/{kind}"), Some(&object))?;
            }
        }
        Ok(())
    }

    /// Makes etcd forget everything but the present, as it does by and by.
    pub(crate) fn compact(&self) -> Result<()> {
        // Any key will do: every answer tells the revision.
        let range = self.etcd("kv/range", &json!({"key": "AA=="}))?;
        let revision = range.pointer("/header/revision").context("etcd tells no revision")?;
        let answer =
            self.etcd("kv/compaction", &json!({"revision": revision, "physical": true}))?;
        match answer.get("header") {
            Some(_) => Ok(()),
            None => bail!("etcd did not compact: {answer}"),
        }
    }

    fn etcd(&self, call: &str, body: &Value) -> Result<Value> {
        let answer = self
            .host
            .run("curl", ["-sS", "-d", &body.to_string(), &format!("{ETCD}/v3/{call}")])?;
        serde_json::from_str(&answer).with_context(|| format!("etcd answered {answer}"))
    }

    /// Waits until the controllers have done what follows from a condition.
    #[track_caller]
    pub(crate) fn wait_for_object(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_for(path, Duration::from_secs(20), || {
            let object = self.request("GET", path, None).map_err(|error| format!("{error:#}"))?;
            if wanted(&object) { Ok(object) } else { Err(object.to_string()) }
        })
    }
}

async fn client(kubeconfig: &Path) -> Result<kube::Client> {
    let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(
        kubeconfig,
        &kube::config::KubeConfigOptions::default(),
    )
    .await?;
    Ok(kube::Client::try_from(config)?)
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        let mut processes = std::mem::take(&mut *self.processes());
        for process in [&mut processes.controllers, &mut processes.server, &mut processes.etcd] {
            // Nothing of it is needed any more; the lab kills the cgroup too.
            drop(process.take());
        }
    }
}
