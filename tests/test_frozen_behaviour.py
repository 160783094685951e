"""Behaviour that a change of the code's shape must keep, held against the files in frozen/.

Losses and summaries of runs, configurations as `--cfg job` prints them, and what optimizers save.
After a change that is meant, look at `git diff` of:

    RENEW_SNAPSHOTS=1 python -m pytest tests/test_frozen_behaviour.py

Runs are equal to the last bit where torch, processor and number of threads are those of the file's
header, and within `ELSEWHERE` on other machines; where packages whose source task=bytes learns have
other versions, there is nothing to compare. Classes go by their last name in configurations, so
that a module may move: that each `_target_` can be imported is a test of its own. Scripts of jobs
are frozen in launch/snapshots, of which launch/test_submit.py says how they are made.
"""

import json
import math
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from command_lines import run_each
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import nn

from largebatch import cli
from largebatch.optim import KFAC, LAMB, LARS, SOAP, Mano, Muon, Shampoo, SOAPMuon

ROOT = Path(__file__).resolve().parents[1]
FROZEN = Path(__file__).parent / "frozen"


class Rows(yaml.SafeDumper):
    """A key a line, a list in one: for the reader of a difference."""


Rows.add_representer(
    list, lambda rows, values: rows.represent_sequence("tag:yaml.org,2002:seq", values, True)
)


def frozen(name: str, found: Any) -> Any:
    """Return what the file `name` holds, after writing `found` there if snapshots are renewed."""
    path = FROZEN / f"{name}.yaml"
    if os.environ.get("RENEW_SNAPSHOTS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.dump(found, Dumper=Rows, sort_keys=False, width=100))
    return yaml.safe_load(path.read_text())


def departures(found: Any, kept: Any, tolerance: float, where: str = "") -> Iterator[str]:
    """Yield a sentence for each value of `found` further than `tolerance` from that of `kept`."""
    if isinstance(found, dict) and isinstance(kept, dict) and found.keys() == kept.keys():
        for key in kept:
            yield from departures(found[key], kept[key], tolerance, f"{where} {key}")
    elif isinstance(found, list) and isinstance(kept, list) and len(found) == len(kept):
        for place, (new, old) in enumerate(zip(found, kept, strict=True)):
            yield from departures(new, old, tolerance, f"{where}[{place}]")
    elif isinstance(found, float) and isinstance(kept, float):
        if not math.isclose(found, kept, rel_tol=tolerance):
            difference = abs(found - kept) / max(abs(found), abs(kept))
            yield f"{where}: {found!r}, was {kept!r}, relative difference {difference:.1e}"
    elif found != kept:
        yield f"{where}: {found!r}, was {kept!r}"


# Losses and summaries ----------------------------------------------------------------------------

OPTIMIZERS = {
    "lars": ["optim=lars"],
    "lamb": ["optim=lamb"],  # by torch's fused kernel
    "lamb_unfused": ["optim=lamb", "+optim.eps_inside_sqrt=true"],
    "shampoo": ["optim=shampoo"],
    "soap": ["optim=soap"],
    "kfac": ["optim=kfac"],
    "muon": ["optim=muon"],
}
ENGINES = {
    "ddp": ["noise.small=micro_batch"],
    "fsdp": ["engine=fsdp", "engine.nproc=2", "noise.small=rank"],
}
STEPS = 30
RUN = (
    "task=bytes", "task.num_bytes=65536", "task.num_eval=64", "target.loss=null",
    "model.embedding=8", "model.hidden=32", "optim.weight_decay=0.01", "lr=cosine",
    "lr.warmup_samples=64", "scaling=sqrt", "scaling.base_batch=64", "batch=rampup",
    "batch.start=16", "batch.increment=16", "batch.ramp_samples=512", "batch.size=64",
    "engine.micro_batch_size=8", "budget.samples=1152", "evaluation.growth=2",
    "guard.grad_norm_multiple=1.3", "guard.window=10", "guard.warmup_steps=5",
    "hydra.run.dir=.",
)  # fmt: skip
COLUMNS = ("loss", "grad_norm", "noise_scale", "skipped")
OF_THE_MACHINE = (
    "seconds", "evaluation_seconds", "record_seconds", "throughput", "provenance"
)  # fmt: skip
FROZEN_APART = ("config",)  # see frozen/configurations
# Relative, with other kernels than the golden file's. Measured with AVX2's, and with scalar ones,
# in place of AVX-512's: LARS, LAMB and K-FAC below 1e-6, Shampoo 9e-5 (roots), Muon 1.1e-3
# (Newton-Schulz in bf16), noise scales the most. SOAP is left out, with losses 3e-2 apart: early
# statistics lack full rank, which leaves their bases to rounding.
ELSEWHERE = {
    "lars": 1e-6, "lamb": 1e-6, "lamb_unfused": 1e-6, "kfac": 1e-6, "shampoo": 5e-4, "muon": 5e-3,
}  # fmt: skip


def processor() -> dict[str, str]:
    """Return what decides which kernels are taken: the processor, and what torch uses of it."""
    told = {"capability": torch.backends.cpu.get_cpu_capability()}
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    names = ("model name", "cpu family", "model", "stepping")
    fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    return told | {name: fields[name] for name in names if name in fields}


def trained(engine: str, folder: Path) -> dict[str, Any]:
    """Train with every optimizer; returns the runs by optimizer, and what they were made with."""
    commands = {
        name: ["train", *words, *RUN, *ENGINES[engine]] for name, words in OPTIMIZERS.items()
    }
    done = forked.run(
        partial(run_each, folder, commands), cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {}
    for name in OPTIMIZERS:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        summary = json.loads((folder / name / "summary.json").read_text())
        made = summary["provenance"]
        runs[name] = {column: [record.get(column) for record in records] for column in COLUMNS} | {
            "summary": {
                key: summary[key] for key in summary if key not in (*OF_THE_MACHINE, *FROZEN_APART)
            }
        }
    header = processor() | {
        "torch": made["versions"]["torch"],
        "num_threads": made["num_threads"],
        "data_hash": made["data_hash"],
    }
    return {"made_with": header, "runs": runs}


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_and_summaries_of_every_optimizer_stay(engine: str, tmp_path: Path) -> None:
    found = trained(engine, tmp_path)
    kept = frozen(f"runs_{engine}", found)
    if found["made_with"]["data_hash"] != kept["made_with"]["data_hash"]:
        pytest.skip("task=bytes learns the source of other versions here, which is another text")
    assert all(len(run["loss"]) == STEPS for run in found["runs"].values())
    same = found["made_with"] == kept["made_with"]
    tolerances = dict.fromkeys(OPTIMIZERS, 0.0) if same else ELSEWHERE
    told = [
        sentence
        for name, tolerance in tolerances.items()
        for sentence in departures(found["runs"][name], kept["runs"][name], tolerance, name)
    ]
    assert not told, "\n".join(told)


# Configurations ----------------------------------------------------------------------------------

GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if [*path.glob("*.yaml")])


def settings(printed: str) -> dict[str, Any]:
    """Return the values of a printed configuration by dotted key, classes by their last name."""

    def flat(node: dict[str, Any], above: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from flat(value, f"{above}{key}.")
            elif key == "_target_" and value is not None:
                yield f"{above}{key}", value.rpartition(".")[2]
            else:
                yield f"{above}{key}", value

    return dict(flat(yaml.safe_load(printed), ""))


def composed(*words: str) -> dict[str, Any]:
    """What `train WORDS --cfg job` shows; of a cluster, what `submit` does."""
    name = "submit" if words[:1] and words[0].startswith("cluster=") else "train"
    return settings(OmegaConf.to_yaml(compose(name, list(words))))


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_composes_to_the_same_configuration(group: str) -> None:
    found = {}
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        plain = composed(*(["cluster=local"] if group == "cluster" else []))
        for choice in sorted(path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")):
            shown = composed(f"{group}={choice}")
            found[choice] = {
                "given": dict(item for item in shown.items() if item not in plain.items()),
                "without": [key for key in plain if key not in shown],
            }
    kept = frozen(f"configurations/{group}", found)
    assert found == kept


def test_the_default_configuration_of_a_job_stays() -> None:
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        found = composed("cluster=local")
    assert found == frozen("configurations/default_submit", found)


def test_the_default_configuration_that_the_command_shows_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["largebatch"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert cli.main(["train", "--cfg", "job"]) == 0
    found = settings(capsys.readouterr().out)
    assert found == frozen("configurations/default_train", found)


# What is saved -----------------------------------------------------------------------------------


def saved(optimizer_class: Any) -> dict[str, Any]:
    """Return names, types and shapes of an optimizer's state after two steps, and its options."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    takes_model = getattr(optimizer_class, "takes_model", False)
    optimizer = optimizer_class(model if takes_model else model.named_parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.randn(8, 4)).square().mean())
        optimizer.step()
    state = optimizer.state_dict()
    groups = state["param_groups"]
    names = {
        index: name
        for group in groups
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }

    def shape(value: Any) -> str:
        return f"{value.dtype} {[*value.shape]}" if torch.is_tensor(value) else repr(value)

    return {
        "keys": sorted(state),
        "param_groups": [sorted(group) for group in groups],
        "state": {
            names[index]: {key: shape(entry[key]) for key in sorted(entry)}
            for index, entry in sorted(state["state"].items())
        },
    }


def test_every_optimizer_saves_the_same_state() -> None:
    kinds = (LARS, LAMB, Shampoo, SOAP, KFAC, Muon, SOAPMuon, Mano)
    found = {kind.__name__: saved(kind) for kind in kinds}
    assert found == frozen("state", found)


# Names and paths ---------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMING = [
    *PAGES,
    *sorted((ROOT / "conf").rglob("*.yaml")),
    *sorted((ROOT / "examples").glob("*.py")),
    *sorted((ROOT / "src").rglob("*.py")),  # the table of commands, and the targets of plugins
]
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()}


def names(text: str) -> set[str]:
    """Return the dotted names of the project in `text`, and each `_target_`.

    In backticks `records.x` stands for largebatch.records.x; `optim.x` is a key of configurations.
    """
    found = set(re.findall(r"\b(?:largebatch|hydra_plugins)(?:\.[A-Za-z_]\w*)+", text))
    found |= set(re.findall(r"_target_: *([a-z]\w*(?:\.\w+)+)", text))
    found |= {f"largebatch.{name}" for name in re.findall(r"`(records(?:\.\w+)+)", text)}
    imports = re.findall(r"^from ((?:largebatch|hydra_plugins)[\w.]*) import (.+)$", text, re.M)
    return found | {f"{module}.{name}" for module, some in imports for name in some.split(", ")}


def unresolved(text: str) -> list[str]:
    """Return the dotted names in `text` that lead to nothing."""

    def leads_nowhere(name: str) -> bool:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return True
        return False

    return sorted(filter(leads_nowhere, names(text)))


def missing(text: str) -> list[str]:
    """Return the paths below the repository's folders that `text` has in backticks and are not
    there; a word in capitals stands for any.
    """
    paths = re.findall(r"`([\w.-]+/[\w./-]*)`", text)
    ours = [path for path in paths if path.partition("/")[0] in FOLDERS]
    return [path for path in ours if not [*ROOT.glob(re.sub(r"\b[A-Z]{2,}\b", "*", path))]]


def findings(pages: list[Path], look: Callable[[str], list[str]]) -> dict[str, list[str]]:
    """Return what `look` finds in each page, without those in which it finds nothing."""
    found = {str(path.relative_to(ROOT)): look(path.read_text(encoding="utf-8")) for path in pages}
    return {page: what for page, what in found.items() if what}


def test_every_name_of_the_project_can_be_imported() -> None:
    assert findings(NAMING, unresolved) == {}


def test_every_path_of_the_repository_is_there() -> None:
    assert findings(PAGES, missing) == {}


def test_a_name_or_path_that_has_gone_is_found() -> None:
    text = """`largebatch.optim.LARS` `largebatch.optim.lars.Gone` _target_: torch.optim.Gone
from largebatch.optim import LAMB, Went
`records.summary.gone(path)` `optim.lr` `train/loop.py` `train/gone.py` `conf/optim/NAME.yaml`
`conf/gone/NAME.yaml` `runs/mine/summary.json` `docs/`"""
    assert unresolved(text) == [
        "largebatch.optim.Went",
        "largebatch.optim.lars.Gone",
        "largebatch.records.summary.gone",
        "torch.optim.Gone",
    ]
    assert missing(text) == ["train/gone.py", "conf/gone/NAME.yaml"]
