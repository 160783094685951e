"""Print the exact steps, and the critical batch, of the study of the noisy quadratic model.

    python -m largebatch.study.nqm [OVERRIDES of study=nqm]

Expected steps of SGD at each batch size of the study: the fewest over all constant learning rates,
and the fewest over those that the study may try.
"""

import sys
from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from largebatch.common.errors import ConfigError, format_config_error
from largebatch.common.numbers import real_number, whole_number
from largebatch.conf.config import TrainConfig, typed
from largebatch.study.fit import fit_curve
from largebatch.study.nqm.model import Descent, power_law
from largebatch.study.nqm.steps import BestSteps, best_steps
from largebatch.study.search import GRID_FACTOR

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
    own = real_number(optim["lr"], "optim.lr", above=0.0)
    return best_steps(
        power_law(
            whole_number(task["dimension"], "task.dimension", 1),
            real_number(task["power"], "task.power", least=0.0),
        ),
        Descent(
            momentum=real_number(optim["momentum"], "optim.momentum", least=0.0),
            nesterov=bool(optim["nesterov"]),
        ),
        config.study.batch_sizes,
        config.target.loss,
        [own * GRID_FACTOR**point for point in SPAN] if on_grid else None,
    )


def main(overrides: Sequence[str]) -> int:
    """Print the tables and their fits."""
    try:
        with initialize_config_module("largebatch.conf", version_base="1.3"):
            config = typed(compose("train", ["study=nqm", "optim=sgd", *overrides]))
        curves = exact(config), exact(config, on_grid=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"largebatch: {format_config_error(error)}", file=sys.stderr)
        return 2
    print("  batch        lr    steps  crossing   lr of the grid   steps  crossing")
    for best, gridded in zip(*curves, strict=True):
        print(
            f"{best.batch_size:7.0f} {best.lr:9.4g} {best.steps:8.0f} {best.crossing:9.2f} "
            f"{gridded.lr:16.4g} {gridded.steps:7.0f} {gridded.crossing:9.2f}"
        )
    for curve, rates in zip(curves, ("all rates", "rates of the grid"), strict=True):
        sizes = [best.batch_size for best in curve]
        for count in ("crossing", "steps"):
            fit = fit_curve(sizes, [getattr(best, count) for best in curve])
            if fit is not None:
                print(
                    f"{rates}, {count}: critical batch {fit.b_crit:.4g} (S_min {fit.s_min:.4g}, "
                    f"E_min {fit.e_min:.4g}, rms of log steps {fit.rms:.3f})"
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
