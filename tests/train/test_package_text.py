"""The bundled text: which files it is of, what is held out, and what the tasks cut from it."""

import hashlib
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from largebatch.common.errors import ConfigError
from largebatch.train.tasks import package_text as module
from largebatch.train.tasks.bytes import VOCABULARY, Bytes
from largebatch.train.tasks.package_text import PACKAGES, package_text
from largebatch.train.tasks.text import Text

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"

# Of the versions in constraints.txt: num_bytes and the SHA-256 of training and held-out text.
PINNED = {
    2_000_000: "34a14d757653b5c3b73948b5a511965f0c8b50768423d8aebe71324e0c118494",
    16_000_000: "6ab00059deaa823a945c3fe3d43b4b6b478ece65a553084370170a2e5900754a",
}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The four packages with 60 small files each in the place of the installed ones, by name."""
    made = {}
    for folder in PACKAGES.values():
        made[f"{folder}/__init__.py"] = b""
        for number in range(59):
            name = f"{folder}/{'abc'[number % 3]}/file{number}.py"
            made[name] = f"# {name}\n".encode() * (number + 1)
    ignored = ["numpy/a/tests/x.py", "numpy/distutils/x.py", "sklearn/externals/x.py",
               "scipy/version.py", "scipy/a/__config__.py", "numpy/a/data.txt"]  # fmt: skip
    for name, content in (made | dict.fromkeys(ignored, b"ignored\n")).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    def find(name: str) -> SimpleNamespace:
        return SimpleNamespace(origin=str(tmp_path / name / "__init__.py"))

    monkeypatch.setattr(module, "find_spec", find)
    package_text.cache_clear()
    yield made
    package_text.cache_clear()


def test_a_file_is_training_text_or_held_out_by_the_hash_of_its_name(
    sources: dict[str, bytes],
) -> None:
    order = sorted(sources, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held_out = [name for name in order if hashlib.sha256(name.encode()).hexdigest() < "08"]
    train = [name for name in order if name not in held_out]
    assert len(held_out) == 7  # of 240; 7.5 expected
    text = package_text(100_000)
    assert text.held_out == b"".join(sources[name] for name in held_out)
    assert text.train == b"".join(sources[name] for name in train)[:100_000]
    assert text.hash == hashlib.sha256(text.train + text.held_out).hexdigest()
    shorter = package_text(5_000)
    assert (shorter.train, shorter.held_out) == (text.train[:5_000], text.held_out)


def test_more_text_than_there_is_is_refused_by_how_much_there_is(
    sources: dict[str, bytes],
) -> None:
    with pytest.raises(ValueError, match=r"task\.num_bytes must be at most 149335, .*got 149336"):
        Bytes(num_bytes=149_336)
    assert Bytes(num_bytes=149_335).num_train == 149_335 - 8


def test_of_a_long_file_the_beginning_is_read(sources: dict[str, bytes], tmp_path: Path) -> None:
    longest = "numpy/b/file31.py"  # held out
    (tmp_path / longest).write_bytes(b"x" * 100_000)
    assert package_text(100).held_out.count(b"x") == 65_536


def test_a_package_that_is_missing_is_named_with_what_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    package_text.cache_clear()
    with pytest.raises(ConfigError, match=r"matplotlib is not installed: pip install 'largebatch"):
        Bytes()


def test_sizes_that_do_not_fit_are_refused_by_name(sources: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"task\.context must be below 4435, .* got 4435"):
        Bytes(num_bytes=10_000, context=4435)
    with pytest.raises(ValueError, match=r"task\.sequence_length must be below 100, .* got 100"):
        Text(num_bytes=100, sequence_length=100)
    with pytest.raises(ValueError, match=r"task\.num_eval must be at most 4427, .* got 4428"):
        Bytes(num_bytes=10_000, num_eval=4428)
    assert Bytes(num_bytes=10_000, num_eval=4427).num_eval == 4427


def symbol(byte: int) -> int:
    if byte == ord("\n"):
        return 0
    return byte - 31 if 32 <= byte < 127 else ord("?") - 31


def test_windows_are_the_texts_bytes_and_the_evaluation_is_of_held_out_ones_alone(
    sources: dict[str, bytes],
) -> None:
    task, text = Bytes(num_bytes=2_000, context=4, num_eval=64), package_text(2_000)
    last = task.num_train - 1
    context, following = task.train_batch(np.array([0, 7, last]))
    for row, start in enumerate((0, 7, last)):
        expected = [symbol(byte) for byte in text.train[start : start + 5]]
        assert [*context[row].tolist(), int(following[row])] == expected
    assert last + 5 == 2_000
    held_out = [symbol(byte) for byte in text.held_out]
    places = {tuple(held_out[start : start + 5]) for start in range(len(held_out) - 4)}
    context, following = task.eval_batch(np.arange(64))
    found = [(*row, last) for row, last in zip(context.tolist(), following.tolist(), strict=True)]
    assert set(found) <= places
    assert len(set(found)) > 32  # from all over it
    longer = Bytes(num_bytes=50_000, context=4, num_eval=64).eval_batch(np.arange(64))
    assert torch.equal(longer[0], context)


def test_every_byte_that_is_no_printable_ascii_is_a_question_mark(
    sources: dict[str, bytes], tmp_path: Path
) -> None:
    first = min(
        (hashlib.sha256(name.encode()).hexdigest(), name)
        for name in sources
        if sources[name] and hashlib.sha256(name.encode()).hexdigest() >= "08"
    )[1]
    (tmp_path / first).write_bytes(bytes(range(256)))
    context, following = Bytes(num_bytes=256, context=255).train_batch(np.array([0]))
    assert [*context[0].tolist(), int(following)] == [symbol(byte) for byte in range(256)]
    assert {symbol(byte) for byte in range(256)} == set(range(VOCABULARY))


class Bigram(nn.Module):
    """Logits by the last symbol alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        return self.table(symbols)


def test_the_losses_are_means_over_bytes_of_minus_log_p(sources: dict[str, bytes]) -> None:
    torch.manual_seed(0)
    model = Bigram()
    table = model.table.weight.detach().double().numpy()
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    text = Text(num_bytes=2_000, sequence_length=16, num_eval=8)
    inputs, targets = text.train_batch(np.array([0, 500, 1_900]))
    expected = -np.mean(log_p[inputs.numpy(), targets.numpy()])
    assert text.loss(model, (inputs, targets)).item() == pytest.approx(expected, rel=1e-6)
    words = Bytes(num_bytes=2_000, context=1, num_eval=8)
    context, following = words.train_batch(np.array([0, 500, 1_900]))
    expected = -np.mean(log_p[context.numpy()[:, 0], following.numpy()])
    squeezed = nn.Sequential(model, nn.Flatten())  # (samples, 1, vocabulary)
    assert words.loss(squeezed, (context, following)).item() == pytest.approx(expected, rel=1e-6)


def test_the_installed_packages_split_into_files_of_different_content() -> None:
    """Files that two packages have in common would be in both texts."""
    package_text.cache_clear()
    whole: dict[bool, set[str]] = {True: set(), False: set()}
    for digest, path in module._files():
        content = path.read_bytes()
        if len(content.strip()) > 100:  # not those that only mark a package
            whole[digest[0] < 8].add(hashlib.sha256(content).hexdigest())
    assert min(map(len, whole.values())) > 20
    assert not whole[True] & whole[False]


@pytest.mark.parametrize("num_bytes", PINNED)
def test_the_text_of_the_pinned_versions_stays(num_bytes: int) -> None:
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    other = [name for name in PACKAGES if metadata.version(name) != pins[name]]
    if other:
        pytest.skip(f"{', '.join(other)} are not of the pinned versions, which is another text")
    assert package_text(num_bytes).hash == PINNED[num_bytes]
    words = Bytes(num_bytes=num_bytes).provenance()["data"]
    assert words == f"{num_bytes} bytes of the sources of " + ", ".join(
        f"{name} {pins[name]}" for name in PACKAGES
    )
