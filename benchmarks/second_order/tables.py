"""The tables of `largebatch bench second_order`."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def show(record: dict[str, Any], console: Console) -> None:
    """What was measured with, how, and two tables for each workload."""

    def say(*lines: str) -> None:
        for text in lines:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    made, cores = record["provenance"], record["num_cores"]
    say(
        ", ".join(f"{name} {number}" for name, number in made["versions"].items()),
        f"{made['device']}, {cores} cores, {made['num_threads']} threads; load average "
        f"{record['load_average']:.1f} at the start, best below 0.5",
        *(f"{name}: {formula}" for name, formula in record["formulas"].items()),
    )
    for workload in record["alone"]:
        console.print()
        console.print(table(workload))
    say(
        "\nOn ranks of one thread each, batch and optimizer shared out among them; interval "
        f"{record['interval_on_ranks']}:",
        *(f"{name}: {formula}" for name, formula in record["rank_formulas"].items()),
    )
    sizes = [row["num_ranks"] for workload in record["on_ranks"] for row in workload["rows"]]
    if cores is not None and max(sizes) > cores:
        say(
            f"More ranks than the {cores} cores here take turns on them: their ms and worst are "
            "mostly waiting, and only work says what a rank has to do."
        )
    for workload in record["on_ranks"]:
        console.print()
        console.print(rank_table(workload))


def table(workload: dict[str, Any]) -> Table:
    title = (
        f"{workload['name']}, in one process of {workload['num_threads']} "
        f"thread{'s' * (workload['num_threads'] > 1)}: {workload['num_parameters'] / 1e6:.2f} M "
        "parameters"
    )
    heads = (
        "interval", "rounds", "ms", "ratio", "mean", "of work", "worst", "by median", "early",
        "step ms", "step ratio", "step worst",
    )  # fmt: skip
    shown = make_table(title, heads)
    for before, entry in zip([None, *workload["rows"]], workload["rows"], strict=False):
        if before is not None and before["interval"] != entry["interval"]:
            shown.add_section()
        shown.add_row(
            entry["name"],
            str(entry["interval"]),
            str(entry["num_rounds"]),
            f"{1e3 * entry['seconds']:.2f}",
            f"{entry['ratio']:.2f}",
            f"{entry['mean_ratio']:.2f}",
            f"{entry['work_ratio']:.2f}",
            f"{1e3 * entry['worst_seconds']:.2f}",
            f"{entry['worst_by_median']:.1f}",
            f"{1e3 * entry['early_worst_seconds']:.1f}",
            f"{1e3 * entry['whole_seconds']:.1f}",
            f"{entry['whole_ratio']:.2f}",
            f"{entry['whole_worst_by_median']:.1f}",
        )
    return shown


def rank_table(workload: dict[str, Any]) -> Table:
    title = f"{workload['name']}: {workload['num_parameters'] / 1e6:.2f} M parameters"
    heads = (
        "ranks", "ms", "work", "1/n", "worst", "MB", "1/n", "on each", "collectives", "sent",
        "by gradient",
    )  # fmt: skip
    shown = make_table(title, heads)
    names = [*dict.fromkeys(entry["name"] for entry in workload["rows"])]
    for name in names:
        entries = [entry for entry in workload["rows"] if entry["name"] == name]
        alone = entries[0]
        assert alone["num_ranks"] == 1
        for entry in entries:
            n, sent = entry["num_ranks"], entry["sent_bytes"]
            shown.add_row(
                name,
                str(n),
                spread(entry["step_seconds"], 1e3),
                spread(entry["work_seconds"], 1e3),
                f"{1e3 * alone['work_seconds'][0] / n:.1f}",
                f"{1e3 * max(entry['worst_seconds']):.1f}",
                spread(entry["state_bytes"], 1e-6, 2),
                f"{1e-6 * alone['state_bytes'][0] / n:.2f}",
                f"{1e-6 * entry['replicated_bytes']:.2f}" if n > 1 else "",
                f"{max(entry['num_collectives']):.3g}",
                spread(sent, 1e-6, 2),
                f"{max(sent) / (4 * workload['num_parameters']):.2f}",
            )
        if name != names[-1]:
            shown.add_section()
    return shown


def make_table(title: str, heads: Sequence[str]) -> Table:
    shown = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    shown.add_column("optimizer", no_wrap=True)
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    return shown


def spread(values: Sequence[float], unit: float, digits: int = 1) -> str:
    """Least and most; one number where they are shown alike."""
    least, most = (f"{unit * value:.{digits}f}" for value in (min(values), max(values)))
    return least if least == most else f"{least}-{most}"
