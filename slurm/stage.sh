#!/bin/bash
# Copies a directory to a node's own disk; staging.sbatch runs it once on every node.   stage.sh SOURCE DESTINATION
set -euo pipefail
source=$1 destination=$2
fail() {
  printf 'stage.sh on %s: %s\n' "$(hostname)" "$*" >&2
  exit 2 # another start would not mend it
}

[[ -d $source ]] || fail "no directory $source"
rm -rf "$destination" # what an earlier start of this job may have left
mkdir -p "$destination" || fail "cannot make $destination"
needed=$(du --summarize --block-size=1M --dereference "$source" | cut -f 1)
free=$(df --block-size=1M --output=avail "$destination" | tail -n 1)
((free > needed)) || fail "$source has $needed MiB, $destination has room for $((free)) MiB"
cp --recursive --dereference "$source/." "$destination" || fail "copying $source failed"
printf 'stage.sh on %s: %s MiB in %s s\n' "$(hostname)" "$needed" "$SECONDS"
