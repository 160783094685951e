"""What a single run shows: a bar while it goes, one line when it is over."""

from pathlib import Path
from typing import Any, Self

from largebatch.common.progress import progress_bar
from largebatch.records.summary import SummaryRecord
from largebatch.train.run_spec import RunSpec


class Display:
    """Takes each line of a run; draws on a terminal only. The bar fills with the sample budget."""

    def __init__(self, spec: RunSpec) -> None:
        self._evaluation = ""
        self._bar = progress_bar()
        config = spec.config
        total = min(config.target.give_up_samples or config.budget.samples, config.budget.samples)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, line: dict[str, Any]) -> None:
        if self._bar.disable:
            return
        if "eval_loss" in line:
            self._evaluation = f"  evaluation {line['eval_loss']:.4f}"
        text = f"step {line['step']:,}  loss {line['loss']:.4f}{self._evaluation}"
        self._bar.update(self._task, completed=line["samples"], description=text)


def outcome(summary: SummaryRecord, folder: Path) -> str:
    """One line: how the run ended, what it took, and where its record is."""
    evaluation, target = summary["eval_loss"], summary["target_loss"]
    ended = summary["status"]
    if target is not None:
        verb = "reached" if ended == "reached" else f"{ended} without reaching"
        ended = f"{verb} {target:g}"
    took = f"{summary['steps']:,} steps, {summary['samples']:,} samples, {summary['seconds']:.1f} s"
    loss = "" if evaluation is None else f"; evaluation loss {evaluation:.4f}"
    why = f" ({summary['reason']})" if summary.get("reason") else ""
    return f"{ended} after {took}{loss}{why}: {folder}"
