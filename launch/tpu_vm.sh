#!/usr/bin/env bash
# Cloud TPU VMs by queued resources: from nothing to a job that goes on by itself.
#
#   launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [...] [--dry-run] [-- train --config=... ]
#
#   up       create (if it is not there), wait, setup, run
#   watch    up; then looks every minute, and does `resume` when the slices were taken away, until
#            the job is done; with --delete it then gives the slices back. After a failure it waits,
#            twice as long each time to half an hour, and gives up after 20 in a row
#   create   queues the request    --topology=v5e:16x16 [--num-slices=N] [--spot | --reserved]
#                                  [--project=P] [--runtime-version=V] [--service-account=A]
#                                  [--network=N] [--internal-ips]
#   wait     until the slices are there
#   setup    copies the committed tree to all hosts, installs it    [--bucket=my-bucket: at /mnt/ldm]
#   run      starts the job on all hosts    [--env=NAME=VALUE] [--secret=VARIABLE=NAME] -- JOB
#   logs     follows one host's output      [--worker=0] [--node=0]
#   status   of the request, and of the job on all hosts
#   stop     asks the job to save and end
#   resume   after a preemption: deletes what is left, then up; else starts the job where it ended
#   delete   gives everything back
#
# A slice is a node, a host a worker. --secret names a secret of Secret Manager, which each host
# fetches when the job starts; its value is in no file. --dry-run prints all commands, runs none.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")

fail() {
  echo "launch/tpu_vm.sh: error: $1" >&2
  exit 2
}

name='' zone='' project='' topology='' slices=1 bucket='' runtime='' account='' network=''
dry='' tier='' internal='' give_back='' worker=0 node=0 variables=()
[[ ${1:-} == --help || $# == 0 ]] && sed -n '2,24s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0
what=$1
shift
options=() # as given, for `watch`, which calls this script again
while (($#)); do
  [[ $1 == -- || $1 == --delete ]] || options+=("$1")
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --num-slices=*) slices=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --runtime-version=*) runtime=${1#*=} ;;
    --service-account=*) account=${1#*=} ;;
    --network=*) network=${1#*=} ;;
    --spot | --reserved)
      [[ -z $tier || $tier == "$1" ]] || fail "give --spot or --reserved, not both"
      tier=$1
      ;;
    --internal-ips) internal=1 ;;
    --worker=*) worker=${1#*=} ;;
    --node=*) node=${1#*=} ;;
    --env=* | --secret=*) variables+=("$1") ;;
    --delete) give_back=1 ;;
    --dry-run) dry=1 ;;
    --)
      shift
      break
      ;;
    *) fail "unknown argument ${1%%=*}; see --help" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name: use small letters, digits and -, a letter first, at most 40"
[[ -n $zone ]] || fail "give --zone=ZONE, one that has the TPUs, for example us-west4-a"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--num-slices=$slices: give a number above 0"
where=("--zone=$zone")
bucket=${bucket#gs://} bucket=${bucket%/}
[[ $bucket =~ ^([a-z0-9][-a-z0-9_.]*)?$ ]] ||
  fail "--bucket=$bucket: give a bucket's name, of small letters, digits, -_., without a folder"
[[ -z $project ]] || where+=("--project=$project")
queued=(gcloud compute tpus queued-resources)
# With internal addresses only, hosts are reached through Google's proxy.
reach=()
[[ -z $internal ]] || reach+=(--tunnel-through-iap)

# Prints words so that a shell reads them back.
show() {
  local word out=() quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/$quote}'"
    out+=("$word")
  done
  echo "${out[*]}"
}

# Runs a command, or only prints it.
do_it() {
  if [[ -n $dry ]]; then
    show "$@"
  else
    "$@"
  fi
}

# gcloud's command that reaches hosts. Status 0 when all of them did it; 2 for what a host says the
# user must mend (see tpu_worker.sh); else 1, whatever ended with which status there: it is tried
# again. A slice that gcloud cannot prepare it leaves out with a warning and status 0.
reach_hosts() {
  if [[ -n $dry ]]; then
    show "$@"
    return
  fi
  local status=0 errors
  errors=$(mktemp)
  { "$@" 2>&1 >&3 3>&- | tee "$errors" >&2 3>&-; } 3>&1 || status=$?
  if grep -q 'Could not prepare all' "$errors"; then
    echo "launch/tpu_vm.sh: $name: a slice was not reached" >&2
    status=1
  fi
  rm -f "$errors"
  case $status in
    0) ;;
    78) return 2 ;;
    *) return 1 ;;
  esac
}

# A command on hosts: NODES WORKERS TEXT.
on_hosts() {
  reach_hosts "${queued[@]}" ssh "$name" "${where[@]}" "${reach[@]}" "--node=$1" "--worker=$2" \
    "--command=$3"
}

# The request's state: ACTIVE, SUSPENDED, ...; ABSENT when there is none.
state() {
  local errors text
  errors=$(mktemp)
  if text=$("${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)' 2>"$errors")
  then
    echo "$text"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

describe() {
  do_it "${queued[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
}

create() {
  [[ -n $topology ]] || fail "give --topology=KIND:SHAPE, for example v5e:16x16"
  local facts request nodes=(--node-id="$name")
  facts=$(python3 "$here/tpu.py" "$topology")
  mapfile -t facts <<<"$facts"
  read -ra request <<<"${facts[0]}"
  ((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$name")
  local flags=("${request[@]}" "--runtime-version=${runtime:-${facts[1]}}" "${nodes[@]}")
  [[ -z $tier ]] || flags+=("$tier")
  [[ -z $account ]] || flags+=("--service-account=$account")
  [[ -z $network ]] || flags+=("--network=$network")
  [[ -z $internal ]] || flags+=(--internal-ips)
  flags+=(--scopes=cloud-platform) # buckets and secrets; what is allowed, the account's roles say
  do_it "${queued[@]}" create "$name" "${where[@]}" "${flags[@]}"
}

wait_for_slices() {
  if [[ -n $dry ]]; then
    echo "# every 30 s until it says ACTIVE:"
    describe
    return
  fi
  local now before=''
  while true; do
    now=$(state)
    [[ $now == "$before" ]] || echo "$(date +%T) $name: $now" >&2
    before=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | ABSENT)
        echo "launch/tpu_vm.sh: $name is $now: see  status, then  resume  or  delete" >&2
        return 1
        ;;
    esac
    sleep 30
  done
}

setup() {
  local tree=ldm_scaling.tar.gz folder='' # the committed tree: a revision names what runs
  if [[ -z $dry ]]; then
    folder=$(mktemp -d)
    tree=$folder/$tree
    [[ -z $(git -C "$root" status --porcelain --untracked-files=no) ]] ||
      echo "launch/tpu_vm.sh: changes that are not committed stay here" >&2
  fi
  do_it git -C "$root" archive --format=tar.gz "--output=$tree" HEAD
  reach_hosts "${queued[@]}" scp "$tree" "$name:ldm_scaling.tar.gz" "${where[@]}" "${reach[@]}" \
    --node=all --worker=all
  on_hosts all all "rm -rf ldm_scaling && mkdir ldm_scaling && tar -xzf ldm_scaling.tar.gz -C \
ldm_scaling && bash ldm_scaling/launch/tpu_worker.sh setup $bucket"
  [[ -z $folder ]] || rm -rf "$folder"
}

run() {
  local lines job text
  lines=$(python3 "$here/common.py" variables "${variables[@]}")
  job=$(show "$@")
  text="bash ldm_scaling/launch/tpu_worker.sh run -- $job"
  # A host's shell reads the lines from a here-document; the names of secrets, not the values.
  on_hosts all all "$text <<'VARIABLES'
$lines
VARIABLES"
}

on_all() {
  on_hosts all all "bash ldm_scaling/launch/tpu_worker.sh $1"
}

delete() {
  do_it "${queued[@]}" delete "$name" "${where[@]}" --force --quiet
}

up() {
  if [[ -n $dry ]]; then
    echo "# if there is no request of that name:"
    create
  elif [[ $(state) == ABSENT ]]; then
    create
  fi
  wait_for_slices
  if [[ -n $dry ]]; then
    echo "# unless the job runs already:"
  else
    local now
    now=$(known_job_state)
    if [[ $now == running ]]; then
      # The tree that it runs from is not replaced beneath it.
      echo "launch/tpu_vm.sh: $name runs already; to change it,  stop  it first" >&2
      return
    fi
  fi
  setup
  run "$@"
}

resume() {
  if [[ -n $dry ]]; then
    describe
    echo "# if it says SUSPENDED or FAILED:"
    delete
    up "$@"
    return
  fi
  case $(state) in
    SUSPENDED | SUSPENDING | FAILED) delete ;;
  esac
  up "$@"
}

# What the first host says of the job (see tpu_worker.sh), or unknown: it cannot be asked.
job_state() {
  local script=ldm_scaling/launch/tpu_worker.sh errors said
  local ask="[ -e $script ] || { echo absent; exit; }; bash $script state"
  if [[ -n $dry ]]; then
    on_hosts 0 0 "$ask"
    return
  fi
  errors=$(mktemp)
  said=$(on_hosts 0 0 "$ask" 2>"$errors" | grep -xE 'absent|running|done|stopped|failed') || true
  [[ -n $said ]] || cat "$errors" >&2
  rm -f "$errors"
  echo "${said:-unknown}"
}

# The same, asked for five minutes: a host that has just come takes no ssh for a while. Status 1
# where it cannot be asked.
known_job_state() {
  local now attempt
  for attempt in {1..10}; do
    ((attempt == 1)) || sleep 30
    now=$(job_state)
    [[ $now == unknown ]] || break
  done
  if [[ $now == unknown ]]; then
    echo "launch/tpu_vm.sh: $name cannot be asked whether the job runs: nothing is set up" >&2
    return 1
  fi
  echo "$now"
}

max_failures=${LDM_MAX_FAILURES:-20}
failures=0 # in a row, since the job was last seen running
# After a failure: waits, longer each time. Status 1 when there were too many.
once_more() {
  failures=$((failures + 1))
  if ((failures > max_failures)); then
    echo "launch/tpu_vm.sh: $name: failed $failures times in a row, no more tries" >&2
    return 1
  fi
  local pause=$((failures < 6 ? 60 * 2 ** (failures - 1) : 1800))
  echo "$(date +%T) $name: failure $failures in a row, again in $pause s" >&2
  sleep "$pause"
}

watch() {
  if [[ -n $dry ]]; then
    up "$@"
    echo "# every 60 s: when the request says SUSPENDED or FAILED, delete and all of the above; ask"
    job_state
    echo "# until it says done, failed or stopped"
    [[ -z $give_back ]] || delete
    return
  fi
  local status now seen
  trap 'exit 130' INT # whatever the command that it comes in makes of it
  while true; do
    # A shell of its own: what fails in it is tried again, but for what the user must mend.
    status=0 seen=''
    "${BASH_SOURCE[0]}" resume "${options[@]}" -- "$@" || status=$?
    ((status != 2)) || return 2
    while ((status == 0)); do
      sleep 60
      now=$(state) || now=unknown
      [[ $now != ACTIVE ]] || now=$(job_state)
      case $now in
        done | failed | stopped)
          echo "$(date +%T) $name: the job is $now" >&2
          # One that is not done is left as it is, to be looked at.
          [[ $now == "done" ]] || return 1
          [[ -z $give_back ]] || delete
          return
          ;;
        running) seen=1 failures=0 ;;
        unknown) once_more || return 1 ;;
        *) break ;; # the slices are gone, or nothing was set up
      esac
    done
    [[ -n $seen ]] || once_more || return 1
  done
}

# What `run` finds mounted, an earlier `setup` mounted.
mounted=()
[[ -z $bucket && $what != run ]] || mounted=(--mounted)
case $what in
  up | run | watch | resume)
    python3 "$here/common.py" check-job --on-hosts "${mounted[@]}" -- "$@"
    ;;
esac
case $what in
  up) up "$@" ;;
  watch) watch "$@" ;;
  create) create ;;
  wait) wait_for_slices ;;
  setup)
    now=absent
    [[ -n $dry ]] || now=$(known_job_state)
    [[ $now != running ]] || fail "the job runs from the tree that setup replaces:  stop  it first"
    setup
    ;;
  run) run "$@" ;;
  logs) on_hosts "$node" "$worker" 'bash ldm_scaling/launch/tpu_worker.sh logs' ;;
  status)
    describe
    on_all state
    ;;
  stop) on_all stop ;;
  resume) resume "$@" ;;
  delete) delete ;;
  *) fail "unknown command $what; see --help" ;;
esac
