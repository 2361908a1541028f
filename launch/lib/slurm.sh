# The job in SLURM's queue, its log and its end.
# shellcheck shell=bash

# The beginning of every command line for this job.
again() { echo "$LAUNCHER $1 --name=$NAME"; }
pause() { sleep "${SBATCH_POLL:-5}"; }

need_slurm() {
  dry_run || command -v sbatch >/dev/null || die "There is no sbatch on the PATH: run this on a" \
    "login node of the cluster ('module load slurm' on some). With --dry-run the command shows" \
    "what it would do without SLURM."
}

# The Python that the tasks run, of the README's virtual environment unless told.
find_python() {
  local given=$PYTHON
  if [ -z "$PYTHON" ]; then
    PYTHON=.venv/bin/python
    dry_run || [ -x "$PYTHON" ] || PYTHON=$(command -v python3) || true
  fi
  dry_run || command -v "$PYTHON" >/dev/null || die "There is no Python ${given:-"at .venv/bin/python" \
    "or on the PATH"}: make a virtual environment that all hosts see, as in 'python3 -m venv .venv" \
    "&& .venv/bin/pip install -r requirements.txt', or name one with --python=PATH."
}

read_run_arguments() {
  local example="-- --config=configs/vit_b32.py --workdir=/shared/runs/b32"
  parse_main_arguments
  [ -n "$CONFIG" ] || die "There is no --config for main.py: its arguments follow a lone --, as in" \
    "'$(again "$COMMAND") $example'."
  find_config
  need_config
  case "$COORDINATOR" in
    "") MAIN_ARGS=("${MAIN_ARGS[@]}" --coordinator=auto) ;;
    auto) ;;
    *) die "The coordinator $COORDINATOR is a fixed address, but SLURM chooses the hosts: leave" \
      "--coordinator out." ;;
  esac
  need_shared_workdir
}

# A requeued job may start on other hosts, and several hosts write one checkpoint.
need_shared_workdir() {
  local folder=$WORKDIR kind
  case "$WORKDIR" in
    "") die "There is no --workdir for main.py: name a folder that all hosts of the cluster see, as" \
      "in --workdir=/shared/runs/b32, or a bucket, as in --workdir=gs://BUCKET/RUN." ;;
    gs://?* | s3://?*) return ;;
    /tmp/* | /var/tmp/* | /dev/shm/* | /run/*) [ "$NODES" -eq 1 ] || die "The hosts cannot share" \
      "$WORKDIR: each has its own. Name a folder that all hosts of the cluster see, as in" \
      "--workdir=/shared/runs/b32, or a bucket." ;;
  esac
  if dry_run; then return; fi
  folder=${folder/#\~/$HOME}
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  kind=$(stat --file-system --format=%T "$folder" 2>/dev/null) || return 0
  case "$kind" in tmpfs | ramfs | overlayfs | ext2/ext3 | xfs | btrfs | zfs) say "Warning:" \
    "$WORKDIR lies on a disk of this host ($kind). Unless that is exported to all hosts of the" \
    "cluster, the run cannot start there, or not resume on another host." ;; esac
}

# Sets JOB to the number of the job of this name, "" without one, and DESCRIPTION.
find_job() {
  local answer
  set -- squeue "--user=${USER:-$(id -un)}" "--name=$NAME" --noheader "--format=%i|%T|%M|%R"
  if dry_run; then
    call "$@"
    return
  fi
  answer=$("$@") || die "SLURM does not tell what is in the queue; what it says stands above."
  JOB="" DESCRIPTION=""
  if [ -n "$answer" ]; then
    local state elapsed place
    # A job that is requeued while it completes is listed once; the newest of several counts.
    IFS='|' read -r JOB state elapsed place <<<"$(echo "$answer" | tail -n 1)"
    DESCRIPTION="job $JOB is $state for $elapsed, $place"
  fi
}

refuse_second_job() {
  find_job
  [ -z "$JOB" ] || die "$NAME is in the queue already: $DESCRIPTION. '$(again stop)' ends it; another" \
    "run needs another --name."
}

submit() {
  local option value
  set -- "--job-name=$NAME" "--nodes=$NODES" "--ntasks-per-node=$TASKS"
  for option in $HANDED_ON; do
    value=$(handed "$option")
    if [ -n "$value" ]; then set -- "$@" "--$option=$value"; fi
  done
  # Whole hosts: SLURM would give a task one core.
  if [ -z "$(handed cpus-per-task)" ]; then
    set -- "$@" --exclusive
    if [ -z "$(handed mem)" ]; then set -- "$@" --mem=0; fi
  fi
  set -- "$@" --requeue --open-mode=append "--signal=TERM@$GRACE" --export=ALL "--output=$LOG"
  set -- "$@" ${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} launch/slurm_job.sh job "$NAME" "$PYTHON" \
    "$TASKS" "$RESTARTS" "$GRACE" "$WORKDIR" "${MAIN_ARGS[@]}"
  call mkdir -p runs/slurm
  if dry_run; then
    call sbatch --parsable "$@"
    return
  fi
  rm -f "runs/slurm/$NAME.state"
  JOB=$(sbatch --parsable "$@") || die "SLURM did not take the job; what it says stands above." \
    "'sinfo' lists the partitions and their time limits, 'sacctmgr show associations' the accounts."
  JOB=${JOB%%;*} # the cluster's name may follow
}

# The run's end in words, as its batch script left it.
ended() {
  local END=""
  if [ ! -f "runs/slurm/$NAME.state" ]; then
    echo "never started from here"
    return
  fi
  # shellcheck source=/dev/null
  . "runs/slurm/$NAME.state"
  echo "${END:-lost: the job ended without a trace, as when it is killed at its time limit; start resumes it}"
}

last_line() {
  tail -n 5 "$LOG" | tr '\r' '\n' | grep . | tail -n 1 | cut -c 1-160 || true
}

# Shows the log from its last lines on, until the job is over.
follow() {
  local tail said=""
  tail -n "$1" -F "$LOG" 2>/dev/null &
  tail=$!
  # shellcheck disable=SC2064 # the present value is meant
  trap "kill $tail 2>/dev/null || true" EXIT
  while :; do
    find_job
    [ -n "$JOB" ] || break
    case "$DESCRIPTION" in *PENDING*)
      if [ "$said" != "${DESCRIPTION##* }" ]; then say "$(date '+%H:%M:%S') $NAME waits: $DESCRIPTION."; fi
      said=${DESCRIPTION##* }
      ;;
    esac
    pause
  done
  sleep 1 # for the last lines
  kill "$tail" 2>/dev/null || true
}
