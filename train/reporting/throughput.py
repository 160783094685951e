"""How fast a run is, with all that the number depends on beside it.

A peak is an agreement, no measurement: one run of 107 TFLOP/s on a tile of Aurora is 44.5 % or
31.4 % of it, by whose figure is taken. So none is used without its source beside it.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

from largebatch.common.numbers import real_number
from largebatch.train.reporting.flops import Flops


@dataclass(frozen=True)
class Peak:
    """Dense BF16 matrix arithmetic of one device, as torch counts devices.

    Whatever precision a run computes in: so that runs compare.
    """

    tflops: float
    source: str


_TILE = "one tile of a Max 1550 (ZE_FLAT_DEVICE_HIERARCHY=FLAT)"

# By what torch calls the device; the first name that fits. Of several figures the first is used:
# for the tile the one of torchtitan and ezpz too, from the units that are there.
PEAKS: Final[tuple[tuple[str, tuple[Peak, ...]], ...]] = (
    (
        r"Data Center GPU Max 1550",
        (
            Peak(
                298.2,
                f"{_TILE}: 512 FLOP per unit and cycle, its 448 active units, 1.3 GHz "
                "(torchtitan tools/utils.py, ezpz flops.py)",
            ),
            Peak(240.5, f"{_TILE}: half of 481 (Hatanpää, Scaling AI Workloads on Aurora, 2025)"),
            Peak(340.8, f"{_TILE}: as the first, were all 512 units active"),
            Peak(256.0, f"{_TILE}: measured GEMM, alone (ALCF node performance, 2026)"),
            Peak(207.0, f"{_TILE}: measured GEMM, a twelfth of the busy node (ALCF, 2026)"),
        ),
    ),
    (r"A100", (Peak(312.0, "NVIDIA A100 data sheet"),)),
    (r"H100 PCIe", (Peak(756.0, "NVIDIA H100 PCIe data sheet, without sparsity"),)),
    (r"H(100|200) NVL", (Peak(835.0, "NVIDIA H100 NVL and H200 NVL data sheets, halved: dense"),)),
    (r"H100|H200|GH200", (Peak(989.0, "NVIDIA H100 SXM and H200 data sheets, halved: dense"),)),
    (r"B200", (Peak(2250.0, "NVIDIA B200 data sheet, halved: dense"),)),
    (
        r"MI250X",
        (Peak(191.5, "half of AMD's MI250X data sheet, 383: torch sees one die of the two"),),
    ),
    (r"MI300X", (Peak(1307.4, "AMD MI300X data sheet, without sparsity"),)),
)


def peaks_of(device_name: str) -> tuple[Peak, ...]:
    """All figures known for a device, the one in use first; none for an unknown one."""
    for name, peaks in PEAKS:
        if re.search(name, device_name):
            return peaks
    return ()


def chosen(peak_tflops: object, device_name: str) -> Peak | None:
    """The peak to divide by: the one that is configured, or that of the device; None: not known."""
    if peak_tflops is not None:
        given = real_number(peak_tflops, "throughput.peak_tflops", above=0.0)
        of_it = next((p.source for p in peaks_of(device_name) if p.tflops == given), None)
        return Peak(given, of_it or "given as throughput.peak_tflops")
    return next(iter(peaks_of(device_name)), None)


@dataclass
class Throughput:
    """Samples and arithmetic per second, and their ratio to the peak, from a run's steps.

    The first steps compile, allocate and connect: on 512 nodes of Aurora one was seen at 0.4 %
    where the run went on at 17 %. They have no utilisation, and the summary leaves them out.

    `flops` are of one sample; where they are not known (None), samples are all that is counted. The
    samples are spread over `num_devices`. `peak` is of one device; without, there is no
    utilisation. `others` are further figures for it; the summary has the ratio to each.
    """

    flops: Flops | None
    num_devices: int
    peak: Peak | None = None
    others: tuple[Peak, ...] = ()
    steps_left_out: int = 5
    _steps: int = 0
    _samples: int = 0
    _seconds: float = 0.0

    def line(self, samples: int, seconds: float) -> dict[str, float]:
        """What the record line of a step gets.

        Args:
            samples: of its global batch.
            seconds: that it took: evaluations and checkpoints are no part of it.
        """
        assert samples > 0
        assert seconds > 0.0
        self._steps += 1
        if self._steps <= self.steps_left_out:
            return {"samples_per_second": samples / seconds}
        self._samples += samples
        self._seconds += seconds
        return self._of(samples / seconds)

    def summary(self) -> dict[str, Any]:
        """Over all steps but the first: rates, and what they were made with."""
        rates = {} if not self._samples else self._of(self._samples / self._seconds)
        made_with: dict[str, Any] = {
            "steps_left_out": self.steps_left_out,
            "steps_measured": max(0, self._steps - self.steps_left_out),
            "seconds_measured": round(self._seconds, 4),
            "num_devices": self.num_devices,
        }
        if self.flops is not None:
            made_with |= {
                "flops_per_sample": self.flops.per_sample,
                "formula": self.flops.formula,
                "recompute": self.flops.recompute,
            }
        if self.peak is not None:
            made_with |= {"peak_tflops": self.peak.tflops, "peak_source": self.peak.source}
        if self.others and "tflops_per_device" in rates:
            made_with["other_peaks"] = [
                {
                    "peak_tflops": other.tflops,
                    "peak_source": other.source,
                    self._ratio: rates["tflops_per_device"] / other.tflops,
                }
                for other in self.others
            ]
        return rates | made_with

    @property
    def _ratio(self) -> str:
        """With what is computed twice in it, it is not the model's utilisation."""
        return "hfu" if self.flops is not None and self.flops.recompute else "mfu"

    def _of(self, samples_per_second: float) -> dict[str, float]:
        rates = {"samples_per_second": samples_per_second}
        if self.flops is not None:
            tflops = samples_per_second * self.flops.per_sample / self.num_devices / 1e12
            rates["tflops_per_device"] = tflops
            if self.peak is not None:
                rates[self._ratio] = tflops / self.peak.tflops
        return rates
