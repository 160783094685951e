"""What batch size and learning rate hold at which sample. Plain arithmetic, without torch."""

from largebatch.common.numbers import whole_number
from largebatch.schedules.adaptive import (
    CABS,
    DiveBatch,
    Goodput,
    NoiseRamp,
    NormTest,
    SqrtNoise,
)
from largebatch.schedules.curves import (
    WSD,
    Constant,
    Cosine,
    Curve,
    GeometricSweep,
    InverseSqrt,
    Linear,
    Polynomial,
    StepDecay,
)
from largebatch.schedules.decided import DecidedRamp, LossTriggered
from largebatch.schedules.hyper import Hyper
from largebatch.schedules.noise import NoiseReading, NoiseScale
from largebatch.schedules.plan import Plan, PlannedStage, Point, Split, Totals
from largebatch.schedules.ramps import (
    ConstantBatch,
    GeometricBatch,
    Ramp,
    RampupBatch,
    StagedBatch,
)
from largebatch.schedules.scaling import HOLDS, RULES, Rule, scale, scale_lr
from largebatch.schedules.trades import LateSwitch, Seesaw, Smith, Trade

__all__ = [
    "CABS",
    "HOLDS",
    "RULES",
    "WSD",
    "Constant",
    "ConstantBatch",
    "Cosine",
    "Curve",
    "DecidedRamp",
    "DiveBatch",
    "GeometricBatch",
    "GeometricSweep",
    "Goodput",
    "Hyper",
    "InverseSqrt",
    "LateSwitch",
    "Linear",
    "LossTriggered",
    "NoiseRamp",
    "NoiseReading",
    "NoiseScale",
    "NormTest",
    "Plan",
    "PlannedStage",
    "Point",
    "Polynomial",
    "Ramp",
    "RampupBatch",
    "Rule",
    "Seesaw",
    "Smith",
    "Split",
    "SqrtNoise",
    "StagedBatch",
    "StepDecay",
    "Totals",
    "Trade",
    "scale",
    "scale_lr",
    "whole_number",
]
