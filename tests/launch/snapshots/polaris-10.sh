#!/bin/bash -l
# largebatch on polaris: 10 nodes x 4 ranks = 40 ranks. Written by
# largebatch submit cluster=polaris cluster.account=project cluster.walltime=01:00:00 cluster.queue=prod cluster.nodes=10 folder=jobs/snapshot -- train optim=lamb batch.size=24576
#PBS -N largebatch
#PBS -A project
#PBS -q prod
#PBS -l select=10
#PBS -l walltime=01:00:00
#PBS -l filesystems=home:eagle
#PBS -l place=scatter
#PBS -k doe
#PBS -j oe
#PBS -o jobs/snapshot/

# No `set -u`: modules and activate scripts use variables that are not set. With
# pipefail a pipe does not hide that its first part failed.
set -o pipefail
cd "${PBS_O_WORKDIR:?is set by PBS}" || exit 1
job_id=${PBS_JOBID:?is set by PBS}
# The run, or the sweep, looks when it has to save.
export LARGEBATCH_JOB_END=$(($(date +%s) + 3600))
folder="jobs/snapshot"
record="jobs/snapshot/run"
mkdir -p "$folder" && folder=$(realpath "$folder") || exit 1

# The software, by version: what a bare name loads changes.
module use /soft/modulefiles || exit 1
module load conda || exit 1
conda activate base || exit 1

# Ours, over the module's: a virtual environment made with --system-site-packages.
venv="$HOME/largebatch-env"
# shellcheck disable=SC1091  # is not here where the script is checked
source "$venv/bin/activate" || exit 1
python -c 'import largebatch' || exit 1

# proxy: ALCF, running jobs
export http_proxy="http://proxy-01.pub.alcf.anl.gov:3128"
export https_proxy="http://proxy-01.pub.alcf.anl.gov:3128"
export NO_PROXY="localhost,127.0.0.1,.alcf.anl.gov"
export no_proxy="localhost,127.0.0.1,.alcf.anl.gov"

# files: as on Aurora: PBS's own is too long for the sockets of data workers
export TMPDIR="/tmp"

# Rank 0 holds a socket for each rank. The ranks look whether this has reached them. No
# core files: a crash of thousands of ranks would fill the file system.
ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
ulimit -c 0

# The nodes, each once, in the system's order.
hostfile="$folder/nodes.$job_id"
awk '!seen[$0]++' "$PBS_NODEFILE" > "$hostfile" || exit 1
found=$(wc -l < "$hostfile")
if [ "$found" -lt 10 ]; then
  echo "largebatch: 10 nodes were asked for, and $found are here" >&2
  exit 1
fi
export LARGEBATCH_HOSTFILE="$hostfile"

# Where the ranks meet: on the first node, by its name on the high-speed network.
export LARGEBATCH_HSN_SUFFIX=hsn.cm.polaris.alcf.anl.gov
MASTER_ADDR="$(head -n 1 "$hostfile" | cut -d. -f1).$LARGEBATCH_HSN_SUFFIX"
MASTER_PORT=2345
export MASTER_ADDR MASTER_PORT

# Cores, none of them shared:
#   rank 0  24-31
#   rank 1  16-23
#   rank 2  8-15
#   rank 3  0-7
export OMP_NUM_THREADS=8

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
  mpiexec --envall -n 40 --ppn 4 --hostfile "$hostfile"
  --cpu-bind list:24-31:16-23:8-15:0-7
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
LARGEBATCH_RANKS=40 "${launch[@]}" "${logged[@]}" "${command[@]}" &
running=$!
trap 'told=1; kill -TERM "$running" 2>/dev/null' TERM
trap 'told=1' INT
until told=0; wait "$running"; code=$?; [ "$told" = 0 ]; do :; done
[ "$code" = 0 ] || echo "largebatch: see also $folder/logs.$job_id" >&2
echo "largebatch: exit code $code, record in $record"
exit "$code"
