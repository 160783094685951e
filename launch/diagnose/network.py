"""Steps that slowed, and network counters that stood out: together where they were at one time."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from largebatch.common.text import and_more
from largebatch.launch.diagnose.causes import Cause
from largebatch.launch.diagnose.nic.report import Episode, clock, overlap, unusual
from largebatch.launch.diagnose.nic.survey import Survey
from largebatch.launch.diagnose.run_times import SlowSpell, Steps, slow_spells
from largebatch.records import find_fields
from largebatch.records.heartbeat import find_beat
from largebatch.records.names import METRICS, SUMMARY
from largebatch.records.summary import status

BEFORE_THE_END: Final = 120.0  # seconds: what was unusual then may have ended the run
QUIET_SAMPLES: Final = 5.0
QUIET_SECONDS: Final = 30.0
"""A node whose record ends so much earlier than the others', in samples and seconds, was gone."""
MOST_NAMED: Final = 6
GRAVE: Final = ("time-outs", "cancelled", "link replays")
"""Kinds that a run may end by; the others slow it."""


def read_network(run: Path, survey: Survey | None, steps: Steps | None) -> list[Cause]:
    """Slow steps with what the counters showed meanwhile, then what they showed besides."""
    episodes = unusual(survey)
    slow = [] if steps is None else slow_spells(steps)
    causes, named = [], []
    for spell in slow:
        together = [episode for episode in episodes if overlap(episode, spell)]
        causes.append(_slow(spell, together, survey is not None))
        named += together
    stopped = _stopped_at(run)
    for episode in episodes:
        if episode not in named:
            causes.append(_besides(episode, stopped))
    return causes + ([] if survey is None else [*_gone(survey)])


def _stopped_at(run: Path) -> float | None:
    """Time of the last sign of a run that has not ended; None where it has ended."""
    summary, beat = find_fields(run / SUMMARY, []), find_beat(run, [])
    if summary is not None and summary.find("status", status) != "failed":
        return None
    return None if beat is None else beat.time


def _slow(spell: SlowSpell, together: list[Episode], recorded: bool) -> Cause:
    when = "" if math.isnan(spell.begin) else f", {clock(spell.begin)} to {clock(spell.end)}"
    factor = spell.seconds / spell.usual
    what = f"Steps {spell.first} to {spell.last} took {spell.seconds:.3g} s each"
    if spell.first == spell.last:
        what = f"Step {spell.first} took {spell.seconds:.3g} s"
    what += f", {factor:.2g} times the usual {spell.usual:.3g} s{when}"
    evidence = [f"{METRICS}: steps {spell.first} to {spell.last}"]
    if not together:
        why = "and no network counter stood out then" if recorded else "for no reason on record"
        do = (
            "look at the nodes (clocks, memory, other processes), the data's file system, and "
            "checkpoints written meanwhile"
        )
        if not recorded:
            do += "; with largebatch nic record beside the run its network can be distinguished"
        return Cause(40, f"{what}, {why}.", do, tuple(evidence))
    first = together[0]
    nodes = tuple(dict.fromkeys(n for e in together if not e.everywhere for n in e.nodes))
    return Cause(
        55,
        f"{what}, while the network showed {first.kind.name} on {first.where}: {first.kind.means}.",
        first.kind.do,
        (*evidence, *(f"nic: {episode}" for episode in together)),
        nodes,
    )


def _besides(episode: Episode, stopped: float | None) -> Cause:
    kind, nodes = episode.kind, () if episode.everywhere else episode.nodes
    shown = f"{kind.name} on {episode.where}"
    if stopped is not None and (
        episode.begin < stopped + BEFORE_THE_END and episode.end > stopped - BEFORE_THE_END
    ):
        weight, what = 65, f"When the run stopped, the network showed {shown}"
    else:
        weight = 10
        what = f"The network showed {shown}, without an effect on the steps that is on record"
    weight += 10 * (kind.name in GRAVE)
    return Cause(weight, f"{what}: {kind.means}.", kind.do, (f"nic: {episode}",), nodes)


def _gone(survey: Survey) -> Iterator[Cause]:
    """Nodes that stopped recording long before the others."""
    usual = sorted(survey.last)[len(survey.last) // 2]
    limit = usual - QUIET_SECONDS - QUIET_SAMPLES * survey.longest
    early = sorted((last, node) for last, node in zip(survey.last, survey.nodes, strict=True)
                   if last < limit)  # fmt: skip
    if early:
        names = tuple(node for _, node in early)
        yield Cause(
            72,
            f"{and_more(names, MOST_NAMED)} stopped recording long before the other nodes: gone, "
            "or hung.",
            "leave these nodes out of the next job, and report them",
            tuple(
                f"nic-{node}.jsonl: last sample {clock(last)}, the others until {clock(usual)}"
                for last, node in early
            ),
            names,
        )
