"""Whether a run may be resumed with a larger budget: if its steps so far are still its own."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, Final

from largebatch.common.errors import ConfigError
from largebatch.schedules import Plan

_PLACES: Final = 1024
"""At which the two plans are compared, evenly spaced."""


def check_past(plan: Plan, before: int, samples: int, decided: Mapping[str, Any]) -> None:
    """Refuse a budget under which the batch sizes or learning rates until now would have been
    others: a curve over the whole budget is another curve over a larger one.

    Args:
        before: the budget until now, in samples.
        samples: that the run has seen.
        decided: by then, by a ramp that follows the run.

    Raises:
        ConfigError: naming where they differ and the ways out.
    """
    if plan.budget_samples == before:
        return
    now = deepcopy(plan)  # `decided` goes into its ramp
    now.load_state_dict(decided)
    then, same = replace(now, budget_samples=before), 0
    for place in range(_PLACES + 1):
        seen = max(0, samples - 1) * place // _PLACES
        one, other = then.at(seen), now.at(seen)
        if one != other:
            break
        same = seen
    else:
        return
    what, was, would = next(
        (name, old, new)
        for name, old, new in zip(one._fields, one, other, strict=True)
        if old != new
    )
    earlier = f"; checkpoints of up to {same} samples can be lengthened" if same > 0 else ""
    raise ConfigError(
        f"budget.samples={plan.budget_samples} was {before}, and the schedule depends on it: after "
        f"{seen} samples {what} was {was}, and would be {would}. Keep the budget, or begin another "
        "run with hydra.run.dir=…; what can be lengthened is a run whose schedule until now does "
        "not depend on its budget (lr=constant, lr=inverse_sqrt, or lr=wsd before its decay"
        f"{earlier})"
    )
