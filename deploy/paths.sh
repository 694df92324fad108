# Where the scripts keep what they fetch and make. Sourced, not run.
# shellcheck shell=bash disable=SC2034 # used by those who source it

SANDMESH_CACHE=${SANDMESH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sandmesh}
export SANDMESH_CACHE
sandmesh_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
sandmesh_logs=$SANDMESH_CACHE/logs

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

say() { printf '%s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# step NAME COMMAND...: runs the command with its output in a log, and prints one line with the time it took.
step() {
  local name=$1 log started
  shift
  log=$sandmesh_logs/$(printf '%s' "$name" | tr -c 'a-zA-Z0-9\n' '-').log
  mkdir -p "$sandmesh_logs"
  started=$(date +%s.%N)
  [ -t 1 ] && printf '  ...   %s\r' "$name"
  if ("$@") >"$log" 2>&1 </dev/null; then
    printf '%6.1fs  %s\n' "$(awk -v a="$started" -v b="$(date +%s.%N)" 'BEGIN { print b - a }')" "$name"
  else
    printf ' FAILED  %s\n' "$name" >&2
    tail -n 15 "$log" >&2
    printf '\n%s failed. The whole log: %s\nPut right what it says, then run the same command again: what is done stays done.\n' "$name" "$log" >&2
    exit 1
  fi
}
