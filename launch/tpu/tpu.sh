#!/usr/bin/env bash
# Cloud TPU jobs through gcloud: one command on every worker of a slice of one queued resource.
#
#   launch/tpu/tpu.sh run --name=huatuo --zone=us-west4-a --accelerator_type=v5e-64 --spot \
#       --setup='mountpoint -q /mnt/runs || sudo mount -t nfs 10.0.0.2:/runs /mnt/runs' \
#       -- python launch/train.py --config=configs/huatuogpt_7b.py --workdir=/mnt/runs/7b
#
# WHAT IT COSTS TO FORGET: a slice is paid for by the chip and the second from ACTIVE until it is
# deleted, whether it computes or idles; a slice of 64 chips left over a weekend is 64 times 60
# hours. `run` deletes the slice that it made at the end, however the job ends (by Ctrl-C too),
# unless --keep is given; but it can only do so while it lives: run it where it is not cut off (tmux
# on a small VM). By hand: `tpu.sh delete`, and look with
# `gcloud compute tpus queued-resources list --zone=ZONE`.
#
# Verbs, in the order in which `run` does them:
#   create  ask for the slice (a queued resource with one node of the same name)
#   wait    until it is ACTIVE
#   copy    this working tree (without what git ignores) to all workers, and install
#   start   --setup, then COMMAND on all workers, detached; output in ~/huatuo_jobs/NAME/log.txt
#   watch   until it has ended; ends with 75 where it was interrupted or its slice was taken away,
#           and with 1 where it failed
#   delete  give the slice back
# and beside them:
#   status  of the slice and of the job on each worker
#   logs    follow the log of a worker (--worker=0)
#   stop    SIGTERM to the job on all workers: it saves and exits
#
# Flags:
#   --name=NAME                of slice and job: small letters, digits, dashes
#   --zone=ZONE  --project=ID  default project: gcloud's own
#   --accelerator_type=TYPE    v4-N, v5p-N (cores), v5e-N, v6e-N (chips)
#   --runtime_version=VERSION  default: by generation
#   --spot, --reserved         cheaper and preemptible; from a reservation
#   --valid_until=DURATION     give up waiting after, as 6h
#   --service_account=EMAIL    of the workers; it needs access to buckets they use
#   --setup='SHELL LINE'       on every worker before each start, so it must bear repeating: as to
#                              mount the disk of --workdir
#   --worker=N                 for `logs`; or `all`
#   --poll_s=60  --keep
#   --dry_run                  print each command, run none
#
# A run that was interrupted is resumed by the same `run`. By itself SkyPilot does so, on machines that
# it looks for: launch/job.py writes its task.
#
# The command runs in the copied folder, `python` is that of its environment, its arguments arrive
# as they are given. --workdir must be a folder that all workers share and that outlives them, such
# as a Filestore (NFS) share: a fresh slice finds its checkpoints there. gs:// addresses are none.
# TPU7x and later are not served by the Cloud TPU API.
set -euo pipefail

readonly INTERRUPTED=75 # Of launch/train.py: stopped, can go on.
readonly CONTACTS=5     # Failed contacts in a row, with the slice ACTIVE, before giving up.

fail() {
  echo "error: $*" >&2
  exit 1
}

# One word as a shell reads it back, whatever is in it.
quote() {
  case $1 in
    '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//\'/\'\\\'\'}" ;;
    *) printf '%s' "$1" ;;
  esac
}

quote_all() {
  local word space=''
  for word in "$@"; do
    printf '%s' "$space"
    quote "$word"
    space=' '
  done
}

# Runs a command, or prints it.
act() {
  if ((dry_run)); then
    quote_all "$@"
    echo
  else
    "$@"
  fi
}

note() {
  if ((dry_run)); then echo "# $*"; else echo "$name: $*" >&2; fi
}

nap() {
  ((dry_run)) || sleep "$poll_s"
}

parse() {
  [[ $# -gt 0 ]] || fail "no verb given: create, wait, copy, start, watch, delete, run, status, logs or stop"
  verb=$1
  shift
  name='' zone='' project='' accelerator_type='' runtime_version='' valid_until='' service_account=''
  setup='' worker=0 poll_s=60 spot=0 reserved=0 keep=0 dry_run=0 command=()
  while [[ $# -gt 0 ]]; do
    case $1 in
      --name=* | --zone=* | --project=* | --accelerator_type=* | --runtime_version=* | --setup=* | \
        --valid_until=* | --service_account=* | --worker=* | --poll_s=*)
        local field=${1%%=*}
        printf -v "${field#--}" '%s' "${1#*=}"
        ;;
      --spot | --reserved | --keep | --dry_run) printf -v "${1#--}" 1 ;;
      --)
        shift
        command=("$@")
        break
        ;;
      *) fail "unknown flag $1; see the head of $0" ;;
    esac
    shift
  done
}

check() {
  [[ -n $name ]] || fail "--name is missing"
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=$name: up to 40 small letters, digits and dashes, a letter first"
  [[ -n $zone ]] || fail "--zone is missing, as --zone=us-west4-a"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$zone is no zone, as us-west4-a"
  [[ $poll_s =~ ^[0-9]+$ ]] || fail "--poll_s=$poll_s must be a whole number of seconds"
  [[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker=$worker must be a number or all"
  ((!(spot && reserved))) || fail "--spot and --reserved: a slice is one or the other"
  case $verb in
    create | watch | run) check_type ;;
  esac
  case $verb in
    start | watch | run) [[ ${#command[@]} -gt 0 ]] || fail "$verb needs a command after --" ;;
    *) [[ ${#command[@]} -eq 0 ]] || fail "$verb takes no command" ;;
  esac
}

# Google's names of a type and of what runs on it, by generation.
check_type() {
  [[ -n $accelerator_type ]] || fail "--accelerator_type is missing, as --accelerator_type=v5e-64"
  local default
  case $accelerator_type in
    v4-*) default=tpu-ubuntu2204-base ;;
    v5e-* | v5litepod-*)
      accelerator_type=v5litepod-${accelerator_type#*-}
      default=v2-alpha-tpuv5-lite
      ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v6e-*) default=v2-alpha-tpuv6e ;;
    *) fail "--accelerator_type=$accelerator_type: known are v4-N, v5e-N, v5p-N and v6e-N" ;;
  esac
  [[ ${accelerator_type#*-} =~ ^[1-9][0-9]*$ ]] ||
    fail "--accelerator_type=$accelerator_type must end in a number, as v5e-64"
  runtime_version=${runtime_version:-$default}
}

# The flags that say which slice.
find_place() {
  place=("--zone=$zone")
  if [[ -n $project ]]; then place+=("--project=$project"); fi
}

queued() { act gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }

# A shell line on workers: all, or one.
on_workers() { act gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"; }

create() {
  local flags=("--node-id=$name" "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version")
  if ((spot)); then flags+=(--spot); fi
  if ((reserved)); then flags+=(--reserved); fi
  if [[ -n $valid_until ]]; then flags+=("--valid-until-duration=$valid_until"); fi
  if [[ -n $service_account ]]; then flags+=("--service-account=$service_account"); fi
  queued create "${flags[@]}"
}

delete() { queued delete --force --quiet; }

# The state of the queued resource; GONE where there is none, UNKNOWN where it cannot be asked.
slice_state() {
  local said
  if said=$(queued describe '--format=value(state.state)' 2>&1); then
    grep -E '^[A-Z_]+$' <<<"$said" | tail -n 1 || echo UNKNOWN
  elif [[ $said == *NOT_FOUND* ]]; then
    echo GONE
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

# The state of the node behind it.
node_state() {
  gcloud compute tpus tpu-vm describe "$name" "${place[@]}" '--format=value(state)' 2>/dev/null ||
    echo UNKNOWN
}

await_slice() {
  if ((dry_run)); then
    note "every $poll_s s until ACTIVE:"
    queued describe '--format=value(state.state)'
    return
  fi
  local state before=''
  while true; do
    state=$(slice_state)
    if [[ $state != "$before" ]]; then note "$state"; fi
    before=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | GONE) return 1 ;;
    esac
    nap
  done
}

copy() {
  local root cache=${XDG_CACHE_HOME:-$HOME/.cache}/huatuo_jax
  local archive=$cache/$name.tar.gz
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  act cd "$root" &&
    act mkdir -p "$cache" &&
    pack "$archive" &&
    act gcloud compute tpus tpu-vm scp "$archive" "$name:huatuo_$name.tar.gz" "${place[@]}" --worker=all &&
    on_workers all "$(unpack)" &&
    on_workers all "bash $job/code/launch/tpu/worker.sh install"
}

# The working tree as it stands.
pack() {
  local line
  line="git ls-files -z --cached --others --exclude-standard | tar -czf $(quote "$1") --null -T -"
  if ((dry_run)); then
    echo "$line"
  else
    bash -c "set -o pipefail; $line" || fail "the code cannot be packed; are all its files there (git status)?"
  fi
}

# Code under a running job stays as it is.
unpack() {
  printf '%s' "if bash $job/code/launch/tpu/worker.sh status 2>/dev/null | grep -q '^huatuo_job running'; then " \
    "echo 'error: the job still runs here' >&2; exit 1; fi; rm -rf $job/code && " \
    "mkdir -p $job/code && tar -xzf huatuo_$name.tar.gz -C $job/code"
}

start() {
  if [[ -n $setup ]]; then on_workers all "$setup" || return 1; fi
  on_workers all "bash $job/code/launch/tpu/worker.sh start $(quote_all "${command[@]}")"
}

stop() { on_workers all "bash $job/code/launch/tpu/worker.sh stop"; }

logs() { on_workers "$worker" "tail -n 200 -F $job/log.txt"; }

status() {
  queued describe '--format=value(state.state)'
  on_workers all "bash $job/code/launch/tpu/worker.sh status"
}

# How the job is on all workers together: running, finished, interrupted, failed, or unreachable.
job_state() {
  local said line seen=0 codes=''
  said=$(on_workers all "bash $job/code/launch/tpu/worker.sh status" 2>/dev/null) || {
    echo unreachable
    return
  }
  while read -r line; do
    case $line in
      'huatuo_job running '*) codes+=' running' ;;
      'huatuo_job died '* | 'huatuo_job absent '*) codes+=" $INTERRUPTED" ;;
      'huatuo_job exit '*) codes+=" $(cut -d ' ' -f 3 <<<"$line")" ;;
      *) continue ;;
    esac
    seen=1
  done <<<"$said"
  if ((!seen)); then
    echo unreachable
  elif [[ $codes == *running* ]]; then
    echo running
  elif [[ -z ${codes// 0/} ]]; then
    echo finished
  elif [[ $codes =~ ^(\ (0|$INTERRUPTED))+$ ]]; then
    echo interrupted
  else
    echo "failed with exit codes$codes"
  fi
}

# The end of each worker's log: with the slice the logs are gone.
last_words() { on_workers all "tail -n 40 $job/log.txt" || true; }

# The end of a run that the same command resumes.
end_interrupted() {
  note "$1: the same command resumes the run"
  exit "$INTERRUPTED"
}

# Whether the slice was taken away; a node may be PREEMPTED while its queued resource is ACTIVE.
is_lost() {
  state=$(slice_state)
  if [[ $state == ACTIVE ]]; then state=$(node_state); fi
  case $state in
    SUSPENDING | SUSPENDED | FAILED | DELETING | GONE | PREEMPTED | TERMINATED) return 0 ;;
    *) return 1 ;;
  esac
}

watch() {
  if ((dry_run)); then
    show_watch
    return
  fi
  local state job_now missed=0
  while true; do
    nap
    if is_lost; then end_interrupted "the slice is lost ($state)"; fi
    job_now=$(job_state)
    if [[ $job_now != unreachable ]]; then missed=0; fi
    case $job_now in
      running) ;;
      finished)
        last_words
        note "finished"
        return
        ;;
      interrupted)
        last_words
        end_interrupted "the job was interrupted"
        ;;
      unreachable)
        if [[ $state == UNKNOWN ]]; then continue; fi # It may be us who are cut off.
        missed=$((missed + 1))
        ((missed < CONTACTS)) || fail "$name: the workers of a slice that is ACTIVE cannot be reached"
        ;;
      *)
        last_words
        fail "$name: the job $job_now"
        ;;
    esac
  done
}

show_watch() {
  note "every $poll_s s until the job has ended:"
  queued describe '--format=value(state.state)'
  act gcloud compute tpus tpu-vm describe "$name" "${place[@]}" '--format=value(state)'
  on_workers all "bash $job/code/launch/tpu/worker.sh status"
  note "where the slice is lost (SUSPENDED, FAILED, gone, node PREEMPTED): exit code $INTERRUPTED"
  note "when the job has ended:"
  last_words
}

run() {
  create || fail "$name: no slice was asked for"
  # From here on there is something to pay for, and it is ours.
  if ((!keep && !dry_run)); then trap 'note "deleting the slice"; delete' EXIT; fi
  await_slice || fail "$name: the slice did not become ACTIVE: $(slice_state)"
  if ! copy || ! start; then fail "$name: the job cannot be set up"; fi
  watch
  if ((!keep && dry_run)); then
    note "at the end, however it ends:"
    delete
  fi
}

parse "$@"
case $verb in
  create | copy | start | watch | delete | run | status | logs | stop) ;;
  wait) verb=await_slice ;;
  *) fail "unknown verb $verb: create, wait, copy, start, watch, delete, run, status, logs or stop" ;;
esac
check
find_place
job=huatuo_jobs/$name
((dry_run)) || command -v gcloud >/dev/null || fail "no gcloud on the PATH: install the Google Cloud CLI"
"$verb"
