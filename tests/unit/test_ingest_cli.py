"""The verbs of documents, run as a user runs them, with a real encoder that is small."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from encoders import make_tiny_encoder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    from agentops.cli import main

    monkeypatch.setenv("AGENTOPS_PATHS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AGENTOPS_RETRIEVAL_EMBEDDER", str(encoder))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["agentops", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "wing.md").write_text("# Wings\n\n## Lift\n\nLift and drag of a wing in a slipstream.")
    (folder / "bread.txt").write_text("Bread is baked with steam.")
    return folder


def test_ingest_and_search(run: Run, docs: Path) -> None:
    code, out, err = run("ingest", "docs", "--collection", "mine")
    assert (code, out, err) == (0, "mine: 2 files, 2 pieces (2 added)\n", "")
    code, out, err = run("ingest", "docs", "-c", "mine")
    assert (code, out) == (0, "mine: 2 files, 2 pieces (0 added, 2 unchanged)\n")
    code, out, err = run("search", "drag of a wing", "--collection", "mine", "-k", "1")
    assert code == 0
    first, scores, snippet = out.splitlines()
    assert first == "1. wing.md > Wings > Lift"
    assert scores.startswith("   0.0328 (vector #1 ")
    assert "lexical #1 " in scores
    assert snippet.strip() == "Lift and drag of a wing in a slipstream."


def test_json_is_all_that_is_printed(run: Run, docs: Path) -> None:
    (docs / "empty.md").touch()
    code, out, err = run("ingest", "docs", "--json", "-c", "mine")
    report = json.loads(out)
    assert code == 0
    assert (report["files"], report["added"], len(report["problems"])) == (2, 2, 1)
    assert "empty.md" in err
    for mode in ("hybrid", "vector", "lexical"):
        found = json.loads(run("search", "bread", "-c", "mine", "--mode", mode, "--json")[1])
        assert found["mode"] == mode
        best = found["hits"][0]
        assert best["rank"] == 1
        assert (best["vector"] is None) == (mode == "lexical")
        assert (best["lexical"] is None) == (mode == "vector")
    assert best["metadata"]["source"] == "bread.txt"
    listed = json.loads(run("collections", "--json")[1])
    assert [(one["name"], one["documents"], one["embedder"], one["dimensions"]) for one in listed] == [("mine", 2, "tiny", 32)]


def test_bad_files_are_listed_and_only_nothing_at_all_is_a_failure(run: Run, docs: Path) -> None:
    (docs / "bad.md").write_bytes(b"\0\1\2\3")
    (docs / "picture.png").touch()
    (docs / ".hidden").touch()
    code, out, err = run("ingest", "docs", "nowhere")
    assert code == 0
    assert out == "default: 2 files, 2 pieces (2 added)\n"
    assert f"not read: {docs / 'bad.md'}: it is not text" in err
    assert "not read: nowhere: no such file or folder" in err
    assert "passed over: 1 hidden, 1 of another kind" in err
    code, out, err = run("ingest", "docs/bad.md")
    assert (code, out) == (1, "")
    assert "not read:" in err
    assert "error: none of 1 could be read" in err


def test_terminal_controls_in_documents_names_and_questions_are_not_printed(run: Run, docs: Path) -> None:
    evil = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\u202ewing"
    (docs / f"{evil}.md").write_text(f"# Lift {evil}\n\nThe wing {evil} has lift. " * 3)
    (docs / f"{evil}.txt").write_bytes(b"\0\1")
    outputs = [
        run("ingest", "docs"),
        run("search", f"lift wing {evil}"),
        run("collections"),
        run("search", "x", "-c", "no\x1b[2J"),
    ]
    for code, out, _ in outputs:
        assert code in (0, 1)
        for control in ("\x1b", "\x07", "\u202e"):
            assert control not in out
    assert "\x1b" not in outputs[0][2]


def test_collections_are_listed_and_dropped(run: Run, docs: Path) -> None:
    code, out, _ = run("collections")
    assert (code, out) == (0, "no collections yet; make one with: agentops ingest PATH --collection NAME\n")
    run("ingest", "docs", "-c", "mine")
    run("ingest", "docs/wing.md", "-c", "other")
    out = run("collections")[1]
    assert [line.split()[:2] for line in out.splitlines()] == [["collection", "documents"], ["mine", "2"], ["other", "1"]]
    code, _, err = run("collections", "--drop", "mine")
    assert code == 2
    assert "--yes" in err
    code, out, err = run("collections", "--drop", "mine", "--yes")
    assert code == 0
    assert "mine" not in out
    code, _, err = run("search", "wing", "-c", "mine")
    assert code == 1
    assert "there are: other" in err
    code, _, err = run("collections", "--drop", "mine", "-y")
    assert code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("search", "  "), "the query is empty"),
        (("search", "x", "--mode", "magic"), "one of: hybrid, vector, lexical"),
        (("search", "x", "-k", "0"), "retrieval.k"),
        (("ingest", "docs", "--chunk-tokens", "3"), "retrieval.chunk_tokens"),
        (("ingest", "docs", "--chunk-tokens", "20", "--overlap-tokens", "20"), "share more"),
        (("ingest", "nowhere", "neither"), "no such file or folder: nowhere, neither"),
        (("ingest",), "PATH"),
    ],
)
def test_a_call_that_is_off(run: Run, docs: Path, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_an_embedder_that_is_none(run: Run, docs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = run("ingest", "docs", "--embedder", str(tmp_path / "empty"))
    assert code == 1
    assert err.startswith("error: ")
    assert "hint: " in err


def test_another_embedder_is_refused(run: Run, docs: Path, tmp_path: Path) -> None:
    run("ingest", "docs")
    other = make_tiny_encoder(tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    code, _, err = run("search", "wing", "--embedder", str(other))
    assert code == 1
    assert "was made with the embedder tiny" in err
    assert run("search", "wing", "--embedder", str(other), "--mode", "lexical")[0] == 0


def test_searching_by_words_loads_neither_torch_nor_langgraph(run: Run, docs: Path, tmp_path: Path, encoder: Path) -> None:
    run("ingest", "docs")
    code = "import sys; sys.argv = ['agentops', 'search', 'wing', '--mode', 'lexical']; import agentops.cli; agentops.cli.main()"
    probe = f"import sys, contextlib\nwith contextlib.suppress(SystemExit):\n    {code}\n"
    probe += "print(sorted({'torch', 'langgraph', 'langchain_core', 'sqlmodel'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "1. wing.md > Wings > Lift"
    assert done.stdout.splitlines()[-1] == "[]"
