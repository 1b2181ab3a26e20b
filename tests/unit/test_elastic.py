"""The index on a real server: when processes are killed, meet each other, or find what was left behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cranfield import ndcg, read_documents, read_questions
from elasticsearch_server import SHORT_LIVED, Server, ServerError, missing, start
from numpy.typing import NDArray

from agentops.errors import CollectionNotFound, RetrievalError, RetrieverUnavailable
from agentops.records import Document, Query, Retrieval, content_hash
from agentops.retrieval import Change, Embedder, Index
from agentops.retrieval import elastic as elastic_module
from agentops.retrieval.cluster import Conflict
from agentops.retrieval.elastic import ElasticIndex, open_index
from agentops.retrieval.embed import HashEmbedder, open_embedder
from agentops.retrieval.embedded import open_index as open_embedded
from agentops.settings import Settings, load_settings
from agentops.sync import run_sync

BATCH = 20

WRITER = """
import sys
from agentops.records import Document, content_hash
from agentops.retrieval.elastic import open_index
from agentops.retrieval.embed import HashEmbedder
from agentops.settings import load_settings

url, prefix, first, turns = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
index = open_index(load_settings({"elasticsearch.url": url, "elasticsearch.prefix": prefix}), HashEmbedder(16))
for turn in range(first, first + turns):
    texts = {f"{turn}-{n}": f"common turn{turn} place{n}" for n in range(%d)}
    index.upsert("c", [Document(key, text, content_hash(text)) for key, text in texts.items()])
    print(turn, flush=True)
    if turn %% 3 == 2:
        index.delete("c", [f"{turn - 2}-{n}" for n in range(%d)])
        print(-(turn - 2), flush=True)
""" % (BATCH, BATCH)  # noqa: UP031


def documents(*texts: str, **metadata: str) -> list[Document]:
    return [Document(str(n), text, content_hash(text), metadata) for n, text in enumerate(texts)]


def find(index: Index, text: str, mode: str = "hybrid", k: int = 8, collection: str = "c") -> Retrieval:
    return run_sync(index.search(Query(text, collection, k, mode)))  # type: ignore[arg-type]


def ids(found: Retrieval) -> list[str]:
    return [hit.document.id for hit in found.hits]


@pytest.fixture
def index(elastic_settings: Settings) -> ElasticIndex:
    return open_index(elastic_settings, HashEmbedder(16))


def on_server(index: ElasticIndex, path: str) -> list[str]:
    """Names of the indices, or ids of documents in one, that the server has."""
    if path:
        index._cluster.ask(lambda client: client.indices.refresh(index=path))
        found = index._cluster.ask(lambda client: client.search(index=path, size=1000, source=False))
        return sorted(hit["_id"] for hit in found["hits"]["hits"])
    return sorted(name["index"] for name in index._cluster.ask(lambda client: client.cat.indices(format="json")))


# -- whole writes


def test_killed_in_the_middle_of_writing_it_holds_whole_writes_and_all_acknowledged(elastic_settings: Settings) -> None:
    random.seed(5)
    index = open_index(elastic_settings, HashEmbedder(16))
    index.upsert("c", [])
    wanted = elastic_settings.elasticsearch
    said: set[int] = set()
    first = 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, wanted.url, wanted.prefix, str(first), "1000"]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        said.add(int(writer.stdout.readline()))
        time.sleep(random.uniform(0.05, 1.0))
        os.kill(writer.pid, signal.SIGKILL)
        said |= {int(line) for line in writer.stdout.read().split()}
        writer.wait()
        writer.stdout.close()
        held = Counter(key.partition("-")[0] for key in index.sources("c").get("", []))
        assert set(held.values()) == {BATCH}, "half of a write is seen"
        turns = {int(turn) for turn in held}
        added, removed = {turn for turn in said if turn > 0}, {-turn for turn in said if turn < 0}
        unsaid = added - removed - turns
        assert unsaid <= {max(added) - 2}, "an acknowledged write is gone"
        assert not turns & removed
        # Killed between a removal and the word of it.
        said |= {-turn for turn in unsaid}
        assert index.collections()[0].documents == BATCH * len(turns) == len(find(index, "common", "lexical", k=10_000).hits)
        first = max(turns) + 1
    index.upsert("c", documents("the next write tidies up"))
    (alias,) = (state.index for state in index._states.all())
    assert len(on_server(index, alias)) == index.collections()[0].documents


def test_a_reader_beside_writers_sees_whole_writes_only(elastic_settings: Settings) -> None:
    """Two indices write the same documents with their own words, as two processes would; one reads."""
    writers = [open_index(elastic_settings, HashEmbedder(16)) for _ in range(2)]
    reader = open_index(elastic_settings, HashEmbedder(16))
    reader.upsert("c", [Document(str(n), f"common start {n}", "b2:0") for n in range(BATCH)])
    failures: list[BaseException] = []

    def write(name: int, index: ElasticIndex) -> None:
        try:
            for turn in range(4):
                word = f"writer{name}turn{turn}"
                index.upsert("c", [Document(str(n), f"common {word} {n}", f"b2:{word}") for n in range(BATCH)])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=pair) for pair in enumerate(writers)]
    for thread in threads:
        thread.start()
    generations, read = [0], 0
    while any(thread.is_alive() for thread in threads):
        found = find(reader, "common", "hybrid" if read % 2 else "lexical", k=BATCH)
        assert len(found.hits) == BATCH
        assert len({hit.document.text.split()[1] for hit in found.hits}) == 1, "two writes are seen at once"
        generations.append(found.generation)
        read += 1
    assert not failures
    assert generations == sorted(generations)
    assert read > 3
    assert reader.collections()[0].documents == BATCH


def test_two_processes_that_write_lose_nothing(elastic_settings: Settings) -> None:
    wanted = elastic_settings.elasticsearch
    commands = [[sys.executable, "-c", WRITER, wanted.url, wanted.prefix, str(first), "2"] for first in (100, 200)]
    writers = [subprocess.Popen(command) for command in commands]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    held = Counter(key.partition("-")[0] for key in open_index(elastic_settings, HashEmbedder(16)).sources("c")[""])
    assert held == {"100": BATCH, "101": BATCH, "200": BATCH, "201": BATCH}


def test_a_writer_that_others_overtook_does_its_work_again(index: ElasticIndex, elastic_settings: Settings) -> None:
    index.upsert("c", documents("zero", "one"))
    other = open_index(elastic_settings, HashEmbedder(16))
    write, interfered = index._cluster.write, []

    def interfere(actions: Any) -> None:
        write(actions)
        if not interfered:
            interfered.append(other.upsert("c", [Document("1", "from another", "b2:1"), Document("9", "new", "b2:9")]))

    index._cluster.write = interfere  # type: ignore[method-assign]
    assert index.upsert("c", [Document("1", "mine", "b2:2"), Document("9", "new", "b2:9")]) == Change(updated=1, unchanged=1)
    assert interfered == [Change(added=1, updated=1)]
    assert {hit.document.id: hit.document.text for hit in find(other, "x", "vector").hits} == {
        "0": "zero",
        "1": "mine",
        "9": "new",
    }
    (state,) = index._states.all()
    assert len(on_server(index, state.index)) == state.documents == 3


def test_what_a_dead_writer_left_is_never_seen(index: ElasticIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index.upsert("c", documents("zero", "one"))

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(index, "_commit", die)
        with pytest.raises(KeyboardInterrupt):
            index.upsert("c", [Document("0", "half of it", "b2:0"), Document("7", "half of it", "b2:7")])
    for _ in range(2):
        assert find(index, "half", "lexical").hits == ()
        assert sorted(ids(find(index, "half of it", "vector"))) == ["0", "1"]
        assert index.sources("c") == {"": ["0", "1"]}
        index.upsert("c", [Document("2", "two", "b2:2")])
        index.delete("c", ["2"])
    (state,) = index._states.all()
    assert len(on_server(index, state.index)) == 2, "the next writer clears it away"


def test_a_write_that_is_done_is_done_where_tidying_fails(index: ElasticIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index.upsert("c", documents("zero", "one"))

    def gone(_: Any) -> None:
        raise RetrieverUnavailable("gone")

    with monkeypatch.context() as patched:
        patched.setattr(index, "_tidy", gone)
        assert index.upsert("c", [Document("0", "zero anew", "b2:0")]) == Change(updated=1)
        assert index.delete("c", ["1"]) == Change(removed=1)
    (state,) = index._states.all()
    assert len(on_server(index, state.index)) == 3
    for mode in ("hybrid", "vector", "lexical"):
        assert [hit.document.text for hit in find(index, "zero one", mode).hits] == ["zero anew"]
    assert index.upsert("c", [Document("0", "zero at last", "b2:1")]) == Change(updated=1)
    assert len(on_server(index, state.index)) == 1


def test_a_search_that_a_write_passes_is_done_again(index: ElasticIndex, elastic_settings: Settings) -> None:
    index.upsert("c", documents("fox zero", "fox one"))
    other = open_index(elastic_settings, HashEmbedder(16))
    ranked, passed = other._ranked, []

    def overtaken(*arguments: Any) -> Any:
        hits = ranked(*arguments)
        if len(passed) < 2:
            passed.append(index.upsert("c", [Document("0", f"fox anew {len(passed)}", f"b2:{len(passed)}")]))
        return hits

    other._ranked = overtaken  # type: ignore[method-assign]
    found = find(other, "fox", "lexical")
    assert len(passed) == 2
    assert {hit.document.text for hit in found.hits} == {"fox one", "fox anew 1"}
    assert found.generation == index.collections()[0].generation


# -- collections


def test_a_removal_that_a_dead_process_began_is_ended(index: ElasticIndex) -> None:
    index.upsert("c", documents("zero"))
    (state,) = index._states.all()
    index._states.store(replace(state, dropped=True))
    assert index.collections() == []
    with pytest.raises(CollectionNotFound):
        find(index, "zero")
    with pytest.raises(CollectionNotFound):
        index.sources("c")
    assert index.upsert("c", documents("new")) == Change(added=1)
    assert find(index, "zero new", "lexical").generation > state.generation
    assert not [name for name in on_server(index, "") if name.startswith(state.index)]


def test_a_write_to_what_was_dropped_meanwhile_makes_it_anew(index: ElasticIndex, elastic_settings: Settings) -> None:
    index.upsert("c", documents("zero"))
    (state,) = index._states.all()
    other, dropped = open_index(elastic_settings, HashEmbedder(16)), []
    refresh = index._refresh

    def drop_first(name: str) -> None:
        if not dropped:
            dropped.append(other.drop("c"))
        refresh(name)

    index._refresh = drop_first  # type: ignore[method-assign]
    assert index.upsert("c", documents("zero", "one")) == Change(added=2)
    assert index.sources("c") == {"": ["0", "1"]}
    assert not [name for name in on_server(index, "") if name.startswith(f"{state.index}-")]


def test_names_reach_nothing_but_their_own(index: ElasticIndex, elastic_settings: Settings) -> None:
    names = ["*", f"{elastic_settings.elasticsearch.prefix}-*", "-c,d", "ünï 東京", "C", "c"]
    for name in names:
        index.upsert(name, documents(f"only in {name}"))
    prefix = re.escape(elastic_settings.elasticsearch.prefix)
    mine = [name for name in on_server(index, "") if name.startswith(elastic_settings.elasticsearch.prefix)]
    assert len(mine) == len(names) + 1
    assert all(re.fullmatch(rf"{prefix}-(collections|[0-9a-f]{{24}}-\d+-documents)", name) for name in mine)
    index.drop("*")
    index.drop(names[1])
    assert [one.name for one in index.collections()] == sorted(names[2:])
    for name in names[2:]:
        assert [hit.document.text for hit in find(index, "only", collection=name).hits] == [f"only in {name}"]
    elsewhere = replace(elastic_settings.elasticsearch, prefix=f"{elastic_settings.elasticsearch.prefix}-2")
    assert open_index(replace(elastic_settings, elasticsearch=elsewhere), HashEmbedder(16)).collections() == []


def test_an_index_that_somebody_took_away_is_missed(index: ElasticIndex) -> None:
    index.upsert("c", documents("zero"))
    (state,) = index._states.all()
    index._cluster.ask(lambda client: client.indices.delete(index=f"{state.index}-documents"))
    for call in (lambda: find(index, "zero"), lambda: index.upsert("c", documents("one"))):
        with pytest.raises(RetrievalError, match="no longer on the server") as caught:
            call()
        assert "--drop" in caught.value.hint
    index.drop("c")
    assert index.upsert("c", documents("zero")) == Change(added=1)


def test_two_that_make_one_collection_share_it(elastic_settings: Settings) -> None:
    indices = [open_index(elastic_settings, HashEmbedder(16)) for _ in range(4)]
    changes: list[Change] = []

    def write(n: int) -> None:
        changes.append(indices[n].upsert("c", [Document(str(n), f"text {n}", f"b2:{n}")]))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert changes == [Change(added=1)] * 4
    assert indices[0].sources("c") == {"": ["0", "1", "2", "3"]}


def test_sources_are_read_page_by_page(index: ElasticIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_module, "_PAGE", 7)
    monkeypatch.setattr(elastic_module, "_LOOKUPS", 5)
    texts = [f"text {n}" for n in range(28)]
    assert index.upsert("c", documents(*texts, source="a.md")) == Change(added=28)
    assert index.upsert("c", documents(*texts, source="a.md")) == Change(unchanged=28)
    assert sorted(index.sources("c")["a.md"], key=int) == [str(n) for n in range(28)]
    assert index.delete("c", [str(n) for n in range(20)]) == Change(removed=20)


# -- what is embedded


class Counting(HashEmbedder):
    """Remembers which texts it was given."""

    def __init__(self) -> None:
        super().__init__(16)
        self.texts: list[str] = []

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts += texts
        return super().embed(texts)


def test_only_texts_that_are_new_are_embedded(elastic_settings: Settings) -> None:
    embedder = Counting()
    index = open_index(elastic_settings, embedder)
    index.upsert("c", documents("one", "two", "one"))
    assert embedder.texts == ["one", "two"]
    before = {hit.document.id: hit.score for hit in find(index, "one", "vector").hits}
    embedder.texts.clear()
    index.upsert("c", documents("one", "two", "one", source="moved.md"))
    index.upsert("c", [Document("copy", "two", content_hash("two"))])
    index.upsert("c", documents("one", "two", "three", source="moved.md"))
    assert embedder.texts == ["three"]
    after = {hit.document.id: hit.score for hit in find(index, "one", "vector").hits}
    assert after["0"] == pytest.approx(1.0, abs=1e-6)
    assert after["copy"] == pytest.approx(before["1"], abs=1e-6)


# -- as good as the embedded index


class Remembering:
    """An embedder that embeds each text once."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder, self._known = embedder, dict[str, NDArray[np.float32]]()
        self.name, self.revision, self.dimensions = embedder.name, embedder.revision, embedder.dimensions
        self.count_tokens = embedder.count_tokens

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def test_words_rank_the_same_documents_alike(elastic_settings: Settings, shared_data: Path, tmp_path: Path) -> None:
    abstracts = read_documents(shared_data / "cranfield", last=400)
    both = open_embedded(tmp_path, HashEmbedder(16)), open_index(elastic_settings, HashEmbedder(16))
    for index in both:
        index.upsert("c", abstracts)
    alike: list[bool] = []
    for question, _ in read_questions(shared_data / "cranfield")[::3]:
        here, there = ({hit.document.id: hit.score for hit in find(index, question, "lexical", k=50).hits} for index in both)
        shared = sorted(here.keys() & there.keys())
        assert len(shared) >= len(here) - 1
        # The embedded index counts a document more, which holds its generation: only documents that are as good change places.
        assert [there[key] for key in shared] == pytest.approx([here[key] for key in shared], rel=0.005), question
        assert [here[key] for key in list(there)[:20]] == pytest.approx(list(here.values())[:20], rel=0.005), question
        alike.append(list(here)[:10] == list(there)[:10])
    assert sum(alike) > 0.9 * len(alike)


@pytest.mark.model
def test_both_find_as_well(elastic_settings: Settings, embedder_folder: Path, shared_data: Path, tmp_path: Path) -> None:
    embedder = Remembering(open_embedder(embedder_folder))
    abstracts = read_documents(shared_data / "cranfield", last=200)
    there = {document.id for document in abstracts}
    questions = [(text, gains) for text, gains in read_questions(shared_data / "cranfield") if len(there & set(gains)) > 3]
    both = open_embedded(tmp_path, embedder), open_index(elastic_settings, embedder)
    for index in both:
        index.upsert("c", abstracts)
    for mode in ("vector", "hybrid"):
        means = []
        for index in both:
            found = [ids(find(index, text, mode, k=10)) for text, _ in questions]
            kept = [{key: gain for key, gain in gains.items() if key in there} for _, gains in questions]
            means.append(sum(map(ndcg, found, kept)) / len(found))
        assert means[0] == pytest.approx(means[1], abs=0.01), mode
        assert means[0] > 0.4


# -- servers of their own


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Starts servers that a test may harm."""
    import tempfile

    if why := missing():
        from conftest import NO_ELASTICSEARCH

        pytest.skip(f"{NO_ELASTICSEARCH}: {why}")
    folders: list[Path] = []
    servers: list[Server] = []

    def make(**options: Any) -> Server:
        folders.append(Path(tempfile.mkdtemp(prefix="agentops elasticsearch ")))
        servers.append(start(folders[-1], java_options=SHORT_LIVED, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def settings_of(server: Server, **more: Any) -> Settings:
    return load_settings({"retrieval.retriever": "elasticsearch", "elasticsearch.url": server.url, **more}, environment={})


@pytest.mark.long
def test_a_server_that_dies_in_the_middle(own_server: Any) -> None:
    server = own_server()
    index = open_index(settings_of(server, **{"elasticsearch.timeout_s": 5.0}), HashEmbedder(16))
    index.upsert("c", [Document(str(n), f"common {n}", f"b2:{n}") for n in range(BATCH)])
    ended: dict[str, tuple[float, BaseException]] = {}
    killed = threading.Event()

    def until_it_fails(name: str, call: Any) -> None:
        turn = 0
        try:
            while True:
                turn += 1
                call(turn)
        except BaseException as error:
            killed.wait(60)
            ended[name] = time.monotonic(), error

    def ingest(turn: int) -> None:
        index.upsert("c", [Document(str(n), f"common {turn} {n}", f"b2:{turn}-{n}") for n in range(BATCH)])

    work = {"search": lambda _: find(index, "common", k=BATCH), "ingest": ingest}
    threads = [threading.Thread(target=until_it_fails, args=pair) for pair in work.items()]
    for thread in threads:
        thread.start()
    time.sleep(3)
    server.kill()
    at = time.monotonic()
    killed.set()
    for thread in threads:
        thread.join(timeout=30)
    for name in work:
        when, error = ended[name]
        assert isinstance(error, RetrieverUnavailable), f"{name}: {error!r}"
        assert when - at < 7
    again = start(Path(server.folder), int(server.url.rpartition(":")[2]), java_options=SHORT_LIVED)
    try:
        found = find(index, "common", "lexical", k=1000)
        assert len(found.hits) == BATCH
        words = {hit.document.text.split()[1] for hit in found.hits}
        assert len(words) == 1 or found.generation == 1, "half of a write survived"
        ingest(10_000)
        assert {hit.document.text.split()[1] for hit in find(index, "common", k=BATCH).hits} == {"10000"}
        (state,) = index._states.all()
        assert len(on_server(index, state.index)) == BATCH
    finally:
        again.stop()


ROLES = """
writer:
  indices:
    - names: ["agentops-*"]
      privileges: ["all"]
reader:
  indices:
    - names: ["agentops-*"]
      privileges: ["read"]
"""


@pytest.mark.long
def test_users_and_their_rights(own_server: Any, tmp_path: Path) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=test"
    subprocess.run([*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=tmp_path, check=True, capture_output=True)
    users = {
        name: (f"{name}-secret-word", role) for name, role in (("boss", "superuser"), ("writer", "writer"), ("reader", "reader"))
    }
    users["nobody"] = ("nobody-secret-word", "no_such_role")
    server = own_server(users=users, roles=ROLES, tls=(tmp_path / "cert.pem", tmp_path / "key.pem"))

    def as_user(name: str, password: str | None = None, trusted: bool = True) -> ElasticIndex:
        told = {"elasticsearch.user": name, "elasticsearch.password": password or f"{name}-secret-word"}
        trust = {"elasticsearch.ca_file": tmp_path / "cert.pem"} if trusted else {}
        return open_index(settings_of(server, **told, **trust), HashEmbedder(16))

    writer, reader = as_user("writer"), as_user("reader")
    assert writer.upsert("c", documents("fox", "wolf")) == Change(added=2)
    assert writer.upsert("c", documents("fox", "dog")) == Change(updated=1, unchanged=1)
    assert ids(find(reader, "dog", "lexical")) == ["1"]
    assert reader.collections()[0].documents == 2
    with pytest.raises(RetrieverUnavailable, match="does not let this user do that"):
        reader.upsert("c", documents("hen"))
    assert reader.sources("c") == {"": ["0", "1"]}
    refused = [as_user("nobody"), as_user("writer", "wrong-secret-word"), as_user("writer", trusted=False)]
    for index, words in zip(refused, ("does not let this user", "refuses the user", "cannot be trusted"), strict=True):
        for call in (lambda: find(index, "dog"), lambda: index.upsert("c", documents("x")), index.collections):  # noqa: B023
            with pytest.raises(RetrieverUnavailable, match=words) as caught:
                call()
            assert "secret-word" not in f"{caught.value} {caught.value.hint}"
    writer.drop("c")


def test_a_port_that_is_taken_is_said(elasticsearch_server: Server, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="is taken by another program"):
        start(tmp_path, int(elasticsearch_server.url.rpartition(":")[2]))


def test_states_are_replaced_only_as_they_were_read(index: ElasticIndex) -> None:
    index.upsert("c", [])
    (state,) = index._states.all()
    index._states.store(replace(state, documents=5))
    with pytest.raises(Conflict):
        index._states.store(replace(state, documents=6))
    assert index.collections()[0].documents == 5
    with suppress(CollectionNotFound):
        index.drop("c")
    assert json.dumps(index.collections()) == "[]"
