"""What batch size and learning rate hold at which sample. Plain arithmetic, without torch."""

from largebatch.common.numbers import whole_number
from largebatch.schedules.adaptive import AdaptiveRamp, LossTriggered
from largebatch.schedules.coupled import CoupledRamp, LateSwitch, Seesaw, Smith
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
from largebatch.schedules.hyper import Hyper
from largebatch.schedules.noise import NoiseReading, NoiseScale
from largebatch.schedules.noise_driven import (
    CABS,
    DiveBatch,
    Goodput,
    NoiseRamp,
    NormTest,
    SqrtNoise,
)
from largebatch.schedules.plan import BatchSplit, Plan, PlannedStage, PlanTotals, Point
from largebatch.schedules.ramps import (
    ConstantBatch,
    GeometricBatch,
    Ramp,
    RampupBatch,
    StagedBatch,
)
from largebatch.schedules.scaling import HOLDS, RULES, Rule, scale, scale_lr

__all__ = [
    "CABS",
    "HOLDS",
    "RULES",
    "WSD",
    "AdaptiveRamp",
    "BatchSplit",
    "Constant",
    "ConstantBatch",
    "Cosine",
    "CoupledRamp",
    "Curve",
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
    "PlanTotals",
    "PlannedStage",
    "Point",
    "Polynomial",
    "Ramp",
    "RampupBatch",
    "Rule",
    "Seesaw",
    "Smith",
    "SqrtNoise",
    "StagedBatch",
    "StepDecay",
    "scale",
    "scale_lr",
    "whole_number",
]
