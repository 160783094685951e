"""How fast a run is, with all that the number depends on beside it."""

from dataclasses import dataclass
from typing import Any

from largebatch.train.reporting.flops import Flops
from largebatch.train.reporting.peaks import Peak


@dataclass
class Throughput:
    """Samples and arithmetic per second, and their ratio to the peak, from a run's steps.

    The first steps compile, allocate and connect: on 512 nodes of Aurora one was seen at 0.4 %
    where the run went on at 17 %. They have no utilisation, and the summary leaves them out.

    Attributes:
        flops: of one sample; None: not known, so samples are all that is counted.
        num_devices: that the samples are spread over.
        peak: of one device; None: not known, so there is no utilisation.
        others: further figures for the same peak; the summary has the ratio to each.
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
