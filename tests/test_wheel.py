"""The built wheel, in an empty environment outside the checkout: everything packaged, and the main job done."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UV = Path(sys.executable).with_name("uv")
CONSTRAINTS = ROOT / "constraints.txt"
FIND_DOCS = "from agentops.cli.demo import docs_folder; print(docs_folder())"


def call(*command: str | Path, cwd: Path, environment: dict[str, str], timeout_s: float = 300) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout_s
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    call(UV, "build", "--wheel", "--out-dir", folder, ROOT, cwd=folder, environment=dict(os.environ))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment that holds the wheel and what it asks for, nothing else."""
    folder = tmp_path_factory.mktemp("wheel") / "environment"
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    call(UV, "venv", "--python", sys.executable, folder, cwd=folder.parent, environment=environment)
    python = folder / "bin" / "python"
    call(UV, "pip", "install", "--python", python, "-c", CONSTRAINTS, wheel, cwd=folder.parent, environment=environment)
    return folder / "bin"


def test_everything_in_the_packages_is_in_the_wheel(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "agentops", "graphs", "evals", "tui"],
        capture_output=True, text=True, cwd=ROOT,
    ).stdout.split("\n")  # fmt: skip
    wanted = {name for name in tracked if name} or {
        str(path.relative_to(ROOT))
        for package in ("agentops", "graphs", "evals", "tui")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted - packed == set()
    assert {
        "agentops/py.typed",
        "graphs/py.typed",
        "evals/py.typed",
        "tui/py.typed",
        "graphs/rag.py",
        "agentops/docs/engine.md",
    } <= packed
    assert any(name.startswith("graphs/prompts/") and name.endswith(".md") for name in packed)
    assert any(name.startswith("agentops/store/migrations/") for name in packed)
    strangers = {name.partition("/")[0] for name in packed} - {"agentops", "graphs", "evals", "tui"}
    assert {name.partition("-")[0] for name in strangers} == {"agentops_runtime"}


@pytest.mark.model
def test_the_wheel_answers_from_documents_outside_the_checkout(
    installed: Path, model_folder: Path, embedder_folder: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    environment = {
        "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path / "me"),
        "AGENTOPS_PATHS_HOME": str(tmp_path / "home"),
        "AGENTOPS_PATHS_CACHE": os.environ["AGENTOPS_PATHS_CACHE"],
        "AGENTOPS_ENGINE_THREADS": "2",
    }

    def agentops(*words: str) -> str:
        return call(installed / "agentops", *words, cwd=elsewhere, environment=environment)

    where = call(installed / "python", "-c", "import agentops; print(agentops.__file__)", cwd=elsewhere, environment=environment)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "run" in agentops("--help")
    assert "0 broken" in agentops("doctor")
    docs = call(installed / "python", "-c", FIND_DOCS, cwd=elsewhere, environment=environment).strip()
    assert Path(docs).is_relative_to(installed.parent), "the documentation of the wheel, not of the checkout"
    agentops("ingest", docs, "--collection", "docs")
    answer = agentops("run", "rag", "How many positions does a block of the KV cache hold?", "--collection", "docs")
    assert "16" in answer
    assert "engine.md" in answer
    assert "rag" in agentops("runs")
