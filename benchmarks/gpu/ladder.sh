#!/usr/bin/env bash
# The ladder on a machine that has jax and no index, lent by the command: the study goes on between
# the commands. From the repository's root, with a folder HANDED of the wheels of
# benchmarks/README.md, packages.tar.xz and, if there is one, autotune.tgz (the compiler's choices of
# kernels that an earlier stretch packed, see ladder.py):
#
#     benchmarks/gpu/ladder.sh start HANDED MINUTES SECONDS OUT   begins; returns after SECONDS at most
#     /tmp/ladder/ladder.sh wait SECONDS OUT                      and again until it has ended
#
# OUT gets what ladder.py packed, as soon as it is packed, and the logs; the exit status is its own,
# 75 while it is at work. Of `start`, SECONDS count from the beginning of the first command.
set -uo pipefail
work=/tmp/ladder

if [ "$1" = start ]; then
  handed=$2 minutes=$3 seconds=$4 out=$5
  began=$(date +%s)
  mkdir -p "$work/src" "$work/run/compiled" "$work/packed"
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$work/site" "$handed"/*.whl || exit 2
  tar xJf "$handed/packages.tar.xz" -C "$work" || exit 2
  [ ! -f "$handed/autotune.tgz" ] || tar xzf "$handed/autotune.tgz" -C "$work/run/compiled"
  cp -r benchmarks configs ldm_scaling pyproject.toml "$work/src/"
  cp "${BASH_SOURCE[0]}" "$work/ladder.sh"
  nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
  setsid nohup nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used,power.draw \
    --format=csv,noheader,nounits -l 3 > "$work/use.csv" 2>&1 < /dev/null &
  cd "$work/src" || exit 2
  export PYTHONUNBUFFERED=1 PYTHONPATH="$work/site:$work/packages:$work/src"
  setsid nohup bash -c "python3 benchmarks/gpu/ladder.py run --workdir=$work/run \
    --to=$work/packed --minutes=$minutes; echo \$? > $work/ended" \
    > "$work/ladder.log" 2>&1 < /dev/null &
  until=$((began + seconds))
else
  seconds=$2 out=$3
  until=$(($(date +%s) + seconds))
fi

mkdir -p "$out/packed"
while [ "$(date +%s)" -lt "$until" ] && [ ! -f "$work/ended" ]; do
  sleep 1
  cp -u "$work"/packed/* "$out/packed/" 2> /dev/null
done
cp "$work"/packed/* "$out/packed/" 2> /dev/null
cat "$work/ladder.log"
for log in "$work"/run/logs/*.txt; do
  echo "== ${log##*/}"
  tr '\r' '\n' < "$log" | grep -v cuda_timer | tail -4 | cut -c1-200
done > "$work/ends.txt"
tail -n 40 "$work/ends.txt"
(cd "$work" && tar cJf "$out/logs.tar.xz" ends.txt ladder.log use.csv run/logs)
# 75: it is at work still.
exit "$(cat "$work/ended" 2> /dev/null || echo 75)"
