#!/bin/bash -l
# all on aurora: 300 nodes x 6 ranks = 1800 ranks and 4 to spare. Written by
# largebatch submit cluster=aurora cluster.account=project cluster.walltime=00:30:00 cluster.queue=prod cluster.nodes=300 cluster.spares=4 name=all cluster.chain=3 cluster.watch_timeout=900 cluster.restarts=5 cluster.preflight=full cluster.environment=copper cluster.daos=pool:box cluster.node.ranks=6 cluster.daos_intercept=true cluster.place=scatter:group=tier0 'cluster.allreduce=direct:0-1048576;rabenseifner:1048577-max' 'cluster.launcher_options=[--rlimit,NOFILE]' cluster.settings.scale.export.PALS_PING_PERIOD=null '+cluster.settings.mine={export:{MY_PATH:'"'"'$HOME/it is "mine"'"'"'},source:me}' folder=jobs/snapshot -- train optim=lamb batch.size=24576 checkpoint.every_samples=1e6 hydra.run.dir=runs/mine 'optim.lr='"'"'0.02'"'"''
#PBS -N all
#PBS -A project
#PBS -q prod
#PBS -l select=304
#PBS -l walltime=00:30:00
#PBS -l filesystems=home:flare:daos_user_fs
#PBS -l place=scatter:group=tier0
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
record="runs/mine"
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

# mine: me
export MY_PATH="$HOME/it is \"mine\""

# All-reduce between nodes, as asked; topo is the way inside of a node. Disputed: ALCF
# reported a failure of rabenseifner in September 2025 and recommended direct; its page
# on oneCCL recommends rabenseifner above 1 MiB. Check values before you train.
# 300 nodes are no power of two, which costs rabenseifner two messages
# more of the whole vector.
export CCL_ALLREDUCE=topo
export CCL_ALLREDUCE_SCALEOUT="direct:0-1048576;rabenseifner:1048577-max"

# Rank 0 holds a socket for each rank. The ranks look whether this has reached them. No
# core files: a crash of thousands of ranks would fill the file system.
ulimit -Sn 1048576 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"
ulimit -c 0

# The nodes, each once, in the system's order.
hostfile="$folder/nodes.$job_id"
awk '!seen[$0]++' "$PBS_NODEFILE" > "$hostfile" || exit 1
found=$(wc -l < "$hostfile")
if [ "$found" -lt 304 ]; then
  echo "largebatch: 304 nodes were asked for, and $found are here" >&2
  exit 1
fi
# Asked before they are used: one dead node would end an mpiexec over all of them;
# 300 good ones go on.
python -m largebatch doctor --probe 'mpiexec --no-vni --envall -n {nodes} --ppn 1 --hostfile {hostfile}' --hostfile "$hostfile" \
  --spares-out "$hostfile.spares" --bad "$folder/bad_nodes" \
  --nodes 300 --hostfile-out "$hostfile.good" || exit 1
spares="$hostfile.spares"
hostfile="$hostfile.good"
export LARGEBATCH_HOSTFILE="$hostfile"

# Where the ranks meet: on the first node, by its name on the high-speed network.
export LARGEBATCH_HSN_SUFFIX=hsn.cm.aurora.alcf.anl.gov
MASTER_ADDR="$(head -n 1 "$hostfile" | cut -d. -f1).$LARGEBATCH_HSN_SUFFIX"
MASTER_PORT=2345
export MASTER_ADDR MASTER_PORT

# The environment's files through Copper, which reads each once for all nodes. The
# module's own need none (ALCF, Copper page).
module load copper || exit 1
launch_copper.sh || exit 1
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export PYTHONPATH="/tmp/$USER/copper$site${PYTHONPATH:+:$PYTHONPATH}"

# DAOS: scratch, whose data may vanish; mounted at /tmp/pool/box.
module use /soft/modulefiles
module load daos || exit 1
launch-dfuse-with-caching.sh pool:box || exit 1

# Cores, none of them shared:
#   rank 0                4-7
#   rank 1                8-11
#   rank 2                12-15
#   rank 3                16-19
#   rank 4                20-23
#   rank 5                24-27
#   the operating system  0,52
#   oneCCL's workers      42-47
#   Copper                48-51
#   DAOS                  100-103
export CCL_WORKER_AFFINITY=42,43,44,45,46,47  # one a rank
export OMP_NUM_THREADS=4

# Of each rank, its last collectives: `largebatch watch` and `explain` compare them.
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_CPP_LOG_LEVEL=ERROR

# One job of a chain: nothing is left to do once the run has ended.
if [ -e "$record/summary.json" ]; then
  status=$(python -c \
    'import json, sys; print(json.load(open(sys.argv[1]))["status"])' \
    "$record/summary.json")
  case "$status" in
    reached | exhausted | diverged)
      echo "largebatch: $record has ended ($status)"
      exit 0 ;;
  esac
fi

command=(
  python -m largebatch
  train
  optim=lamb
  batch.size=24576
  checkpoint.every_samples=1e6
  hydra.run.dir=runs/mine
  'optim.lr='"'"'0.02'"'"''
  resume=auto
)
launch=(
  mpiexec --envall -n 1800 --ppn 6 --hostfile "$hostfile"
  --pmi=pmix  # with CCL_PROCESS_LAUNCHER=pmix
  --cpu-bind list:4-7:8-11:12-15:16-19:20-23:24-27
  --no-vni  # DAOS needs it
  # Python needs the second (ALCF, DAOS page).
  --env LD_PRELOAD=/usr/lib64/libpil4dfs.so --env D_IL_COMPATIBLE=1
  --rlimit
  NOFILE
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
LARGEBATCH_RANKS=1800 "${launch[@]}" \
  python -m largebatch doctor --preflight full \
  --timeout 198 || exit
# Ends the job after this many seconds without a step: a hang ends nothing by itself.
# What hung or failed is started again from its last checkpoint, without the
# nodes that failed; the next jobs of a chain use those last.
watch=(
  python -m largebatch watch "$record"
  --timeout 900
  --restarts 5
  --hostfile "$hostfile" --spares "$spares" --bad "$folder/bad_nodes"
  --
)

# A batch system sends TERM before it kills. It is handed on, the run saves and leaves,
# and what follows here is done; behind a foreground command the shell would die of it.
# Ctrl-C reaches the command without this.
LARGEBATCH_RANKS=1800 "${watch[@]}" "${launch[@]}" "${logged[@]}" "${command[@]}" &
running=$!
trap 'told=1; kill -TERM "$running" 2>/dev/null' TERM
trap 'told=1' INT
until told=0; wait "$running"; code=$?; [ "$told" = 0 ]; do :; done
stop_copper.sh
clean-dfuse.sh pool:box
[ "$code" = 0 ] || echo "largebatch: see also $folder/logs.$job_id" >&2
echo "largebatch: exit code $code, record in $record"
exit "$code"
