# The image and the manifest of a run on GKE.
# shellcheck shell=bash

# The commit of the image; warns of what is not in it.
committed() {
  local commit changed
  commit=$(git rev-parse --verify --quiet "${REF:-HEAD}^{commit}") || die "There is no commit" \
    "'${REF:-HEAD}' in this repository: give --ref a branch, a tag or a commit."
  changed=$(git status --porcelain | wc -l | tr -d ' ')
  if [ -z "$REF" ] && [ "$changed" -gt 0 ]; then
    say "Warning: $changed changed or new file(s) are not committed and therefore not in the image of" \
      "commit $(git rev-parse --short "$commit")."
  fi
  echo "$commit"
}

# The image's full name: with a tag or digest as given, else with the commit as tag.
image() {
  case "${IMAGE##*/}" in
    *:* | *@*) echo "$IMAGE" ;;
    *) echo "$IMAGE:$(git rev-parse --short=12 "$1")" ;;
  esac
}

jax_of() { if [ "$KIND" = tpu ]; then echo tpu; else echo cuda13; fi; }

pods() { echo "jobset.sigs.k8s.io/jobset-name=$NAME"; }

# A JSON string, which YAML reads too, of a text without control characters.
json() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

# main.py's arguments as a list. Kubernetes puts in variables, and makes one dollar sign of two.
arguments() {
  local one separator=""
  printf '['
  for one in "$@"; do
    printf '%s' "$separator"
    # shellcheck disable=SC2016
    json "${one//\$/\$\$}"
    separator=", "
  done
}

# How the hosts find each other. JAX reads TPU_* and MEGASCALE_*; a GPU host is told by flags. The names
# are those that JobSet gives the pods: NAME-slice-SLICE-HOST.NAME.
flags() {
  if [ -n "$COORDINATOR" ]; then return; fi
  if [ "$KIND" = tpu ]; then
    printf ', "--coordinator=auto"'
  elif [ "$HOSTS" -gt 1 ]; then
    # shellcheck disable=SC2016
    printf ', "--coordinator=%s", "--processes=%s", "--process=$(HOST)"' "$NAME-slice-0-0.$NAME:8476" "$HOSTS"
  fi
}

variables() {
  local i names="" slice=0
  # shellcheck disable=SC2016 # Kubernetes puts in the value
  if [ "$SLICES" -gt 1 ]; then slice='$(MEGASCALE_SLICE_ID)'; fi
  for ((i = 0; i < HOSTS; i++)); do names="$names${names:+,}$NAME-slice-$slice-$i.$NAME"; done
  variable JAX_PLATFORMS "$(if [ "$KIND" = tpu ]; then echo tpu,cpu; else echo cuda,cpu; fi)" # never silently the CPU alone
  if [ "$KIND" = gpu ]; then
    variable LD_LIBRARY_PATH /usr/local/nvidia/lib64 # where GKE puts the driver
    if [ "$HOSTS" -gt 1 ]; then label HOST batch.kubernetes.io/job-completion-index; fi
    return
  fi
  if [ "$SLICES" -gt 1 ]; then
    variable MEGASCALE_NUM_SLICES "$SLICES"
    variable MEGASCALE_COORDINATOR_ADDRESS "$NAME-slice-0-0.$NAME"
    variable MEGASCALE_PORT 8081
    label MEGASCALE_SLICE_ID jobset.sigs.k8s.io/job-index
  fi
  label TPU_WORKER_ID batch.kubernetes.io/job-completion-index
  variable TPU_WORKER_HOSTNAMES "$names"
}

variable() { echo "                    - {name: $1, value: $(json "$2")}"; }

label() {
  echo "                    - {name: $1, valueFrom: {fieldRef: {fieldPath: \"metadata.annotations['$2']\"}}}"
}

node_selectors() {
  local pair
  selector() { echo "                $1: $(json "$2")"; }
  if [ "$KIND" = tpu ]; then
    selector cloud.google.com/gke-tpu-accelerator "$ACCELERATOR"
    selector cloud.google.com/gke-tpu-topology "$TOPOLOGY"
  else
    selector cloud.google.com/gke-accelerator "$ACCELERATOR"
    selector node.kubernetes.io/instance-type "$TYPE"
  fi
  if [ "$SPOT" = yes ]; then selector cloud.google.com/gke-spot true; fi
  for pair in ${NODE_SELECTORS[@]+"${NODE_SELECTORS[@]}"}; do
    selector "${pair%%=*}" "${pair#*=}"
  done
}

tolerations() {
  local resource=$1
  echo "                - {key: $resource, operator: Exists, effect: NoSchedule}"
  if [ "$SPOT" = yes ]; then
    echo '                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
  fi
}

# On TPU nodes the devices are root's, and locking memory for them takes privileges.
security() {
  if [ "$KIND" = tpu ]; then
    echo '{runAsUser: 0, privileged: true}'
  else
    echo '{runAsNonRoot: true, runAsUser: 1000, allowPrivilegeEscalation: false}'
  fi
}

# Writes the JobSet. Exit codes as in clip_jax/errors.py: 42 and those from 127 on start again, which
# Kubernetes calls a failure beyond backoffLimit; on all others the Job fails by its podFailurePolicy,
# and JobSet tells by the message whether an exit code or a node that was taken away was the cause.
manifest() {
  local resource=google.com/tpu
  if [ "$KIND" = gpu ]; then resource=nvidia.com/gpu; fi
  grep . <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
$(if [ -n "$QUEUE" ]; then printf '  labels:\n    kueue.x-k8s.io/queue-name: %s\n' "$QUEUE"; fi
  if [ "$KIND" = tpu ] && [ "$HOSTS" -gt 1 ]; then
    printf '  annotations: # a slice of several hosts is a node pool, which no other Job may enter\n'
    printf '    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool\n'
  fi)
spec:
  network: {enableDNSHostnames: true, subdomain: $NAME, publishNotReadyAddresses: true}
  failurePolicy:
    maxRestarts: $MAX_RESTARTS # of those that fit none of the rules
    rules: # the first that fits
      - name: fault
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ["failed with exit code"]
      - name: preempted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ["has condition DisruptionTarget"]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          completionMode: Indexed
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
              - action: FailJob
                onExitCodes:
                  containerName: main
                  operator: NotIn
                  values: [42, $(seq -s ', ' 127 255)]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $GRACE # for the checkpoint after SIGTERM
$(if [ -n "$SERVICE_ACCOUNT" ]; then echo "              serviceAccountName: $SERVICE_ACCOUNT"; fi)
              nodeSelector:
$(node_selectors)
              tolerations:
$(tolerations "$resource")
              containers:
                - name: main
                  image: $(json "$1")
                  args: $(arguments "${MAIN_ARGS[@]}")$(flags)]
                  env:
$(variables)
                  resources:
                    limits: {$resource: $CHIPS}
                  securityContext: $(security)
                  volumeMounts: [{name: shm, mountPath: /dev/shm}]
              volumes: # NCCL wants more than the usual 64 MB
                - {name: shm, emptyDir: {medium: Memory}}
END
}
