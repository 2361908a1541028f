#!/usr/bin/env bash
# A training run as a SLURM job: launch/slurm.sh --help. Needs bash and SLURM's commands.

set -euo pipefail
ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
for part in say options main_arguments slurm_options slurm_help slurm; do
  # shellcheck source=/dev/null
  . "$ROOT/launch/lib/$part.sh"
done

command_start() {
  find_python
  read_run_arguments
  refuse_second_job
  submit
  dry_run || say "Job $JOB is in the queue. '$(again status)' tells its state, '$(again logs)" \
    "--follow' shows the log."
}

command_run() {
  find_python
  read_run_arguments
  find_job
  if [ -n "$JOB" ]; then say "$NAME is in the queue already, as job $JOB."; else submit; fi
  if dry_run; then return; fi
  say "Following the log. Ctrl-C ends only that: the job continues."
  follow 0
  command_status
  [ "$(ended)" = finished ]
}

command_status() {
  find_job
  if dry_run; then return; fi
  if [ -n "$JOB" ]; then echo "$NAME: $DESCRIPTION"; else echo "$NAME: $(ended)"; fi
  if [ -f "$LOG" ]; then echo "  $(last_line)"; fi
}

command_logs() {
  if dry_run; then
    quoted tail -n "$LINES_SHOWN" "$LOG"
    return
  fi
  [ -f "$LOG" ] || die "There is no log $LOG: $NAME was never started from here, or still waits in" \
    "the queue; '$(again status)' tells."
  if [ "$FOLLOW" = yes ]; then follow "$LINES_SHOWN"; else tail -n "$LINES_SHOWN" "$LOG"; fi
}

command_stop() {
  find_job
  if dry_run; then JOB=JOB; fi
  if [ -z "$JOB" ]; then
    say "There is no job $NAME in the queue."
    return
  fi
  call scancel "$JOB" || die "Job $JOB was not cancelled; SLURM says why above."
  if dry_run; then return; fi
  while [ -n "$JOB" ]; do
    pause
    find_job
  done
  say "$NAME is stopped. start with the same arguments resumes it."
}

run_launcher "$@"
