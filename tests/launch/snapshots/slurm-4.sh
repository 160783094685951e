#!/bin/bash -l
# largebatch on slurm: 4 nodes x 4 ranks = 16 ranks and 1 to spare. Written by
# largebatch submit cluster=slurm cluster.walltime=12:00:00 cluster.nodes=4 cluster.node.ranks=4 'cluster.directives=['"'"'--gpus-per-node=4'"'"']' cluster.spares=1 'cluster.node.domains=[{cores:0-31},{cores:32-63}]' folder=jobs/snapshot -- train optim=lamb batch.size=24576
#SBATCH --job-name=largebatch
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=4
#SBATCH --time=12:00:00
#SBATCH --exclusive
#SBATCH --output=jobs/snapshot/%j.log
#SBATCH --gpus-per-node=4

# No `set -u`: modules and activate scripts use variables that are not set. With
# pipefail a pipe does not hide that its first part failed.
set -o pipefail
cd "${SLURM_SUBMIT_DIR:?is set by Slurm}" || exit 1
job_id=${SLURM_JOB_ID:?is set by Slurm}
# The run, or the sweep, looks when it has to save.
export LARGEBATCH_JOB_END=$(($(date +%s) + 43200))
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
scontrol show hostnames "$SLURM_JOB_NODELIST" > "$hostfile" || exit 1
found=$(wc -l < "$hostfile")
if [ "$found" -lt 5 ]; then
  echo "largebatch: 5 nodes were asked for, and $found are here" >&2
  exit 1
fi
# Asked before they are used: one dead node would end an mpiexec over all of them;
# 4 good ones go on.
python -m largebatch doctor --probe 'srun --nodes=1 --ntasks=1 --nodelist={node}' --hostfile "$hostfile" \
  --nodes 4 --hostfile-out "$hostfile.good" || exit 1
hostfile="$hostfile.good"
export LARGEBATCH_HOSTFILE="$hostfile"

# Where the ranks meet: on the first node.
MASTER_ADDR=$(head -n 1 "$hostfile")
MASTER_PORT=29500
export MASTER_ADDR MASTER_PORT

# Cores, none of them shared:
#   rank 0  0-15
#   rank 1  16-31
#   rank 2  32-47
#   rank 3  48-63
export OMP_NUM_THREADS=16

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
  srun --nodes=4 --ntasks=16 --ntasks-per-node=4
  --nodelist="$hostfile" --kill-on-bad-exit=1
  '--cpu-bind=mask_cpu:0xffff,0xffff0000,0xffff00000000,0xffff000000000000'
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
LARGEBATCH_RANKS=16 "${launch[@]}" "${logged[@]}" "${command[@]}" &
running=$!
trap 'told=1; kill -USR2 "$running" 2>/dev/null' TERM
trap 'told=1' INT
until told=0; wait "$running"; code=$?; [ "$told" = 0 ]; do :; done
[ "$code" = 0 ] || echo "largebatch: see also $folder/logs.$job_id" >&2
echo "largebatch: exit code $code, record in $record"
exit "$code"
