"""Reads run records and turns them into curves, critical batch sizes, figures and a report.

import largebatch.study as study

study.runs("studies/bytes").to_pandas()  # a row a run
study.intervals(rows)   # of any table with optimizer, batch_size, seed and steps
study.pairs(rows)
"""

from largebatch.study.fit import CurveFit, fit_curve
from largebatch.study.points import RulePoint, StudyPoint, curve_points, rule_points
from largebatch.study.reading import RunSummary, read_runs
from largebatch.study.report import StudyReport, print_report, write_report
from largebatch.study.run_table import RunTable
from largebatch.study.section_study import SectionStudy, Study, read_study, runs
from largebatch.study.statistics.intervals import CurveEstimates, Estimate, intervals
from largebatch.study.statistics.pairs import Pair, pairs
from largebatch.study.statistics.table import SeedSteps

__all__ = [
    "CurveEstimates",
    "CurveFit",
    "Estimate",
    "Pair",
    "RulePoint",
    "RunSummary",
    "RunTable",
    "SectionStudy",
    "SeedSteps",
    "Study",
    "StudyPoint",
    "StudyReport",
    "curve_points",
    "fit_curve",
    "intervals",
    "pairs",
    "print_report",
    "read_runs",
    "read_study",
    "rule_points",
    "runs",
    "write_report",
]
