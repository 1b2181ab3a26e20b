"""A report as one page of HTML that needs nothing else."""

from __future__ import annotations

from evals.report.model import Report


def to_html(report: Report, *, worst: int = 5) -> str:
    """A whole document: no scripts, nothing fetched, every text escaped."""
    return report.title
