# Messages to the user, and functions that run commands or, with --dry-run, show them.
# shellcheck shell=bash

say() { echo "$*" >&2; }

# Ends with the exit code of a user error, as main.py does.
die() {
  say "$*"
  exit 2
}

# Quotes words into one line, which a POSIX shell reads back as the same words.
quoted() {
  local word line="" escape="'\\''"
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//\'/$escape}'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

dry_run() { [ "$DRY_RUN" = yes ]; }

call() {
  if dry_run; then quoted "$@"; else "$@"; fi
}

pause() { dry_run || sleep "${TPU_POLL:-60}"; }
