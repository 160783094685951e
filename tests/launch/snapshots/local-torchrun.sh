#!/bin/bash
# largebatch on local: 1 node x 2 ranks = 2 ranks. Written by
# largebatch submit cluster=local cluster.launcher=torchrun folder=jobs/snapshot -- train optim=lamb batch.size=24576

# No `set -u`: modules and activate scripts use variables that are not set. With
# pipefail a pipe does not hide that its first part failed.
set -o pipefail
job_id=$$
folder="jobs/snapshot"
record="jobs/snapshot/run"
mkdir -p "$folder" && folder=$(realpath "$folder") || exit 1
python -c 'import largebatch' || exit 1

# Rank 0 holds a socket for each rank. The ranks look whether this has reached them. No
# core files: a crash of thousands of ranks would fill the file system.
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
ulimit -c 0

# The nodes, each once, in the system's order.
hostfile="$folder/nodes.$job_id"
hostname > "$hostfile"
found=$(wc -l < "$hostfile")
if [ "$found" -lt 1 ]; then
  echo "largebatch: 1 nodes were asked for, and $found are here" >&2
  exit 1
fi
export LARGEBATCH_HOSTFILE="$hostfile"

# Where the ranks meet: rank 0 says it through MPI, torchrun by itself.

# Of each rank, its last collectives: `largebatch watch` and `explain` compare them.
export TORCH_FR_BUFFER_SIZE=2000
mkdir -p "$folder/flight_recorder"
export TORCH_FR_DUMP_TEMP_FILE="$folder/flight_recorder/${job_id}_rank_"
export TORCH_CPP_LOG_LEVEL=ERROR

command=(
  python -m largebatch
  train
  optim=lamb
  batch.size=24576
  hydra.run.dir=jobs/snapshot/run
)
launch=(
  python -m torch.distributed.run --standalone --nproc-per-node 2
  --no-python
)
# Rank 0 speaks for all; each other rank writes into a file of its own, in a folder of
# its node: launchers choke on the output of thousands. `exec`, so that a rank's parent
# is the launcher's, and the rank ends when that has gone.
# shellcheck disable=SC2016  # the ranks expand it
logged=(bash -c '
  rank=${RANK:-${PALS_RANKID:-${PMI_RANK:-${SLURM_PROCID:-0}}}}
  [ "$rank" = 0 ] && exec "$@"
  logs="$0/$(hostname)"
  mkdir -p "$logs" && exec "$@" > "$logs/rank$rank.log" 2>&1
' "$folder/logs.$job_id")

# A batch system sends TERM before it kills. It is handed on, the run saves and leaves,
# and what follows here is done; behind a foreground command the shell would die of it.
# Ctrl-C reaches the command without this.
LARGEBATCH_RANKS=2 "${launch[@]}" "${logged[@]}" "${command[@]}" &
running=$!
trap 'told=1; kill -TERM "$running" 2>/dev/null' TERM
trap 'told=1' INT
until told=0; wait "$running"; code=$?; [ "$told" = 0 ]; do :; done
[ "$code" = 0 ] || echo "largebatch: see also $folder/logs.$job_id" >&2
echo "largebatch: exit code $code, record in $record"
exit "$code"
