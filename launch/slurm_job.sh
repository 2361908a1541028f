#!/usr/bin/env bash
# The batch script of launch/slurm.sh, which starts main.py again as long as that may help.
#
#   slurm_job.sh job NAME PYTHON TASKS RESTARTS GRACE WORKDIR ARGUMENT...   on the job's first host
#   slurm_job.sh task PYTHON TASKS ARGUMENT...                              main.py, as each task
#
# TASKS is their number on every host. SLURM runs both in the repository.

set -uo pipefail

say() { echo "=== $(date -u '+%Y-%m-%d %H:%M:%S UTC') $*"; }

# Keeps what a later start of the job, or launch/slurm.sh status, needs to know. END is the run's
# end in words, "" before it.
remember() {
  END=$1
  printf 'FAILURES=%q\nSTEP=%q\nEND=%q\n' "$FAILURES" "$STEP" "$END" >"runs/slurm/$NAME.state"
}

# over CODE END WORD...
over() {
  remember "$2"
  say "${@:3}"
  exit "$1"
}

# The step of the newest checkpoint, local or in a bucket.
newest_step() {
  "$PYTHON" - "$WORKDIR" <<'PYTHON'
import sys

from clip_jax.storage import locations

folder = locations.parse(sys.argv[1]) / "checkpoints"
names = [path.name for path in folder.iterdir()] if folder.exists() else []
print(max((int(name) for name in names if name.isdigit()), default=0))
PYTHON
}

# Counts the failures in a row that left no new checkpoint.
count_failure() {
  local step
  step=$(newest_step) || step=$STEP
  if [ "$step" -gt "$STEP" ]; then FAILURES=0; else FAILURES=$((FAILURES + 1)); fi
  STEP=$step
  remember ""
}

# Such as RUNNING, or COMPLETING once the job was cancelled or requeued; the controller may be away.
job_state() {
  local i
  for i in 1 2 3 4 5 6 7 8 9 10; do
    squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T && return
    [ "$i" -eq 10 ] || sleep "$PAUSE"
  done
}

# Seconds until the time limit, or until a preemption that was announced.
seconds_left() {
  local left days=0 hours minutes seconds
  left=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%L)
  case "$left" in
    "" | *[!0-9:-]*) echo 999999999 && return ;; # UNLIMITED
    *-*) days=${left%%-*} left=${left#*-} ;;
  esac
  IFS=: read -r hours minutes seconds <<<"$left"
  if [ -z "$seconds" ]; then seconds=$minutes minutes=$hours hours=0; fi
  echo $((((10#${days:-0} * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$seconds))
}

job() {
  NAME=$1 PYTHON=$2 WORKDIR=$6 FAILURES=0 STEP=0 END="" PAUSE=${RESTART_PAUSE:-10}
  local tasks=$3 restarts=$4 grace=$5 code state starts=${SLURM_RESTART_COUNT:-0}
  shift 6
  [ -f main.py ] || {
    say "The job does not see the repository: it must lie where all hosts of the cluster see it."
    exit 2
  }
  # shellcheck source=/dev/null
  if [ "$starts" -gt 0 ]; then . "runs/slurm/$NAME.state"; else STEP=$(newest_step) || STEP=0; fi
  remember ""
  # When SLURM ends the job it signals the script too, which must outlive the tasks.
  trap ':' TERM
  # Errors of srun itself are worth another start. Tasks share the job's CPUs, and none is killed
  # while another one still saves.
  export SLURM_EXIT_ERROR=255 PYTHONUNBUFFERED=1
  set -- --ntasks=$((SLURM_JOB_NUM_NODES * tasks)) --ntasks-per-node="$tasks" --cpu-bind=none --kill-on-bad-exit=0 \
    --wait=300 bash launch/slurm_job.sh task "$PYTHON" "$tasks" "$@"
  if [ $((SLURM_JOB_NUM_NODES * tasks)) -gt 1 ]; then set -- --label "$@"; fi
  while :; do
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: main.py starts"
    srun "$@"
    code=$?
    case $code in
      0) over 0 finished "The run has finished." ;;
      42 | 12[7-9] | 1[3-9]? | 2??) ;; # as in clip_jax/errors.py; the others would only come back
      *) over "$code" "failed with exit status $code" \
        "The run ended with exit status $code, which another start would not cure." ;;
    esac
    state=$(job_state)
    if [ "$state" != RUNNING ]; then
      over "$code" "stopped by SLURM" "SLURM ends the job, or requeues it (exit status $code)."
    fi
    count_failure
    if [ "$FAILURES" -gt "$restarts" ]; then
      over "$code" "failed with exit status $code" "The run ended with exit status $code after" \
        "$restarts restarts in a row without a new checkpoint (step $STEP). The lines above say why;" \
        "once that is cured, launch/slurm.sh start with the same arguments resumes it."
    fi
    if [ "$(seconds_left)" -lt $((grace + 120)) ]; then
      say "Exit status $code shortly before the end of the job's time: it goes back to the queue."
      scontrol requeue "$SLURM_JOB_ID" && exit 0
      over "$code" "failed: not requeued" "SLURM does not requeue the job, for which it says the" \
        "reason above: launch/slurm.sh start with the same arguments resumes the run."
    fi
    say "Exit status $code: main.py starts again (the newest checkpoint is step $STEP;" \
      "$FAILURES of $restarts restarts without a new one)."
    sleep $((PAUSE * (FAILURES + 1)))
  done
}

task() {
  local python=$1 tasks=$2 visible=${CUDA_VISIBLE_DEVICES:-${ROCR_VISIBLE_DEVICES:-}} count first=0
  shift 2
  # Those of the host, or, where SLURM has split them already, those of the task.
  count=$(echo "$visible" | tr ',' '\n' | grep -c .)
  if [ "$count" -eq 0 ]; then count=${SLURM_GPUS_ON_NODE:-$(find /dev -name 'nvidia[0-9]*' | wc -l)}; fi
  if [ "$count" -eq "${SLURM_GPUS_ON_NODE:-$count}" ]; then
    count=$((count / tasks))
    first=$((SLURM_LOCALID * count))
  fi
  # JAX would take one GPU for each task, that of its number on the host.
  if [ "$count" -gt 0 ]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s , "$first" $((first + count - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  exec "$python" main.py "$@"
}

"$@"
