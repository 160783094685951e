"""Print the exact steps, and the critical batch, of the study of the noisy quadratic model.

    python -m largebatch.study.nqm [OVERRIDES of study=nqm]

Expected steps of SGD at each batch size of the study: the fewest over all constant learning rates,
and the fewest over those that the study may try; and of the latter what runs need that are looked
at as the study's are, by simulation. The fits of each, by S_min + E_min / B and with the shape n
free.
"""

import math
import sys
from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from largebatch.common.errors import ConfigError, format_config_error
from largebatch.common.numbers import real_number, whole_number
from largebatch.conf.config import TrainConfig, typed
from largebatch.study.fit import fit_curve
from largebatch.study.nqm.model import Descent, Spectrum, power_law
from largebatch.study.nqm.runs import RunSteps, Simulation
from largebatch.study.nqm.steps import BestSteps, best_steps
from largebatch.study.protocol.search import GRID_FACTOR

SPAN = range(-40, 41)
"""Points of the grid of learning rates, to either side of the optimizer's own."""


def exact(config: TrainConfig, on_grid: bool = False) -> list[BestSteps]:
    """The fewest expected steps to the target at each batch size of the study.

    Args:
        on_grid: over the learning rates of the study's grid alone.

    Raises:
        ConfigError: another task or optimizer, or no study or target.
    """
    task, optim, lr = config.task, config.optim, config.lr
    for holds, sentence in (
        (str(task["_target_"]).endswith(".NoisyQuadratic"), "task=nqm"),
        (
            optim["_target_"] == "torch.optim.SGD" and not optim["weight_decay"],
            "optim=sgd without weight_decay",
        ),
        (
            str(lr["_target_"]).endswith(".Constant") and not lr["warmup_samples"],
            "lr=constant without warm-up",
        ),
        (config.clip_norm is None, "clip_norm=null"),
        (config.study is not None and config.target.loss is not None, "a study to a target"),
    ):
        if not holds:
            raise ConfigError(f"exact steps are known for {sentence}: study=nqm has them all")
    assert config.study is not None
    assert config.target.loss is not None
    return best_steps(
        *model_of(config), config.study.batch_sizes, config.target.loss,
        grid_of(config) if on_grid else None,
    )  # fmt: skip


def simulated(config: TrainConfig) -> list[RunSteps]:
    """What runs need at each batch size of the study, at the best rate of its grid."""
    assert config.study is not None
    assert config.target.loss is not None
    spectrum, descent = model_of(config)
    simulation = Simulation(
        spectrum=spectrum, descent=descent, target=config.target.loss,
        growth=config.evaluation.growth,
    )  # fmt: skip
    return [simulation.best(size, grid_of(config)) for size in config.study.batch_sizes]


def model_of(config: TrainConfig) -> tuple[Spectrum, Descent]:
    """The noisy quadratic model that a configuration describes."""
    task, optim = config.task, config.optim
    spectrum = power_law(
        whole_number(task["dimension"], "task.dimension", 1),
        real_number(task["power"], "task.power", least=0.0),
    )
    momentum = real_number(optim["momentum"], "optim.momentum", least=0.0)
    return spectrum, Descent(momentum=momentum, nesterov=bool(optim["nesterov"]))


def grid_of(config: TrainConfig) -> list[float]:
    """The learning rates that the study may try."""
    own = real_number(config.optim["lr"], "optim.lr", above=0.0)
    return [own * GRID_FACTOR**point for point in SPAN]


def main(overrides: Sequence[str]) -> int:
    """Print the tables and their fits."""
    try:
        with initialize_config_module("largebatch.conf", version_base="1.3"):
            config = typed(compose("train", ["study=nqm", "optim=sgd", *overrides]))
        curves = exact(config), exact(config, on_grid=True)
        runs = simulated(config)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"largebatch: {format_config_error(error)}", file=sys.stderr)
        return 2
    print(
        "  batch        lr    steps  crossing   lr of the grid   steps  crossing   lr of runs  mean"
    )
    for best, gridded, run in zip(*curves, runs, strict=True):
        print(
            f"{best.batch_size:7.0f} {best.lr:9.4g} {best.steps:8.0f} {best.crossing:9.2f} "
            f"{gridded.lr:16.4g} {gridded.steps:7.0f} {gridded.crossing:9.2f} "
            f"{run.lr:12.4g} {run.steps:8.2f}"
        )
    sizes = [best.batch_size for best in curves[0]]
    for counts, meant in (
        ([best.crossing for best in curves[0]], "all rates"),
        ([best.crossing for best in curves[1]], "rates of the grid"),
        ([run.steps for run in runs], "runs, rates of the grid"),
    ):
        for shape in (1.0, None):
            fit = fit_curve(sizes, counts, shape=shape) if max(counts) < math.inf else None
            if fit is not None:
                print(
                    f"{meant}, n = {fit.shape:.3g}: critical batch {fit.b_crit:.4g} "
                    f"(S_min {fit.s_min:.4g}, E_min {fit.e_min:.4g}, rms of log steps "
                    f"{fit.rms:.3f})"
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
