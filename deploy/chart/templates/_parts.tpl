{{/* Labels of pods: none that changes with the chart alone, since that would restart every agent. */}}
{{- define "sluice.podLabels" -}}
{{- with .Values.commonLabels }}
{{- toYaml . }}
{{ end -}}
app.kubernetes.io/name: {{ .name | default "sluice" }}
app.kubernetes.io/component: service-proxy
app.kubernetes.io/part-of: sluice
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* Labels of every object, as Kubernetes recommends them. */}}
{{- define "sluice.labels" -}}
{{ include "sluice.podLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{- end }}

{{/* Annotations of every object, with those of one. Call with (list . extra). */}}
{{- define "sluice.annotations" -}}
{{- $all := mergeOverwrite (dict) (index . 0).Values.commonAnnotations (index . 1) }}
{{- with $all -}}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A flag's word. YAML reads an unquoted on or off as a boolean, and gets the word back. */}}
{{- define "sluice.word" -}}
{{- if kindIs "bool" . }}{{ . | ternary "on" "off" }}{{ else }}{{ . }}{{ end }}
{{- end }}

{{- define "sluice.words" -}}
{{- $words := list }}
{{- range . }}{{ $words = append $words (include "sluice.word" .) }}{{ end }}
{{- join "," $words }}
{{- end }}

{{/* The program's arguments. */}}
{{- define "sluice.args" -}}
{{- if hasKey .Values.kubeProxyConfiguration "healthzBindAddress" }}
{{- fail "kubeProxyConfiguration.healthzBindAddress: the kubelet's probe needs all addresses of the node; healthz.port is the port" }}
{{- end }}
- agent
{{- if .Values.kubeProxyConfiguration }}
- --config=/etc/sluice/config.yaml
{{- else }}
- --conntrack-tcp-timeout-close-wait=1h
{{- end }}
{{- with .Values.serviceProxyName }}
- {{ printf "--proxy-name=%s" . | quote }}
{{- end }}
{{- with .Values.masquerade }}
- --masquerade={{ . }}
{{- end }}
{{- with .Values.detectLocal }}
- {{ printf "--detect-local=%s" . | quote }}
{{- end }}
{{- with .Values.clusterCIDRs }}
- --cluster-cidr={{ join "," . }}
{{- end }}
{{- with .Values.serviceCIDRs }}
- --service-cidr={{ join "," . }}
{{- end }}
{{- with .Values.nodePortAddresses }}
- --nodeport-addresses={{ join "," . }}
{{- end }}
{{- with .Values.externalIPs }}
- --external-ips={{ include "sluice.words" . }}
{{- end }}
{{- with include "sluice.word" .Values.socketPath }}
- --socket-path={{ . }}
{{- end }}
{{- with include "sluice.word" .Values.xdp }}
- --xdp={{ . }}
{{- end }}
{{- with include "sluice.word" .Values.accelerate }}
- --accelerate={{ . }}
{{- end }}
{{- if .Values.takeover.enabled }}
- --takeover
{{- end }}
{{- with .Values.logFormat }}
- --log-format={{ . }}
{{- end }}
{{- range until (int .Values.verbosity) }}
- --verbose
{{- end }}
{{- if ne (int .Values.healthz.port) 10256 }}
- --healthz-bind-address=0.0.0.0:{{ .Values.healthz.port }},[::]:{{ .Values.healthz.port }}
{{- end }}
{{- with .Values.metrics.bindAddresses }}
- --metrics-bind-address={{ include "sluice.words" . }}
{{- end }}
{{- with .Values.metrics.detail }}
- --metrics-detail={{ . }}
{{- end }}
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{/* What the chart's affinity says, and that no agent's pod is on the node. */}}
{{- define "sluice.cleanupAffinity" -}}
{{- $agent := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" (dict "app.kubernetes.io/name" "sluice")) }}
{{- $affinity := deepCopy .Values.affinity }}
{{- $_ := set $affinity "podAntiAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $agent)) }}
{{- toYaml $affinity }}
{{- end }}

{{/* With a digest, the tag is for people alone. */}}
{{- define "sluice.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- with .Values.image.digest }}@{{ . }}{{ end }}
{{- end }}

{{/* The port of the first address that metrics are served at. */}}
{{- define "sluice.metricsPort" -}}
{{- $address := include "sluice.word" (first .Values.metrics.bindAddresses) }}
{{- if eq $address "off" }}{{ fail "prometheus.podMonitor: metrics.bindAddresses is off, so there is nothing to scrape" }}{{ end }}
{{- if regexMatch "^([^:]+|\\[.+\\]):[0-9]+$" $address }}
{{- regexFind "[0-9]+$" $address }}
{{- else }}10249{{ end }}
{{- end }}

{{/* For both containers: preflight tries what the agent does. */}}
{{- define "sluice.securityContext" -}}
{{- if eq .Values.privileges "least" -}}
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  add: [BPF, NET_ADMIN, NET_RAW, PERFMON]
seccompProfile:
  type: RuntimeDefault
# Container runtimes' AppArmor profiles forbid writing below /sys/fs/bpf, and SELinux's type for containers forbids bpf().
appArmorProfile:
  type: Unconfined
seLinuxOptions:
  type: spc_t
  level: s0
{{- else -}}
privileged: true
readOnlyRootFilesystem: true
{{- end }}
{{- end }}

{{/* An unprivileged container sees its own /proc/sys read-only, so the node's is mounted at another place. */}}
{{- define "sluice.leastEnv" -}}
- name: SLUICE_PROC_SYS
  value: /node/proc/sys
{{- end }}

{{- define "sluice.leastMount" -}}
- name: settings
  mountPath: /node/proc/sys/net
{{- end }}
