"""`agentops demo` from beginning to end, as `make demo` calls it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.model
def test_the_demo_answers_two_questions_and_declines_one(
    environment: dict[str, str], tmp_path: Path, model_folder: Path, embedder_folder: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agentops", "demo"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout
    assert "16 positions" in answers
    assert "engine.md" in answers
    assert "crashed" in answers
    assert "record.md" in answers
    assert "I do not know" in answers
    assert "balanced" in answers
    assert "the same state after each" in answers
    assert "0 calls of a model" in answers
    assert re.search(r"faithfulness +\S+", answers)
    for node in ("rewrite", "retrieve", "write", "critic", "finish"):
        assert f"─ {node}" in answers
