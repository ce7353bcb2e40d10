//! The examples in each command's help. A test parses every one.

pub(super) const AGENT: &str = "\
Examples:
  # On a machine without a cluster: follow the files in a folder
  sluice agent --manifests /etc/sluice/services --node-name a

  # On a node, next to a kube-proxy whose connections it takes over
  sluice agent --api https://192.0.2.1:6443 --takeover";

pub(super) const STATUS: &str = "\
Examples:
  # Everything about this node; the exit code says whether it is ready
  sluice status

  # The commonest reasons for packets that were not forwarded
  sluice status -o jsonpath='{.reasons[*].reason}'";

pub(super) const SERVICES: &str = "\
Examples:
  # What is served
  sluice services

  # Services of one namespace whose connections fail, and how it goes on
  sluice services -n shop --sort-by .failed -w

  # Every address of one Service
  sluice services shop/web -o wide";

pub(super) const BACKENDS: &str = "\
Examples:
  # The endpoints of a Service, their shares and their failures
  sluice backends shop/web

  # With pods and nodes
  sluice backends svc/web:http -o wide

  # Only addresses
  sluice backends web -o jsonpath='{.items[*].backend}'";

pub(super) const FLOWS: &str = "\
Examples:
  # Who talks to a Service, the most recent first
  sluice flows shop/web --limit 20

  # With the names of all pods, by the rights of a kubeconfig
  sluice flows -o wide --kubeconfig /root/.kube/config";

pub(super) const TOP: &str = "\
Examples:
  # Live, in a terminal
  sluice top

  # One table over ten seconds
  sluice top --once --interval 10s";

pub(super) const TRACE: &str = "\
Examples:
  # What is dropped or rejected, as it happens
  sluice trace --drops

  # A minute of one Service, for a program
  sluice trace --service shop/web --duration 1m -o json";

pub(super) const EXPLAIN: &str = "\
Examples:
  # What happens when a pod calls a Service
  sluice explain pod/shop/client svc/web:http

  # The same by addresses
  sluice explain tcp 10.244.1.5:40000 10.96.0.10:80 --from pod

  # A client outside at a node port, by a dump of the cluster and without root
  sluice explain external node/n1:30080 --manifests dump.yaml --node n1

  # What would change
  sluice explain external svc/web:http --manifests now --what-if new.yaml";

pub(super) const VALIDATE: &str = "\
Examples:
  # A folder, before it is served
  sluice validate /etc/sluice/services

  # A dump of a cluster (kubectl get svc,endpointslices,nodes -A -o yaml)
  sluice validate dump.yaml --node n1";

pub(super) const PLAN: &str = "\
Examples:
  # On a node, before kubectl apply -f new.yaml
  sluice plan -f new.yaml

  # For a node of a dump, without root
  sluice plan -f new.yaml --manifests dump.yaml --node n1";

pub(super) const PREFLIGHT: &str = "\
Examples:
  # On a node, before the install
  sluice preflight

  # What would bypass netfilter's rules
  sluice preflight --accelerate on";

pub(super) const DIFF: &str = "\
Examples:
  # Do the maps hold what the agent's sources want?
  sluice diff

  # Against files
  sluice diff --manifests /etc/sluice/services";

pub(super) const TAKEOVER: &str = "\
Examples:
  # How far it is
  sluice takeover --wait 0

  # Once kube-proxy is stopped for good: remove its rules
  sluice takeover --finish";

pub(super) const RELEASE: &str = "\
Examples:
  # Before kube-proxy is started
  sluice release --prepare

  # Hand over, and cut what still lives after ten minutes
  sluice release --timeout 10m";

pub(super) const CLEANUP: &str = "\
Examples:
  # After the agent has stopped
  sluice cleanup";

pub(super) const VERSION: &str = "\
Examples:
  sluice version
  sluice version -o json";

pub(super) const COMPLETION: &str = "\
Examples:
  # bash, for this shell and for all
  source <(sluice completion bash)
  sluice completion bash > /etc/bash_completion.d/sluice

  # zsh
  sluice completion zsh > \"${fpath[1]}/_sluice\"

  # fish
  sluice completion fish > ~/.config/fish/completions/sluice.fish";
