"""What the code asks of a device's module exists, in torch.xpu and in torch.cuda.

`torch.get_device_module` returns whichever is there, so neither a type checker nor a run on a CPU
sees a name that is wrong.
"""

import ast
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import forked
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("optim", "schedules", "train", "study", "launch", "benchmarks", "records", "conf",
    "common", "distributed")  # fmt: skip
OF_DEVICES = "get_device_module"


@cache
def sources() -> dict[str, ast.Module]:
    files = {file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    return {str(file): ast.parse(file.read_text()) for file in sorted(files)}


def dotted(node: ast.AST) -> str:
    """`a.b.c` as it is written; what is no such chain begins with "?"."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def called(node: ast.AST | None) -> str:
    """The last name of what a call calls."""
    return dotted(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""


def makers_in(trees: Iterable[ast.Module]) -> set[str]:
    """`get_device_module`, and every function that returns what it returns."""
    returned = [
        (function.name, name)
        for tree in trees
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and (name := called(node.value))
    ]
    makers, found = set[str](), {OF_DEVICES}
    while found != makers:
        makers = found
        found = makers | {function for function, name in returned if name in makers}
    return makers


def asked_of_devices(tree: ast.Module, makers: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name, dotted, of all that a file takes from the module of a device."""
    for scope in tree.body:  # a whole top-level function, with those within
        if not any(called(node) in makers for node in ast.walk(scope)):
            continue
        aliases = {
            target.id
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)
            and called(node.value) in makers
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute):
                holder, names = node.value, [node.attr]
                while isinstance(holder, ast.Attribute):
                    names.insert(0, holder.attr)
                    holder = holder.value
                named = isinstance(holder, ast.Name) and holder.id in aliases
                if named or called(holder) in makers:
                    yield node.lineno, ".".join(names)


def resolves(module: object, name: str) -> bool:
    """Whether a module has `a.b`; what hangs on a function's result is not looked at."""
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


@cache
def asked_of_all() -> list[tuple[str, str]]:
    trees = sources()
    makers = makers_in(trees.values())
    return [
        (f"{file}:{line}", name)
        for file, tree in trees.items()
        for line, name in asked_of_devices(tree, makers)
    ]


@pytest.mark.parametrize("device", ["xpu", "cuda"])
def test_every_name_asked_of_a_device_module_exists(device: str) -> None:
    asked = asked_of_all()
    module = getattr(torch, device)
    wrong = [(place, name) for place, name in asked if not resolves(module, name)]
    assert not wrong, f"torch.{device} has no such name: {wrong}"
    names = {"get_device_name", "manual_seed", "get_device_properties"}
    assert names <= {name for _, name in asked}


def test_every_name_of_torch_accelerator_cuda_and_xpu_exists() -> None:
    roots = ("torch.accelerator.", "torch.cuda.", "torch.xpu.")
    asked = {
        name: f"{file}:{node.lineno}"
        for file, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and (name := dotted(node)).startswith(roots)
    }
    wrong = {n: at for n, at in asked.items() if not resolves(torch, n.removeprefix("torch."))}
    assert not wrong
    assert "torch.accelerator.set_device_index" in asked


@pytest.mark.parametrize(
    "text",
    [
        "def f(d):\n return torch.get_device_module(d).getdevice_name(d)",
        "def f(d):\n module = torch.get_device_module(d)\n return module.getdevice_name(d)",
        "def f(d):\n if (m := get_device_module(d)): return m.getdevice_name(d)",
        "def of(d):\n return torch.get_device_module(d)\n"
        "def f(d, m=None):\n m = of(d)\n def g(): return m.getdevice_name(d)",
    ],
)
def test_a_wrong_name_is_found_through_aliases(text: str) -> None:
    tree = ast.parse(text)
    asked = [*asked_of_devices(tree, makers_in([tree]))]
    assert [name for _, name in asked] == ["getdevice_name"]
    assert not resolves(torch.xpu, "getdevice_name")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="it would make its runs here")
def test_without_an_accelerator_make_test_gpu_says_so() -> None:
    (line,) = [li for li in (ROOT / "Makefile").read_text().splitlines() if "real_device.py" in li]
    command = line.strip().replace("$(BIN)/python", forked.stand_in())
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "torch finds no accelerator here" in done.stderr
