"""The words of a command line: commands, options among overrides, values, one's own choices."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from largebatch import cli
from largebatch.common.errors import format_config_error, hydra_word
from largebatch.completion import SCRIPTS

ROOT = Path(__file__).resolve().parents[1]

VALUES = [
    "~/x", "~/a b", "runs/lr=0.1", "runs/données", "runs/a(1)", "it's", "a;b", "a#b", "$HOME/x=1",
    "a&b", "x)", "ünï code=(1)",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_value_that_hydra_cannot_read_is_told_with_the_line_to_type(value: str) -> None:
    parser = OverridesParser.create()
    with pytest.raises(HydraException) as refusal:
        parser.parse_overrides([f"hydra.run.dir={value}"])
    told = format_config_error(refusal.value)
    assert "\n" not in told
    assert f"hydra.run.dir={value}" in told or repr(f"hydra.run.dir={value}") in told
    line = re.search(r".*(?:shell:|type) (.*)$", told)
    assert line is not None
    (word,) = shlex.split(line[1])  # as a shell takes it
    (override,) = parser.parse_overrides([word])
    assert override.key_or_group == "hydra.run.dir"
    assert override.value() == os.path.expanduser(value)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optim=lamb,", "a value is missing beside a comma; type optim=lamb"),
        ("seed=0,,1", "a value is missing beside a comma; type seed=0,1"),
        ("optim.lr=[1", "has a bracket without its other half"),
        ("optim.lr", "'optim.lr' is not KEY=VALUE, without spaces and dashes, as in optim.lr=0.01"),
    ],
)
def test_a_word_with_something_missing_is_told(word: str, told: str) -> None:
    with pytest.raises(HydraException) as refusal:
        OverridesParser.create().parse_overrides([word])
    assert told in format_config_error(refusal.value)


@pytest.mark.parametrize("value", ["a", "a b", "it's", "x\\", "a\\'b", "é", "${x}", "\\'", "~", ""])
def test_a_quoted_value_is_read_back(value: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"key={hydra_word(value)}"])
    assert override.value() == value


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's with choices of the package's names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["largebatch"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    folder = tmp_path / "my configs"
    for group in ("optim", "cluster"):
        (folder / group).mkdir(parents=True)
    lamb = "_target_: largebatch.optim.LAMB\n_partial_: true\nlr: 0.0123\n"
    (folder / "optim" / "lamb.yaml").write_text(lamb)
    aurora = "{name: mine, scheduler: none, launcher: mpich, node: {ranks: 3}}"
    (folder / "cluster" / "aurora.yaml").write_text(aurora)
    return folder


@pytest.mark.parametrize("command", ["train", "sweep", "plan"])
def test_the_user_s_choice_wins_over_the_package_s(
    command: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Options stand wherever among the overrides.
    words = ["seed=1", "--config-dir", str(mine), "optim=lamb", "--cfg", "job"]
    assert cli.main([command, *words]) == 0
    output, said = capsys.readouterr()
    assert yaml.safe_load(output)["optim"]["lr"] == 0.0123
    assert said == (
        f"largebatch: from {mine}, not the package: cluster/aurora.yaml, optim/lamb.yaml\n"
    )


def test_the_user_s_cluster_wins_over_the_package_s(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cluster=aurora", "--config-dir", str(mine), "--dry-run", "--", "sweep", "seed=1"]
    assert cli.main(["submit", *words]) == 0
    output, said = capsys.readouterr()
    assert "#PBS" not in output
    assert "cluster/aurora.yaml" in said


OWN_STUDY = [
    "sweep", "study=custom", "task=digits", "target.loss=0.9", "budget.samples=1e4",
    "study.batch_sizes=[64,256]", "study.optimizers=[lamb]", "study.rules=[sqrt]",
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--config-dri", "x"], "did you mean --config-dir?"),
        (["train", "--config-dir", "nowhere"], "--config-dir must be a folder, got 'nowhere'"),
        (["train", "seed=1", "--seed=2"], "keys are given as KEY=VALUE, without dashes"),
        (["train", "~target.loss"], "target.loss"),
        (["train", "optim=lam"], "optim must be one of adamw, kfac"),
        (["train", "nproc=2"], "there is no key nproc: did you mean engine.nproc?"),
        (["train", "engine.precision=bf16"], "no key engine.precision: did you mean precision?"),
        (
            ["train", "task=custom", "task._target_=a.B"],
            "model.context is taken from task.context, which is not there",
        ),
        (["train", "batch=512"], "batch=512: a group takes the name of a choice"),
        (["train", "batch=true"], "batch=true: a group takes the name of a choice"),
        (["train", "task=[0.9,nan]"], "task=[0.9,nan]: a group takes the name of a choice"),
        (["train", "--config-name", "x"], "--config-name must be a file of yours"),
        (["train", "seed=range(0,3"], "a bracket without its other half"),
        (["sweep", "seed=0,1", "optim=lam"], "optim must be one of adamw, kfac"),
        (["sweep", "seed=0,1", "hydra/launcher=x"], "hydra/launcher must be one of basic"),
        (
            [*OWN_STUDY, "study.rule_batches=[128]"],
            "study.rule_batches must be among study.batch_sizes [64, 256], got [128]",
        ),
        (
            [*OWN_STUDY, "study.start_batch=32"],
            "study.start_batch must be one of study.batch_sizes [64, 256], got 32",
        ),
        (["sweep", "seed=range(3,0)"], "seed=range(3,0) has no values"),
        (["sweep", "seed=1", "optim=glob(zz*)"], "optim=glob(zz*) has no values"),
        (["trian"], "no command 'trian': did you mean train?"),
        (["bench", "optimm"], "no benchmark 'optimm': did you mean optim?"),
    ],
)
def test_what_is_misspelt_is_told_in_one_line(
    words: list[str], told: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del mine
    more = ["target.loss=null"] if "~target.loss" in words else []
    assert cli.main([*words[:1], *more, *words[1:]]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"lr: [\n", "broken.yaml:2 is no YAML"), (b"name: \xe9\n", "broken.yaml is not UTF-8 text")],
)
@pytest.mark.parametrize("words", [["train", "optim=broken"], ["submit", "cluster=broken"]])
def test_a_file_of_the_user_s_that_is_no_configuration_is_named(
    words: list[str], content: bytes, told: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for group in ("optim", "cluster"):
        (mine / group / "broken.yaml").write_bytes(content)
    more = ["--", "train"] * (words[0] == "submit")
    assert cli.main([*words, "--config-dir", str(mine), *more]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"]])
def test_the_version_is_this_project_s(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("largebatch ")


def test_the_package_says_its_version() -> None:
    import largebatch

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert largebatch.__version__ == project["version"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
    with pytest.raises(AttributeError, match="no attribute '__versoin__'"):
        largebatch.__versoin__  # noqa: B018 — asked for, to be refused


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_a_hundred_columns_and_ends_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.suppress(SystemExit):
        assert cli.main([command, "--help"]) == 0
    page = capsys.readouterr().out.splitlines()
    assert [line for line in page if len(line) > 100] == []
    assert page[-1].startswith("example: ")
    assert f"largebatch {command} " in page[-1]


@pytest.mark.parametrize("words", [["train"], ["sweep", "study=digits"], ["plan", "optim=muon"]])
def test_help_says_what_each_key_means(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main([*words, "--help"]) == 0
    page = capsys.readouterr().out
    for line in (ROOT / "conf" / "train.yaml").read_text(encoding="utf-8").splitlines():
        comment = line.partition("# ")[2]
        if line[:1] not in "#- " and ":" in line and comment:
            assert re.sub(r"\W+", "", comment) in re.sub(r"\W+", "", page)
    assert ("study.report_seeds" in page or "report_seeds: " in page) is (words[0] == "sweep")
    assert ("optim.ns_steps: 5" in page) is ("optim=muon" in words)
    assert ("study=digits" in page) is (words[0] == "sweep")


@pytest.mark.parametrize(
    ("module", "package"), [("omegaconf.errors", "omegaconf"), ("sklearn.datasets", "scikit-learn")]
)
def test_what_is_missing_is_named_as_pip_calls_it(module: str, package: str) -> None:
    assert cli.missing(ModuleNotFoundError(name=module)) == package


def test_nothing_that_is_offered_to_complete_a_word_runs(tmp_path: Path) -> None:
    words = ["optim=lamb", "optim=$(touch$IFS'ran')", "optim=`touch ran`", "optim=la;mb", "seed="]
    (tmp_path / "largebatch").write_text("#!/bin/sh\ncat words\n")
    (tmp_path / "largebatch").chmod(0o755)
    (tmp_path / "words").write_text("".join(f"{word}\n" for word in words))
    script = f"""{SCRIPTS["bash"]}
COMP_LINE="largebatch train optim=" COMP_POINT=23 COMP_WORDS=(./largebatch)
_largebatch
echo "${{COMPREPLY[*]}}"
"""
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.splitlines() == ["lamb"], done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_shell_completes_commands_keys_and_choices(tmp_path: Path) -> None:
    (tmp_path / "largebatch").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m largebatch "$@"\n')
    (tmp_path / "largebatch").chmod(0o755)
    script = """
eval "$(largebatch train --shell-completion install=bash)"
complete -p largebatch | grep -q -- '-F _largebatch largebatch' || exit 1
for COMP_LINE in "largebatch swe" "largebatch train optim=lam" "largebatch sweep seed=1 budg"; do
    COMP_POINT=${#COMP_LINE} COMP_WORDS=($COMP_LINE)
    _largebatch
    echo "${COMPREPLY[*]}"
done
"""
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["sweep", "lamb", "budget."], done.stderr
