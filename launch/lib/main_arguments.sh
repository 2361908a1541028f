# main.py's arguments, as far as a launcher must know them.
# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are read in the other files

# Sets CONFIG, WORKDIR and COORDINATOR, "" where the argument is missing.
parse_main_arguments() {
  local argument previous=""
  CONFIG="" WORKDIR="" COORDINATOR=""
  for argument in ${MAIN_ARGS[@]+"${MAIN_ARGS[@]}"}; do
    case "$previous$argument" in
      --config=*) CONFIG=${argument#--config=} ;;
      --workdir=*) WORKDIR=${argument#--workdir=} ;;
      --coordinator=*) COORDINATOR=${argument#--coordinator=} ;;
    esac
    previous=""
    case "$argument" in --config | --workdir | --coordinator)
      previous="$argument="
      ;;
    esac
  done
}

# Makes CONFIG a file, as main.py does.
find_config() {
  CONFIG=${CONFIG%%:*} # the part after a colon is the config's argument
  case "$CONFIG" in */* | *.py) ;; *) CONFIG=configs/$CONFIG.py ;; esac
}

need_config() {
  [ -f "$CONFIG" ] || die "The config $CONFIG does not exist: in configs/ there are" \
    "$(cd configs && echo *.py | sed 's/__init__.py //; s/default.py //')."
}

# For launchers that send the repository as committed; CONFIG_GOES says how.
read_main_arguments() {
  parse_main_arguments
  [ -n "$CONFIG" ] || die "There is no --config for main.py: its arguments follow a lone --, as in" \
    "'$(again "$COMMAND") -- --config=configs/vit_b32.py --workdir=gs://BUCKET/RUN'."
  find_config
  case "$CONFIG" in /* | *..*) die "The config $CONFIG is not a path inside the repository:" \
    "$CONFIG_GOES, so name a file such as configs/vit_b32.py." ;; esac
  need_config
}
