"""`make demo` and `make test` on a fresh checkout in a folder with a space in its name: in either order, and twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = ("demo",)
TEST = ("test", "ARGS=-q tests/unit/test_sync.py")


@pytest.mark.long
@pytest.mark.model
@pytest.mark.parametrize("order", [(DEMO, TEST), (TEST, DEMO)], ids=["demo-first", "test-first"])
def test_make_works_in_either_order_and_twice(
    tmp_path: Path, environment: dict[str, str], model_folder: Path, embedder_folder: Path, order: tuple[tuple[str, ...], ...]
) -> None:
    if shutil.which("make") is None or not (ROOT / ".git").exists():
        pytest.skip("needs make and a git checkout; this test did not run")
    checkout = tmp_path / "a folder" / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    clean = {
        key: value
        for key, value in environment.items()
        if key not in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "VIRTUAL_ENV")
    }
    clean["PATH"] = os.pathsep.join(part for part in clean["PATH"].split(os.pathsep) if ".venv" not in part)
    for round_ in range(2):
        for arguments in order:
            began = time.monotonic()
            done = subprocess.run(["make", *arguments], cwd=checkout, env=clean, capture_output=True, text=True, check=False)
            print(f"round {round_ + 1}: make {arguments[0]}: {time.monotonic() - began:.0f} s")
            assert done.returncode == 0, done.stdout + done.stderr
            assert ("I do not know" if arguments is DEMO else "passed") in done.stdout
    assert (checkout / ".venv" / ".ready").is_file()
