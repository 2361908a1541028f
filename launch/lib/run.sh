# A training run on the TPU: its code, its start and its end.
# shellcheck shell=bash

# Several workers write one checkpoint, so it must lie where all of them reach it.
need_shared_workdir() {
  case "$WORKDIR" in gs://?*) return ;; esac
  one_worker || die "The workers of ${TYPE:-this TPU} cannot share ${WORKDIR:-"the default workdir"}:" \
    "each would see its own disk, and checkpoints would be lost with it. Give a bucket in the" \
    "TPU's region, as in --workdir=gs://BUCKET/RUN (a slice with one worker, such as v5litepod-8," \
    "may do without; in a --dry-run say so with --type)."
}

set_up() {
  local commit changed archive
  command -v git >/dev/null || die "git is not installed, and setup sends what it has committed."
  commit=$(git rev-parse --verify --quiet "${REF:-HEAD}^{commit}") || die "There is no commit" \
    "'${REF:-HEAD}' in this repository: give --ref a branch, a tag or a commit."
  changed=$(git status --porcelain | wc -l | tr -d ' ')
  if [ -z "$REF" ] && [ "$changed" -gt 0 ]; then
    say "Warning: $changed changed or new file(s) are not committed and therefore not sent; the" \
      "workers get commit $(git rev-parse --short "$commit"). Commit first if the run needs them."
  fi
  archive=$(git rev-parse --git-path clip_jax.tar.gz)
  call git archive --format=tar.gz "--output=$archive" "$commit" || die "The commit could not be" \
    "packed; git says why above."
  each_slice send_files "$archive" || die "Not every worker received the code. If gcloud says that" \
    "the SSH key is not in the agent, run 'ssh-add ~/.ssh/google_compute_engine' first; then try" \
    "again, which is safe."
  on_workers setup "$commit" || die "Not every worker could be set up; the lines above say why. Run" \
    "the same command again once that is fixed: it resumes where it stopped."
}

launch_run() {
  on_workers check "$CONFIG" || die "Nothing was started, because not every worker is ready; the" \
    "lines above say why. '$(again stop)' ends a run, '$(again setup)' sends the committed code."
  set -- "${MAIN_ARGS[@]}"
  [ -n "$COORDINATOR" ] || set -- "$@" --coordinator=auto
  on_workers start "$@" || die "Not every worker started: see '$(again status)', and" \
    "end the others with '$(again stop)' before you start again."
}

# Sets RUN to the state of the whole run, REPORT to the workers' lines.
read_run() {
  local states
  RUN=unreachable
  REPORT=$(on_workers status 2>/dev/null) || return 0
  states=$(echo "$REPORT" | sed -n 's/^[^ ]*: \([a-z]*\).*/\1/p' | sort -u | tr '\n' ' ')
  for RUN in lost failed stopped; do
    case " $states" in *" $RUN "*) return ;; esac
  done
  RUN=mixed
  case "$states" in "running " | "finished " | "idle ") RUN=${states% } ;; esac
  if [ "$states" = "finished running " ]; then RUN=running; fi
}

# True if Google preempted a node, which the state of its request may show only later.
node_is_gone() {
  local node
  for node in $NODES; do
    case "$(tpus tpu-vm describe "$node" "--format=value(state)" 2>/dev/null)" in
      PREEMPTED | TERMINATED) return 0 ;;
    esac
  done
  return 1
}

# Returns when the run is over or given up; sets OVER to preempted, deleted or the run's state.
watch_run() {
  local trouble=0 said=""
  while :; do
    look
    case "$STATE" in
      FAILED | SUSPENDING | SUSPENDED) OVER=preempted && return ;;
      NONE | DELETING) OVER=deleted && return ;;
      UNKNOWN) say "Google Cloud does not answer: ${REASON} Trying again." ;;
      ACTIVE)
        read_run
        if [ "$RUN" != "$said" ]; then say "$(date '+%H:%M:%S') The run is $RUN."; fi
        said=$RUN
        case "$RUN" in
          finished | stopped) OVER=$RUN && return ;;
          running) trouble=0 ;;
          *) # a preemption looks like this at first
            if node_is_gone; then OVER=preempted && return; fi
            trouble=$((trouble + 1))
            if [ "$trouble" -ge 5 ]; then
              OVER=$RUN
              return
            fi
            ;;
        esac
        ;;
    esac
    pause
  done
}

# Creates the TPU unless it exists; with --watch, also creates a preempted TPU again.
obtain_tpu() {
  local refusals=0 asked=no
  look
  if dry_run; then STATE=NONE; fi
  while :; do
    case "$STATE" in
      NONE) if ask_for_tpu; then asked=yes; elif [ "$WATCH" != yes ]; then exit 2; fi ;;
      FAILED | SUSPENDED | SUSPENDING)
        [ "$WATCH" = yes ] || look_for_workers
        if [ "$STATE" != SUSPENDING ] && give_back_tpu && ask_for_tpu; then asked=yes; fi
        ;;
      UNKNOWN) [ -n "$OVER" ] || look_for_workers ;; # a watch that lasts for days retries
    esac
    if wait_for_tpu; then return; fi
    case "$STATE,$asked" in
      NONE,yes | DELETING,yes) die "The request for $NAME was deleted while it was waited for; run the" \
        "same command again to ask anew." ;;
      DELETING,no | SUSPENDING,*) ;;
      *) refusals=$((refusals + 1)) ;;
    esac
    if [ "$WATCH" != yes ] || [ "$refusals" -gt 3 ]; then
      die "The request for $NAME became $STATE instead of ACTIVE: 'gcloud compute tpus" \
        "queued-resources describe $NAME --zone=$ZONE' tells the reason (quota, capacity, a type" \
        "the zone lacks). Then '$(again delete)' and try again, perhaps in another zone."
    fi
    pause
  done
}

# Sets up and starts, unless the run is running already (this command was started again).
bring_up_run() {
  if ! dry_run; then
    read_run
    if [ "$RUN" = running ]; then
      say "The run is running already."
      return
    fi
    case "$REPORT" in *": running"*) on_workers stop ;; esac
  fi
  set_up
  launch_run
}

show_plan_of_watch() {
  echo "# Every ${TPU_POLL:-60} seconds, until the run is over:"
  look
  on_workers status
  echo "# When the TPU was preempted, this and then all of the above again:"
  give_back_tpu
}

# Follows the first worker's log to its end.
follow_run() {
  local i
  say "Following the first worker's log. Ctrl-C ends only that: the run continues."
  ssh_to "${NODES%%[[:space:]]*}" 0 logs 50 follow || true
  if dry_run; then return; fi
  for i in 1 2 3; do # the other workers end a little later
    read_run
    [ "$RUN" = running ] || break
    [ "$i" -eq 3 ] || sleep 2
  done
  OVER=$RUN
}

# Counts a lost run in RESTARTS unless it went on for a while: a cause that lasts is left to the user.
count_restart() {
  if [ $((SECONDS - STARTED)) -gt "${TPU_STEADY:-1200}" ]; then RESTARTS=0; fi
  RESTARTS=$((RESTARTS + 1))
}

run_to_its_end() {
  local failures=0 STARTED RESTARTS=0
  while :; do
    obtain_tpu
    need_shared_workdir
    if [ "$WATCH" != yes ]; then
      bring_up_run
      follow_run
      break
    fi
    if (bring_up_run); then # a preemption can come in between
      failures=0
      if dry_run; then
        show_plan_of_watch
        break
      fi
      STARTED=$SECONDS
      watch_run
    else
      failures=$((failures + 1))
      [ "$failures" -lt 5 ] || die "The run could not be started in $failures attempts; the lines above" \
        "say why. The TPU $NAME is still yours and billed: fix it and run the same command again," \
        "or '$(again delete)'."
      OVER=lost
      look
      case "$STATE" in NONE | DELETING) OVER=deleted ;; esac
      if [ "$STATE" = ACTIVE ] && node_is_gone; then OVER=preempted; fi
    fi
    case "$OVER" in
      preempted)
        say "$(date '+%H:%M:%S') The TPU was preempted: creating it again."
        if [ "$STATE" = ACTIVE ]; then give_back_tpu || true; fi
        ;;
      lost)
        if [ "$failures" -eq 0 ]; then count_restart; fi
        if [ "$RESTARTS" -gt "$MAX_RESTARTS" ]; then
          say "The run was lost $RESTARTS times in a row, each time within $((${TPU_STEADY:-1200} / 60))" \
            "minutes of its start, so it is not started again (--max-restarts=$MAX_RESTARTS)."
          break
        fi
        say "$(date '+%H:%M:%S') Starting the run again."
        pause
        ;;
      *) break ;;
    esac
  done
}
