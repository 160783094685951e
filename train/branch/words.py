"""From a checkpoint to the words of its branches: what its run was, and what each branch changes.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from largebatch.common.errors import ConfigError, hydra_word
from largebatch.conf.config import BudgetConfig
from largebatch.records.checkpoints import is_name, listed, samples_of
from largebatch.records.configuration import read_yaml
from largebatch.records.fields import Fields, RecordError, mapping, number, optional, text, whole
from largebatch.records.names import CONFIG
from largebatch.records.record import words_of
from largebatch.train.checkpoints.files import problem, read_state

LINEAR: Final = ("SGD", "LARS")
"""Optimizers whose rate grows with the batch; that of all others grows with its square root."""

_KNOWN: Final = ("largebatch.", "torch.")
_ENDLESS: Final = ("Constant", "InverseSqrt")
"""Curves that do not depend on the budget, so that a trunk may be gone on from at its end."""


@dataclass(frozen=True)
class Trunk:
    """What a checkpoint's run was, as its record says it.

    Attributes:
        words: overrides that the run was made with.
        samples: seen by the checkpoint; `batch_size` is that of its last step.
        lr: at `base_batch`, by `rule`.
        num_train: samples of the training set; None: not on record.
    """

    checkpoint: Path
    words: tuple[str, ...]
    samples: int
    batch_size: int
    optimizer: str
    lr: float
    rule: str
    base_batch: int
    curve: str
    budget: int
    num_train: int | None
    noise: str | None

    @property
    def name(self) -> str:
        """Of the folder of its branches."""
        return f"{self.checkpoint.parents[1].name}-{self.checkpoint.name}"


def read_trunk(path: Path, given: Sequence[str]) -> Trunk:
    """Read what the run of a checkpoint was.

    Args:
        path: the checkpoint, or its run, whose last whole one is taken.
        given: the user's own words.

    Raises:
        ConfigError: there is none that is whole, or its run is not beside it, or is of a kind that
            has no branches.
    """
    checkpoint = _checkpoint(path.absolute())
    run = checkpoint.parents[1]
    try:
        config = Fields(mapping(OmegaConf.to_container(read_yaml(run / CONFIG))), str(run / CONFIG))
        state = Fields(read_state(checkpoint), str(checkpoint))
        words = words_of(run)
        optim, scaling = config.inside("optim"), config.inside("scaling")
        batch, data = config.inside("batch"), state.find_inside("data")
        found = Trunk(
            checkpoint=checkpoint,
            words=tuple(words or ()),
            samples=samples_of(checkpoint),
            batch_size=state.take("batch_size", whole(1)),
            optimizer=_last(optim.take("_target_", text)),
            lr=float(optim.take("lr", number)),
            rule=scaling.take("rule", text),
            base_batch=_whole(scaling.take("base_batch", number)),
            curve=_last(config.inside("lr").take("_target_", text)),
            budget=_budget(config.inside("budget").values),
            num_train=data.find("num_train", whole(1)),
            noise=config.inside("noise").take("small", optional(text)),
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error.filename} is not there: branches are made by the words of the checkpoint's "
            "run, so its folder has to be beside it"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if words is None:
        raise ConfigError(f"{run} does not say by which words it was made (.hydra/overrides.yaml)")
    if _last(batch.take("_target_", text)) in ("Seesaw", "Smith"):
        raise ConfigError(
            f"{run} trades its learning rate for its batch size, so that no rule says what the "
            "rate of another batch would be: branch from a run with another batch=…"
        )
    _check_known(run, found.words, given)
    return found


def _checkpoint(path: Path) -> Path:
    found = [path] if is_name(path.name) and path.is_dir() else listed(path)
    if not found:
        raise ConfigError(
            f"{path} has no checkpoints: name one, as RUN/checkpoints/samples-N, or a run that was "
            "trained with checkpoint.every_samples"
        )
    problems = []
    for checkpoint in reversed(found):
        what = problem(checkpoint)
        if what is None:
            return checkpoint
        problems.append(f"{checkpoint.name}: {what}")
    raise ConfigError(f"{path}: no checkpoint is whole ({'; '.join(problems[:3])})")


def _check_known(run: Path, words: Sequence[str], given: Sequence[str]) -> None:
    """Refuse words of a folder that would run what neither this package nor the user names."""
    for word in words:
        key, _, value = word.partition("=")
        names = key.endswith("_target_") or key.endswith("scaling.function")
        if names and not value.startswith(_KNOWN) and word not in given:
            raise ConfigError(
                f"{run} was made with {word}, which is code that its folder names: if it is what "
                f"you mean to run, give the word yourself: largebatch branch … {word}"
            )


@dataclass(frozen=True)
class Branching:
    """What is to be tried.

    Attributes:
        multiples: of the trunk's batch size, ascending, 1 first.
        window: samples of each branch.
        rule: how the learning rate follows the batch.
    """

    trunk: Trunk
    multiples: tuple[int, ...]
    window: int
    rule: str

    @property
    def batch_sizes(self) -> list[int]:
        return [multiple * self.trunk.batch_size for multiple in self.multiples]

    @property
    def ends_at(self) -> int:
        return self.trunk.samples + self.window

    def words(self, folder: Path) -> list[str]:
        """What makes the trunk's words those of the branches, a sweep of them in `folder`."""
        sizes = ",".join(map(str, self.batch_sizes))
        return [
            *self._shared(folder),
            f"batch.size={sizes}",
            "noise.small=null" if self.trunk.noise is None else f"noise.small={self.trunk.noise}",
            "hydra.sweep.subdir=batch-${batch.size}",
        ]

    def noise_words(self, folder: Path, ranks: int) -> list[str] | None:
        """Those of one run more that measures the noise scale at the trunk's batch size; None where
        the branches do, or the batch does not divide.

        Args:
            ranks: among which the batch is divided.
        """
        share = self.trunk.batch_size // ranks
        parts = next((parts for parts in (8, 4, 2) if share % parts == 0 and share), None)
        if self.trunk.noise is not None or parts is None:
            return None
        return [
            *self._shared(folder / "noise"),
            f"batch.size={self.trunk.batch_size}",
            "noise.small=micro_batch",
            f"engine.micro_batch_size={share // parts}",
            f"noise.half_life_samples={self.window}",
            "hydra.sweep.subdir=run",
        ]

    def _shared(self, folder: Path) -> list[str]:
        trunk = self.trunk
        scaling = [f"scaling={self.rule}", f"scaling.base_batch={trunk.batch_size}"]
        return [
            *trunk.words,
            "hydra/sweeper=largebatch_runs",  # the trunk may be a study's
            f"branch_from={hydra_word(str(trunk.checkpoint))}",
            f"optim.lr={trunk.lr!r}",
            "batch=constant",
            *(scaling if trunk.rule == "none" or trunk.base_batch == trunk.batch_size else []),
            f"budget.samples={max(trunk.budget, self.ends_at)}",
            "budget.tokens=null",
            "target.loss=null",
            *(f"target.{key}=null" for key in ("metric", "value", "direction")),
            f"target.give_up_samples={self.ends_at}",
            "evaluation.within=null",
            "evaluation.growth=1000000",  # training losses are compared, and one evaluation ends it
            "objective=null",
            "record.every=1",
            "resume=null",
            "stop_at=null",
            "checkpoint.every_samples=null",
            "checkpoint.every_minutes=null",
            "guard.non_finite=stop",
            "guard.spike=skip",
            "guard.loss_deviations=null",
            f"hydra.sweep.dir={hydra_word(str(folder))}",
        ]


def branching_of(
    trunk: Trunk, multiples: Sequence[int], window: int | None, rule: str | None
) -> Branching:
    """What is to be tried, checked.

    Args:
        window: None: as many samples as make `STEPS` steps of the largest batch.
        rule: None: the trunk's own, or what suits its optimizer.

    Raises:
        ConfigError: naming what cannot be.
    """
    factors = tuple(sorted({1, *multiples}))
    largest = factors[-1] * trunk.batch_size
    if trunk.num_train is not None and largest > trunk.num_train:
        raise ConfigError(
            f"a batch of {largest} is more than the {trunk.num_train} samples of the training set: "
            f"leave multiples above {trunk.num_train // trunk.batch_size} out of --multiples"
        )
    samples = STEPS * largest if window is None else window
    samples = -(-samples // largest) * largest  # the same samples at every batch size
    if samples < FEWEST * largest:
        raise ConfigError(
            f"--window={samples} is fewer than {FEWEST} steps of batch {largest}: raise it to "
            f"{FEWEST * largest}, or leave the largest multiples out"
        )
    if trunk.samples + samples > trunk.budget and trunk.curve not in _ENDLESS:
        raise ConfigError(
            f"{trunk.checkpoint} has seen {trunk.samples} of {trunk.budget} samples, and the "
            f"window takes {samples}: the schedule of lr={trunk.curve} says nothing beyond; name "
            "an earlier checkpoint, or a smaller --window or --multiples"
        )
    own = None if trunk.rule == "none" or trunk.base_batch == trunk.batch_size else trunk.rule
    if own is not None and rule not in (None, own):
        raise ConfigError(
            f"--rule={rule}: the run was scaled by {own} from batch {trunk.base_batch}, and its "
            "branches follow that rule"
        )
    suited = "linear" if trunk.optimizer in LINEAR else "sqrt"
    default = suited if trunk.rule == "none" else trunk.rule
    return Branching(trunk, factors, samples, own or rule or default)


STEPS: Final = 32
"""Of the largest batch, in a window: about what 2e9 tokens are at the largest batches of Merrill et
al."""
FEWEST: Final = 8


def _budget(values: Mapping[str, Any]) -> int:
    tokens, per = values.get("tokens"), values.get("tokens_per_sample", 1)
    samples = values.get("samples") if tokens is None else tokens
    if not isinstance(samples, int | float) or not isinstance(per, int | float) or per < 1:
        raise RecordError(f"its budget must be a number of samples or tokens, got {values}")
    given = {"samples": int(samples)} if tokens is None else {"tokens": int(samples)}
    return BudgetConfig(**given, tokens_per_sample=int(per)).samples


def _last(target: str) -> str:
    return target.rpartition(".")[2]


def _whole(value: float) -> int:
    return int(value)
