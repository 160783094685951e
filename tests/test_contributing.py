"""What CONTRIBUTING.md shows is complete: its code, put where it says, runs by its commands."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## Add an? (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
MOST_LINES = 60

# The code folders are copied, so that a recipe changes nothing here.
COPIED = ("common", "conf", "distributed", "optim", "records", "schedules", "src", "study", "train")
# A fork has the modules of this checkout; those of the copy are to take their place.
AFRESH = """
import sys
for name in [*sys.modules]:
    if name.partition(".")[0] in ("largebatch", "hydra_plugins"):
        del sys.modules[name]
import runpy
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def files(recipe: str) -> list[tuple[str, str, str]]:
    """Each block that stands under a path: the path, the kind and the text."""
    return re.findall(r"^`([^`]+)`[^\n]*:\n\n```(\w+)\n(.*?)```", recipe, re.DOTALL | re.MULTILINE)


def commands(recipe: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", recipe, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def put(recipe: str, folder: Path) -> None:
    """Make the recipe's files in `folder`, and the changes to those that are there."""
    for name, kind, text in files(recipe):
        path = folder / name
        if kind == "diff":
            after = path.read_text(encoding="utf-8")
            for hunk in text.split("@@\n"):
                lines = hunk.splitlines(keepends=True)
                old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
                assert after.count(old) == 1, (name, old)
                after = after.replace(old, new)
            text = after
        else:
            assert not path.exists(), name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def run(words: list[str], folder: Path, source: Path) -> None:
    if words[0] == "python":
        assert words[1:3] == ["-m", "pytest"]
        # A fork has imported what pytest would rewrite.
        ignored = "ignore::pytest.PytestAssertRewriteWarning"
        words = [*words[2:], "-q", "-p", "no:cacheprovider", "-W", ignored]
    how = ["-m"] if source == ROOT else ["-c", AFRESH]
    done = forked.run(
        [sys.executable, *how, *words], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{source / 'src'}:{folder}"}, timeout=600,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: the budget is spent
    if words[0] == "pytest":
        assert " passed" in done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the code and of the tests that recipes change."""
    for name in (*COPIED, "tests/optim", "tests/schedules", "tests/shared"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_page_has_its_four_recipes() -> None:
    assert list(RECIPES) == ["optimizer", "ramp", "task", "engine"]


def check_lint(recipe: str, folder: Path) -> None:
    names = [name for name, _, _ in files(recipe) if name.endswith(".py")]
    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run(
            [*ruff, *names], cwd=folder, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("what", RECIPES)
def test_a_recipe_is_short(what: str) -> None:
    written = [
        line
        for _, kind, text in files(RECIPES[what])
        for line in text.splitlines()
        if line.strip() and (kind != "diff" or re.match(r"\+.", line))
    ]
    assert 10 < len(written) < MOST_LINES


@pytest.mark.parametrize("what", ["optimizer", "ramp"])
def test_a_recipe_for_the_project_works_in_a_copy_of_it(what: str, copy: Path) -> None:
    put(RECIPES[what], copy)
    check_lint(RECIPES[what], copy)
    for words in commands(RECIPES[what]):
        run(words, copy, copy)


@pytest.mark.parametrize("what", ["task", "engine"])
def test_a_recipe_for_users_works_beside_the_project(what: str, tmp_path: Path) -> None:
    put(RECIPES[what], tmp_path)
    check_lint(RECIPES[what], tmp_path)
    for words in commands(RECIPES[what]):
        run(words, tmp_path, ROOT)
    if what == "engine":
        losses = [
            [json.loads(line)["loss"] for line in path.read_text().splitlines()]
            for path in sorted(tmp_path.glob("runs/*/metrics.jsonl"))
        ]
        assert len(losses) == 2
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
