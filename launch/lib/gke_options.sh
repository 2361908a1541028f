# The options of launch/gke.sh, and the answers to --help.
# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are read in the other files

LAUNCHER=launch/gke.sh
COMMANDS="build run status logs stop"
ENV_EXAMPLE="GKE_NAME=clip, GKE_TYPE=v5litepod-256 and GKE_IMAGE=us-docker.pkg.dev/my-project/clip/clip_jax"
CONFIG_GOES="the container has only the repository"

GRACE=120 # seconds that main.py has to save after SIGTERM

set_defaults() {
  NAME=${GKE_NAME:-} TYPE=${GKE_TYPE:-} TOPOLOGY=${GKE_TOPOLOGY:-} SLICES=${GKE_SLICES:-1}
  HOSTS=${GKE_HOSTS:-} IMAGE=${GKE_IMAGE:-} NAMESPACE=${GKE_NAMESPACE:-} CONTEXT=${GKE_CONTEXT:-}
  SERVICE_ACCOUNT=${GKE_SERVICE_ACCOUNT:-} QUEUE=${KUEUE_QUEUE:-}
  SPOT=no DRY_RUN=no FOLLOW=no REF="" WORKER=0 SLICE=0 LINES_SHOWN=50 MAX_RESTARTS=50
  NODE_SELECTORS=() MAIN_ARGS=()
}

options_of() {
  local common="name= namespace= context= env= dry-run" machine="type= topology= slices= hosts="
  case "$1" in
    build) echo "$common $machine image= ref=" ;;
    run) echo "$common $machine image= ref= spot service-account= queue= max-restarts= node-selector=" ;;
    logs) echo "$common worker= slice= lines= follow" ;;
    *) echo "$common" ;;
  esac
}

set_option() {
  case "$1" in
    --name) NAME=$2 ;;
    --type) TYPE=$2 ;;
    --topology) TOPOLOGY=$2 ;;
    --slices) SLICES=$2 ;;
    --hosts) HOSTS=$2 ;;
    --image) IMAGE=$2 ;;
    --ref) REF=$2 ;;
    --namespace) NAMESPACE=$2 ;;
    --context) CONTEXT=$2 ;;
    --service-account) SERVICE_ACCOUNT=$2 ;;
    --queue) QUEUE=$2 ;;
    --max-restarts) MAX_RESTARTS=$2 ;;
    --node-selector) NODE_SELECTORS=(${NODE_SELECTORS[@]+"${NODE_SELECTORS[@]}"} "$2") ;;
    --worker) WORKER=$2 ;;
    --slice) SLICE=$2 ;;
    --lines) LINES_SHOWN=$2 ;;
    --spot) SPOT=yes ;;
    --follow) FOLLOW=yes ;;
    --dry-run) DRY_RUN=yes ;;
  esac
}

# need_name OPTION VALUE: a name as Kubernetes takes it, and no option of kubectl.
need_name() {
  case "$2" in [!a-z]* | *[!a-z0-9-]* | *-) die "The option --$1 is '$2', which cannot be a name in" \
    "Kubernetes: it begins with a lower-case letter, continues with lower-case letters, digits and" \
    "hyphens, and does not end in a hyphen." ;; esac
}

check_options() {
  local selector
  [ -n "$NAME" ] || die "There is no name for the run: give --name=clip, or set GKE_NAME in the" \
    "environment or in the file of --env."
  need_name name "$NAME"
  [ "${#NAME}" -le 40 ] || die "The name $NAME has ${#NAME} letters: give at most 40, since the names of" \
    "the pods are made from it and must not exceed 63."
  need_name namespace "$NAMESPACE"
  need_name service-account "$SERVICE_ACCOUNT"
  need_name queue "$QUEUE"
  need_number slices "$SLICES"
  need_number hosts "${HOSTS:-1}"
  need_number max-restarts "$MAX_RESTARTS"
  need_number worker "$WORKER"
  need_number slice "$SLICE"
  need_number lines "$LINES_SHOWN"
  SLICES=$((10#$SLICES)) HOSTS=${HOSTS:+$((10#$HOSTS))} MAX_RESTARTS=$((10#$MAX_RESTARTS)) # 08 is 8
  [ "$SLICES" -ge 1 ] && [ "${HOSTS:-1}" -ge 1 ] || die "The options --slices and --hosts are at least 1."
  for selector in ${NODE_SELECTORS[@]+"${NODE_SELECTORS[@]}"}; do
    case "$selector" in ?*=?*) ;; *) selector="" ;; esac
    case "${selector%%=*}" in "" | *[!A-Za-z0-9./_-]*) die "The option --node-selector is not understood: give LABEL=VALUE of a" \
      "node, as in --node-selector=cloud.google.com/gke-nodepool=my-pool." ;; esac
  done
  # shellcheck disable=SC2153
  case "$COMMAND" in build | run)
    choose_machine
    [ -n "$IMAGE" ] || die "There is no image: give --image=us-docker.pkg.dev/PROJECT/REPOSITORY/clip_jax, or" \
      "set GKE_IMAGE in the environment or in the file of --env; '$LAUNCHER build' makes it and sends it there."
    case "$IMAGE" in [!a-z0-9]* | *[!A-Za-z0-9./_:@-]*) die "The image '$IMAGE' is not the name of one: give" \
      "--image=us-docker.pkg.dev/PROJECT/REPOSITORY/clip_jax." ;; esac
    ;;
  esac
}

# The beginning of every command line of this program for this run.
again() {
  echo "launch/gke.sh $1 --name=$NAME${NAMESPACE:+ --namespace=$NAMESPACE}${CONTEXT:+ --context=$CONTEXT}"
}

show_help() {
  case "$1" in
    "")
      cat <<'END'
Trains CLIP on Google Kubernetes Engine, from a machine with kubectl. The cluster and its node pools are
yours to make. Usage: launch/gke.sh COMMAND [OPTION]...

  build    builds the container image of the committed code and sends it to the registry
  run      starts main.py on every host, as a JobSet that the cluster starts again after a preemption
  status   shows the run's state and its pods
  logs     shows a pod's log
  stop     lets main.py save and end, and removes the JobSet

Options of all commands, with the environment variable or line in the file of --env that sets them:
  --name=NAME        the run's name                                 GKE_NAME
  --namespace=NAME   default: kubectl's                             GKE_NAMESPACE
  --context=NAME     which cluster; default: kubectl's              GKE_CONTEXT
  --env=FILE         a file of lines such as GKE_NAME=clip; options on the command line win
  --dry-run          prints the commands, or for run the manifest, and changes nothing

launch/gke.sh COMMAND --help tells more; launch/README.md has a worked example.
END
      ;;
    build)
      cat <<'END'
launch/gke.sh build --name=clip --type=v5litepod-256 --image=us-docker.pkg.dev/PROJECT/REPOSITORY/clip_jax

Builds launch/Dockerfile from what is committed (git archive), for the TPUs or GPUs of the type, and
pushes it. Without a tag of your own in --image, the tag is the commit.
  --ref=REF   the branch, tag or commit to build, default HEAD
END
      ;;
    run)
      cat <<'END'
launch/gke.sh run --name=clip --type=v5litepod-256 --image=IMAGE [OPTION]... -- --config=configs/vit_l14.py --workdir=gs://bucket/run1 ...

Creates a JobSet and returns. The cluster starts it again when main.py ends with 42 or from 127 on, or when
nodes are taken away; any other exit status ends it. The same arguments resume.
  --type=TYPE              v5litepod-256, v6e-64, v5p-128, v4-64, tpu7x-128 as Google names slices (chips, or
                           from v4 on in v4, v5p and tpu7x two TensorCores a chip), or a GPU machine such
                           as a3-highgpu-8g                                             GKE_TYPE
  --topology=AxB           default: by the type                                         GKE_TOPOLOGY
  --slices=N               TPU slices of that type, default 1                           GKE_SLICES
  --hosts=N                GPU: machines, default 1; TPU: only where a topology has two
                           machine types (2x4: 1 host of 8 chips by default, or 2)      GKE_HOSTS
  --image=IMAGE            as built; without a tag, the commit's                        GKE_IMAGE
  --ref=REF                the commit of the image, default HEAD
  --spot                   nodes that Google can take back at any time
  --service-account=NAME   of Kubernetes, with rights to the bucket                     GKE_SERVICE_ACCOUNT
  --queue=NAME             Kueue's local queue                                          KUEUE_QUEUE
  --max-restarts=N         restarts that no lost node explains, default 50
  --node-selector=L=V      another label the nodes must have; repeatable
END
      ;;
    status)
      cat <<'END'
launch/gke.sh status --name=clip

The JobSet's state with its reason and restarts, and a line for each pod: phase, why it waits (ImagePullBackOff:
no such image), exit status, node.
END
      ;;
    logs)
      cat <<'END'
launch/gke.sh logs --name=clip [OPTION]...

  --worker=N   which host of the slice, default 0
  --slice=N    which slice, default 0
  --lines=N    how many of the last lines, default 50
  --follow     continues until the pod ends, or until Ctrl-C, which does not end the run
A restart makes new pods: the logs of earlier ones are in Cloud Logging.
END
      ;;
    stop)
      cat <<'END'
launch/gke.sh stop --name=clip

Deletes the JobSet: main.py gets SIGTERM, saves a checkpoint and ends, for which it has two minutes. Nodes
and bucket stay. run with the same arguments resumes.
END
      ;;
    *) return 1 ;;
  esac
}
