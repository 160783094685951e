"""Reads run records and turns them into curves, critical batch sizes, figures and a report."""

from largebatch.study.fit import CurveFit, fit_curve, fit_points
from largebatch.study.points import RulePoint, StudyPoint, curve_points, rule_points
from largebatch.study.report import Study, StudyReport, print_report, read_study, write_report
from largebatch.study.runs import RunSummary, read_runs

__all__ = [
    "CurveFit",
    "RulePoint",
    "RunSummary",
    "Study",
    "StudyPoint",
    "StudyReport",
    "curve_points",
    "fit_curve",
    "fit_points",
    "print_report",
    "read_runs",
    "read_study",
    "rule_points",
    "write_report",
]
