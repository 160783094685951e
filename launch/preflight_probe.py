"""Asking each node of an allocation by itself, before a launcher that needs all of them is tried.

One dead node makes an mpiexec over all nodes fail before any rank can say which it was.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from largebatch.launch.findings import Finding, found_from, merged
from largebatch.launch.preflight_meeting import first_line
from largebatch.launch.preflight_nodes import short

TEMPLATE: Final = "mpiexec -n 1 --ppn 1 --hostfile {hostfile}"
"""Starts one command on the node in {hostfile} (a file of one line), or on {node}."""
_AT_ONCE: Final = 64


def probe(lines: Sequence[str], template: str, timeout_seconds: float) -> list[Finding]:
    """What `largebatch doctor` finds on each node of a hostfile's lines, and node-dead.

    A node is given `timeout_seconds`; _AT_ONCE nodes are asked at a time.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_AT_ONCE) as pool:
        asked = [pool.submit(_ask, line, template, timeout_seconds, folder) for line in lines]
        answers = {short(line): answer.result() for line, answer in zip(lines, asked, strict=True)}
    return merged(_findings(answers))


def _ask(line: str, template: str, timeout_seconds: float, folder: str) -> dict[str, Any] | str:
    """One node's answer, or why there is none."""
    hostfile = Path(folder) / short(line)
    hostfile.write_text(f"{line}\n", encoding="utf-8")
    words = shlex.split(template.format(hostfile=hostfile, node=line.split()[0]))
    # One rank is what is wanted, whatever the allocation's size.
    doctor = ["env", "LARGEBATCH_RANKS=1", sys.executable, "-m", "largebatch", "doctor"]
    try:
        done = subprocess.run(
            [*words, *doctor, "--preflight", "off", "--json"],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            stdin=subprocess.DEVNULL,
        )
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except subprocess.TimeoutExpired:
        return f"has not answered within {timeout_seconds:g} s"
    except OSError as error:
        return f"cannot be asked: {words[0]}: {error.strerror}"
    except ValueError:  # no JSON
        why = done.stderr.strip().splitlines()[-1:] or ["without a word"]
        return f"failed with exit code {done.returncode}: {first_line(Exception(why[0]))}"
    return answer


def _findings(answers: dict[str, dict[str, Any] | str]) -> Iterator[Finding]:
    programs: dict[str, str] = {}
    for node, answer in answers.items():
        if isinstance(answer, str):
            yield Finding(
                "node-dead",
                "error",
                answer,
                "a job over this node does not start",
                "it is left out where spares allow",
                (node,),
            )
            continue
        for row in answer["findings"]:
            found = found_from(row)
            yield Finding(found.code, found.severity, found.found, found.means, found.do, (node,))
        programs[node] = json.dumps(answer["versions"], sort_keys=True)
    if not programs:
        return
    usual = Counter(programs.values()).most_common(1)[0][0]
    for node, program in programs.items():
        if program != usual:
            here, there = json.loads(program), json.loads(usual)
            names = [name for name in there if here.get(name) != there[name]]
            yield Finding(
                "versions-differ",
                "error",
                ", ".join(f"{name} {here.get(name)} (others {there[name]})" for name in names),
                "the ranks would run different programs",
                "spread the environment anew (largebatch env spread)",
                (node,),
            )
