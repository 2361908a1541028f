# The TPU, requested as a queued resource, and the commands to its workers.
# shellcheck shell=bash

tpus() { call gcloud compute tpus "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}; }

need_gcloud() {
  dry_run || command -v gcloud >/dev/null || die "There is no gcloud on the PATH: install" \
    "the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then run" \
    "'gcloud init' and 'gcloud auth login'. With --dry-run this command shows what it would do" \
    "without gcloud."
}

# The VM image that belongs to an accelerator type.
default_runtime() {
  case "$1" in
    v5litepod-[0-9]*) echo v2-alpha-tpuv5-lite ;;
    v5p-[0-9]*) echo v2-alpha-tpuv5 ;;
    v6e-[0-9]*) echo v2-alpha-tpuv6e ;;
    v[234]-[0-9]*) echo tpu-ubuntu2204-base ;;
    v5e-[0-9]*) die "Unknown type $1: Google Cloud calls a v5e slice v5litepod, so try" \
      "--type=v5litepod-${1#v5e-}." ;;
    *) die "Unknown type '$1': known are v5litepod-N (v5e), v6e-N, v5p-N, v4-N, v3-N and v2-N, such" \
      "as --type=v5litepod-256; 'gcloud compute tpus accelerator-types list --zone=$ZONE' lists" \
      "what your zone has. For a newer one give its VM image too, with --runtime=." ;;
  esac
}

# True if the TPU, its type known, has a single worker.
one_worker() {
  case "$TYPE" in
    v[234]-8 | v5p-8 | v5litepod-[148] | v6e-[148]) [ "$(echo "$NODES" | wc -w)" -eq 1 ] ;;
    *) false ;;
  esac
}

# The names that Google Cloud gives to the slices of this queued resource.
planned_nodes() {
  local i=0
  if [ "$SLICES" -eq 1 ]; then
    echo "$NAME"
  else
    while [ "$i" -lt "$SLICES" ]; do
      echo "$NAME-$i"
      i=$((i + 1))
    done
  fi
}

# Sets STATE (NONE without such a resource, UNKNOWN without an answer), TYPE and NODES.
look() {
  local answer kind nodes fields
  fields="state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec[].nodeId"
  set -- queued-resources describe "$NAME" "--format=value($fields)"
  if dry_run; then
    tpus "$@"
    STATE=ACTIVE NODES=$(planned_nodes)
  elif answer=$(tpus "$@" 2>&1); then
    answer=$(echo "$answer" | tr '\t' ',' | grep -E '^[A-Z_]+,' || true) # no remarks of gcloud's
    IFS=, read -r STATE kind nodes <<<"$answer"
    STATE=${STATE:-UNKNOWN} TYPE=${kind:-$TYPE} REASON=""
    NODES=${nodes//;/ }
    [ -n "$NODES" ] || NODES=$(planned_nodes)
  else
    STATE=UNKNOWN
    case "$answer" in *NOT_FOUND*) STATE=NONE ;; esac
    REASON=$(echo "$answer" | grep . | head -n 3 | tr '\n' ' ') || true
  fi
}

# Looks for the TPU, for the commands that need its workers.
look_for_workers() {
  need_gcloud
  look
  case "$STATE" in
    ACTIVE) ;;
    NONE) die "There is no TPU named $NAME in $ZONE: create one with '$(again create) --type=...'," \
      "or look for yours with 'gcloud compute tpus queued-resources list --zone=$ZONE'." ;;
    UNKNOWN) die "Google Cloud does not tell the state of $NAME: ${REASON}" ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) die "The TPU $NAME is gone (its request is $STATE): delete the" \
      "request with '$(again delete)' and create it anew; '$(again run) --watch ...' does that by" \
      "itself." ;;
    *) die "The TPU $NAME is not there yet (its request is $STATE): '$(again wait)' waits for it." ;;
  esac
}

ask_for_tpu() {
  local flag
  [ -n "$RUNTIME" ] || RUNTIME=$(default_runtime "$TYPE")
  set -- queued-resources create "$NAME" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME"
  if [ "$SLICES" -eq 1 ]; then set -- "$@" "--node-id=$NAME"; else
    set -- "$@" "--node-count=$SLICES" "--node-prefix=$NAME"
  fi
  if [ "$SPOT" = yes ]; then set -- "$@" --spot; fi
  if [ "$RESERVED" = yes ]; then set -- "$@" --reserved; fi
  for flag in ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"}; do set -- "$@" "$flag"; done
  tpus "$@" || {
    say "Google Cloud did not take the request for $NAME; what it says stands above."
    return 1
  }
}

give_back_tpu() { tpus queued-resources delete "$NAME" --force --quiet; }

# Returns 0 once the TPU is there, 1 once it is clear that it will not come.
wait_for_tpu() {
  local said=""
  while :; do
    look
    case "$STATE" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | NONE | DELETING) return 1 ;;
    esac
    if [ "$STATE" != "$said" ]; then
      say "$(date '+%H:%M:%S') The request for $NAME is $STATE; waiting for ACTIVE." \
        "${REASON:-}"
      said=$STATE
    fi
    pause
  done
}

# ssh_to NODE WORKER COMMAND...
ssh_to() {
  local node=$1 worker=$2
  shift 2
  tpus tpu-vm ssh "$node" "--worker=$worker" "--command=bash clip_jax_worker.sh $(quoted "$@")"
}

# Runs a command for every slice, the slices at the same time: `each_slice FUNCTION ARGUMENT...`
# calls FUNCTION NODE ARGUMENT... and fails if one fails.
each_slice() {
  local node pid pids="" result=0 function=$1
  shift
  for node in $NODES; do
    if dry_run || [ "$node" = "$NODES" ]; then
      "$function" "$node" "$@" </dev/null || result=1
    else
      "$function" "$node" "$@" </dev/null &
      pids="$pids $!"
    fi
  done
  for pid in $pids; do wait "$pid" || result=1; done
  return "$result"
}

ssh_to_all() { ssh_to "$1" all "${@:2}"; }
on_workers() { each_slice ssh_to_all "$@"; }

send_files() { tpus tpu-vm scp "$2" launch/clip_jax_worker.sh "$1:" --worker=all; }
