"""The script of a job: one body for every scheduler and launcher, written to be read.

Each section is a function that returns its lines; `script` puts them in order. Comments in the
script say why a line is there and who has confirmed it; the settings bring theirs from the YAML.
"""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from largebatch.common.text import clock, spell_cores
from largebatch.conf.cluster_config import ClusterConfig
from largebatch.launch.doctor.preflight.command import seconds_for
from largebatch.launch.jobs import script_nodes
from largebatch.launch.jobs.binding import pals_list, slurm_mask
from largebatch.launch.jobs.job import Job, Lines, comment, quoted, word


def script(job: Job) -> str:
    """The whole script; ConfigError for cores that two would have."""
    sections = (
        _head, directives_lines, _begin, _modules, _environment, variables_lines, _limits,
        script_nodes.nodes_lines, master_lines, _storage, cores_lines, _diagnostics, _chain, _run,
    )  # fmt: skip
    return "\n".join(line for section in sections for line in section(job)) + "\n"


def _head(job: Job) -> Lines:
    cluster = job.cluster
    yield f"#!/bin/bash {cluster.shell_options}".rstrip()
    yield comment(f"{job.config.name} on {cluster.name}: {_size(job)}. Written by")
    yield comment(shlex.join(["largebatch", "submit", *job.request]))


def _size(job: Job) -> str:
    cluster = job.cluster
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    spares = f" and {cluster.spares} to spare" if cluster.spares else ""
    return f"{nodes} x {cluster.node.ranks} ranks = {cluster.num_ranks} ranks{spares}"


def directives_lines(job: Job) -> Lines:
    cluster, folder = job.cluster, job.config.folder
    nodes = cluster.nodes + cluster.spares
    if cluster.scheduler == "pbs":
        yield f"#PBS -N {job.config.name}"
        yield f"#PBS -A {cluster.account}"
        yield f"#PBS -q {cluster.queue}"
        yield f"#PBS -l select={nodes}"
        yield f"#PBS -l walltime={clock(cluster.walltime)}"
        if cluster.filesystems:
            daos = [] if cluster.daos is None else [cluster.daos_filesystem]
            yield f"#PBS -l filesystems={':'.join([*cluster.filesystems, *daos])}"
        if cluster.place is not None:
            yield f"#PBS -l place={cluster.place}"
        yield "#PBS -k doe"
        yield "#PBS -j oe"
        yield f"#PBS -o {folder}/"  # a file for each job, ID.OU
        yield from (f"#PBS {directive}" for directive in cluster.directives)
    elif cluster.scheduler == "slurm":
        yield f"#SBATCH --job-name={job.config.name}"
        if cluster.account is not None:
            yield f"#SBATCH --account={cluster.account}"
        if cluster.queue is not None:
            yield f"#SBATCH --partition={cluster.queue}"
        yield f"#SBATCH --nodes={nodes}"
        yield f"#SBATCH --ntasks-per-node={cluster.node.ranks}"
        yield f"#SBATCH --time={clock(cluster.walltime)}"
        yield "#SBATCH --exclusive"
        yield f"#SBATCH --output={folder}/%j.log"
        if cluster.restarts:
            yield "#SBATCH --no-kill  # a lost node is replaced"
        yield from (f"#SBATCH {directive}" for directive in cluster.directives)


def _begin(job: Job) -> Lines:
    cluster = job.cluster
    yield ""
    yield "# No `set -u`: modules and activate scripts use variables that are not set. With"
    yield "# pipefail a pipe does not hide that its first part failed."
    yield "set -o pipefail"
    if cluster.scheduler == "pbs":
        yield 'cd "${PBS_O_WORKDIR:?is set by PBS}" || exit 1'
        yield "job_id=${PBS_JOBID:?is set by PBS}"
    elif cluster.scheduler == "slurm":
        yield 'cd "${SLURM_SUBMIT_DIR:?is set by Slurm}" || exit 1'
        yield "job_id=${SLURM_JOB_ID:?is set by Slurm}"
    else:
        yield "job_id=$$"
    if cluster.walltime is not None:
        yield "# The run, or the sweep, looks when it has to save."
        yield f"export LARGEBATCH_JOB_END=$(($(date +%s) + {cluster.walltime}))"
    yield f"folder={quoted(job.config.folder)}"
    yield f"record={quoted(job.record)}"
    yield 'mkdir -p "$folder" && folder=$(realpath "$folder") || exit 1'


def _modules(job: Job) -> Lines:
    cluster = job.cluster
    if not (cluster.modules or cluster.setup):
        return
    yield ""
    yield "# The software, by version: what a bare name loads changes."
    yield from (f"module load {module} || exit 1" for module in cluster.modules)
    yield from (f"{line} || exit 1" for line in cluster.setup)


def _environment(job: Job) -> Lines:
    cluster = job.cluster
    if cluster.venv is not None:
        yield ""
        yield "# Ours, over the module's: a virtual environment made with --system-site-packages."
        yield f"venv={quoted(cluster.venv)}"
        yield "# shellcheck disable=SC1091  # is not here where the script is checked"
        yield 'source "$venv/bin/activate" || exit 1'
    yield f"{job.python} -c 'import largebatch' || exit 1"


def variables_lines(job: Job) -> Lines:
    cluster = job.cluster
    for name, group in cluster.active_settings.items():
        yield ""
        scale = f", from {group.from_nodes} nodes" if group.from_nodes > 1 else ""
        yield comment(f"{name}{scale}: {group.source}")
        for variable, value in group.export.items():
            if value is None:
                continue
            because = group.because.get(variable)
            why = "" if because is None else f"  {comment(because)}"
            yield f"export {variable}={quoted(value)}{why}"
        if group.unset:
            yield f"unset {' '.join(group.unset)}"
    if cluster.collectives == "oneccl":
        yield from _algorithm(cluster)


def _algorithm(cluster: ClusterConfig) -> Lines:
    yield ""
    if cluster.allreduce == "default":
        yield "# All-reduce: the module's choice; cluster.allreduce=… makes another."
        return
    yield "# All-reduce between nodes, as asked; topo is the way inside of a node. Disputed: ALCF"
    yield "# reported a failure of rabenseifner in September 2025 and recommended direct; its page"
    yield "# on oneCCL recommends rabenseifner above 1 MiB. Check values before you train."
    if "rabenseifner" in cluster.allreduce and cluster.nodes & (cluster.nodes - 1):
        yield f"# {cluster.nodes} nodes are no power of two, which costs rabenseifner two messages"
        yield "# more of the whole vector."
    yield "export CCL_ALLREDUCE=topo"
    yield f"export CCL_ALLREDUCE_SCALEOUT={quoted(cluster.allreduce)}"


def _limits(job: Job) -> Lines:
    files = job.cluster.open_files
    yield ""
    yield "# Rank 0 holds a socket for each rank. The ranks look whether this has reached them. No"
    yield "# core files: a crash of thousands of ranks would fill the file system."
    yield f'ulimit -Sn {files} 2>/dev/null || ulimit -Sn "$(ulimit -Hn)"'
    yield "ulimit -c 0"


def master_lines(job: Job) -> Lines:
    cluster = job.cluster
    if not job.on_ranks:
        return
    yield ""
    if cluster.hsn_suffix is not None:
        yield "# Where the ranks meet: on the first node, by its name on the high-speed network."
        yield f"export LARGEBATCH_HSN_SUFFIX={cluster.hsn_suffix}"
    elif cluster.master_port is not None:
        yield "# Where the ranks meet: on the first node."
    if cluster.master_port is None:
        yield "# Where the ranks meet: rank 0 says it through MPI, torchrun by itself."
        return
    first = 'head -n 1 "$hostfile"'
    if cluster.hsn_suffix is None:
        yield f"MASTER_ADDR=$({first})"
    else:
        yield f'MASTER_ADDR="$({first} | cut -d. -f1).$LARGEBATCH_HSN_SUFFIX"'
    yield f"MASTER_PORT={cluster.master_port}"
    yield "export MASTER_ADDR MASTER_PORT"


def _storage(job: Job) -> Lines:
    cluster = job.cluster
    if cluster.environment == "spread":
        yield ""
        yield "# Python's files onto every node's own disk, by one rank a node: thousands of ranks"
        yield "# that import from a shared file system bring it to its knees."
        yield 'spread="/tmp/largebatch-$job_id"'
        if script_nodes.everywhere(job)[1] != "$hostfile":
            yield 'cat "$hostfile" "$spares" > "$hostfile.all"'
        yield "one_a_node=("
        yield from (f"  {line}" for line in launcher_lines(job, one_a_node=True))
        yield ")"
        yield '"${one_a_node[@]}" python -m largebatch env spread \\'
        yield f'  {quoted(cluster.archive)} --to "$spread" || exit 1'
        yield "# shellcheck disable=SC1091  # as above"
        yield 'source "$spread/bin/activate" || exit 1'
        yield "python -c 'import largebatch' || exit 1"
    elif cluster.environment == "copper":
        yield ""
        yield "# The environment's files through Copper, which reads each once for all nodes. The"
        yield "# module's own need none (ALCF, Copper page)."
        yield "module load copper || exit 1"
        yield "launch_copper.sh || exit 1"
        code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
        yield f"site=$({job.python} -c '{code}')"
        yield 'export PYTHONPATH="/tmp/$USER/copper$site${PYTHONPATH:+:$PYTHONPATH}"'
    if cluster.daos is not None:
        pool, _, container = cluster.daos.partition(":")
        yield ""
        yield f"# DAOS: scratch, whose data may vanish; mounted at /tmp/{pool}/{container}."
        yield "module use /soft/modulefiles"
        yield "module load daos || exit 1"
        # Files that are mapped need the cache (ALCF, DAOS page).
        caching = "-with-caching" * cluster.daos_caching
        yield f"launch-dfuse{caching}.sh {cluster.daos} || exit 1"


def cores_lines(job: Job) -> Lines:
    binding = job.binding
    if binding is None:
        return
    yield ""
    yield "# Cores, none of them shared:"
    width = max(map(len, binding.owners))
    for owner, cores in binding.owners.items():
        yield f"#   {owner:{width}}  {spell_cores(cores)}"
    if binding.workers:
        yield f"export CCL_WORKER_AFFINITY={','.join(map(str, binding.workers))}  # one a rank"
    yield f"export OMP_NUM_THREADS={binding.cores_per_rank}"


def _diagnostics(job: Job) -> Lines:
    yield ""
    yield "# Of each rank, its last collectives: `largebatch watch` and `explain` compare them."
    yield "export TORCH_FR_BUFFER_SIZE=2000"
    if job.cluster.collectives != "oneccl":  # XCCL's writes no files
        yield 'mkdir -p "$folder/flight_recorder"'
        yield 'export TORCH_FR_DUMP_TEMP_FILE="$folder/flight_recorder/${job_id}_rank_"'
    yield "export TORCH_CPP_LOG_LEVEL=ERROR"


def _chain(job: Job) -> Lines:
    if job.cluster.chain == 1 or not job.on_ranks:
        return
    yield ""
    yield "# One job of a chain: nothing is left to do once the run has ended."
    yield 'if [ -e "$record/summary.json" ]; then'
    yield f"  status=$({job.python} -c \\"
    yield "    'import json, sys; print(json.load(open(sys.argv[1]))[\"status\"])' \\"
    yield '    "$record/summary.json")'
    yield '  case "$status" in'
    yield "    reached | exhausted | diverged)"
    yield '      echo "largebatch: $record has ended ($status)"'
    yield "      exit 0 ;;"
    yield "  esac"
    yield "fi"


def _run(job: Job) -> Lines:
    cluster, steps, logged = job.cluster, ["command"], False
    yield ""
    yield "command=("
    yield from (f"  {line}" for line in job.command)
    yield ")"
    if job.on_ranks:
        yield "launch=("
        yield from (f"  {line}" for line in launcher_lines(job))
        yield ")"
        if logged := cluster.nodes >= cluster.rank_logs_from_nodes:
            yield from script_nodes.rank_logs_lines()
            steps.insert(0, "logged")
        steps.insert(0, "launch")
        if cluster.preflight is not None:
            yield "# Every collective by value, on all ranks, before any compute is spent."
            yield f'LARGEBATCH_RANKS={cluster.num_ranks} "${{launch[@]}}" \\'
            seconds = seconds_for(cluster.preflight, cluster.num_ranks)
            more = " --all-to-all" * uses_all_to_all(job.words)
            yield f"  {job.python} -m largebatch doctor --preflight {cluster.preflight} \\"
            yield f"  --timeout {seconds:.0f}{more} || exit"
    if cluster.watch_timeout is not None or cluster.restarts:
        yield from script_nodes.watch_lines(job)
        steps.insert(0, "watch")
    yield ""
    words = " ".join(f'"${{{step}[@]}}"' for step in steps)
    # Only what is started here: a `python -m largebatch …` beside it is one rank.
    words = f"LARGEBATCH_RANKS={cluster.num_ranks} {words}" if job.on_ranks else words
    yield from script_nodes.waiting_lines(job, words)
    if cluster.environment == "copper":
        yield "stop_copper.sh"
    if cluster.daos is not None:
        yield f"clean-dfuse.sh {cluster.daos}"
    if logged:
        yield '[ "$code" = 0 ] || echo "largebatch: see also $folder/logs.$job_id" >&2'
    yield 'echo "largebatch: exit code $code, record in $record"'
    yield 'exit "$code"'


def uses_all_to_all(words: Sequence[str]) -> bool:
    """Whether the run's optimizer sends blocks of gradients to their owners by it."""
    return any(word in ("optim=kfac", "optim=shampoo", "optim=soap") for word in words)


def launcher_lines(job: Job, one_a_node: bool = False) -> Lines:
    """The words that start the ranks, or one process on each node, some a line."""
    cluster, binding = job.cluster, None if one_a_node else job.binding
    each = 1 if one_a_node else cluster.node.ranks
    nodes, ranks, hostfile = str(cluster.nodes), str(cluster.num_ranks), "$hostfile"
    if one_a_node:
        nodes, hostfile = script_nodes.everywhere(job)
        ranks = nodes
    if cluster.launcher == "pals":
        yield f'mpiexec --envall -n {ranks} --ppn {each} --hostfile "{hostfile}"'
        if cluster.collectives == "oneccl":
            yield "--pmi=pmix  # with CCL_PROCESS_LAUNCHER=pmix"
        if binding is not None:
            yield f"--cpu-bind {word(pals_list(binding))}"
        if cluster.daos is not None and "--no-vni" not in cluster.launcher_options:
            yield "--no-vni  # DAOS needs it"
        if cluster.daos_intercept and not one_a_node:
            yield "# Python needs the second (ALCF, DAOS page)."
            yield "--env LD_PRELOAD=/usr/lib64/libpil4dfs.so --env D_IL_COMPATIBLE=1"
    elif cluster.launcher == "srun":
        yield f"srun --nodes={nodes} --ntasks={ranks} --ntasks-per-node={each}"
        yield f'--nodelist="{hostfile}" --kill-on-bad-exit=1'
        if binding is not None:
            yield word(f"--cpu-bind={slurm_mask(binding)}")
    elif cluster.launcher == "mpich":
        on = f' -f "{hostfile}"' * (cluster.nodes > 1)
        yield f"{_mpiexec(job)} -n {ranks} -ppn {each}{on}"
    else:
        yield f"{job.python} -m torch.distributed.run --standalone --nproc-per-node {each}"
        yield "--no-python"
    yield from (word(option) for option in cluster.launcher_options)


def _mpiexec(job: Job) -> str:
    """The one on PATH, or that of this environment, which need not be active."""
    own = Path(sys.executable).with_name("mpiexec")
    if job.python == "python" or shutil.which("mpiexec") is not None or not own.exists():
        return "mpiexec"
    return word(str(own))
