# The settings of launch/slurm.sh, in place of those of launch/tpu.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are read in the other files

LAUNCHER=launch/slurm.sh
COMMANDS="run start status logs stop"
ENV_EXAMPLE="SBATCH_NAME=b32, SBATCH_PARTITION=gpu, SBATCH_NODES=2 and SBATCH_GPUS_PER_NODE=8"

# The options that sbatch takes under the same name.
HANDED_ON="partition account qos time gpus-per-node gres cpus-per-task mem constraint"

# The variable that sets an option: SBATCH_ and its name in capitals.
variable_of() { echo "SBATCH_$(echo "$1" | tr 'a-z-' 'A-Z_')"; }

set_defaults() {
  NAME=${SBATCH_NAME:-clip} NODES=${SBATCH_NODES:-1} TASKS=${SBATCH_TASKS_PER_NODE:-1}
  GRACE=${SBATCH_GRACE:-60} RESTARTS=${SBATCH_MAX_RESTARTS:-5} PYTHON=${SBATCH_PYTHON:-}
  DRY_RUN=no FOLLOW=no LINES_SHOWN=50 JOB="" DESCRIPTION=""
  SBATCH_FLAGS=() MAIN_ARGS=()
}

# The value of an option that is handed on, "" without one.
handed() {
  local variable
  variable=$(variable_of "$1")
  echo "${!variable:-}"
}

options_of() {
  local common="name= env= dry-run"
  case "$1" in
    run | start) echo "$common nodes= tasks-per-node= grace= max-restarts= python= sbatch-flag=" \
      "${HANDED_ON// /= }=" ;;
    logs) echo "$common lines= follow" ;;
    *) echo "$common" ;;
  esac
}

set_option() {
  case "$1" in
    --name) NAME=$2 ;;
    --nodes) NODES=$2 ;;
    --tasks-per-node) TASKS=$2 ;;
    --grace) GRACE=$2 ;;
    --max-restarts) RESTARTS=$2 ;;
    --python) PYTHON=$2 ;;
    --sbatch-flag) SBATCH_FLAGS=(${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} "$2") ;;
    --lines) LINES_SHOWN=$2 ;;
    --follow) FOLLOW=yes ;;
    --dry-run) DRY_RUN=yes ;;
    --env) ;;
    *) printf -v "$(variable_of "${1#--}")" %s "$2" ;;
  esac
}

check_options() {
  local flag gpus
  case "$NAME" in "" | [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) die "The name '$NAME' cannot be a job's" \
    "here: it begins with a letter or digit and continues with letters, digits and . _ -, as in" \
    "--name=clip-b32." ;; esac
  need_number nodes "$NODES"
  need_number tasks-per-node "$TASKS"
  need_number grace "$GRACE"
  need_number max-restarts "$RESTARTS"
  need_number lines "$LINES_SHOWN"
  if [ "$NODES" -lt 1 ] || [ "$TASKS" -lt 1 ]; then
    die "A job has at least one host and one task on it, not --nodes=$NODES and" \
      "--tasks-per-node=$TASKS."
  fi
  gpus=$(handed gpus-per-node)
  gpus=${gpus##*:} # a100:8 asks for 8
  case "$gpus" in "" | *[!0-9]*) ;; *) [ $((gpus % TASKS)) -eq 0 ] || die "The $gpus GPUs of a host" \
    "cannot be shared out evenly among --tasks-per-node=$TASKS: leave that out, and one task" \
    "drives all GPUs of its host." ;; esac
  for flag in ${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"}; do
    case "$flag" in
      --signal* | --requeue | --no-requeue | --open-mode* | --output* | -o* | --job-name* | -J* | \
        --nodes* | -N* | --ntasks* | -n*) die "The flag $flag cannot be handed on: the restarts" \
        "depend on it. --grace=SECONDS, --name, --nodes and --tasks-per-node say what may differ." ;;
      -*) ;;
      *) die "The option --sbatch-flag is '$flag', which is no flag of sbatch: write it as in" \
        "--sbatch-flag=--exclude=node7." ;;
    esac
  done
  LOG=runs/slurm/$NAME.log
  need_slurm
}
