{{/* The program's arguments. */}}
{{- define "sluice.args" -}}
- agent
{{- if .Values.kubeProxyConfiguration }}
- --config=/etc/sluice/config.yaml
{{- else }}
- --conntrack-tcp-timeout-close-wait=1h
{{- end }}
{{- with .Values.serviceProxyName }}
- --proxy-name={{ . }}
{{- end }}
{{- with .Values.masquerade }}
- --masquerade={{ . }}
{{- end }}
{{- with .Values.detectLocal }}
- --detect-local={{ . }}
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
- --external-ips={{ join "," . }}
{{- end }}
{{- with .Values.socketPath }}
- --socket-path={{ . }}
{{- end }}
{{- with .Values.xdp }}
- --xdp={{ . }}
{{- end }}
{{- with .Values.accelerate }}
- --accelerate={{ . }}
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
- --metrics-bind-address={{ join "," . }}
{{- end }}
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- define "sluice.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
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
