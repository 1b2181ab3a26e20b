"""A report for a terminal, drawn by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evals.report.model import Report

if TYPE_CHECKING:
    from rich.console import RenderableType


def to_terminal(report: Report, *, worst: int = 5) -> RenderableType:
    """For `rich.console.Console.print`."""
    return report.title
