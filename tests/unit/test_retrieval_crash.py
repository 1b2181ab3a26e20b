"""The embedded index when processes are killed, meet each other, or find their files damaged."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from agentops.errors import RetrievalError
from agentops.records import Document, Query, Retrieval, content_hash
from agentops.retrieval.embed import HashEmbedder
from agentops.retrieval.embedded import EmbeddedIndex
from agentops.retrieval.lexical import LexicalError, LexicalIndex
from agentops.sync import run_sync

BATCH = 20

WRITER = """
import sys
from pathlib import Path
from agentops.records import Document, content_hash
from agentops.retrieval.embed import HashEmbedder
from agentops.retrieval.embedded import open_index

folder, mode, turns = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
index = open_index(folder, HashEmbedder(64))
start = max([int(key.split("-")[0]) for key in index.sources("c").get("", [])], default=-1) + 1 if mode == "grow" else 0
if mode != "grow":
    print("ready", flush=True)
for turn in range(start, start + turns):
    texts = {(f"{turn}-{n}" if mode == "grow" else f"d{n}"): f"common turn{turn} place{n}" for n in range(%d)}
    index.upsert("c", [Document(key, text, content_hash(text)) for key, text in texts.items()])
    if mode == "grow" and turn %% 3 == 2:
        print(f"+{turn}", flush=True)
        index.delete("c", [f"{turn - 2}-{n}" for n in range(%d)])
        print(f"-{turn - 2}", flush=True)
    else:
        print(f"+{turn}", flush=True)
""" % (BATCH, BATCH)  # noqa: UP031


def start_writer(folder: Path, mode: str, turns: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), mode, str(turns)], stdout=subprocess.PIPE, text=True)


def open_here(folder: Path, **options: float) -> EmbeddedIndex:
    return EmbeddedIndex(folder, HashEmbedder(64), **options)  # type: ignore[arg-type]


def find(index: EmbeddedIndex, text: str, mode: str = "hybrid", k: int = BATCH) -> Retrieval:
    return run_sync(index.search(Query(text, "c", k, mode)))  # type: ignore[arg-type]


def fill(folder: Path, count: int = 3) -> None:
    texts = [f"hello number{n}" for n in range(count)]
    open_here(folder).upsert("c", [Document(str(n), text, content_hash(text)) for n, text in enumerate(texts)])


def test_killed_in_the_middle_of_writing_it_holds_whole_writes_and_all_acknowledged(tmp_path: Path) -> None:
    random.seed(5)
    folder = tmp_path / "index"
    open_here(folder).upsert("c", [])
    there: set[int] = set()
    for _ in range(4):
        writer = start_writer(folder, "grow", 10_000)
        assert writer.stdout is not None
        lines = [writer.stdout.readline()]
        time.sleep(random.uniform(0.0, 0.4))
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
        writer.wait()
        writer.stdout.close()
        added = {int(line[1:]) for line in lines if line.startswith("+")}
        deleted = {int(line[1:]) for line in lines if line.startswith("-")}

        index = open_here(folder)
        keys = {key for keys in index.sources("c").values() for key in keys}
        whole = Counter(int(key.partition("-")[0]) for key in keys)
        assert set(whole.values()) == {BATCH}, "half of a write is there"
        maybe_deleted = {turn - 2 for turn in added if turn % 3 == 2}
        assert (there | added) - maybe_deleted <= set(whole), "an acknowledged write is lost"
        assert not deleted & set(whole), "what was deleted is back"
        assert set(whole) <= there | added | {max(there | added) + 1}, "something is there that nobody wrote"
        there = set(whole)
        for turn in sorted(whole)[-3:]:
            words = {hit.document.id for hit in find(index, f"turn{turn}", "lexical").hits}
            assert words == {f"{turn}-{n}" for n in range(BATCH)}, "words and documents disagree"
        for mode in ("lexical", "vector"):
            assert {hit.document.id for hit in find(index, "common", mode, k=10_000).hits} == keys
        index.close()
    assert len(there) > 4


def test_a_reader_never_sees_half_of_another_process_write(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    open_here(folder).upsert("c", [Document(f"d{n}", "common turn", "b2:0") for n in range(BATCH)])
    reader = open_here(folder)
    writer = start_writer(folder, "replace", 25)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    seen: list[tuple[int, str]] = []
    while writer.poll() is None or len({text for _, text in seen}) < 2:
        for mode in ("lexical", "hybrid", "vector"):
            found = find(reader, "common", mode)
            assert len(found.hits) == BATCH
            texts = {hit.document.text.split()[1] for hit in found.hits}
            assert len(texts) == 1, "documents of two writes in one answer"
            seen.append((found.generation, texts.pop()))
    writer.stdout.close()
    assert writer.returncode == 0
    generations = [generation for generation, _ in seen]
    assert generations == sorted(generations)
    assert len(set(seen)) == len(set(generations)), "one generation had two contents"
    assert find(reader, "common").hits[0].document.text.split()[1] == "turn24"


def test_two_writers_take_turns(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    writers = [start_writer(folder, "replace", 8) for _ in range(2)]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    index = open_here(folder)
    assert index.collections()[0].documents == BATCH
    assert {hit.document.text.split()[1] for hit in find(index, "common", "lexical").hits} == {"turn7"}


def test_a_writer_that_keeps_its_turn_is_reported_and_reading_goes_on(tmp_path: Path) -> None:
    fill(tmp_path)
    index = open_here(tmp_path, lock_timeout_s=0.1)
    with FileLock(tmp_path / "index.lock"):
        with pytest.raises(RetrievalError, match="another process") as caught:
            index.upsert("c", [Document("x", "new", "b2:0")])
        assert "try again" in caught.value.hint
        assert len(find(index, "hello").hits) == 3
    assert index.upsert("c", [Document("x", "new", "b2:0")]).added == 1


def test_a_locked_database_is_reported(tmp_path: Path) -> None:
    fill(tmp_path)
    other = sqlite3.connect(tmp_path / "documents.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    index = open_here(tmp_path, lock_timeout_s=0.1)
    with pytest.raises(RetrievalError, match="locked") as caught:
        find(index, "hello")
    assert caught.value.hint
    other.execute("ROLLBACK")
    other.close()
    assert len(find(index, "hello").hits) == 3


def test_the_words_are_built_anew_when_they_are_lost_or_damaged(tmp_path: Path) -> None:
    fill(tmp_path)
    words = tmp_path / "lexical"

    def spoil_meta(folder: Path) -> None:
        (folder / "meta.json").write_text("garbage")

    def empty_files(folder: Path) -> None:
        for file in folder.glob("*.term"):
            file.unlink()

    for spoil in (shutil.rmtree, spoil_meta, empty_files):
        (folder,) = words.iterdir()
        spoil(folder)
        assert [hit.document.id for hit in find(open_here(tmp_path), "number1", "lexical").hits] == ["1"]
        assert len(find(open_here(tmp_path), "hello", "lexical").hits) == 3


def test_a_reader_clears_damaged_words_in_its_turn_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    search, clear = LexicalIndex.search, LexicalIndex.clear
    events: list[str] = []

    def broken_once(self: LexicalIndex, *args: Any) -> Any:
        events.append("search")
        if events == ["search"]:
            raise LexicalError("damaged")
        return search(self, *args)

    def watched(self: LexicalIndex) -> None:
        try:
            with FileLock(tmp_path / "index.lock", timeout=0):
                events.append("cleared out of turn")
        except Timeout:
            events.append("cleared in turn")
        clear(self)

    monkeypatch.setattr(LexicalIndex, "search", broken_once)
    monkeypatch.setattr(LexicalIndex, "clear", watched)
    assert [hit.document.id for hit in find(open_here(tmp_path), "number1", "lexical").hits] == ["1"]
    assert "cleared in turn" in events
    assert "cleared out of turn" not in events
    assert events[-1] == "search"


def test_words_from_a_backup_are_not_believed(tmp_path: Path) -> None:
    fill(tmp_path / "index", 3)
    shutil.copytree(tmp_path / "index" / "lexical", tmp_path / "old")
    index = open_here(tmp_path / "index")
    index.delete("c", ["0"])
    index.upsert("c", [Document("9", "hello again", "b2:0")])
    shutil.rmtree(tmp_path / "index" / "lexical")
    shutil.copytree(tmp_path / "old", tmp_path / "index" / "lexical")
    found = find(open_here(tmp_path / "index"), "hello", "lexical")
    assert {hit.document.id for hit in found.hits} == {"1", "2", "9"}


def test_words_of_a_catalogue_that_was_taken_away_are_not_believed(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    (tmp_path / "documents.sqlite").unlink()
    open_here(tmp_path).upsert("c", [Document("x", "penguin", "b2:0")])
    assert [hit.document.id for hit in find(open_here(tmp_path), "penguin", "lexical").hits] == ["x"]
    assert not find(open_here(tmp_path), "hello", "lexical").hits


def test_words_catch_up_with_a_process_that_died_between_its_commits(tmp_path: Path) -> None:
    fill(tmp_path / "index", 3)
    shutil.copytree(tmp_path / "index" / "lexical", tmp_path / "before")
    database = sqlite3.connect(tmp_path / "index" / "documents.sqlite")
    database.execute("UPDATE collection SET generation = generation + 1")
    database.execute("UPDATE document SET generation = generation + 1, text = 'caught up' WHERE id = '1'")
    database.execute("UPDATE counter SET generation = generation + 1")
    database.commit()
    database.close()
    assert [hit.document.id for hit in find(open_here(tmp_path / "index"), "caught", "lexical").hits] == ["1"]


@pytest.mark.parametrize("spoil", ["garbage", "cut"])
def test_a_damaged_database_is_said_with_its_mend(tmp_path: Path, spoil: str) -> None:
    fill(tmp_path, 200)
    file = tmp_path / "documents.sqlite"
    data = file.read_bytes()
    file.write_bytes(b"not a database at all" * 1000 if spoil == "garbage" else data[:8192] + os.urandom(len(data) - 8192))
    with pytest.raises(RetrievalError) as caught:
        find(open_here(tmp_path), "hello", "vector")
    assert "damaged" in str(caught.value)
    assert "ingest the documents again" in caught.value.hint


def test_a_newer_index_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path)
    database = sqlite3.connect(tmp_path / "documents.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(RetrievalError, match="newer version"):
        open_here(tmp_path).collections()
    with pytest.raises(RetrievalError, match="newer version"):
        open_here(tmp_path).upsert("c", [])


def test_a_creation_cut_short_reads_as_empty_and_can_be_finished(tmp_path: Path) -> None:
    (tmp_path / "documents.sqlite").touch()
    assert open_here(tmp_path).collections() == []
    fill(tmp_path)
    assert open_here(tmp_path).collections()[0].documents == 3


def test_reading_makes_nothing(tmp_path: Path) -> None:
    index = open_here(tmp_path / "missing")
    assert index.collections() == []
    with pytest.raises(RetrievalError):
        find(index, "hello")
    with pytest.raises(RetrievalError):
        index.drop("c")
    assert not (tmp_path / "missing").exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RetrievalError) as caught:
        fill(tmp_path / "file")
    assert caught.value.hint


def test_nothing_of_a_dropped_collection_is_left(tmp_path: Path) -> None:
    text = "canary-7f3a words nobody else uses zyxwvutsrq"
    index = open_here(tmp_path)
    fill(tmp_path)
    index.upsert("secret", [Document("canary-7f3a", text, "b2:0", {"source": "canary-7f3a.md"})])

    def raw() -> bytes:
        return b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())

    assert b"canary-7f3a" in raw()
    assert b"zyxwvutsrq" in raw()
    index.drop("secret")
    assert b"canary-7f3a" not in raw()
    assert b"zyxwvutsrq" not in raw()


def test_only_texts_without_a_vector_are_embedded(tmp_path: Path) -> None:
    seen: list[str] = []

    class Counting(HashEmbedder):
        def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            seen.extend(texts)
            return super().embed(texts)

    index = EmbeddedIndex(tmp_path, Counting(64))
    index.upsert("c", [Document("a", "one", "b2:1"), Document("b", "two", "b2:2")])
    index.upsert("c", [Document("a", "one", "b2:1"), Document("b", "one", "b2:1"), Document("z", "two", "b2:2", {"page": 1})])
    index.upsert("c", [Document("a", "three", "b2:3"), Document("b", "three", "b2:3")])
    assert seen == ["one", "two", "three"]


def test_the_bytes_scan_finds_what_the_floats_would(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(400)]
    random.seed(2)
    texts = [" ".join(random.choices(words, k=30)) for _ in range(1500)]
    index = open_here(tmp_path)
    index.upsert("c", [Document(f"{n:04}", text, content_hash(text)) for n, text in enumerate(texts)])
    vectors = HashEmbedder(64).embed(texts)
    for query in ("w1 w2 w3", "w100", texts[7]):
        exact = vectors @ HashEmbedder(64).embed([query])[0]
        best = [f"{n:04}" for n in np.argsort(-exact, kind="stable")[:20]]
        hits = find(index, query, "vector").hits
        assert [hit.document.id for hit in hits] == best
        assert hits[0].score == pytest.approx(float(exact.max()), abs=1e-6)
