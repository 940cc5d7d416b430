# shellcheck shell=bash
# What all templates share; they source it, nobody submits it. It gives them
#
#   tasks                 how many ranks the job has
#   mpirun_over RANKS     sets the array `mpirun`: the command that starts so many ranks
#   srun_over RANKS       sets the array `srun`: the same through Slurm
#   program_of CONFIG.yaml … | SCRIPT.py …
#                         sets the array `program`: the trainer with its arguments, or Python with a script and its arguments
#   run COMMAND …         runs a command to its end, hands signals to it, and leaves its exit code in `code`
#   finish                ends the script by `code`: starts the job again, or passes the code on
#
# and reads
#
#   HVDLOCAL_SITE          what the site needs: modules, fabric (default: site.sh beside this file)
#   HVDLOCAL_BIN           directory of the Python environment (default: .venv/bin, where there is one)
#   HVDLOCAL_SURVIVE       1: when ranks die, the others go on without them (docs/slurm.md); submit with --no-kill
#   HVDLOCAL_MAX_RESTARTS  a job that was started again so often is not once more after a failure (default: 30)
#                          (three starts in a row that fail within a minute end it sooner)
#   MPIRUN                 the mpirun to use (default: the one on PATH); Open MPI 5 refuses a wrapper that adds --bind-to as well

say() { printf 'slurm/common.sh: %s\n' "$*"; }

# -- signals -----------------------------------------------------------------------------------------------------------
# Slurm signals this script alone (--signal=B:USR2@…), and the script signals mpirun or srun, which both hand USR2 on to all ranks.
# A signal to the job's steps instead would, with mpirun, reach Open MPI's daemons. The ranks get USR2 whatever came: mpirun takes a
# TERM as an order to kill them. Set first: until then a signal ends the script.
launcher=    # process id of the command that runs
interrupted= # the first signal that came
forwarded=   # whether the ranks have been told; once is enough
signalled=   # whether a signal has just ended `wait`

on_signal() {
  signalled=1
  say "SIG$1${interrupted:+ again}"
  interrupted=${interrupted:-$1}
  forward
}
forward() {
  [[ -n $interrupted && -n $launcher && -z $forwarded ]] || return 0
  forwarded=1
  kill -USR2 "$launcher" 2>/dev/null || true # it has just ended
}
trap 'on_signal USR2' USR2
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

# -- the environment of a rank -----------------------------------------------------------------------------------------
templates=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
soon=60 # seconds; site.sh may raise it where a start takes minutes before the training
set +u # modules read variables that may be unset
# shellcheck source=slurm/site.sh
source "${HVDLOCAL_SITE:-$templates/site.sh}"
set -u

bin=${HVDLOCAL_BIN:-$PWD/.venv/bin}
if [[ -d $bin ]]; then export PATH=$bin:$PATH; fi

# Slurm sets these only when the options were given.
tasks=${SLURM_NTASKS:-$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))}
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_GPU:-1}}

export OMP_NUM_THREADS=$((cpus > 1 ? cpus - 1 : 1)) # one core is left for Horovod's background thread
export PYTHONUNBUFFERED=1                           # a log that can be followed, and is whole after a kill
export PYTHONFAULTHANDLER=1                         # a crash in a library says where

# The bare id of an array's last task is that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}
restarts=${SLURM_RESTART_COUNT:-0}
max_restarts=${HVDLOCAL_MAX_RESTARTS:-30}
if [[ ! $max_restarts =~ ^[0-9]+$ ]]; then
  say "HVDLOCAL_MAX_RESTARTS=$max_restarts: a whole number is needed"
  exit 2
fi
failure_log=$PWD/hvdlocal-$job.failures

# The trainer stops in time by it. Older versions of Slurm do not set it; a job without a limit has none.
if [[ -z ${SLURM_JOB_END_TIME:-} && -n $job ]]; then
  end=$(squeue --noheader --jobs="$job" --format=%e 2>/dev/null) || end=
  SLURM_JOB_END_TIME=$(date --date="${end:-unknown}" +%s 2>/dev/null) || SLURM_JOB_END_TIME=
  if [[ -n $SLURM_JOB_END_TIME ]]; then export SLURM_JOB_END_TIME; fi
fi

# -- what Open MPI leaves behind -----------------------------------------------------------------------------------------
# When it is killed, files in TMPDIR (Open MPI 4 and 5: orte_tmpdir_base, prte_tmpdir_base) and memory in /dev/shm (vader, sm) stay,
# and an mpirun of Open MPI 5 that gets the process id of a killed one fails at once: "The PMIx server's listener thread failed to
# start". So each start has directories of its own on every node; `finish` removes them, and so does the job's next start.
# A job that is cancelled leaves them on its other nodes, to the site's epilog.
nodes=${SLURM_JOB_NUM_NODES:-1}
on_each_node=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1)
private=hvdlocal-mpi-${job:-$$}
own_files=${TMPDIR:-/tmp}/$private-$RANDOM$RANDOM
own_memory=/dev/shm/$private-$RANDOM$RANDOM

everywhere() { # runs bash with these arguments on every node
  if ((nodes > 1)); then "${on_each_node[@]}" --mpi=none bash "$@"; else bash "$@"; fi
}
make_private() {
  # shellcheck disable=SC2016
  everywhere -c 'rm -rf "${1%-*}"-* "${2%-*}"-* 2>/dev/null; mkdir -p -m 700 "$1" "$2"' bash "$own_files" "$own_memory" || return 0
  local name
  for name in OMPI_MCA_orte_tmpdir_base PRTE_MCA_prte_tmpdir_base; do export "$name=${!name:-$own_files}"; done
  for name in OMPI_MCA_btl_{vader,sm}_backing_directory; do export "$name=${!name:-$own_memory}"; done
}
remove_private() {
  rm -rf "$own_files" "$own_memory"
  # Of a job that was cancelled, Slurm starts nothing any more.
  if ((nodes > 1)); then everywhere -c 'rm -rf "$@"' bash "$own_files" "$own_memory" 2>/dev/null || true; fi
}

# -- starting ranks ----------------------------------------------------------------------------------------------------
# Open MPI hands on its own settings and Slurm's on the first node; these have to be named.
handed_on='PATH|LD_LIBRARY_PATH|SLURM_JOB_END_TIME|SLURM_RESTART_COUNT'
handed_on+='|PYTHON.*|OMP_.*|HVDLOCAL_.*|HOROVOD_.*|NCCL_.*|RCCL_.*|OFI_NCCL_.*|FI_.*|UCX_.*'
handed_on+='|GLOO_.*|TORCH_.*|MASTER_ADDR|MASTER_PORT'

survives() { [[ ${HVDLOCAL_SURVIVE:-} == 1 ]]; }
cannot_survive() {
  say "HVDLOCAL_SURVIVE=1: $*"
  exit 2
}

mpirun_over() {
  local name version program=${MPIRUN:-mpirun}
  mpirun=("$program" -np "$1")
  version=$("$program" --version 2>&1 | head -n 2) || true # an mpirun that prints more may be ended by a broken pipe
  if survives; then
    if ! [[ $version =~ "Open MPI) "([0-9]+) ]] || ((BASH_REMATCH[1] < 5)); then
      cannot_survive "this needs mpirun of Open MPI 5 or later; $program is ${version%%$'\n'*}"
    fi
    mpirun+=(--with-ft ulfm)
    export HVDLOCAL_BACKEND=${HVDLOCAL_BACKEND:-mpi4py} # the only engine that goes on
  fi
  case $version in
    *"Open MPI"* | *OpenRTE* | *PRTE*)
      mpirun+=(--bind-to none) # a rank bound to one core shares it with Horovod's thread
      # Said outright: whether a slot is a task or a core differs between versions of Open MPI.
      if [[ -n ${SLURM_NTASKS_PER_NODE:-} ]]; then mpirun+=(--map-by "ppr:$SLURM_NTASKS_PER_NODE:node"); fi
      while read -r name; do mpirun+=(-x "$name"); done < <(compgen -e | grep -Ex "$handed_on")
      ;;
    *) mpirun+=(-bind-to none) ;; # MPICH and Intel MPI hand on the whole environment
  esac
}

srun_over() {
  if survives; then cannot_survive "Open MPI goes on after the death of a rank under mpirun only: take a template that uses it"; fi
  # Named again because srun does not inherit --cpus-per-task from Slurm 22.05 to 23.02. Without --kill-on-bad-exit the ranks of a
  # dead one wait until their deadline. No --unbuffered: it makes a terminal of the log, and progress bars would fill it.
  local mpi=pmix
  if [[ ${HVDLOCAL_BACKEND:-} == torch ]]; then mpi=none; fi # its ranks meet by what Slurm itself tells them
  # shellcheck disable=SC2034 # the templates use it
  srun=(srun --ntasks="$1" --cpus-per-task="$cpus" --mpi="$mpi" --kill-on-bad-exit=1)
}

program_of() {
  # shellcheck disable=SC2034 # the templates use it
  case ${1:-} in
    *.py) program=(python "$@") ;;
    *) program=(python -m hvdlocal train "$@") ;;
  esac
}

# -- running, and the end of the job: docs/slurm.md has the exit codes ---------------------------------------------------
run() {
  local began=$SECONDS
  code=85
  [[ -z $interrupted ]] || return 0 # nothing is begun any more, and nothing is lost
  setsid "$@" &
  launcher=$!
  forward # a signal may have come between the two lines above
  while :; do
    signalled=
    code=0
    wait "$launcher" || code=$?
    [[ -n $signalled ]] || break # `wait` also ends when a signal comes, with 128 + its number
  done
  lasted=$((SECONDS - began))
  # bash can lose the code of a command that ends just when a signal comes. Another start finds out: a finished run says so.
  if [[ -n $interrupted ]] && ((code < 0 || code == 127)); then code=85; fi
  # When mpirun was killed, ranks may be left over: on this node they are in its session. On the others Slurm ends them with the
  # job's steps, before the job starts again.
  pkill -KILL -s "$launcher" || true
  launcher=
  if survives && ((code == 0)) && ! left_finished "$@"; then
    say "$1 ended with 0, but the run is not finished: all ranks were killed, or a node was lost with Open MPI's daemon"
    code=4
  fi
}

# With --with-ft ulfm, mpirun also ends with 0 after it lost every rank, or the daemon of a node (measured with 5.0.11).
left_finished() { # whether these words started no training, or one that is finished
  local words=("$@") i
  for ((i = 1; i < $#; i++)); do
    if [[ ${words[i - 1]} == hvdlocal && ${words[i]} == train ]]; then
      words[i]=finished
      "${words[@]:${#mpirun[@]}}"
      return
    fi
  done
}

finish() {
  local why failed=1
  remove_private
  case $code in
    0 | 2 | 3) # finished, a mistake, diverged: another start would come to the same
      forget_failures
      exit "$code"
      ;;
    4) why="a rank died or hung" ;;
    85) why="stopped by a signal or the time limit, checkpoint written" failed= ;;
    # Every other code is taken for an accident, because it does not tell one from a bug: after the death of a rank Open MPI 5 ends
    # with the code of that rank, of its signal, or of the MPI error that the others met; after a TERM with 1, as Python after a bug.
    *) why="a rank or its launcher failed" ;;
  esac
  if ((code > 128 && code < 193)); then why="a rank or its launcher was killed by signal $((code - 128))"; fi
  if [[ -n $interrupted && -n $failed ]]; then
    why="ended after SIG$interrupted" failed= # the launcher was quicker than the last rank's exit code
  fi
  say "exit code $code: $why"
  if [[ -n $failed ]] && ((lasted < soon)); then note_failure; else forget_failures; fi
  if [[ -z $job ]]; then
    say "not in a Slurm job: start it again by hand"
  elif [[ -n $failed ]] && ((restarts >= max_restarts)); then
    say "started again $restarts times already (HVDLOCAL_MAX_RESTARTS): not once more"
    forget_failures
  elif (($(failures) >= 3)); then
    say "failed three times in a row within $soon s of its start: not started again"
    forget_failures
  else
    requeue
  fi
  exit "$code"
}

# Failures that come soon after the start, one a line: wrong options of the launcher or a library that is missing come again at
# every start, and before the trainer can see that it makes no progress. The next start may be on another node, so the file is in
# the working directory.
failures() { if [[ -n $job && -f $failure_log ]]; then wc -l <"$failure_log"; else echo 0; fi; }
note_failure() {
  if [[ -n $job ]]; then
    echo "$(date +%FT%T) start $((restarts + 1)) failed with exit code $code after $lasted s" >>"$failure_log" || true
  fi
}
forget_failures() { if [[ -n $job ]]; then rm -f "$failure_log" || true; fi; }

requeue() {
  # Incomplete: what its owner has cancelled in the meantime stays cancelled.
  if scontrol requeue Incomplete "$job"; then
    say "asked Slurm to start job $job again"
  else
    say "job $job is not started again: scontrol refused"
  fi
}

make_private
say "job ${job:-none}: $tasks ranks on ${SLURM_JOB_NODELIST:-this machine}, $OMP_NUM_THREADS threads each," \
  "start $((restarts + 1))"
