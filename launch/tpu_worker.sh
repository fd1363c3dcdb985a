#!/usr/bin/env bash
# Runs on every host of a TPU slice; launch/tpu_vm.sh copies it there and calls it.
#
#   tpu_worker.sh setup [BUCKET]      # Python, the package, jax[tpu]; BUCKET mounted at /mnt/ldm
#   tpu_worker.sh run -- JOB < VARIABLES     # the job as a service
#   tpu_worker.sh state | stop | logs
#
# The service is systemd's: it starts again after every status but 0, 2 and 130 and after a reboot,
# and gives up after 20 restarts in a row, where an hour of running counts from zero again. What it
# prints is kept by the journal.
set -euo pipefail

unit=ldm-scaling
tree=$HOME/ldm_scaling
venv=$HOME/ldm_venv
start=$HOME/ldm_start.sh
mount=/mnt/ldm
unit_path=${LDM_UNITS:-/etc/systemd/system}/$unit.service
self=$(realpath "${BASH_SOURCE[0]}")
starts=$HOME/ldm_starts # how many in a row, and when the last was
max_restarts=20
stable=3600 # seconds after which an attempt's failure is the first again

# The user must mend something: a status that nothing else that is called here ends with (uv's and
# tar's is 2 when a server does not answer). Of the service it is 2, as the job's.
fail() {
  echo "tpu_worker.sh: error: $1" >&2
  exit "${2:-78}"
}

setup() {
  local bucket=${1:-}
  python3 -m pip install --quiet --user uv
  # The images bring Python 3.10; uv brings a newer one.
  [[ -x $venv/bin/python ]] || "$HOME/.local/bin/uv" venv --python 3.12 "$venv"
  # The demo's packages name torch, which nothing here imports: the small one, without CUDA.
  "$HOME/.local/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend=cpu \
    --constraint "$tree/requirements.lock" --editable "${tree}[data,demo,downstream]" 'jax[tpu]'
  [[ -z $bucket ]] || mount_bucket "$bucket"
}

mount_bucket() {
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc from=https://packages.cloud.google.com/apt
    curl -fsSL "$from/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -q
    sudo apt-get install -qy gcsfuse
  fi
  # What was mounted before would stay until the next reboot, whatever fstab says.
  local there
  there=$(findmnt -no SOURCE "$mount" || true)
  if [[ -n $there && $there != "$1" ]]; then
    [[ $(state) != running* ]] || fail "the job runs on $there at $mount: stop it first"
    sudo umount "$mount" || fail "$there is in use at $mount: end what uses it first"
  fi
  sudo mkdir -p "$mount"
  # In fstab, so that it is there after a reboot too. A checkpoint is made final by renaming its
  # folder, which gcsfuse does only up to rename_dir_limit files.
  local options="rw,_netdev,allow_other,implicit_dirs,rename_dir_limit=200000"
  options+=",uid=$(id -u),gid=$(id -g)"
  sudo sed -i "\\# $mount gcsfuse #d" /etc/fstab
  echo "$1 $mount gcsfuse $options 0 0" | sudo tee -a /etc/fstab >/dev/null
  mountpoint -q "$mount" || sudo mount "$mount"
}

# Lines on standard input go before the command: variables, and how secrets are fetched at start.
run() {
  local command count
  # Behind a job's own  --  the flag would be Beam's.
  printf -v command '%q ' "$venv/bin/ldm-scaling" "$1" --distributed "${@:2}"
  printf -v count '%q ' bash "$self" count
  rm -f "$starts"
  {
    echo '#!/usr/bin/env bash'
    echo 'set -euo pipefail'
    echo "$count"
    cat
    echo "exec $command"
  } >"$start"
  chmod 700 "$start"
  unit_file | sudo tee "$unit_path" >/dev/null
  sudo systemctl daemon-reload
  sudo systemctl enable --quiet "$unit"
  sudo systemctl reset-failed "$unit" 2>/dev/null || true
  sudo systemctl start --no-block "$unit" # a job that runs already stays
}

# Counts a start of the job; status 2, after which nothing starts again, when it is one too many.
count() {
  local row=0 last=0 now
  now=$(date +%s)
  [[ ! -s $starts ]] || read -r row last <"$starts"
  if ((now - last >= stable)); then row=0; fi
  ((row <= max_restarts)) || fail "it failed $row times in a row, no more restarts" 2
  echo "$((row + 1)) $now" >"$starts"
}

# SIGTERM goes to the main process alone: it saves and ends its own data workers. systemd takes an
# end by SIGTERM for a clean one; here it is not, unless it was asked for by `stop`. 75 is one that
# saved: it is started again by force, and after `stop` it is no failure.
unit_file() {
  cat <<UNIT
[Unit]
Description=ldm-scaling
Wants=network-online.target
After=network-online.target remote-fs.target
StartLimitIntervalSec=0

[Service]
User=$(id -un)
WorkingDirectory=$tree
ExecStart=$start
Restart=on-failure
RestartForceExitStatus=75 76 SIGTERM SIGINT SIGHUP
RestartPreventExitStatus=2 130
SuccessExitStatus=75
RestartSec=30
KillMode=mixed
TimeoutStopSec=300

[Install]
WantedBy=multi-user.target
UNIT
}

# absent; running, or starts again soon; done; stopped, by `stop`; failed: 2, or it gave up.
state() {
  local status ended
  if [[ ! -e $unit_path ]]; then
    echo absent
    return
  fi
  status=$(systemctl show --property=ExecMainStatus --value "$unit")
  ended=$(systemctl show --property=ExecMainExitTimestampMonotonic --value "$unit")
  case $(systemctl is-active "$unit" || true) in
    active | activating | deactivating) echo running ;;
    failed) echo failed ;;
    *) if [[ $status == 0 && $ended != 0 ]]; then echo "done"; else echo stopped; fi ;;
  esac
  echo "status of its last end: $status"
}

what=${1:-}
shift || true
case $what in
  setup) setup "$@" ;;
  run)
    [[ ${1:-} == -- ]] && shift
    run "$@"
    ;;
  unit) unit_file ;;
  count) count ;; # of the service itself
  state) state ;;
  stop) sudo systemctl disable --quiet --now "$unit" ;;
  logs) journalctl --unit="$unit" --output=cat --lines=200 --follow ;;
  *) fail "setup, run, state, stop or logs" ;;
esac
