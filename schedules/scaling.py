"""How hyperparameters move with the batch size: `scale`, and the rules that it applies.

A rule is a function (hyper, base_batch, batch) -> Hyper of what was tuned at `base_batch` samples a
step; further arguments are keyword-only. kappa = batch / base_batch. Weight decay is not the
rules' affair: it is held by `hold`, in words that say what stays. Nor is the length of the run:
`for_duration` brings it to a rule.

None of the rules but `surge` and `adascale` knows where the noise stops: beyond the critical batch
size the best learning rate stops rising, whatever the rule says.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from largebatch.common.numbers import real_number, whole_number
from largebatch.schedules.hyper import Hyper

Rule = Callable[..., Hyper]
"""(hyper, base_batch, batch, *, options) -> Hyper."""

Factor = Callable[[float], float]
"""kappa -> factor on the learning rate."""


def none(hyper: Hyper, base_batch: int, batch: int) -> Hyper:
    """Nothing moves, whatever the batch."""
    del base_batch, batch
    return hyper


def linear(hyper: Hyper, base_batch: int, batch: int) -> Hyper:
    """lr kappa (Goyal et al. 2017, arXiv:1706.02677): kappa small steps become one large one.

    For SGD, momentum kept, where gradient noise dominates and the learning rate is warmed up over
    unchanged samples; the paper holds it up to a batch of 8,192 on ImageNet. Not for Adam-like
    optimizers, whose step does not grow with the gradient.
    """
    kappa = batch / base_batch
    return _averaged(replace(hyper, lr=hyper.lr * kappa), kappa)


def sqrt(hyper: Hyper, base_batch: int, batch: int) -> Hyper:
    """lr sqrt(kappa): keeps the variance of an SGD increment (Krizhevsky 2014, arXiv:1404.5997).

    Also the learning-rate part of `adam_sde`; betas and eps are left alone here, which is what most
    users of Adam and LAMB do. Assumes that gradient noise dominates.
    """
    kappa = batch / base_batch
    return _averaged(replace(hyper, lr=hyper.lr * math.sqrt(kappa)), kappa)


def adam_sde(hyper: Hyper, base_batch: int, batch: int) -> Hyper:
    """lr sqrt(kappa), beta to 1 - kappa (1 - beta) for both, eps / sqrt(kappa) (Malladi et al.
    2022, arXiv:2205.10287).

    Adam then follows the same stochastic differential equation, in samples. With beta1 = 0 it is
    the rule of RMSprop. Valid while kappa (1 - beta) < 1 for both betas, and refused beyond; the
    derivation assumes noise-dominated gradients and says nothing of weight decay, for which
    `hold="per_sample"` follows from it (and is this rule's default).

    Raises:
        ValueError: kappa too large for the betas; it says how far they reach.
    """
    return _sde(hyper, base_batch, batch)


def _sde(hyper: Hyper, base_batch: int, batch: int, clock: float = 1.0) -> Hyper:
    """`adam_sde` with kappa times `clock`, which is 1 / duration where time is a share of a run."""
    kappa = batch / base_batch * clock
    scaled = replace(hyper, lr=hyper.lr * math.sqrt(kappa))
    if hyper.betas is not None:
        first, second = (
            _shortened(beta, kappa, f"beta{index}", base_batch, clock)
            for index, beta in enumerate(hyper.betas, 1)
        )
        eps = None if hyper.eps is None else hyper.eps / math.sqrt(kappa)
        scaled = replace(scaled, betas=(first, second), eps=eps)
    return _averaged(scaled, kappa)


def half_life(hyper: Hyper, base_batch: int, batch: int, *, exponent: float = 0.25) -> Hyper:
    """beta2^kappa, lr kappa^exponent (Marek et al. 2025, arXiv:2507.07101): the second moment
    forgets after a fixed number of samples.

    beta1 and eps are kept. The paper finds the best learning rate to move more slowly than the root
    and gives no formula; 1/4 is what users of it write. The same as `adam_sde`'s beta2 for small
    kappa, and defined for all.
    """
    kappa = batch / base_batch
    exponent = real_number(exponent, "scaling.exponent")
    scaled = replace(hyper, lr=hyper.lr * kappa**exponent)
    if hyper.betas is not None:
        scaled = replace(scaled, betas=(hyper.betas[0], hyper.betas[1] ** kappa))
    return _averaged(scaled, kappa)


def legw(hyper: Hyper, base_batch: int, batch: int) -> Hyper:
    """lr sqrt(kappa), warm-up samples kappa (You et al. 2019, arXiv:1901.08256): linear-epoch
    gradual warm-up.

    kappa times the epochs are the same number of warm-up steps at every batch size. Under a ramp
    the first batch size counts.
    """
    warmup_samples = round(hyper.warmup_samples * (batch / base_batch))
    return replace(sqrt(hyper, base_batch, batch), warmup_samples=warmup_samples)


def lamb_untuned(hyper: Hyper, base_batch: int, batch: int) -> Hyper:
    """lr sqrt(kappa), warm-up samples kappa (You et al. 2020, arXiv:1904.00962, table 4): LAMB
    without tuning.

    For BERT the paper starts from 5e-3 at a batch of 32,768 with 3,125 warm-up steps. The
    arithmetic of `legw`, for LAMB; betas and eps are kept.
    """
    return legw(hyper, base_batch, batch)


def surge(hyper: Hyper, base_batch: int, batch: int, *, noise_scale: float) -> Hyper:
    """lr f(batch) / f(base_batch), f(B) = 2 / (sqrt(N / B) + sqrt(B / N)) (Li et al. 2024,
    arXiv:2405.14578).

    For sign-like optimizers (Adam): the best learning rate rises as the root, peaks at the noise
    scale N and falls beyond it. N, in samples, has to be measured and rises during training: one
    number holds for one phase. betas and eps are kept.
    """
    noise_scale = real_number(noise_scale, "scaling.noise_scale", above=0.0)

    def best(size: int) -> float:
        return 2.0 / (math.sqrt(noise_scale / size) + math.sqrt(size / noise_scale))

    lr = hyper.lr * (best(batch) / best(base_batch))
    return _averaged(replace(hyper, lr=lr), batch / base_batch)


def adascale(hyper: Hyper, base_batch: int, batch: int, *, noise_scale: float) -> Hyper:
    """lr r, r = (1 + phi) / (1 + phi / kappa), phi = noise_scale / base_batch (Johnson et al. 2020,
    arXiv:2007.05105).

    r is what one large step is worth in small ones: kappa where noise dominates, 1 + phi at most.
    For SGD. AdaScale measures r at each step and counts r steps for one on the schedule's clock;
    here the noise scale is a number given, and the clock stays samples.
    """
    phi = real_number(noise_scale, "scaling.noise_scale", above=0.0) / base_batch
    kappa = batch / base_batch
    return _averaged(replace(hyper, lr=hyper.lr * ((1.0 + phi) / (1.0 + phi / kappa))), kappa)


def power(hyper: Hyper, base_batch: int, batch: int, *, exponent: float) -> Hyper:
    """lr kappa^exponent: any power law, such as one fitted to a search at several batch sizes."""
    kappa = batch / base_batch
    exponent = real_number(exponent, "scaling.exponent")
    return _averaged(replace(hyper, lr=hyper.lr * kappa**exponent), kappa)


RULES: Final[dict[str, Rule]] = {
    rule.__name__: rule
    for rule in (
        none,
        linear,
        sqrt,
        adam_sde,
        half_life,
        legw,
        lamb_untuned,
        surge,
        adascale,
        power,
    )
}

HOLDS: Final = ("per_step", "per_sample", "timescale")

OWN: Final = "rule"
"""The `hold` that the rule implies: "per_sample" under `adam_sde`, else None."""


def scale(
    hyper: Hyper,
    base_batch: int,
    batch: int,
    rule: str | Rule = "sqrt",
    *,
    hold: str | None = OWN,
    duration: float = 1.0,
    duration_exponent: float = 0.0,
    **options: Any,
) -> Hyper:
    """What `hyper`, tuned at the global batch size `base_batch`, becomes at `batch`, in samples.

    Args:
        rule: a name in `RULES`, or a function of your own like those there.
        hold: what stays of the weight decay, where w shrinks by lr * weight_decay a step:
            "per_step" that product; "per_sample" that product over the batch size; "timescale" the
            share of the run over which weights are averaged, batch / (lr * weight_decay * samples
            of the run) (Wang & Aitchison 2024, arXiv:2405.13698; Bergsma et al. 2025,
            arXiv:2505.13738). None leaves weight_decay as it is. "rule", the default, is
            "per_sample" under `adam_sde`, which implies it, and None under every other rule.
        duration: samples of this run over samples of the one that was tuned; for "timescale", and
            for `duration_exponent`.
        duration_exponent: lr goes as duration to the power of minus it, and more under `adam_sde`:
            see `for_duration`.
        options: the rule's own: `noise_scale` (surge, adascale), `exponent` (power, half_life).

    Raises:
        ValueError: an unknown rule or hold, an option that the rule lacks or does not take, a value
            out of range, or a batch size that the rule does not reach.

    >>> scale(Hyper(lr=0.4), 256, 1024, rule="sqrt", duration=4, duration_exponent=0.5).lr
    0.4
    """
    base_batch = whole_number(base_batch, "base_batch", 1)
    batch = whole_number(batch, "batch", 1)
    function = find_rule(rule)
    check_options(function, options)
    duration = real_number(duration, "duration", above=0.0)
    scaled = for_duration(function, duration, duration_exponent)(
        hyper, base_batch, batch, **options
    )
    held = resolve_hold(hold, function)
    return replace(scaled, weight_decay=_held(hyper, scaled, batch / base_batch, held, duration))


def for_duration(rule: Rule, duration: float, exponent: float) -> Rule:
    """`rule` for a run `duration` times as long as the one that was tuned: lr times
    duration^-exponent beside it.

    The longer the run, the lower its best rate, which no rule of the batch says. With 1/2 this is
    Complete(d)P's (Mlodozeniec et al. 2025, arXiv:2512.22382), which puts r = kappa / duration in
    the place of kappa: under `adam_sde` betas and eps follow r too, and with another exponent
    kappa duration^(-2 exponent); its formulas are here at second hand, the paper was not. 0.3 is
    what Marin's recipes for text use (github.com/marin-community/marin, pull request 3292).
    """
    exponent = real_number(exponent, "scaling.duration_exponent", least=0.0)
    if exponent == 0.0:
        return rule
    factor = duration**-exponent

    def prolonged(hyper: Hyper, base_batch: int, batch: int, **options: Any) -> Hyper:
        if rule is adam_sde:
            return _sde(hyper, base_batch, batch, factor**2)
        scaled = rule(hyper, base_batch, batch, **options)
        return replace(scaled, lr=scaled.lr * factor)

    return prolonged


def check_duration(exponent: float | None, base_samples: int | None) -> None:
    """Refuse an exponent of the run's length where the length of the tuned run is not known."""
    if exponent and base_samples is None:
        raise ValueError(
            f"scaling.duration_exponent={exponent:g} moves the rate with the run's length over "
            "that of the run that was tuned: give its samples, scaling.base_samples"
        )


def scale_lr(
    base_lr: float,
    base_batch: int,
    batch: int,
    rule: str | Factor = "sqrt",
    **options: Any,
) -> float:
    """The learning rate at the global batch size `batch`, in samples, given the one tuned at
    `base_batch`.

    Args:
        rule: a name in `RULES`, or any function of kappa = batch / base_batch.
        options: the rule's own.

    Raises:
        ValueError: an unknown rule, or a value out of range.

    >>> scale_lr(0.1, 256, 1024, rule="sqrt"), scale_lr(0.1, 256, 1024, rule="linear")
    (0.2, 0.4)
    """
    base_lr = real_number(base_lr, "base_lr", above=0.0)
    base_batch = whole_number(base_batch, "base_batch", 1)
    batch = whole_number(batch, "batch", 1)
    if not isinstance(rule, str):
        return base_lr * rule(batch / base_batch)
    alone = Hyper(lr=base_lr, betas=None, eps=None, weight_decay=None)
    return scale(alone, base_batch, batch, rule, **options).lr


def find_rule(rule: str | Rule) -> Rule:
    """The function that `rule` names, or is; an unknown name is refused."""
    if not isinstance(rule, str):
        return rule
    if rule not in RULES:
        raise ValueError(f"the scaling rule must be one of {', '.join(RULES)}, got {rule!r}")
    return RULES[rule]


def resolve_hold(hold: str | None, rule: Rule) -> str | None:
    """One of `HOLDS`, or None where weight decay stays; "rule" is what `rule` implies."""
    check_hold(hold)
    if hold == OWN:
        return "per_sample" if rule is adam_sde else None
    return hold


def options_of(rule: Rule) -> dict[str, bool]:
    """The keyword-only arguments of a rule, and whether it needs each."""
    return {
        name: parameter.default is parameter.empty
        for name, parameter in inspect.signature(rule).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def check_options(rule: Rule, options: dict[str, Any]) -> None:
    """Refuse options that `rule` does not take, and the lack of one that it needs."""
    known, name = options_of(rule), getattr(rule, "__name__", "custom")
    for option in options.keys() - known.keys():
        taken = ", ".join(known) or "no option"
        raise ValueError(f"scaling.{option} is nothing to the rule {name}, which takes {taken}")
    for option, needed in known.items():
        if needed and option not in options:
            raise ValueError(f"the rule {name} needs scaling.{option}: a number, got nothing")


def check_hold(hold: str | None) -> None:
    """Refuse a `hold` that there is not."""
    if hold is not None and hold not in (*HOLDS, OWN):
        known = ", ".join((*HOLDS, OWN))
        raise ValueError(f"scaling.hold must be null or one of {known}, got {hold!r}")


def _held(
    hyper: Hyper, scaled: Hyper, kappa: float, hold: str | None, duration: float
) -> float | None:
    if scaled.weight_decay is None or hold is None:
        return scaled.weight_decay
    slower = hyper.lr / scaled.lr
    if hold == "per_step":
        return scaled.weight_decay * slower
    if hold == "per_sample":
        return scaled.weight_decay * (kappa * slower)
    return scaled.weight_decay * (kappa * slower / duration)


def _averaged(hyper: Hyper, kappa: float) -> Hyper:
    """ema_decay^kappa: the weights' average keeps its half-life in samples (Busbridge et al. 2023,
    arXiv:2307.13813).
    """
    if hyper.ema_decay is None:
        return hyper
    return replace(hyper, ema_decay=hyper.ema_decay**kappa)


def _shortened(beta: float, kappa: float, name: str, base_batch: int, clock: float) -> float:
    """1 - kappa (1 - beta), to the last bit beta at kappa = 1; a beta of 0 is no average at all."""
    if beta == 0.0:
        return beta
    # 10 * (1 - 0.9) is a hair below 1 in floats, and 1 on paper.
    if kappa * (1.0 - beta) >= 1.0 - 1e-12:
        reach = math.ceil(base_batch / clock / (1.0 - beta) * (1.0 - 1e-12)) - 1
        longer = "" if clock == 1.0 else f" with a kappa {clock:.4g} times as large by duration"
        raise ValueError(
            f"the rule adam_sde needs kappa (1 - {name}) < 1, got {kappa:g} * {1.0 - beta:.4g} at "
            f"a batch of {kappa / clock * base_batch:g}{longer}: from {base_batch} it reaches "
            f"{reach}; "
            f"raise {name} above {1.0 - 1.0 / kappa:.4g}, or use sqrt or half_life"
        )
    return beta - (kappa - 1.0) * (1.0 - beta)
