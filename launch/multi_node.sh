#!/usr/bin/env bash
# Train on several machines, from any one that reaches all of them by ssh without a password. Again: goes on.
#
#   bash launch/multi_node.sh RECIPE HOSTFILE [options of `mslt train`]
#
#   RECIPE    path of a recipe, or the name of one shipped with mslt
#   HOSTFILE  a line `NAME slots=WORKERS` for each machine, see launch/hostfile.example
#
# Needs pdsh here, and this checkout, the shards and the run directory in a folder that all machines share.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
case ${1:-} in --help | -h) usage && exit 0 ;; esac
[ $# -ge 2 ] || { usage >&2 && exit 2; }
recipe=$1 hostfile=$2
shift 2
command -v pdsh >/dev/null || { echo "needs pdsh on this machine (package pdsh)" >&2 && exit 1; }

here=$(dirname -- "$(realpath -- "$0")")
# An environment that has mslt is used; otherwise the checkout makes .venv.
if ! command -v mslt >/dev/null; then
  cd "$here/.."
  . launch/environment.sh ""
  cd - >/dev/null
fi
# shellcheck source=launch/network.sh
. "$here/network.sh"
exec mslt train "$recipe" --hostfile "$hostfile" "$@"
