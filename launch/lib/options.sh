# The command line: a file of settings, options, main.py's arguments, and the command to run.
#
# A program sets PROGRAM (its path), COMMANDS, SETTINGS (an example of a file of --env) and CONFIG_GOES
# (how the config reaches the workers), defines set_defaults, options_of, set_option, check_options,
# show_help, again and a function command_NAME for each of COMMANDS, and calls run_program.
# shellcheck shell=bash
# shellcheck disable=SC2034 # the variables are read in the other files

read_env_file() {
  local argument previous=""
  for argument in "$@"; do
    if [ "$previous" = --env ]; then argument="--env=$argument"; fi
    case "$argument" in
      --) break ;;
      --env=*)
        local file=${argument#--env=}
        [ -f "$file" ] || die "The file $file of --env does not exist: give one with lines such as" \
          "$SETTINGS."
        case "$file" in */*) ;; *) file=./$file ;; esac
        # shellcheck disable=SC1090
        . "$file"
        ;;
    esac
    previous=$argument
  done
}

read_options() {
  local option value known
  while [ $# -gt 0 ]; do
    option=$1 value=""
    shift
    case "$option" in
      --)
        case "$COMMAND" in start | run) ;; *) die "The command $COMMAND takes nothing after --: only" \
          "the commands that start main.py do." ;; esac
        MAIN_ARGS=("$@")
        return
        ;;
      --*=*) value=${option#*=} option=${option%%=*} ;;
      --*) ;;
      *) die "The word '$option' is not understood: options begin with --, and main.py's arguments" \
        "follow a lone --. See '$PROGRAM $COMMAND --help'." ;;
    esac
    known=" $(options_of "$COMMAND") "
    case "$known" in
      *" ${option#--}= "*)
        if [ -z "$value" ] && [ $# -gt 0 ]; then
          value=$1
          shift
        fi
        [ -n "$value" ] || die "The option $option needs a value, as in $option=VALUE."
        ;;
      *" ${option#--} "*)
        [ -z "$value" ] || die "The option $option takes no value: write just $option."
        ;;
      *) die "The command $COMMAND has no option $option: see '$PROGRAM $COMMAND --help'. Arguments for" \
        "main.py follow a lone --." ;;
    esac
    set_option "$option" "$value"
  done
}

# A whole number, and no option of another program.
need_number() {
  case "$2" in "" | *[!0-9]*) die "The option --$1 is '$2', not a whole number." ;; esac
}

# Reads the config, the workdir and the coordinator from main.py's arguments; refuses wrong ones.
read_main_arguments() {
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
  local example="-- --config=configs/vit_b32.py --workdir=gs://BUCKET/RUN"
  [ -n "$CONFIG" ] || die "There is no --config for main.py: its arguments follow a lone --, as in" \
    "'$(again "$COMMAND") $example'."
  CONFIG=${CONFIG%%:*} # the part after a colon is the config's argument
  case "$CONFIG" in */* | *.py) ;; *) CONFIG=configs/$CONFIG.py ;; esac # as main.py takes it
  case "$CONFIG" in /* | *..*) die "The config $CONFIG is not a path inside the repository: $CONFIG_GOES," \
    "so name a file such as configs/vit_b32.py." ;; esac
  [ -f "$CONFIG" ] || die "The config $CONFIG does not exist: in configs/ there are" \
    "$(cd configs && echo *.py | sed 's/__init__.py //; s/default.py //')."
}

# Writes words as "a, b or c".
alternatives() {
  local last=${*: -1}
  [ $# -gt 1 ] || { echo "$last" && return; }
  set -- "${@:1:$#-1}"
  local IFS=,
  echo "$* or $last" | sed 's/,/, /g'
}

run_program() {
  local argument names
  # shellcheck disable=SC2086,SC2153 # several words
  names=$(alternatives $COMMANDS)
  COMMAND=${1:-}
  case " $COMMANDS help -h --help " in
    *" ${COMMAND:-?} "*) shift ;;
    *) die "There is no command${COMMAND:+ "'$COMMAND'"}: use $names. See '$PROGRAM --help'." ;;
  esac
  case "$COMMAND" in -h | --help | help) show_help "" && exit ;; esac
  for argument in "$@"; do
    case "$argument" in
      --) break ;;
      -h | --help) show_help "$COMMAND" && exit ;;
    esac
  done
  read_env_file "$@"
  set_defaults
  read_options "$@"
  cd "$ROOT" || exit
  check_options
  "command_$COMMAND"
}
