#!/usr/bin/env bash
# Cloud TPU VMs for a training run: launch/tpu.sh --help. Needs bash 3.2, git and gcloud.

set -euo pipefail
ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
for part in say options main_arguments tpu_options help tpu run; do
  # shellcheck source=/dev/null
  . "$ROOT/launch/lib/$part.sh"
done

command_create() {
  check_type
  need_gcloud
  ask_for_tpu || exit 2
  dry_run || say "Asked for $NAME ($SLICES x $TYPE) in $ZONE."
  if [ "$WAIT" = yes ]; then command_wait; else
    dry_run || say "'$(again wait)' waits for it; a request can be deleted at any time."
  fi
}

command_wait() {
  need_gcloud
  wait_for_tpu || look_for_workers
  if ! dry_run; then
    say "The TPU $NAME is there."
    remind_of_costs
  fi
}

command_setup() {
  look_for_workers
  set_up
  dry_run || say "Every worker is set up."
}

command_start() {
  read_main_arguments
  look_for_workers
  need_shared_workdir
  launch_run
  dry_run || say "Started on every worker. '$(again logs) --follow' shows the log."
}

command_logs() {
  local node
  look_for_workers
  node=$(echo "$NODES" | tr ' ' '\n' | sed -n "$((SLICE + 1))p")
  [ -n "$node" ] || die "There is no slice $SLICE: $NAME has $(echo "$NODES" | wc -w | tr -d ' ')," \
    "numbered from 0."
  set -- "$node" "$WORKER" logs "$LINES_SHOWN"
  if [ "$FOLLOW" = yes ]; then set -- "$@" follow; fi
  ssh_to "$@"
}

command_status() {
  need_gcloud
  look
  dry_run || echo "$NAME in $ZONE${TYPE:+, $TYPE}: $STATE${REASON:+ ($REASON)}"
  [ "$STATE" = ACTIVE ] || return 0
  on_workers status || die "Not every worker answered: a worker that was never set up needs" \
    "'$(again setup)'."
}

command_stop() {
  look_for_workers
  on_workers stop || die "Not every worker could be reached, so main.py may still run there: see" \
    "'$(again status)'."
  if ! dry_run; then
    say "main.py runs on no worker of $NAME any more."
    remind_of_costs
  fi
}

command_delete() {
  local answer=""
  need_gcloud
  if [ "$YES" != yes ] && ! dry_run; then
    printf 'Delete the TPU %s in %s with everything on its disks? [y/N] ' "$NAME" "$ZONE" >&2
    read -r answer || say ""
    case "$answer" in [yY] | [yY][eE][sS]) ;; *) die "Nothing was deleted: answer y, or give --yes." ;; esac
  fi
  give_back_tpu
  dry_run || say "The TPU $NAME is deleted."
}

command_run() {
  check_type
  read_main_arguments
  NODES=$(planned_nodes)
  need_shared_workdir # before anything costs money
  need_gcloud
  run_to_its_end
  if dry_run; then
    if [ "$DELETE" = yes ]; then give_back_tpu; fi
    return
  fi
  case "$OVER" in
    running)
      say "The connection to the log ended, but the run continues: '$(again logs) --follow'."
      return
      ;;
    deleted) die "The TPU $NAME was deleted meanwhile, so the watch ends; '$(again run) ...' with the" \
      "same arguments resumes the run." ;;
    finished | stopped) ;;
    failed | lost) ssh_to "${NODES%%[[:space:]]*}" 0 logs 30 || true ;;
    *)
      DELETE=no
      say "The state of the run is unclear (it is $OVER): look with '$(again status)'."
      ;;
  esac
  if [ -n "$REPORT" ]; then echo "$REPORT"; fi
  case "$REPORT" in *": failed"*": running"* | *": running"*": failed"*) on_workers stop || true ;; esac
  case "$OVER" in finished | stopped | failed | lost) say "The run is over: $OVER." ;; esac
  if [ "$DELETE" = yes ]; then give_back_tpu; else remind_of_costs; fi
  [ "$OVER" = finished ]
}

run_launcher "$@"
