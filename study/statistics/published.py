"""Steps to a target against the batch size, as others have published them.

MLPerf's reference convergence points (mlcommons/logging at 7bbf792, `rcp_checker`, every batch size
that a version of it has, the newest where several have it): mean epochs of 1,281,167 images to
75.9 % with LARS (ResNet-50), mean samples to 0.72 with LAMB (BERT). Zhang et al. 2024
(arXiv:2410.21676; hlzhang109/critical-batch-size, plots/chinchilla.ipynb): steps to a loss at
Chinchilla's number of tokens, AdamW, sequences of 512 tokens, by model size.
"""

from collections.abc import Mapping
from typing import Final

IMAGES: Final = 1_281_167

LARS_EPOCHS: Final = {
    1632: 35.0, 2048: 38.4, 3264: 35.2, 4096: 40.0, 8192: 42.0, 13_056: 45.4, 32_768: 56.0,
    49_152: 68.0, 58_880: 79.9, 64_480: 86.1, 65_536: 84.5, 67_840: 85.857,
}  # fmt: skip

LAMB_SAMPLES: Final = {
    256: 2_552_704, 448: 2_410_630, 1536: 2_777_588, 3072: 2_768_215, 4096: 2_843_443,
    4608: 2_794_752, 6144: 3_321_446, 6912: 3_596_122, 8192: 4_191_437, 8704: 4_278_144,
    12_288: 4_470_336, 13_056: 4_632_576, 16_384: 5_504_307,
}  # fmt: skip

MLPERF: Final[Mapping[str, Mapping[int, float]]] = {
    "LARS, ResNet-50": {size: found * IMAGES / size for size, found in LARS_EPOCHS.items()},
    "LAMB, BERT": {size: found / size for size, found in LAMB_SAMPLES.items()},
}
"""Steps by batch size."""

ZHANG_BATCH_SIZES: Final = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
ZHANG_OPTIMAL: Final = 256
"""The batch size that their CBS is counted from."""
ZHANG_STEPS: Final = {
    "85M": (46_000, 23_000, 13_282, 7000, 3840, 2500, 1800, 1600, 1600),
    "151M": (96_000, 49_000, 24_000, 11_951, 7128, 4200, 2760, 2400, 2300),
    "302M": (196_000, 90_000, 46_000, 23_400, 13_300, 7224, 4980, 3400, 2879),
    "604M": (311_000, 166_000, 81_000, 37_440, 21_320, 11_400, 7199, 4700, 3800),
    "1.2B": (643_000, 331_000, 176_000, 94_000, 46_500, 25_000, 15_360, 8900, 6500),
}
ZHANG_CBS20: Final = {"85M": 745, "151M": 955, "302M": 1394, "604M": 1889, "1.2B": 2533}
"""As they print it, from a fit of their own."""
