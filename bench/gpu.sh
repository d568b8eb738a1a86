#!/usr/bin/env bash
# Runs what only a GPU can tell, most important first, in about eight minutes:
#
#     bash bench/gpu.sh FOLDER [--FIELD VALUE ...]
#
# FOLDER gets the output and the wall seconds of each part. Further arguments are settings of train.py. A part that
# fails or runs out of time does not stop the next part.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$1
shift
mkdir -p "$folder"

part() { # NAME SECONDS COMMAND...
    local name=$1 most=$2 start=$SECONDS
    shift 2
    timeout "$most" "$@" >"$folder/$name.log" 2>&1
    echo "$name: exit code $?, $((SECONDS - start)) s: $*" | tee -a "$folder/parts.txt"
}

part tests 150 python -m pytest -n 0 tests/test_cuda.py
part prefix-rft 150 python train.py --out "$folder/prefix-rft" "$@"
part step 150 python bench/gpu.py step many
part limits 90 python bench/gpu.py limits
part adapters 120 python bench/gpu.py adapters
part rft 150 python train.py --out "$folder/rft" --method rft "$@"
