"""`largebatch doctor`: what is wrong here, what it means and what to do; under a launcher, the
preflight of all its ranks.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from largebatch.common.files import write_whole
from largebatch.distributed.mailbox import Unreachable
from largebatch.launch.doctor import checks
from largebatch.launch.doctor.findings import Finding, as_json, as_text, exit_code
from largebatch.launch.doctor.host import Host, HostFacts, alone, collect
from largebatch.launch.doctor.preflight import nodes
from largebatch.launch.doctor.preflight.command import MODES, Verdict, preflight, seconds_for
from largebatch.launch.hosts import host_lines, write_hosts
from largebatch.records.outcomes import ExitCode


def main(arguments: list[str]) -> int:
    """Run `largebatch doctor ARGUMENTS`; returns 0 (no error found), 1 (errors), 2 (refused)."""
    options = _parser().parse_args(arguments)
    host = Host()
    try:
        _check(options)
        lines = _hostfile(options, host) if options.nodes else []
        taken_out = nodes.remembered(options.bad)
    except ValueError as error:
        print(f"largebatch: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    if options.answer is not None:
        facts = collect(alone(host), options.run_folder)
        answer = as_json(checks.of_all([facts]), _about(facts))
        write_whole(options.answer / f"{facts.node}.json", answer, durable=False)
        return 0
    facts = collect(host, options.run_folder)
    report = partial(_report, options, facts, lines)
    if options.probe:
        seconds = options.timeout or seconds_for("fast", len(lines))
        found = nodes.probe(lines, options.probe, seconds, options.hostfile_out)
        return report(Verdict([*found, *taken_out]))
    mode = options.preflight or "fast"
    if facts.size == 1 or mode == "off":
        verdict = Verdict(checks.of_all([facts]))
        return report(verdict) if facts.rank == 0 else exit_code(verdict.findings)
    try:
        return preflight(
            facts, host.ranks(), mode, report=report, timeout_seconds=options.timeout,
            all_to_all=options.all_to_all,
        ).code  # fmt: skip
    except Unreachable as error:
        if facts.local_rank == 0:  # one voice a node
            print(f"largebatch doctor on {facts.node}: master-unreachable: {error}: {_DIAL}",
                  file=sys.stderr)  # fmt: skip
        return 1


_DIAL = (
    "is rank 0 alive, does MASTER_ADDR name its node on a network that this node reaches, is "
    "MASTER_PORT free there?"
)


def _report(
    options: argparse.Namespace, facts: HostFacts, lines: list[str], verdict: Verdict
) -> int:
    """Print what was found, choose nodes where that is asked for; returns the exit code."""
    code = exit_code(verdict.findings)
    chosen: dict[str, Any] = {}
    words = ""
    if options.nodes:
        try:
            choice = nodes.choose(lines, verdict.findings, options.nodes)
        except nodes.TooFewNodes as error:
            code, words = 1, f"too-few-nodes: {error}"
            chosen = {"too_few_nodes": str(error)}
        else:
            write_hosts(choice.lines, options.hostfile_out)
            if options.spares_out is not None:
                write_hosts(choice.spares, options.spares_out)
            # What was wrong is left out.
            code, words = 0, nodes.format_choice(choice, options.hostfile_out)
            chosen = {"nodes": list(choice.lines), "left_out": dict(choice.left_out)}
    if options.json:
        print(as_json(verdict.findings, {**_about(facts), **verdict.measured, **chosen}))
    else:
        print(page(facts, verdict.findings, verdict.measured))
        if words:
            print(words, file=sys.stderr if code else sys.stdout)
    sys.stdout.flush()
    return code


def page(facts: HostFacts, findings: list[Finding], measured: dict[str, Any]) -> str:
    """The short page for people."""
    known = {name: version for name, version in facts.versions.items() if version}
    lines = [
        f"node {facts.node}: " + ", ".join(f"{name} {known[name]}" for name in known),
        f"{facts.size:,} {'rank' if facts.size == 1 else 'ranks'} (launcher: {facts.launcher}), "
        f"{facts.local_size} on this node; {len(facts.cores)} of {facts.num_cpus} CPUs, "
        f"{facts.nofile_soft:,} open files",
        f"run folder {facts.run_folder.path} ({facts.run_folder.free_bytes / 2**30:,.0f} GiB "
        f"free), TMPDIR {facts.tmpdir.path} ({facts.tmpdir.free_bytes / 2**30:,.0f} GiB free)",
    ]
    if facts.torch.get("xpu"):
        lines.append(f"{facts.torch['devices']} XPU tiles")
    elif not facts.expects_tiles:
        lines.append("no sign of XPU tiles here: torch was not asked for them")
    for name, seconds in measured.get("collective_seconds", {}).items():
        lines.append(f"  {name:28} {seconds * 1e3:10.2f} ms")
    rates = measured.get("node_gb_per_second", {})
    if rates:
        slowest = sorted(rates.items(), key=lambda row: row[1])[:8]
        lines.append(
            "slowest nodes in pairs, GB/s: " + ", ".join(f"{n} {r:.3g}" for n, r in slowest)
        )
    lines.append(as_text(findings) if findings else "nothing found that speaks against a run")
    return "\n".join(lines)


def _about(facts: HostFacts) -> dict[str, Any]:
    return {
        "node": facts.node,
        "ranks": facts.size,
        "launcher": facts.launcher,
        "versions": facts.versions,
    }


def _check(options: argparse.Namespace) -> None:
    if (options.nodes is None) != (options.hostfile_out is None):
        raise ValueError("--nodes N and --hostfile-out FILE are given together, or neither")
    if options.nodes is not None and options.nodes < 1:
        raise ValueError(f"--nodes must be at least 1, got {options.nodes}")
    if options.probe and options.nodes is None:
        raise ValueError("--probe asks the nodes among which --nodes N chooses: give that too")
    for name in ("spares_out", "bad"):
        if getattr(options, name) is not None and not options.probe:
            raise ValueError(f"--{name.replace('_', '-')} is for --probe: give that too")
    if options.timeout is not None and options.timeout <= 0:
        raise ValueError(f"--timeout must be > 0 seconds, got {options.timeout:g}")
    if options.hostfile_out is not None and not options.hostfile_out.absolute().parent.is_dir():
        raise ValueError(f"--hostfile-out {options.hostfile_out}: there is no such folder")


def _hostfile(options: argparse.Namespace, host: Host) -> list[str]:
    named = options.hostfile or host.environment.get("PBS_NODEFILE")
    if not named:
        raise ValueError(
            "--nodes chooses from the allocation's hostfile: give it with --hostfile FILE, or run "
            "in a PBS job, where PBS_NODEFILE names it"
        )
    lines = host_lines(Path(named))
    if len(lines) < options.nodes:
        raise ValueError(f"--nodes {options.nodes}, but {named} names {len(lines)} nodes")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="largebatch doctor",
        description="What is wrong here, what it means and what to do. Under mpiexec, srun or "
        "torchrun: the preflight of all ranks.",
        epilog="exit codes: 0 no error found (there may be warnings), or --nodes good nodes "
        "written; 1 errors found, or too few good nodes; 2 refused. docs/doctor.md explains every "
        "code.",
    )
    add = parser.add_argument
    add("--preflight", choices=MODES,
        help="for several ranks: fast (default; seconds), full (larger messages, more pairs of "
        "nodes), off (this rank's own facts only)")  # fmt: skip
    add("--json", action="store_true", help="one JSON object instead of the page")
    add("--run-folder", type=Path, default=Path(), metavar="DIR", help="where the run will write")
    seconds = ", ".join(f"{seconds_for(mode, 0):g} for {mode}" for mode in MODES[:2])
    add("--timeout", type=float, metavar="SECONDS",
        help=f"of each part of the preflight (default: {seconds}, and one more for every 100 "
        "ranks)")  # fmt: skip
    add("--all-to-all", action="store_true",
        help="try all_to_all too, which second-order optimizers use; not from 1,024 ranks on",
    )  # fmt: skip
    # What --probe starts on many nodes at once.
    add(nodes.ANSWER, type=Path, dest="answer", metavar="DIR", help=argparse.SUPPRESS)
    add = parser.add_argument_group("choosing nodes from an allocation with spares").add_argument
    add("--nodes", type=int, metavar="N", help="how many good nodes are wanted")
    for name, what in (
        ("hostfile-out", "write the hostfile of N good nodes here"),
        ("hostfile", "the allocation's (default: $PBS_NODEFILE)"),
        ("spares-out", "and the good nodes beside them here"),
        ("bad", "nodes, a line each, that failed in earlier jobs: they come last"),
    ):
        add(f"--{name}", type=Path, metavar="FILE", help=what)
    add("--probe", nargs="?", const=nodes.TEMPLATE, metavar="COMMAND",
        help="from the batch script, without mpiexec: ask each node by itself, started by COMMAND "
        "with {hostfile} or {node} in it; with {nodes} too, all of a rack at once, where names "
        f"tell racks (default: {nodes.TEMPLATE!r})")  # fmt: skip
    return parser
