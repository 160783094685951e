"""The nodes of a job, from an allocation with spares: asked before a launcher that needs all of
them is tried, and chosen.

One dead node makes an mpiexec over all nodes fail before any rank can say which it was.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from largebatch.launch.doctor.findings import Finding, error, found_from, merged, warning
from largebatch.launch.hosts import places, short, write_hosts

TEMPLATE: Final = "mpiexec --no-vni --envall -n {nodes} --ppn 1 --hostfile {hostfile}"
"""Starts one command on each of the {nodes} nodes in {hostfile}, a line each, or on {node}. Without
--no-vni many small jobs at a time run out of networks (ALCF, known issues)."""
ANSWER: Final = "--answer"
"""Of the doctor: the folder that a node's answer goes into. It is no text of a launcher's, which
would mix those of many nodes."""
_AT_ONCE: Final = 64
_RACK: Final = re.compile(r"(x\d+)c\d+s\d+b\d+n\d+$")


def probe(
    lines: Sequence[str], template: str, timeout_seconds: float, beside: Path
) -> list[Finding]:
    """What `largebatch doctor` finds on each node of a hostfile's lines, and node-dead.

    With {nodes} in the template all nodes of a rack are asked by one launch. Where it fails, those
    without an answer are asked again, each by itself, as one dead node fails it for all. Answers
    are written next to `beside`, a path in a folder that every node sees; `timeout_seconds` are
    those of a launch, of which _AT_ONCE are under way at a time.
    """
    racks: dict[str, list[str]] = {}
    for line in lines:
        rack = _RACK.match(short(line)) if "{nodes}" in template else None
        racks.setdefault(rack[1] if rack else short(line), []).append(line)
    folder = Path(tempfile.mkdtemp(prefix=".probe-", dir=beside.absolute().parent))
    answers: dict[str, dict[str, Any] | str] = {}
    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:

            def ask(groups: Iterable[Sequence[str]]) -> None:
                for said in pool.map(
                    lambda group: _ask(group, template, timeout_seconds, folder), groups
                ):
                    answers.update(said)

            ask(racks.values())
            ask([line] for line in lines if short(line) not in answers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return merged(_findings({short(line): answers[short(line)] for line in lines}))


def _ask(
    lines: Sequence[str], template: str, timeout_seconds: float, above: Path
) -> dict[str, dict[str, Any] | str]:
    """The answers of some nodes, or of a single one why there is none."""
    folder = Path(tempfile.mkdtemp(dir=above))
    hostfile = folder / "hosts"
    write_hosts(lines, hostfile)
    first = lines[0].split()[0]
    words = shlex.split(template.format(hostfile=hostfile, node=first, nodes=len(lines)))
    doctor = [sys.executable, "-m", "largebatch", "doctor", ANSWER, str(folder)]
    why = ""
    try:
        done = subprocess.run(
            [*words, *doctor], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout_seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        why = f"has not answered within {timeout_seconds:g} s"
    except OSError as error:
        why = f"cannot be asked: {words[0]}: {error.strerror}"
    else:
        said = done.stderr.strip().splitlines()[-1:] or ["without a word"]
        why = f"failed with exit code {done.returncode}: {said[0]}"
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("[!.]*.json")}
    if len(lines) == 1:  # it may call itself by another name
        return {short(lines[0]): next(iter(found.values()), why)}
    return {node: answer for node, answer in found.items() if node in set(map(short, lines))}


def _findings(answers: dict[str, dict[str, Any] | str]) -> Iterator[Finding]:
    programs: dict[str, str] = {}
    for node, answer in answers.items():
        if isinstance(answer, str):
            yield error(
                "node-dead",
                answer,
                "a job over this node does not start",
                "it is left out where spares allow",
                (node,),
            )
            continue
        for row in answer["findings"]:
            yield found_from(row | {"nodes": [node]})
        programs[node] = json.dumps(answer["versions"], sort_keys=True)
    if not programs:
        return
    usual = Counter(programs.values()).most_common(1)[0][0]
    for node, program in programs.items():
        if program != usual:
            here, there = json.loads(program), json.loads(usual)
            names = [name for name in there if here.get(name) != there[name]]
            yield error(
                "versions-differ",
                ", ".join(f"{name} {here.get(name)} (others {there[name]})" for name in names),
                "the ranks would run different programs",
                "spread the environment anew (largebatch env spread)",
                (node,),
            )


class TooFewNodes(ValueError):
    """Fewer good nodes than asked for; the message is for the user."""


@dataclass(frozen=True)
class Choice:
    """`lines` are those of the allocation's hostfile, as they stand there."""

    lines: tuple[str, ...]
    left_out: Mapping[str, str]
    """Node -> the codes that spoke against it, or "spare"."""
    spares: tuple[str, ...] = ()
    """Lines of good nodes that were left out, those without a warning first."""


def choose(lines: Sequence[str], findings: Iterable[Finding], num_nodes: int) -> Choice:
    """`num_nodes` good nodes: those without a finding first, then those with warnings only.
    TooFewNodes for an error that no choice of nodes takes away, or too few nodes without one.
    """
    findings = list(findings)
    everywhere = [f.code for f in findings if f.severity == "error" and not f.nodes]
    if everywhere:
        raise TooFewNodes(f"leaving nodes out does not help against {', '.join(everywhere)}")
    line_of = {short(line): line for line in lines}
    against: dict[str, list[str]] = {node: [] for node in line_of}
    bad = set()
    for finding in findings:
        for node in finding.nodes:
            if finding.severity != "note" and node in against:
                against[node].append(finding.code)
                if finding.severity == "error":
                    bad.add(node)
    good = [node for node in line_of if node not in bad]
    if len(good) < num_nodes:
        why = "; ".join(f"{node}: {', '.join(against[node])}" for node in sorted(bad))
        raise TooFewNodes(
            f"{num_nodes} nodes are wanted, and {len(good)} of the allocation's {len(line_of)} are "
            f"good ({why or 'the allocation is that small'}): ask PBS for more spares, or for "
            "fewer nodes here"
        )
    # Stable: where nothing speaks against them, nodes stay in the allocation's order.
    good = sorted(good, key=lambda node: len(against[node]))
    best = good[:num_nodes]
    chosen = [node for node in line_of if node in best]
    return Choice(
        tuple(line_of[node] for node in chosen),
        {
            node: ", ".join(dict.fromkeys(against[node])) or "spare"
            for node in line_of
            if node not in best
        },
        tuple(line_of[node] for node in good[num_nodes:]),
    )


def remembered(path: Path | None) -> list[Finding]:
    """A warning for each node that an earlier job has taken out: by now it may be mended.
    ValueError where the file cannot be read.
    """
    if path is None or not path.exists():
        return []
    try:
        rows = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--bad {path} cannot be read: {error}") from error
    why = {short(words[0]): words[-1].strip() for words in rows if words}
    return [
        warning(
            "node-taken-out",
            f"in an earlier job: {reason}",
            "it may fail again",
            "it is used last",
            (node,),
        )
        for node, reason in why.items()
    ]


def format_choice(choice: Choice, path: Path) -> str:
    """What was chosen, for people."""
    rows = [f"{path}: {len(choice.lines)} nodes ({places([short(x) for x in choice.lines])})"]
    rows += [f"  left out {node}: {why}" for node, why in choice.left_out.items()]
    return "\n".join(rows)
