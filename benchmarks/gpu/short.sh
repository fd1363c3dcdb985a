#!/usr/bin/env bash
# What is worth most in ten minutes of one GPU: a batch of each side in training and in sampling.
#
#     benchmarks/gpu/short.sh FOLDER [SECONDS:SCRIPT:PIECE ...]
#
# Each piece is a process with its own limit, so that one that fails ends nothing but itself; its
# output lies in FOLDER/logs. The scripts themselves go on from what is done in FOLDER.
set -u
to="$1"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
mkdir -p "$to/logs"
if (($# == 0)); then
    set -- 60:train_step:ceilings 170:train_step:ours_064 220:train_step:peer_064 \
        150:sampling:ours_016 150:sampling:peer_016
fi
for one in "$@"; do
    IFS=: read -r limit script piece <<<"$one"
    log="$to/logs/${script}_$piece.txt"
    printf '== %s %s (%s s)\n' "$script" "$piece" "$SECONDS"
    if ! timeout "$limit" python3 "benchmarks/gpu/$script.py" --to="$to" --piece="$piece" \
        >"$log" 2>&1; then
        echo "failed or stopped after $limit s"
        tail -n 12 "$log" | cut -c1-300
    else
        grep -A40 '"result"' "$to/$script/$piece.json" | tr -d '\n ' | cut -c1-600
        echo
    fi
done
printf '== done (%s s)\n' "$SECONDS"
