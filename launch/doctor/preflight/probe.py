"""Asking the nodes of an allocation, before a launcher that needs all of them is tried.

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from largebatch.launch.doctor.findings import Finding, error, found_from, merged
from largebatch.launch.hosts import short, write_hosts

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
    without an answer are asked again, each by itself, as one dead node fails it for all.

    Args:
        timeout_seconds: of a launch; _AT_ONCE are under way at a time.
        beside: a path in a folder that every node sees: answers are written next to it.
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
