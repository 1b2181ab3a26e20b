"""Files become documents, and the collection follows what happens to the files."""

from __future__ import annotations

import os
import random
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agentops.errors import CollectionNotFound, RetrievalError
from agentops.records import Document, Query, content_hash
from agentops.retrieval.embed import HashEmbedder
from agentops.retrieval.embedded import EmbeddedIndex
from agentops.retrieval.ingest import IngestReport, Problem, ingest, make_document
from agentops.sync import run_sync

EMBEDDER = HashEmbedder(64)
GUIDE = """---
title: "The Guide"
---
# Guide

Welcome to the guide.

## Ferry

The ferry leaves at *nine*. It takes `two` hours. See [the table](https://example.org/x).

- first item
- second item

| port | time |
| --- | --- |
| Kiel | 9:00 |

### Return

It returns at ten.

## Food

Bring bread.
"""


@pytest.fixture
def index(tmp_path: Path) -> EmbeddedIndex:
    return EmbeddedIndex(tmp_path / "index", EMBEDDER)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "guide.md").write_text(GUIDE)
    (folder / "notes.txt").write_text("Some notes.\n\nMore notes.")
    (folder / "deep" / "er" / "page.html").write_text("<title>Page</title><h1>Top</h1><p>Hello <b>there</b>.</p>")
    return folder


def read(index: EmbeddedIndex, *paths: Path | str, chunk: int = 60, overlap: int = 10, **options: Any) -> IngestReport:
    counting = EMBEDDER.count_tokens
    return ingest(paths, index, "c", chunk_tokens=chunk, overlap_tokens=overlap, count_tokens=counting, **options)


def stored(index: EmbeddedIndex, text: str = "a") -> list[Document]:
    found = run_sync(index.search(Query(text, "c", 5000, "vector")))
    return sorted((hit.document for hit in found.hits), key=lambda one: (one.metadata["source"], one.metadata.get("start", 0)))


def sources(index: EmbeddedIndex) -> list[str]:
    return list(index.sources("c"))


def test_a_folder_is_read_with_its_kinds_of_files(index: EmbeddedIndex, docs: Path) -> None:
    (docs / ".hidden.md").write_text("hidden")
    (docs / ".git").mkdir()
    (docs / ".git" / "x.md").write_text("hidden")
    (docs / "image.png").write_bytes(b"\x89PNG")
    (docs / "LICENSE").write_text("text of no known kind")
    report = read(index, docs)
    assert (report.files, report.hidden, report.unknown, report.problems) == (3, 2, 2, ())
    assert report.pieces == report.added == index.collections()[0].documents
    assert sources(index) == ["deep/er/page.html", "guide.md", "notes.txt"]
    assert not report.failed


def test_metadata_says_where_a_piece_is_from(index: EmbeddedIndex, docs: Path) -> None:
    read(index, docs / "guide.md")
    pieces = stored(index)
    assert [piece.metadata.get("heading") for piece in pieces] == [
        "Guide",
        "Guide > Ferry",
        "Guide > Ferry > Return",
        "Guide > Food",
    ]
    assert {piece.metadata["title"] for piece in pieces} == {"The Guide"}
    assert {piece.metadata["source"] for piece in pieces} == {"guide.md"}
    ferry = pieces[1].text
    assert ferry.startswith("The ferry leaves at nine. It takes `two` hours. See the table.")
    assert "- first item\n- second item" in ferry
    assert "| Kiel | 9:00 |" in ferry
    assert "Return" not in ferry
    assert all(piece.hash == content_hash(piece.text) for piece in pieces)


def test_a_heading_is_searched_though_it_is_not_in_the_piece(index: EmbeddedIndex, docs: Path) -> None:
    read(index, docs)
    hit = run_sync(index.search(Query("food", "c", 1, "lexical"))).hits[0]
    assert hit.document.text == "Bring bread."


@pytest.mark.parametrize("chunk", [16, 40, 200])
def test_pieces_are_stretches_of_the_text_of_the_size_asked_for(index: EmbeddedIndex, tmp_path: Path, chunk: int) -> None:
    random.seed(1)
    words = [f"{random.choice(['alpha', 'beta', 'gamma'])}{n}" for n in range(1500)]
    text = "".join(word + random.choice([" ", " ", " ", ". ", ".\n", "\n", ".\n\n"]).replace(". ", ". A ") for word in words)
    (tmp_path / "long.txt").write_text(text)
    read(index, tmp_path / "long.txt", chunk=chunk, overlap=chunk // 4)
    pieces = stored(index)
    parsed = "\n\n".join(block.strip("\n").rstrip() for block in text.split("\n\n"))
    covered = 0
    for piece in pieces:
        start, end = int(piece.metadata["start"]), int(piece.metadata["end"])
        assert parsed[start:end] == piece.text
        assert EMBEDDER.count_tokens(piece.text) <= chunk
        assert not parsed[covered:start].strip(), "words were lost between two pieces"
        covered = max(covered, end)
    assert not parsed[covered:].strip()
    shared = sum(int(a.metadata["end"]) > int(b.metadata["start"]) for a, b in pairwise(pieces))
    assert shared > len(pieces) / 8, "neighbours share nothing"
    if chunk == 40:
        whole = sum(piece.text.rstrip()[-1] == "." for piece in pieces)
        assert whole > 0.8 * len(pieces), "pieces should end where sentences do"


def test_a_word_without_end_is_cut(index: EmbeddedIndex, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("é" * 10_000)
    counting = ingest([tmp_path / "x.txt"], index, "c", chunk_tokens=300, overlap_tokens=0, count_tokens=len)
    assert counting.pieces >= 10_000 / 300
    assert {piece.text for piece in stored(index)} <= {"é" * n for n in range(1, 301)}


def test_the_second_time_nothing_is_embedded_and_nothing_changes(
    index: EmbeddedIndex, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(index, docs)
    before = index.collections()
    monkeypatch.setattr(HashEmbedder, "embed", lambda self, texts: pytest.fail("embedded again"))
    monkeypatch.chdir(docs)
    for same in (docs, Path(), "../docs", docs / "deep" / "..", docs / "guide.md", "deep/er", "deep/er/page.html"):
        again = read(index, same)
        assert (again.added, again.updated, again.removed) == (0, 0, 0), same
        assert index.collections() == before
    assert read(index, docs).unchanged == first.pieces


def test_a_changed_file_replaces_its_pieces(index: EmbeddedIndex, docs: Path) -> None:
    read(index, docs)
    (docs / "guide.md").write_text("# Guide\n\nAll new.")
    report = read(index, docs)
    assert (report.updated, report.added, report.removed) == (1, 0, 3)
    assert [piece.text for piece in stored(index) if piece.metadata["source"] == "guide.md"] == ["All new."]
    (docs / "guide.md").write_text("# Guide\n\nAll new.\n\n## And\n\nMore.")
    assert read(index, docs / "guide.md").added == 1


def test_text_put_before_is_not_embedded_again(index: EmbeddedIndex, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(index, docs)
    (docs / "guide.md").write_text(GUIDE.replace("# Guide", "# Guide\n\n## Before\n\nNew first part.\n\n## Guide", 1))
    texts: list[str] = []
    embed = HashEmbedder.embed

    def noting(self: HashEmbedder, given: list[str]) -> Any:
        texts.extend(given)
        return embed(self, given)

    monkeypatch.setattr(HashEmbedder, "embed", noting)
    read(index, docs / "guide.md")
    assert any("New first part." in text for text in texts)
    assert not any("Bring bread." in text for text in texts)


def test_removed_files_leave_and_only_those_below_the_folder(index: EmbeddedIndex, docs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("Notes of the same name elsewhere.")
    (tmp_path / "single.txt").write_text("A single file.")
    index.upsert("c", [make_document("by-hand", "Put in by hand.", {"source": "guide.md"})])
    read(index, docs, other, tmp_path / "single.txt")
    assert len(index.sources("c")["notes.txt"]) == 2, "two files of one name are two"
    (docs / "notes.txt").unlink()
    (docs / "guide.md").unlink()
    shutil.rmtree(docs / "deep")
    report = read(index, docs)
    assert report.files == 0
    assert report.removed == 6
    assert not report.failed
    assert {piece.text for piece in stored(index) if piece.metadata["source"] == "notes.txt"} == {
        "Notes of the same name elsewhere."
    }
    assert index.sources("c")["guide.md"] == ["by-hand"]
    assert "single.txt" in sources(index)


def test_files_and_folders_may_overlap_in_any_order(index: EmbeddedIndex, docs: Path) -> None:
    page = docs / "deep" / "er" / "page.html"
    for paths in ([page], [docs / "deep"], [docs], [docs / "deep"], [page], [page, docs, docs / "deep"]):
        read(index, *paths)
        texts = [piece.text for piece in stored(index)]
        assert texts.count("Hello there.") == 1, paths
    assert sources(index) == ["deep/er/page.html", "guide.md", "notes.txt"]
    page.unlink()
    read(index, docs / "deep")
    assert sources(index) == ["guide.md", "notes.txt"]


def test_one_bad_file_does_not_keep_the_others_out(index: EmbeddedIndex, docs: Path) -> None:
    random.seed(3)
    (docs / "garbage.md").write_bytes(random.randbytes(4096))
    (docs / "empty.md").touch()
    (docs / "blank.html").write_text("<html><script>only(code)</script></html>")
    (docs / "broken.pdf").write_bytes(b"%PDF-1.7\nnothing")
    (docs / "dangling.md").symlink_to(docs / "nowhere.md")
    os.mkfifo(docs / "pipe.txt")
    (docs / "folder.md").mkdir()
    (docs / "folder.md" / "inner.md").write_text("Inner.")
    report = read(index, docs)
    assert report.files == 4
    assert "folder.md/inner.md" in sources(index)
    reasons = {Path(problem.path).name: problem.reason for problem in report.problems}
    assert set(reasons) == {"garbage.md", "empty.md", "blank.html", "broken.pdf", "dangling.md", "pipe.txt"}
    assert reasons["garbage.md"] == "it is not text"
    assert reasons["empty.md"] == "it holds no text"
    assert "damaged" in reasons["broken.pdf"]
    assert not report.failed


def test_a_file_that_cannot_be_read_any_more_keeps_what_was_known_of_it(index: EmbeddedIndex, docs: Path) -> None:
    read(index, docs)
    (docs / "notes.txt").write_bytes(b"\0\1\2" * 100)
    report = read(index, docs)
    assert report.problems == (Problem(str(docs / "notes.txt"), "it is not text"),)
    assert report.removed == 0
    assert "notes.txt" in sources(index)


def test_a_folder_that_cannot_be_read_any_more_keeps_what_was_known_of_it(
    index: EmbeddedIndex, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(index, docs)
    before = index.sources("c")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path) == docs / "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    (docs / "guide.md").unlink()
    report = read(index, docs)
    assert [Path(problem.path) for problem in report.problems] == [docs / "deep"]
    kept = {source: keys for source, keys in before.items() if source.startswith("deep/")}
    assert kept
    assert {source: keys for source, keys in index.sources("c").items() if source.startswith("deep/")} == kept
    assert "guide.md" not in index.sources("c")


def test_paths_that_are_not_there(index: EmbeddedIndex, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    report = read(index, tmp_path / "nowhere", tmp_path / "loop")
    assert report.failed
    assert [problem.reason for problem in report.problems] == ["no such file or folder", "a link to nowhere, or to itself"]
    with pytest.raises(CollectionNotFound):
        index.sources("c")


def test_linked_folders_are_not_entered(index: EmbeddedIndex, docs: Path, tmp_path: Path) -> None:
    (docs / "deep" / "loop").symlink_to(docs)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.md").write_text("outside")
    (docs / "out").symlink_to(outside)
    report = read(index, docs)
    assert report.files == 3
    assert report.unknown == 2


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system refuses such names")
def test_hostile_file_names(index: EmbeddedIndex, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    folder = os.fsencode(tmp_path / "docs")
    names = [
        b"\xff\xfe.md",
        b"a\nb.md",
        b"\x1b[2J.md",
        b"-rf.md",
        b"'; DROP TABLE document;--.md",
        b"\xe2\x80\xae.md",
        b"$(x).md",
    ]
    names += [b" .md", b"%s{0}.md", b"CON.md", b"a\\b.md", b"x" * 250 + b".md"]
    for number, name in enumerate(names):
        with open(os.path.join(folder, name), "w") as file:  # noqa: PTH118, PTH123
            file.write(f"content {number}")
    report = read(index, tmp_path / "docs")
    assert (report.files, report.problems) == (len(names), ())
    assert len(index.sources("c")) == len(names)
    assert read(index, tmp_path / "docs").unchanged == len(names)


def test_a_file_named_itself_is_read_whatever_its_kind(index: EmbeddedIndex, tmp_path: Path) -> None:
    (tmp_path / ".notes").write_text("Hidden and of no kind.")
    (tmp_path / "script.py").write_text("print('hello')")
    (tmp_path / "image.bin").write_bytes(b"\0" * 100)
    report = read(index, tmp_path / ".notes", tmp_path / "script.py", tmp_path / "image.bin")
    assert report.files == 2
    assert [problem.reason for problem in report.problems] == ["it is not text"]


def test_progress_goes_from_nothing_to_all(index: EmbeddedIndex, docs: Path) -> None:
    (docs / "long.txt").write_text("\n\n".join(f"Paragraph {n} of many words that fill it up." for n in range(900)))
    shares: list[tuple[float, str]] = []
    read(index, docs, chunk=16, overlap=0, progress=lambda share, source: shares.append((share, source)))
    assert [share for share, _ in shares] == sorted(share for share, _ in shares)
    assert shares[0][0] == 0
    assert shares[-1] == (1.0, "")
    assert sum(source == "long.txt" for _, source in shares) > 3


def test_killed_between_two_batches_the_next_time_finishes(
    index: EmbeddedIndex, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "long.txt").write_text("\n\n".join(f"Paragraph {n} of many words that fill it up." for n in range(500)))
    upsert, calls = EmbeddedIndex.upsert, []

    def stops(self: EmbeddedIndex, *args: Any) -> Any:
        calls.append(args)
        if len(calls) > 2:
            raise RetrievalError("no space is left")
        return upsert(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedIndex, "upsert", stops)
        with pytest.raises(RetrievalError):
            read(index, docs, chunk=16)
    assert index.collections()[0].documents == 128
    report = read(index, docs, chunk=16)
    assert report.unchanged == 128
    assert index.collections()[0].documents == report.pieces


def test_documents_can_be_made_by_hand(index: EmbeddedIndex) -> None:
    index.upsert("c", [make_document("1", "A wing in a slipstream.", {"title": "Experimental investigation"})])
    hit = run_sync(index.search(Query("investigation", "c", 1, "lexical"))).hits[0]
    assert hit.document.hash == content_hash("A wing in a slipstream.")


def test_the_index_is_its_owners_alone(tmp_path: Path, docs: Path) -> None:
    index = EmbeddedIndex(tmp_path / "home" / "index", EMBEDDER)
    old_umask = os.umask(0o022)
    try:
        read(index, docs)
    finally:
        os.umask(old_umask)
        index.close()
    assert {(tmp_path / "home" / name).stat().st_mode & 0o777 for name in ("", "index")} == {0o700}
