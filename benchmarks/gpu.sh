#!/usr/bin/env bash
# All that is asked of a GPU, in one call of about ten minutes:  benchmarks/gpu.sh CHECKPOINT MANIFEST [RESULTS]
# CHECKPOINT: a multilingual Hugging Face folder; for sizes of which there is none, random weights with its vocabulary.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${3:-benchmarks/results}
compare() { python benchmarks/compare.py "$1" "$2" --systems "^transformers, bfloat16$" --repeats 3 "${@:3}"; }

compare "$1" "$2" --batch_size 20 --result "$results/gpu.timings.json"
for size in small large-v3 large-v3-turbo; do
  compare "$1" "$2" --random "$size" --only "encoder|one window$" --result "$results/gpu.$size.timings.json"
  compare "$1" "$2" --random "$size" --only "clips" --minutes 60 --batch_size 120 --result "$results/gpu.$size.hour.timings.json"
done
