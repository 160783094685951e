"""What batch size and learning rate hold at which sample. Plain arithmetic, without torch."""

from largebatch.schedules.counts import whole_number
from largebatch.schedules.curves import Constant, Cosine, Curve, Polynomial
from largebatch.schedules.plan import Plan, Point
from largebatch.schedules.ramps import ConstantBatch, Ramp, RampupBatch
from largebatch.schedules.scaling import RULES, scale_lr

__all__ = [
    "RULES",
    "Constant",
    "ConstantBatch",
    "Cosine",
    "Curve",
    "Plan",
    "Point",
    "Polynomial",
    "Ramp",
    "RampupBatch",
    "scale_lr",
    "whole_number",
]
