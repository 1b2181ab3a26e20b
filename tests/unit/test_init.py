"""A new project works before anything is changed in it, and making one never changes a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agentops.cli.init import QUESTION, make_project
from agentops.errors import UsageError
from agentops.graph import load_graph


def call(*words: str, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_the_test_of_a_new_project_passes_and_its_files_are_clean(tmp_path: Path, environment: dict[str, str]) -> None:
    made = call("agentops", "init", "my library", "--name", "desk", cwd=tmp_path, environment=environment)
    assert made.returncode == 0, made.stderr
    assert f"cd 'my library'\n  agentops run desk \"{QUESTION}\"\n  pytest" in made.stdout
    project = tmp_path / "my library"
    tested = call("pytest", "-q", "-p", "no:cacheprovider", cwd=project, environment=environment)
    assert tested.returncode == 0, tested.stdout
    assert "1 passed" in tested.stdout
    listed = call("agentops", "graphs", cwd=project, environment=environment)
    assert "desk" in listed.stdout
    assert not listed.stderr
    drawn = call("agentops", "graph", "draw", "desk", cwd=project, environment=environment)
    assert "│ look_up │" in drawn.stdout
    ruff = call(
        "ruff",
        "check",
        "--no-cache",
        "--isolated",
        "--select",
        "E,F,I,UP,B",
        "--line-length",
        "130",
        ".",
        cwd=project,
        environment=environment,
    )
    assert ruff.returncode == 0, ruff.stdout
    for file in project.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert "{{name}}" not in file.read_text(encoding="utf-8"), file
            assert "NAME" not in file.name


@pytest.mark.model
def test_a_new_project_runs_on_the_real_model(
    tmp_path: Path, environment: dict[str, str], model_folder: Path, embedder_folder: Path
) -> None:
    assert call("agentops", "init", "library", cwd=tmp_path, environment=environment).returncode == 0
    done = call("agentops", "run", "library", QUESTION, cwd=tmp_path / "library", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "10:00" in done.stdout
    shown = call("agentops", "show", "last", cwd=tmp_path, environment=environment)
    assert "opening_hours tool" in shown.stdout


def test_a_folder_with_files_is_refused_and_none_is_ever_changed(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text("mine = 1\n")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "answer.md").write_text("mine\n")
    with pytest.raises(UsageError, match=r"is not empty: it has prompts, tools\.py") as refused:
        make_project(tmp_path, "desk")
    assert "--force" in refused.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts", "tools.py"]
    made, kept = make_project(tmp_path, "desk", force=True)
    assert set(kept) == {Path("tools.py"), Path("prompts/answer.md")}
    assert Path("desk.py") in made
    assert (tmp_path / "tools.py").read_text() == "mine = 1\n"
    again, all_kept = make_project(tmp_path, "desk", force=True)
    assert not again
    assert set(all_kept) == {*made, *kept}


def test_a_repository_without_files_is_empty(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("mine\n")
    made, kept = make_project(tmp_path, "desk")
    assert kept == [Path(".gitignore")]
    assert Path("desk.py") in made


@pytest.mark.parametrize(
    ("folder", "name"), [("My Agent!", "my_agent"), ("json", "agent"), ("tools", "agent"), ("123", "agent"), ("class", "agent")]
)
def test_the_graph_is_named_after_the_folder_where_that_can_be(
    tmp_path: Path, environment: dict[str, str], folder: str, name: str
) -> None:
    from agentops.cli.init import _from_folder

    assert _from_folder(tmp_path / folder) == name
    make_project(tmp_path / folder, name)
    assert load_graph(f"{tmp_path / folder}/langgraph.json:{name}").name == name
    assert _from_folder(tmp_path / folder) == name, "a second time it is the same"


@pytest.mark.parametrize("name", ["json", "langgraph", "tools", "two words", "../up", "class", "", "test_x"])
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, environment: dict[str, str], name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agentops", "init", "new", "--name", name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "a graph cannot be called" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be made"):
        make_project(tmp_path / "file", "desk")
    with pytest.raises(UsageError, match="cannot be made"):
        make_project(tmp_path / "file" / "below", "desk")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "prompts").write_text("a file where a folder is needed")
    with pytest.raises(UsageError, match="cannot be made"):
        make_project(tmp_path / "new", "desk", force=True)
