"""What the code asks of a device's module exists, in torch.xpu and in torch.cuda.

`torch.get_device_module` returns whichever is there, so neither a type checker nor a run on a CPU
sees a name that is wrong.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import largebatch

FOLDERS = [Path(folder) for folder in largebatch.__path__]
OF_DEVICES = "get_device_module"


@cache
def sources() -> dict[str, ast.Module]:
    files = {file for folder in FOLDERS for file in folder.rglob("*.py")}
    return {str(file): ast.parse(file.read_text()) for file in sorted(files)}


def dotted(node: ast.AST) -> str:
    """`a.b.c` as it is written; what is no such chain begins with "?"."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def gives_module(node: ast.AST | None, makers: set[str]) -> bool:
    """Whether it is a call of `get_device_module`, or of a function that returns one's result."""
    return isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in makers


def makers_in(trees: dict[str, ast.Module]) -> set[str]:
    """`get_device_module`, and every function that returns what it returns."""
    makers, found = set[str](), {OF_DEVICES}
    while found != makers:
        makers = set(found)
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    returns = (n for n in ast.walk(node) if isinstance(n, ast.Return))
                    if any(gives_module(each.value, makers) for each in returns):
                        found.add(node.name)
    return makers


def asked_of_devices(tree: ast.Module, makers: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name, dotted, of all that a file takes from the module of a device."""
    for scope in tree.body:  # a whole top-level function, with those within
        aliases = {
            target.id
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)
            and gives_module(node.value, makers)
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
                if named or gives_module(holder, makers):
                    yield node.lineno, ".".join(names)


def resolves(module: object, name: str) -> bool:
    """Whether a module has `a.b`; what hangs on a function's result is not looked at."""
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


@pytest.mark.parametrize("device", ["xpu", "cuda"])
def test_every_name_asked_of_a_device_module_exists(device: str) -> None:
    trees = sources()
    makers = makers_in(trees)
    asked = [
        (f"{file}:{line}", name)
        for file, tree in trees.items()
        for line, name in asked_of_devices(tree, makers)
    ]
    module = getattr(torch, device)
    wrong = [(place, name) for place, name in asked if not resolves(module, name)]
    assert not wrong, f"torch.{device} has no such name: {wrong}"
    assert {"get_device_name", "manual_seed", "mem_get_info"} <= {name for _, name in asked}


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
    asked = [*asked_of_devices(tree, makers_in({"": tree}))]
    assert [name for _, name in asked] == ["getdevice_name"]
    assert not resolves(torch.xpu, "getdevice_name")
