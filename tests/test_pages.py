"""Code blocks of README and docs: Python runs, shells read what is meant, commands have their keys.

What CONTRIBUTING.md or the tutorial put into files has tests of its own, and test_readme.py runs
the commands of README.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser

import largebatch.conf.resolvers  # noqa: F401 — registers them
from largebatch.cli import COMMANDS
from largebatch.conf.config import typed
from largebatch.train.hydra_app import own_classes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(r"^`[^`]+`[^\n]*:\n\n\Z", re.MULTILINE)
"""What stands above a block that is to be put into a file."""

# Whatever is called prints its words; nothing is started, sourced or changed.
STUBS = r"""
command_not_found_handle() { printf '%s\0' "$@" "|end|"; }
command_not_found_handler() { printf '%s\0' "$@" "|end|"; }
cd() { :; }; export() { :; }; .() { :; }
USER=me NODES=8 nodes=8 run=runs/mine HOME=/home/me PATH=/nonexistent
"""
BASH = ["bash", "-O", "failglob", "-uec"]  # a pattern that matches nothing is an error, as in zsh
SHELL_KINDS = ("bash", "zsh", "shell", "console")
"""What else a block of commands could be called, and is not: `sh` alone is looked at."""
SHELLS = [BASH, ["zsh", "-fuec"]]


def blocks(page: Path, kind: str) -> Iterator[str]:
    """The page's blocks of a kind that are not the content of a file."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if not FILE.search(text[: found.start()]):
            yield found[1]


def spoken(block: str, shell: list[str]) -> list[list[str]]:
    """The words of each command in a block, as a shell reads them; what is to run beside the others
    runs before them, so that the order is one.
    """
    block = re.sub(r"[ \t]&[ \t]*$", "", block, flags=re.MULTILINE)
    done = subprocess.run(
        [shutil.which(shell[0]) or shell[0], *shell[1:], STUBS + block],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT / "docs",
    )
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    lines = done.stdout.split("|end|\0")[:-1]
    return [line.removesuffix("\0").split("\0") for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_python_runs(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # runs leave their records there
    torch.manual_seed(0)
    known: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, f"{page.name}: {block.splitlines()[0]}", "exec"), known)
    assert ("tensor(" in capsys.readouterr().out) is (page.stem == "README")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_yaml_is_yaml(page: Path) -> None:
    for block in blocks(page, "yaml"):
        assert yaml.safe_load(block)


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell[0])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_shells_read_its_commands_alike(page: Path, shell: list[str]) -> None:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    for block in blocks(page, "sh"):
        assert spoken(block, shell) == spoken(block, BASH)


COMMENT = re.compile(r"(^|[\s;&|(])(#.*)")


def comments(block: str) -> list[str]:
    """What bash takes for a comment, and an interactive zsh for words of the command.

    Quoted text is left out first: a # in it is neither's comment.
    """
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "x", block)
    return [found[2] for line in bare.splitlines() for found in COMMENT.finditer(line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_commands_have_no_comments_which_an_interactive_zsh_does_not_know(page: Path) -> None:
    assert [comment for block in blocks(page, "sh") for comment in comments(block)] == []
    assert [kind for kind in SHELL_KINDS if [*blocks(page, kind)]] == []


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind `largebatch`, or behind a launcher's `-m largebatch`, of each command."""
    for block in blocks(page, "sh"):
        for words in spoken(block, BASH):
            for place, word in enumerate(words):
                if word == "largebatch" and (place == 0 or words[place - 1] == "-m"):
                    yield words[place + 1 :]


# What CONTRIBUTING.md adds is not there.
@pytest.mark.parametrize("page", [PAGES[0], *PAGES[2:]], ids=lambda page: page.stem)
def test_its_commands_and_keys_are_there(page: Path) -> None:
    for name, *words in commands(page):
        assert name in COMMANDS
        if "--" in words and name in ("submit", "watch"):
            inner = words[words.index("--") + 1 :]
            words = inner if name == "submit" else inner[inner.index("largebatch") + 1 :]
            name, *words = words
        if any(re.match(r"optim=\w+,", word) for word in words):  # whose rates are far apart
            assert not [word for word in words if word.startswith("optim.lr=")]
        is_run = page.stem == "README" and not any(word.startswith("study=") for word in words)
        if name in ("train", "sweep", "plan") and not ({"…", "--help"} & {*words} or is_run):
            check(words)


def check(words: list[str]) -> None:
    """Compose the configuration that the words ask for, of a sweep the first."""
    taken = []
    for override in OverridesParser.create().parse_overrides(own_classes(words)):
        key = override.get_key_element()
        if override.is_interval_sweep():
            value = "1"
        elif override.is_sweep_override():
            value = next(iter(override.sweep_string_iterator()))
        else:
            value = override.get_value_element_as_str()
        if not key.startswith(("hydra.launcher.", "hydra/launcher")):  # its own file says its keys
            taken.append(f"{key}={value}")
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        typed(compose("train", taken))


def test_a_comment_is_found() -> None:
    block = "# first\nmake study  # the picture\nsed 's/ #.*//' ${name#x} a#b\n"
    assert comments(block) == ["# first", "# the picture"]


def test_what_a_shell_would_not_read_is_found() -> None:
    (words,) = spoken("largebatch train 'study.optimizers=[lamb]'\n", BASH)
    assert words == ["largebatch", "train", "study.optimizers=[lamb]"]
    with pytest.raises(AssertionError, match="no match"):
        spoken("largebatch sweep study.optimizers=[adamw,lamb]", BASH)
