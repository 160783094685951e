"""Of a job's script, its nodes and its life: which nodes run, who watches them, who waits."""

from largebatch.launch.doctor.preflight.nodes import TEMPLATE
from largebatch.launch.jobs.job import Job, Lines


def nodes_lines(job: Job) -> Lines:
    cluster = job.cluster
    yield ""
    yield "# The nodes, each once, in the system's order."
    yield 'hostfile="$folder/nodes.$job_id"'
    if cluster.scheduler == "pbs":
        yield 'awk \'!seen[$0]++\' "$PBS_NODEFILE" > "$hostfile" || exit 1'
    elif cluster.scheduler == "slurm":
        yield 'scontrol show hostnames "$SLURM_JOB_NODELIST" > "$hostfile" || exit 1'
    else:
        yield 'hostname > "$hostfile"'
    yield 'found=$(wc -l < "$hostfile")'
    wanted = cluster.nodes + cluster.spares
    yield f'if [ "$found" -lt {wanted} ]; then'
    yield f'  echo "largebatch: {wanted} nodes were asked for, and $found are here" >&2'
    yield "  exit 1"
    yield "fi"
    if cluster.spares:
        yield "# Asked before they are used: one dead node would end an mpiexec over all of them;"
        yield f"# {cluster.nodes} good ones go on."
        alone = TEMPLATE
        if cluster.scheduler == "slurm":
            alone = "srun --nodes=1 --ntasks=1 --nodelist={node}"
        yield f"{job.python} -m largebatch doctor --probe '{alone}' --hostfile \"$hostfile\" \\"
        if cluster.restarts:
            yield '  --spares-out "$hostfile.spares" --bad "$folder/bad_nodes" \\'
        yield f'  --nodes {cluster.nodes} --hostfile-out "$hostfile.good" || exit 1'
        if cluster.restarts:
            yield 'spares="$hostfile.spares"'
        yield 'hostfile="$hostfile.good"'
    yield 'export LARGEBATCH_HOSTFILE="$hostfile"'


def everywhere(job: Job) -> tuple[str, str]:
    """Number of nodes on which ranks may run, spares included, and their hostfile."""
    if not (job.cluster.restarts and job.cluster.spares):
        return str(job.cluster.nodes), "$hostfile"
    return '"$(wc -l < "$hostfile.all")"', "$hostfile.all"


def rank_logs_lines() -> Lines:
    yield "# Rank 0 speaks for all; each other rank writes into a file of its own, in a folder of"
    yield "# its node: launchers choke on the output of thousands. `exec`, so that a rank's parent"
    yield "# is the launcher's, and the rank ends when that has gone."
    yield "# shellcheck disable=SC2016  # the ranks expand it"
    yield "logged=(bash -c '"
    yield "  rank=${RANK:-${PALS_RANKID:-${PMI_RANK:-${SLURM_PROCID:-0}}}}"
    yield '  [ "$rank" = 0 ] && exec "$@"'
    yield '  logs="$0/$(hostname)"'
    yield '  mkdir -p "$logs" && exec "$@" > "$logs/rank$rank.log" 2>&1'
    yield '\' "$folder/logs.$job_id")'


def watch_lines(job: Job) -> Lines:
    """Lines of `largebatch watch`, which ends a run that hangs and starts it again on request."""
    cluster = job.cluster
    yield "# Ends the job after this many seconds without a step: a hang ends nothing by itself."
    if cluster.restarts:
        yield "# What hung or failed is started again from its last checkpoint, without the"
        yield "# nodes that failed; the next jobs of a chain use those last."
    yield "watch=("
    yield f'  {job.python} -m largebatch watch "$record"'
    if cluster.watch_timeout is not None:
        yield f"  --timeout {cluster.watch_timeout}"
    if cluster.restarts:
        yield f"  --restarts {cluster.restarts}"
    if cluster.restarts and cluster.spares:
        yield '  --hostfile "$hostfile" --spares "$spares" --bad "$folder/bad_nodes"'
    yield "  --"
    yield ")"


def waiting_lines(job: Job, command: str) -> Lines:
    """The command, its exit code in `code`, and a shell that outlives SIGTERM for it."""
    # An srun kills its ranks on TERM.
    handed_on = "USR2" if job.cluster.launcher == "srun" and job.on_ranks else "TERM"
    yield "# A batch system sends TERM before it kills. It is handed on, the run saves and leaves,"
    yield "# and what follows here is done; behind a foreground command the shell would die of it."
    yield "# Ctrl-C reaches the command without this."
    yield f"{command} &"
    yield "running=$!"
    yield f"""trap 'told=1; kill -{handed_on} "$running" 2>/dev/null' TERM"""
    yield "trap 'told=1' INT"
    yield 'until told=0; wait "$running"; code=$?; [ "$told" = 0 ]; do :; done'
