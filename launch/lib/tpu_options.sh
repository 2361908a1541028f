# The options of launch/tpu.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are read in the other files

LAUNCHER=launch/tpu.sh
COMMANDS="create wait setup start logs status stop delete run"
ENV_EXAMPLE="TPU_NAME=clip, TPU_ZONE=us-east5-b, TPU_TYPE=v5litepod-16 and PROJECT=my-project"
CONFIG_GOES="setup sends only the repository"

set_defaults() {
  NAME=${TPU_NAME:-} ZONE=${TPU_ZONE:-} TYPE=${TPU_TYPE:-} SLICES=${TPU_SLICES:-1}
  RUNTIME=${TPU_RUNTIME:-} PROJECT=${PROJECT:-}
  SPOT=no RESERVED=no WATCH=no DELETE=no DRY_RUN=no FOLLOW=no YES=no WAIT=no
  REF="" WORKER=0 SLICE=0 LINES_SHOWN=50 MAX_RESTARTS=5
  REASON="" REPORT="" RUN="" OVER="" STATE="" NODES=""
  CREATE_FLAGS=() MAIN_ARGS=()
}

# Options beyond the common ones; a trailing = takes a value.
options_of() {
  local common="name= zone= project= type= slices= env= dry-run" create="runtime= create-flag= spot reserved"
  case "$1" in
    create) echo "$common $create wait" ;;
    setup) echo "$common ref=" ;;
    logs) echo "$common worker= slice= lines= follow" ;;
    run) echo "$common $create ref= watch max-restarts= delete" ;;
    delete) echo "$common yes" ;;
    *) echo "$common" ;;
  esac
}

set_option() {
  case "$1" in
    --name) NAME=$2 ;;
    --zone) ZONE=$2 ;;
    --project) PROJECT=$2 ;;
    --type) TYPE=$2 ;;
    --slices) SLICES=$2 ;;
    --runtime) RUNTIME=$2 ;;
    --create-flag) CREATE_FLAGS=(${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} "$2") ;;
    --ref) REF=$2 ;;
    --worker) WORKER=$2 ;;
    --slice) SLICE=$2 ;;
    --lines) LINES_SHOWN=$2 ;;
    --spot) SPOT=yes ;;
    --reserved) RESERVED=yes ;;
    --wait) WAIT=yes ;;
    --watch) WATCH=yes ;;
    --max-restarts) MAX_RESTARTS=$2 ;;
    --delete) DELETE=yes ;;
    --follow) FOLLOW=yes ;;
    --yes) YES=yes ;;
    --dry-run) DRY_RUN=yes ;;
  esac
}

check_options() {
  [ -n "$NAME" ] || die "There is no name for the TPU: give --name=clip, or set TPU_NAME in the" \
    "environment or in the file of --env."
  case "$NAME" in [!a-z]* | *[!a-z0-9-]* | *-) die "The name '$NAME' cannot be a TPU's: it begins with" \
    "a lower-case letter, continues with lower-case letters, digits and hyphens, and does not end in" \
    "a hyphen, as in --name=clip-l14." ;; esac
  [ -n "$ZONE" ] || die "There is no zone: give --zone=us-east5-b, or set TPU_ZONE in the environment" \
    "or in the file of --env. 'gcloud compute tpus locations list' lists the zones with TPUs."
  case "$ZONE" in [a-z]*-[a-z]*[0-9]-[a-z]) ;; *) die "The zone '$ZONE' is not one: a zone is a region" \
    "with a letter, as in --zone=us-east5-b." ;; esac
  need_number slices "$SLICES"
  need_number worker "$WORKER"
  need_number slice "$SLICE"
  need_number lines "$LINES_SHOWN"
  need_number max-restarts "$MAX_RESTARTS"
  [ "$SLICES" -ge 1 ] || die "The option --slices is $SLICES: a TPU has at least one slice."
  if [ "$SPOT" = yes ] && [ "$RESERVED" = yes ]; then
    die "A TPU is either --spot or --reserved: spot capacity is cheap and can be taken back, a" \
      "reservation is capacity you hold. Leave one of them out (or both, for on-demand)."
  fi
}

# For the commands that create a TPU.
check_type() {
  [ -n "$TYPE" ] || die "There is no type of TPU: give --type=v5litepod-16, or set TPU_TYPE in the" \
    "environment or in the file of --env; 'gcloud compute tpus accelerator-types list --zone=$ZONE'" \
    "lists what your zone has."
  [ -n "$RUNTIME" ] || default_runtime "$TYPE" >/dev/null
}

# The beginning of every command line of launch/tpu.sh for this TPU.
again() { echo "launch/tpu.sh $1 --name=$NAME --zone=$ZONE${PROJECT:+ --project=$PROJECT}"; }

remind_of_costs() {
  say "The TPU is still yours and billed. When you are done: $(again delete)"
}
