"""The tables of a study for people, on the terminal and on the page: heads, cells, layout."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from largebatch.study.fit import FEWEST_POINTS, CurveFit
from largebatch.study.points import RulePoint, StudyPoint

if TYPE_CHECKING:
    from rich.table import Table

# The same tables for people, on the terminal and on the page: words first and last, else numbers.
POINT_HEADS = ("optimizer", "batch", "steps", "samples", "seconds", "best rate", "rates tried", "")
FIT_HEADS = ("optimizer", "S_min", "E_min", "B_crit", "leave-one-out range", "rms", "")
RULE_HEADS = ("optimizer", "rule", "base", "batch", "rate", "steps", "tuned", "ratio", "")


def critical_batch(fit: CurveFit | None) -> str:
    """B_crit in words, or why there is none."""
    if fit is None:
        return f"no fit, it needs {FEWEST_POINTS} batch sizes that reach the target"
    if not fit.identified:
        return (
            f"B_crit not identified (the fit says {three_digits(fit.b_crit)}, but the batches do "
            "not reach a factor 4 to both sides of it)"
        )
    if fit.b_crit_range is None:
        return f"B_crit {three_digits(fit.b_crit)}"
    return f"B_crit {three_digits(fit.b_crit)} (leaving one point out: {_range(fit)})"


def point_cells(point: StudyPoint) -> list[str]:
    spread = ""
    if point.steps is not None and point.seeds > 1:
        most = f"{point.steps_high:,.0f}" if point.steps_high < math.inf else "missed"
        spread = f" ({point.steps_low:,.0f} to {most})"
    rate = "-" if point.lr is None else f"{point.lr:.3g}"
    flag = "missed" if point.missed else "at edge" if point.at_edge else ""
    numbers = [f"{point.batch_size:,}", _whole(point.steps) + spread, _whole(point.samples)]
    seconds = "-" if point.seconds is None else f"{point.seconds:.1f}"
    return [point.optimizer, *numbers, seconds, rate, str(point.trials), flag]


def fit_cells(name: str, fit: CurveFit | None) -> list[str]:
    if fit is None:
        return [name, "-", "-", "-", "-", "-", critical_batch(fit)]
    used = f"{fit.num_points} points" + (f", {fit.num_censored} missed" * bool(fit.num_censored))
    trust = "identified" if fit.identified else "not identified"
    constants = [three_digits(fit.s_min), three_digits(fit.e_min), three_digits(fit.b_crit)]
    return [name, *constants, _range(fit), f"{fit.rms:.3f}", f"{trust} ({used})"]


def rule_cells(r: RulePoint) -> list[str]:
    ratio = "-" if r.ratio is None else f"{r.ratio:.2f}"
    where = [r.optimizer, r.rule, _whole(r.base_batch), f"{r.batch_size:,}", f"{r.lr:.3g}"]
    flag = "missed" if r.steps is None else ""
    return [*where, _whole(r.steps), _whole(r.tuned_steps), ratio, flag]


def terminal_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape as plain
    from rich.table import Table

    table = Table(title=plain(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in ("optimizer", "rule", "") else "right")
    previous: str | None = None
    for row in rows:
        if previous not in (None, row[0]):
            table.add_section()
        table.add_row(*map(plain, row))
        previous = row[0]
    return table


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; a line sets off each optimizer's rows."""
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    previous: str | None = None
    for row in rows:
        begins = ' class="first"' if previous not in (None, row[0]) else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[:-1])
        lines.append(f'<tr{begins}>{cells}<td class="words">{escape(row[-1])}</td></tr>')
        previous = row[0]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def three_digits(value: float) -> str:
    """Three significant digits, written in full: 23.3, 1,290 and 30,200."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def _range(fit: CurveFit) -> str:
    return "-" if fit.b_crit_range is None else " to ".join(map(three_digits, fit.b_crit_range))
