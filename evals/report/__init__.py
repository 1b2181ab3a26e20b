"""Reports: what an evaluation found, for people and for other programs.

`report_of` and `compare` read the record; `to_terminal`, `to_json`, `to_markdown` and `to_html` show the same report;
`parse_bars` and `failures` give a build its verdict. Importing it loads neither numpy nor rich.
"""

from __future__ import annotations

from evals.report.bars import Bar, failures, parse_bars
from evals.report.build import compare, report_of
from evals.report.markdown import to_markdown
from evals.report.model import Arm, Case, Comparison, MetricDifference, MetricResult, PersonScore, Report, Scale
from evals.report.page import to_html
from evals.report.plain import to_json
from evals.report.terminal import to_terminal

__all__ = [
    "Arm",
    "Bar",
    "Case",
    "Comparison",
    "MetricDifference",
    "MetricResult",
    "PersonScore",
    "Report",
    "Scale",
    "compare",
    "failures",
    "parse_bars",
    "report_of",
    "to_html",
    "to_json",
    "to_markdown",
    "to_terminal",
]
