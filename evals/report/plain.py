"""A report as plain values for other programs. Texts are as they were recorded: whoever shows them makes them safe."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from evals.report.model import Report

VERSION = 1


def to_json(report: Report) -> dict[str, Any]:
    """What `json.dumps` takes; `version` rises when a field changes its meaning."""
    plain: dict[str, Any] = asdict(report)
    return {"version": VERSION, **plain}
