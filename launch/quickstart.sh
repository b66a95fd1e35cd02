#!/usr/bin/env bash
# From nothing to a grown BERT and its baseline, on this machine. Run again, it goes on where it stopped.
#
#   bash launch/quickstart.sh [--text DIR] [--out DIR]
#
#   --text DIR  your own folder of .txt, .md or .rst files, instead of the English that every Python ships
#   --out DIR   where shards, runs and the picture go; default runs/quickstart, or runs/quickstart-NAME for a text
set -euo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0"; }
text='' out=''
while [ $# -gt 0 ]; do
  case $1 in
    --text) text=$(realpath -- "${2:?--text needs a folder}") && shift 2 ;;
    --out) out=$(realpath -m -- "${2:?--out needs a folder}") && shift 2 ;;
    --help | -h) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
  esac
done
cd "$(dirname "$0")/.."

. launch/environment.sh ""

if [ -n "$text" ]; then
  out=${out:-runs/quickstart-$(basename "$text")-$(printf %s "$text" | cksum | cut -d ' ' -f 1)}
  mslt data prepare --text "$text" --vocab-size 4096 --validation-share 0.1 "$out/shards"
else
  out=${out:-runs/quickstart}
  mslt data prepare data-quickstart "$out/shards"
fi

# As many as there are GPUs, but a power of two, so that they share the batch of 32; two on a CPU.
workers=$(python -c 'import torch; n = torch.cuda.device_count() or 2; print(min(1 << n.bit_length() - 1, 16))')
mslt train quickstart --shards "$out/shards" --run-dir "$out/mslt" --workers "$workers"
mslt train quickstart-full --shards "$out/shards" --run-dir "$out/full" --workers "$workers"

mslt compare "$out/full" "$out/mslt" --picture "$out/curves.png"
echo "checkpoint:  $out/mslt/stage-4/model"
echo "TensorBoard: tensorboard --logdir $out"
