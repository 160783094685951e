"""What a fit says of a batch size."""

from largebatch.study.fit import Fit


def steps_at(fit: Fit, batch_size: float) -> float:
    """S_min + E_min / B, in steps."""
    return fit.s_min + fit.e_min / batch_size
