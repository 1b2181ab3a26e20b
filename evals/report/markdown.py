"""A report as Markdown, for a pull request."""

from __future__ import annotations

from evals.report.model import Report


def to_markdown(report: Report, *, worst: int = 5) -> str:
    """GitHub's Markdown; no text of a model, document or person can be more than text in it."""
    return report.title
