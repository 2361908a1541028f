#!/usr/bin/env bash
# A training run on Google Kubernetes Engine: launch/gke.sh --help. Needs bash 3.2, git and kubectl.

set -euo pipefail
ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
for part in say options main_arguments gke_options gke_machines gke_manifest; do
  # shellcheck source=/dev/null
  . "$ROOT/launch/lib/$part.sh"
done

kube() {
  call kubectl ${CONTEXT:+"--context=$CONTEXT"} ${NAMESPACE:+"--namespace=$NAMESPACE"} "$@"
}

need() {
  dry_run || command -v "$1" >/dev/null || die "There is no $1 on the PATH: install it ($2). With" \
    "--dry-run this command shows what it would do without it."
}

need_kubectl() { need kubectl https://kubernetes.io/docs/tasks/tools; }

# Sets STATE: NONE, Completed, Failed, or "" while it runs or waits.
look() {
  local answer
  STATE=NONE
  if answer=$(kube get jobset "$NAME" "--output=jsonpath={.status.terminalState}" 2>&1); then
    STATE=$answer
    return
  fi
  case "$answer" in
    *NotFound*) ;;
    *"doesn't have a resource type"*) die "The cluster knows no JobSet: install it once, as" \
      "https://jobset.sigs.k8s.io/docs/installation says (0.10 or later)." ;;
    *) die "The cluster does not answer: $(echo "$answer" | tail -n 1). 'gcloud container clusters" \
      "get-credentials CLUSTER --location=REGION' connects kubectl to yours." ;;
  esac
}

command_build() {
  local commit
  commit=$(committed)
  need docker https://docs.docker.com/get-docker
  # The archive is what is committed, and nothing else.
  set -- docker build --platform=linux/amd64 --file=launch/Dockerfile "--tag=$(image "$commit")" \
    "--build-arg=JAX=$(jax_of)" "--build-arg=COMMIT=$commit" -
  if dry_run; then
    echo "git archive $commit | $(quoted "$@")"
  else
    git archive "$commit" | "$@" || die "The image could not be built; docker says why above."
  fi
  call docker push "$(image "$commit")" || die "The image could not be sent: 'gcloud auth" \
    "configure-docker ${IMAGE%%/*}' lets docker speak for you."
}

command_run() {
  local commit
  read_main_arguments
  case "$WORKDIR" in [a-z]*://?*) ;; *) die "The pods cannot share ${WORKDIR:-"the default workdir"}:" \
    "their disks go with them. Give a bucket in the cluster's region, as in --workdir=gs://BUCKET/RUN." ;; esac
  case "${MAIN_ARGS[*]}" in *[[:cntrl:]]*) die "An argument of main.py has a line break or another control" \
    "character: leave it out, or put the setting into the config." ;; esac
  commit=$(committed)
  need_kubectl
  if dry_run; then
    manifest "$(image "$commit")"
    return
  fi
  look
  case "$STATE" in
    NONE) ;;
    Completed | Failed) kube delete jobset "$NAME" --wait >&2 ;; # frees the name
    *) die "The run $NAME is there already: see '$(again status)', and end it with '$(again stop)'" \
      "before you start it again." ;;
  esac
  manifest "$(image "$commit")" | kube create --filename=- >&2 || die "The cluster did not take the" \
    "JobSet; it says why above. JobSet 0.10 or later has to be installed."
  say "Started. '$(again status)' shows the pods, '$(again logs) --follow' the log."
}

command_status() {
  local fields
  need_kubectl
  fields='{range .status.conditions[?(@.status=="True")]}{.type}{": "}{.message}{"\n"}{end}'
  fields="$fields"'{"Restarts: "}{.status.restarts}{"\n"}'
  if ! dry_run; then
    look
    [ "$STATE" != NONE ] || die "There is no run named $NAME: start one with '$(again run) -- ...'."
    case "$STATE" in Completed) STATE="finished" ;; Failed) STATE="failed" ;; *) STATE="running or waiting" ;; esac
    echo "$NAME: $STATE"
  fi
  kube get jobset "$NAME" "--output=jsonpath=$fields"
  kube get pods "--selector=$(pods)" "--output=custom-columns=POD:.metadata.name,PHASE:.status.phase,$(
  )WAITING:.status.containerStatuses[*].state.waiting.reason,$(
  )EXIT:.status.containerStatuses[*].state.terminated.exitCode,NODE:.spec.nodeName,$(
  )UNSCHEDULED:.status.conditions[?(@.reason==\"Unschedulable\")].message"
}

command_logs() {
  need_kubectl
  set -- "--tail=$LINES_SHOWN" --container=main
  if [ "$FOLLOW" = yes ]; then set -- "$@" --follow; fi
  kube logs "--selector=$(pods),jobset.sigs.k8s.io/job-index=$SLICE,$(
  )batch.kubernetes.io/job-completion-index=$WORKER" "$@"
}

command_stop() {
  need_kubectl
  say "main.py is asked to save and to end; its pods have ${GRACE} s for that."
  kube delete jobset "$NAME" --cascade=foreground --wait || die "The run $NAME could not be stopped;" \
    "kubectl says why above."
  dry_run || say "The run $NAME has ended, and no pod is left. Its nodes are billed until the cluster's" \
    "autoscaler or you remove them; '$(again run) -- ...' with the same arguments resumes."
}

run_launcher "$@"
