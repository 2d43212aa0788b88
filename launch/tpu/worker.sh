#!/usr/bin/env bash
# The worker's side of tpu.sh, which calls it over ssh: install, start COMMAND..., status, stop.
#
# It stands in JOB/code/launch/tpu; beside the code, JOB holds `.venv`, `log.txt`, and the job's
# `pid` and `exit_code`.
set -euo pipefail

code=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
job=$(dirname "$code")

is_running() { [[ -f $job/pid ]] && kill -0 -- "-$(<"$job/pid")" 2>/dev/null; }

# The images of TPU VMs are Ubuntu 22.04 with Python 3.10; the project needs 3.11, which uv fetches.
install() {
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  [[ -x $job/.venv/bin/python ]] || uv venv --quiet --python 3.11 "$job/.venv"
  uv pip install --quiet --python "$job/.venv/bin/python" --editable "${code}[tpu,gcs]"
}

# The job is a process group of its own: a lost connection does not end it, `stop` reaches all of it.
start() {
  if is_running; then
    echo "error: the job already runs on $(hostname)" >&2
    exit 1
  fi
  rm -f "$job/exit_code"
  cd "$code"
  export PATH=$job/.venv/bin:$PATH HUATUO_MULTI_HOST=${HUATUO_MULTI_HOST:-auto} PYTHONUNBUFFERED=1
  # The shell outlives SIGTERM to tell how the command ended.
  # shellcheck disable=SC2016 # Expanded by the inner shell.
  setsid nohup bash -c 'trap : TERM; job=$1; shift; "$@"; echo $? >"$job/exit_code"' bash \
    "$job" "$@" >>"$job/log.txt" 2>&1 </dev/null &
  echo $! >"$job/pid"
}

status() {
  if is_running; then
    echo "huatuo_job running $(hostname)"
  elif [[ -f $job/exit_code ]]; then
    echo "huatuo_job exit $(<"$job/exit_code") $(hostname)"
  elif [[ -f $job/pid ]]; then
    echo "huatuo_job died $(hostname)"
  else
    echo "huatuo_job absent $(hostname)"
  fi
}

stop() {
  if is_running; then kill -TERM -- "-$(<"$job/pid")"; fi
}

case ${1:-} in
  install | start | status | stop) "$@" ;;
  *)
    echo "error: ${1:-nothing}: install, start COMMAND..., status or stop" >&2
    exit 1
    ;;
esac
