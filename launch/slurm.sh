#!/usr/bin/env bash
# Submits a job to Slurm: one process on each GPU node.
#
#   launch/slurm.sh --nodes=4 --gpus=8 [--name=NAME] [--partition=P] [--account=A] [--time=T]
#                   [--cpus=C] [--logs=DIR] [--dry-run] -- train --config=FILE --workdir=DIR
#
# Run it where `ldm-scaling` is found (an activated environment): the job inherits it. Variables
# with secrets are inherited too, and written nowhere.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
  echo "launch/slurm.sh: error: $1" >&2
  exit 2
}
number() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2: give a number above 0"
}

# Prints words so that a shell reads them back.
show() {
  local word out=() quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/$quote}'"
    out+=("$word")
  done
  echo "${out[*]}"
}

nodes='' gpus='' name=ldm partition='' account='' time=24:00:00 cpus='' logs=. dry=''
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --dry-run) dry=1 ;;
    --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    --)
      shift
      break
      ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
  shift
done
number --nodes "${nodes:-nothing}"
number --gpus "${gpus:-nothing}"
[[ -z $cpus ]] || number --cpus "$cpus"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name: use small letters, digits and -"
python3 "$here/common.py" check-job -- "$@"

command=(sbatch "--job-name=$name" "--nodes=$nodes" "--gpus-per-node=$gpus" "--time=$time"
  "--output=$logs/$name-%j.log")
[[ -z $partition ]] || command+=("--partition=$partition")
[[ -z $account ]] || command+=("--account=$account")
[[ -z $cpus ]] || command+=("--cpus-per-task=$cpus")
command+=("$here/slurm.sbatch" "$@")

if [[ -n $dry ]]; then
  show "${command[@]}"
  echo "# on the first node, for every start:"
  show srun --kill-on-bad-exit=0 --wait=900 --ntasks-per-node=1 ldm-scaling "$1" --distributed "${@:2}"
  exit 0
fi
command -v sbatch >/dev/null || fail "sbatch is not here: run this on a node of the cluster"
mkdir -p "$logs"
exec "${command[@]}"
