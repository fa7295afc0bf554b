#!/usr/bin/env bash
# All that is asked of a GPU, in one call of about ten minutes:  benchmarks/gpu.sh CHECKPOINT RECORDING
set -euo pipefail
cd "$(dirname "$0")/.."
compare() { python benchmarks/compare.py "$@" --repeats 3; }

for size in tiny base small; do
  compare "$1" "$2" --random "$size" --only "encoder and 3 tokens" --systems "^transformers, bfloat16$"
done
compare "$1" "$2" --random large-v3 --only "one window$" --systems "^transformers, bfloat16"
for size in large-v3 large-v3-turbo; do
  compare "$1" "$2" --random "$size" --only "1 h" --hour 120 --systems "^transformers, bfloat16$"
done
