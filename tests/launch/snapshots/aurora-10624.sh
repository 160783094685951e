#!/bin/bash -l
# largebatch on aurora: 10624 nodes x 12 ranks = 127488 ranks. Written by
# largebatch submit cluster=aurora cluster.account=project cluster.walltime=00:30:00 cluster.queue=prod cluster.nodes=10624 cluster.preflight=fast folder=jobs/snapshot -- train optim=lamb batch.size=127488
#PBS -N largebatch
#PBS -A project
#PBS -q prod
#PBS -l select=10624
#PBS -l walltime=00:30:00
#PBS -l filesystems=home:flare
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
export LARGEBATCH_JOB_END=$(($(date +%s) + 1800))
folder="jobs/snapshot"
record="jobs/snapshot/run"
mkdir -p "$folder" && folder=$(realpath "$folder") || exit 1

# The software, by version: what a bare name loads changes.
module load frameworks/2025.3.1 || exit 1

# Ours, over the module's: a virtual environment made with --system-site-packages.
venv="$HOME/largebatch-env"
# shellcheck disable=SC1091  # is not here where the script is checked
source "$venv/bin/activate" || exit 1
python -c 'import largebatch' || exit 1

# device: ALCF, PyTorch page: what the module sets, said again for other images
export ZE_FLAT_DEVICE_HIERARCHY="FLAT"  # a tile is a device, 12 a node, chosen by local rank
export ZES_ENABLE_SYSMAN="1"  # or a device does not tell its free memory (ALCF, known issues)
unset ZE_AFFINITY_MASK DS_ACCELERATOR

# oneccl: ALCF, oneCCL page: the minimal set, tested by ALCF to 1,024 nodes
export CCL_PROCESS_LAUNCHER="pmix"
export CCL_ATL_TRANSPORT="mpi"  # disputed: Megatron-DeepSpeed's helpers use ofi; `direct` and CCL_KVS_MODE=mpi need mpi
export CCL_KVS_MODE="mpi"
export FI_MR_CACHE_MONITOR="userfaultfd"  # disputed: `disabled` helps some applications (ALCF)
export PALS_PMI="pmix"  # used by an 8,192-node job of ALCF's DLcomm_benchmark
export CCL_KVS_CONNECTION_TIMEOUT="600"  # seconds; oneCCL's own 120 are short at scale (ALCF, extended set)
export CCL_KVS_USE_MPI_RANKS="1"  # ALCF, extended set
export CCL_OP_SYNC="1"  # the module's own; keeps collectives from hanging, null only to capture XPU graphs

# scale, from 256 nodes: ALCF, oneCCL page: extended and application-dependent sets; used by an 8,192-node job of DLcomm_benchmark
export FI_CXI_DEFAULT_CQ_SIZE="1048576"  # disputed: ALCF's known issues say 131072 with a fill of 20
export FI_CXI_CQ_FILL_PERCENT="30"
export FI_CXI_RX_MATCH_MODE="hybrid"
export FI_CXI_OFLOW_BUF_SIZE="8388608"
export CCL_ZE_CACHE_OPEN_IPC_HANDLES_THRESHOLD="1024"  # disputed: Megatron-DeepSpeed's helpers say 32768
export CCL_CONFIGURATION="cpu_gpu_dpcpp"
export CCL_CONFIGURATION_PATH=""
export CCL_ATL_SYNC_COLL="1"  # against a hang at large scale (ALCF)
export PALS_PING_PERIOD="240"  # seconds: nodes that are slow to answer are not lost
export PALS_RPC_TIMEOUT="240"
export INTELGT_AUTO_ATTACH_DISABLE="1"
unset MPIR_CVAR_CH4_POSIX_COLL_SELECTION_TUNING_JSON_FILE MPIR_CVAR_CH4_COLL_SELECTION_TUNING_JSON_FILE MPIR_CVAR_COLL_SELECTION_TUNING_JSON_FILE

# proxy: ALCF; NO_PROXY is inferred
export http_proxy="http://proxy.alcf.anl.gov:3128"
export https_proxy="http://proxy.alcf.anl.gov:3128"
export NO_PROXY="localhost,127.0.0.1,.alcf.anl.gov"
export no_proxy="localhost,127.0.0.1,.alcf.anl.gov"

# files: ALCF, known issues
export TMPDIR="/tmp"  # PBS's own is too long for the sockets of data workers

# All-reduce: the module's choice; cluster.allreduce=… makes another.

# Rank 0 holds a socket for each rank. The ranks look whether this has reached them. No
# core files: a crash of thousands of ranks would fill the file system.
ulimit -Sn 1048576 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
ulimit -c 0

# The nodes, each once, in the system's order.
hostfile="$folder/nodes.$job_id"
awk '!seen[$0]++' "$PBS_NODEFILE" > "$hostfile" || exit 1
found=$(wc -l < "$hostfile")
if [ "$found" -lt 10624 ]; then
  echo "largebatch: 10624 nodes were asked for, and $found are here" >&2
  exit 1
fi
export LARGEBATCH_HOSTFILE="$hostfile"

# Where the ranks meet: on the first node, by its name on the high-speed network.
export LARGEBATCH_HSN_SUFFIX=hsn.cm.aurora.alcf.anl.gov
MASTER_ADDR="$(head -n 1 "$hostfile" | cut -d. -f1).$LARGEBATCH_HSN_SUFFIX"
MASTER_PORT=2345
export MASTER_ADDR MASTER_PORT

# Cores, none of them shared:
#   rank 0                4-7
#   rank 1                8-11
#   rank 2                12-15
#   rank 3                16-19
#   rank 4                20-23
#   rank 5                24-27
#   rank 6                56-59
#   rank 7                60-63
#   rank 8                64-67
#   rank 9                68-71
#   rank 10               72-75
#   rank 11               76-79
#   the operating system  0,52
#   oneCCL's workers      42-47,94-99
export CCL_WORKER_AFFINITY=42,43,44,45,46,47,94,95,96,97,98,99  # one a rank
export OMP_NUM_THREADS=4

# Of each rank, its last collectives: `largebatch watch` and `explain` compare them.
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_CPP_LOG_LEVEL=ERROR

command=(
  python -m largebatch
  train
  optim=lamb
  batch.size=127488
  hydra.run.dir=jobs/snapshot/run
)
launch=(
  mpiexec --envall -n 127488 --ppn 12 --hostfile "$hostfile"
  --pmi=pmix  # with CCL_PROCESS_LAUNCHER=pmix
  --cpu-bind list:4-7:8-11:12-15:16-19:20-23:24-27:56-59:60-63:64-67:68-71:72-75:76-79
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
# Every collective by value, on all ranks, before any compute is spent.
LARGEBATCH_RANKS=127488 "${launch[@]}" \
  python -m largebatch doctor --preflight fast \
  --timeout 1335 || exit

# A batch system sends TERM before it kills. It is handed on, the run saves and leaves,
# and what follows here is done; behind a foreground command the shell would die of it.
# Ctrl-C reaches the command without this.
LARGEBATCH_RANKS=127488 "${launch[@]}" "${logged[@]}" "${command[@]}" &
running=$!
trap 'told=1; kill -TERM "$running" 2>/dev/null' TERM
trap 'told=1' INT
until told=0; wait "$running"; code=$?; [ "$told" = 0 ]; do :; done
[ "$code" = 0 ] || echo "largebatch: see also $folder/logs.$job_id" >&2
echo "largebatch: exit code $code, record in $record"
exit "$code"
