#!/usr/bin/env bash
# Commands that launch/tpu.sh runs on a TPU worker. Setup puts this file into the home directory.
#
#   bash clip_jax_worker.sh setup COMMIT          unpacks ~/clip_jax.tar.gz and installs the requirements
#   bash clip_jax_worker.sh check CONFIG          fails unless a run can start here
#   bash clip_jax_worker.sh start ARGUMENT...     main.py ARGUMENT... in the background
#   bash clip_jax_worker.sh status                one line: host, state, last line of the log
#   bash clip_jax_worker.sh logs LINES [follow]
#   bash clip_jax_worker.sh stop [SECONDS]        SIGTERM, and SIGKILL if that was not enough
#
# No command may end with status 255: gcloud takes that for a broken connection and tries again.

set -euo pipefail

BASE=$HOME/clip_jax # code/ venv/ commit run.log run.pid run.status
SELF=$HOME/clip_jax_worker.sh
HOST=$(hostname)

fail() {
  echo "$HOST: $*" >&2
  exit 1
}

# The supervisor's process id, if it is alive. The command is compared because after a reboot the
# same id can belong to anything; -ww: whole, however long the path is.
running() {
  [ -f "$BASE/run.pid" ] || return 1
  local pid
  pid=$(cat "$BASE/run.pid")
  ps -ww -p "$pid" -o command= 2>/dev/null | grep -q "clip_jax_worker.sh supervise" || return 1
  echo "$pid"
}

setup() {
  local pid uv=$HOME/.local/bin/uv
  if pid=$(running); then fail "main.py is running (process $pid): stop it before setting up."; fi
  mkdir -p "$BASE"
  rm -rf "$BASE/code" "$BASE/code.new"
  mkdir "$BASE/code.new"
  tar -xzf "$HOME/clip_jax.tar.gz" -C "$BASE/code.new"
  mv "$BASE/code.new" "$BASE/code"

  # The VM images bring Python 3.10; uv brings its own.
  if [ ! -x "$uv" ]; then
    curl -LsSf https://astral.sh/uv/install.sh | env UV_UNMANAGED_INSTALL="$HOME/.local/bin" sh >&2
  fi
  [ -x "$BASE/venv/bin/python" ] || "$uv" venv --quiet --python 3.12 "$BASE/venv"
  "$uv" pip install --quiet --python "$BASE/venv/bin/python" \
    -r "$BASE/code/requirements.txt" "jax[tpu]"
  "$BASE/venv/bin/python" -c "import jax, libtpu"
  echo "$1" >"$BASE/commit"
  echo "$HOST: set up at $1"
}

check() {
  local pid
  if pid=$(running); then fail "main.py is still running (process $pid)."; fi
  if [ ! -f "$BASE/commit" ] || [ ! -f "$BASE/code/main.py" ]; then fail "not set up."; fi
  [ -f "$BASE/code/$1" ] || fail "$1 is not in commit $(cat "$BASE/commit"), which setup sent."
}

start() {
  local pid
  if pid=$(running); then fail "main.py is still running (process $pid)."; fi
  rm -f "$BASE/run.status"
  echo "=== $(date -u '+%Y-%m-%d %H:%M:%S UTC') commit $(cat "$BASE/commit"): main.py $*" \
    >>"$BASE/run.log"
  # As leader of its own session, it outlives the connection, and stop can end the whole group.
  setsid nohup bash "$SELF" supervise "$@" >>"$BASE/run.log" 2>&1 </dev/null &
  pid=$!
  echo "$pid" >"$BASE/run.pid"
  until running >/dev/null || [ -f "$BASE/run.status" ]; do
    kill -0 "$pid" 2>/dev/null || fail "it could not be started: $(tail -n 1 "$BASE/run.log")"
    sleep 0.05
  done
  echo "$HOST: started (process $pid)"
}

# Stays the parent of main.py to record its exit status.
supervise() {
  local child status
  cd "$BASE/code"
  PYTHONUNBUFFERED=1 CLIP_JAX_REVISION=$(cut -c 1-12 "$BASE/commit") "$BASE/venv/bin/python" main.py "$@" &
  child=$!
  # shellcheck disable=SC2064 # the present value is meant
  trap "kill -TERM $child 2>/dev/null || true" TERM
  while :; do # a signal ends wait before main.py has ended
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  echo "$status" >"$BASE/run.status"
}

# True if the same command may succeed: as in clip_jax/errors.py, and where no status was left.
may_resume() {
  [ -f "$BASE/run.status" ] || return 0
  case "$(cat "$BASE/run.status")" in
    42 | 12[7-9] | 1[3-9]? | 2??) ;; # 42, or from 127 on: a signal
    *) return 1 ;;
  esac
}

status() {
  local pid state ended last=""
  if pid=$(running); then
    state="running for $(ps -p "$pid" -o etime= | tr -d ' ')"
  elif [ ! -f "$BASE/run.pid" ]; then
    state="idle, never started"
  elif [ ! -f "$BASE/run.status" ]; then
    state="lost: it ended without a trace, as in a reboot"
  else
    ended=$(cat "$BASE/run.status")
    case "$ended" in
      0) state="finished" ;;
      stopped) state="stopped" ;;
      *) if may_resume; then state="lost: exit status $ended"; else state="failed with exit status $ended"; fi ;;
    esac
  fi
  if [ -f "$BASE/run.log" ]; then
    last=$(tail -n 3 "$BASE/run.log" | tr '\r' '\n' | grep . | tail -n 1 | cut -c 1-160) || true
  fi
  echo "$HOST: $state${last:+ | $last}"
}

logs() {
  local pid
  [ -f "$BASE/run.log" ] || fail "no log yet: main.py was never started here."
  if [ "${2:-}" = follow ] && pid=$(running); then
    exec tail -n "$1" --pid="$pid" -f "$BASE/run.log"
  fi
  exec tail -n "$1" "$BASE/run.log"
}

stop() {
  local pid tenths=$((${1:-120} * 10)) how="stopped"
  if ! pid=$(running); then
    # When another worker is stopped first, main.py has ended here by itself: to be started again.
    if [ -f "$BASE/run.pid" ] && may_resume; then echo stopped >"$BASE/run.status"; fi
    echo "$HOST: main.py was not running"
    return
  fi
  kill -TERM "$pid"
  while running >/dev/null && [ "$tenths" -gt 0 ]; do
    sleep 0.1
    tenths=$((tenths - 1))
  done
  if running >/dev/null; then how="killed, since it did not end by itself"; fi
  kill -KILL -- "-$pid" 2>/dev/null || true # the rest of the group, data workers included
  echo stopped >"$BASE/run.status"
  echo "$HOST: $how"
}

"$@"
