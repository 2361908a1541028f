# The command line: a file of settings, options, and the command to run.
#
# A launcher sets LAUNCHER (its path), COMMANDS and ENV_EXAMPLE (a file of --env), defines set_defaults,
# options_of, set_option, check_options, show_help, again, and command_NAME for each of COMMANDS, and
# calls run_launcher.
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
          "$ENV_EXAMPLE."
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
        "follow a lone --. See '$LAUNCHER $COMMAND --help'." ;;
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
      *) die "The command $COMMAND has no option $option: see '$LAUNCHER $COMMAND --help'. Arguments for" \
        "main.py follow a lone --." ;;
    esac
    set_option "$option" "$value"
  done
}

# A whole number, and no option of another program.
need_number() {
  case "$2" in "" | *[!0-9]*) die "The option --$1 is '$2', not a whole number." ;; esac
}

# Writes words as "a, b or c".
alternatives() {
  local last=${*: -1}
  [ $# -gt 1 ] || { echo "$last" && return; }
  set -- "${@:1:$#-1}"
  local IFS=,
  echo "$* or $last" | sed 's/,/, /g'
}

run_launcher() {
  local argument names
  # shellcheck disable=SC2086,SC2153 # several words
  names=$(alternatives $COMMANDS)
  COMMAND=${1:-}
  case " $COMMANDS help -h --help " in
    *" ${COMMAND:-?} "*) shift ;;
    *) die "There is no command${COMMAND:+ "'$COMMAND'"}: use $names. See '$LAUNCHER --help'." ;;
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
