# The machines of GKE by type and topology: chips, hosts and the labels of their nodes.
# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are read in the other files

# Sets KIND (tpu or gpu), ACCELERATOR (the nodes' label), TOPOLOGY, HOSTS and CHIPS (of a host).
choose_machine() {
  case "$TYPE" in
    "") die "There is no type of machine: give --type=v5litepod-256 (TPU) or --type=a3-highgpu-8g (GPU), or" \
      "set GKE_TYPE in the environment or in the file of --env." ;;
    v5litepod | v5litepod-*) choose_slice tpu-v5-lite-podslice 1 flat ;;
    v6e | v6e-*) choose_slice tpu-v6e-slice 1 flat ;;
    v4 | v4-*) choose_slice tpu-v4-podslice 2 4096 ;;
    v5p | v5p-*) choose_slice tpu-v5p-slice 2 8960 ;;
    tpu7x | tpu7x-*) choose_slice tpu7x 2 9216 ;;
    a2-highgpu-[1248]g) choose_gpus nvidia-tesla-a100 ;;
    a2-ultragpu-[1248]g) choose_gpus nvidia-a100-80gb ;;
    a3-highgpu-[1248]g) choose_gpus nvidia-h100-80gb ;;
    a3-megagpu-8g) choose_gpus nvidia-h100-mega-80gb ;;
    a3-ultragpu-8g) choose_gpus nvidia-h200-141gb ;;
    a4-highgpu-8g) choose_gpus nvidia-b200 ;;
    v5e-*) die "Unknown type $TYPE: Google Cloud calls a v5e slice v5litepod, so try" \
      "--type=v5litepod-${TYPE#v5e-}." ;;
    *) die "Unknown type '$TYPE': known are the TPUs v5litepod-N (v5e), v6e-N, v5p-N, v4-N and tpu7x-N, and" \
      "the GPU machines a2-highgpu-Ng, a2-ultragpu-Ng, a3-highgpu-Ng, a3-megagpu-8g, a3-ultragpu-8g and" \
      "a4-highgpu-8g." ;;
  esac
}

choose_gpus() {
  KIND=gpu ACCELERATOR=$1 CHIPS=${TYPE##*-} HOSTS=${HOSTS:-1}
  CHIPS=${CHIPS%g}
  [ -z "$TOPOLOGY" ] || die "The option --topology is $TOPOLOGY, but $TYPE is a machine with GPUs: leave it" \
    "out, and give the number of machines by --hosts."
  [ "$SLICES" -eq 1 ] || die "The option --slices is $SLICES, but $TYPE is a machine with GPUs: give the number" \
    "of machines by --hosts=$SLICES."
}

chips_of() { echo $((${1//x/*})); }

# Lists the topologies of up to MOST chips for a generation: "flat", or with so many chips at most.
topologies() {
  local a b c most=$2
  if [ "$1" = flat ]; then
    echo 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16
    return
  fi
  if [ "${TYPE%%-*}" = tpu7x ]; then echo 1x1x1; fi
  echo 2x2x1 2x2x2 2x2x4 2x4x4
  if [ "$most" -gt "$1" ]; then most=$1; fi
  for ((a = 4; a * a * a <= most; a += 4)); do
    for ((b = a; a * b * b <= most; b += 4)); do
      for ((c = b; a * b * c <= most; c += 4)); do echo "${a}x${b}x${c}"; done
    done
  done
}

# choose_slice LABEL CORES SHAPES: Google counts a type's size in chips, or in CORES TensorCores a chip.
choose_slice() {
  local size=${TYPE#*-} generation=${TYPE%%-*} wanted="" all known
  KIND=tpu ACCELERATOR=$1
  if [ "$size" != "$TYPE" ]; then
    case "$size" in "" | 0* | *[!0-9]*) die "Unknown type '$TYPE': the part after the hyphen is a number, as in" \
      "--type=$generation-$((64 * $2))." ;; esac
    [ $((size % $2)) -eq 0 ] || die "There is no slice $TYPE: the number counts TensorCores, two a chip." \
      "$generation-$((size + 1)) has $(((size + 1) / 2)) chip(s)."
    wanted=$((size / $2))
  fi
  if [ -z "$TOPOLOGY" ]; then
    [ -n "$wanted" ] || die "The type is $TYPE without a size: give --type=$generation-$((64 * $2)), or" \
      "--topology=AxB$([ "$3" = flat ] || echo xC)."
    TOPOLOGY=$(topology_with "$wanted" "$3")
    [ -n "$TOPOLOGY" ] || die "There is no slice $TYPE: no topology has $wanted chips. Near it are" \
      "$(near "$wanted" "$2" "$3")."
  fi
  all=$(topologies "$3" "$(case "$TOPOLOGY" in *[!0-9x]* | 0* | x* | *x | *xx* | *x0*) echo 64 ;; *) chips_of "$TOPOLOGY" ;; esac)")
  known=" $(echo "$all" | tr '\n' ' ')"
  case "$known" in *" $TOPOLOGY "*) ;; *)
    if [ "$3" = flat ]; then die "The topology $TOPOLOGY does not exist for $generation, which has" \
      "$(echo "$all" | sed 's/ /, /g; s/, \([^,]*\)$/ and \1/')$(fitting "$wanted" "$3")."; fi
    die "The topology $TOPOLOGY does not exist for $generation, which has 2x2x1, 2x2x2, 2x2x4, 2x4x4 and" \
      "multiples of 4, the smallest first, such as 4x4x4 or 4x4x8, up to $3 chips$(fitting "$wanted" "$3")."
    ;;
  esac
  if [ -n "$wanted" ] && [ "$wanted" -ne "$(chips_of "$TOPOLOGY")" ]; then
    die "The type $TYPE has $wanted chips, but the topology $TOPOLOGY has $(chips_of "$TOPOLOGY"): give" \
      "--type=$generation-$(($(chips_of "$TOPOLOGY") * $2))$(fitting "$wanted" "$3" ", or --topology=")."
  fi
  choose_hosts
}

# The topology with so many chips, the one nearest to a square or cube; "" if there is none.
topology_with() {
  local one sum best="" least=1000000
  for one in $(topologies "$2" "$1"); do
    if [ "$(chips_of "$one")" -ne "$1" ]; then continue; fi
    sum=$((${one//x/+}))
    if [ "$sum" -lt "$least" ]; then best=$one least=$sum; fi
  done
  echo "$best"
}

fitting() {
  local fits
  if [ -z "$1" ]; then return; fi
  fits=$(topology_with "$1" "$2")
  if [ -n "$fits" ]; then echo "${3:-"; for $TYPE it is "}$fits"; fi
}

# The sizes just below and above.
near() {
  local one chips below=0 above=0
  for one in $(topologies "$3" $(($1 * 2 + 64))); do
    chips=$(chips_of "$one")
    if [ "$chips" -lt "$1" ] && [ "$chips" -gt "$below" ]; then below=$chips; fi
    if [ "$chips" -gt "$1" ] && { [ "$above" -eq 0 ] || [ "$chips" -lt "$above" ]; }; then above=$chips; fi
  done
  for chips in "$below" "$above"; do
    if [ "$chips" -gt 0 ]; then echo "${TYPE%%-*}-$((chips * $2)) ($(topology_with "$chips" "$3"))"; fi
  done | paste -s -d, - | sed 's/,/ and /'
}

choose_hosts() {
  local chips
  chips=$(chips_of "$TOPOLOGY")
  case "$TOPOLOGY,$HOSTS" in
    1x1,* | 1x1x1,*) CHIPS=1 ;;
    2x4, | 2x4,1) CHIPS=8 ;; # the machine type with 8 chips; others have 4
    *) CHIPS=4 ;;
  esac
  HOSTS=${HOSTS:-$((chips / CHIPS))}
  [ $((HOSTS * CHIPS)) -eq "$chips" ] || die "The option --hosts is $HOSTS, but the $chips chips of $TOPOLOGY are" \
    "on $((chips / CHIPS)) host(s), $CHIPS each: leave it out."
}
