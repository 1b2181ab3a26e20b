"""What every `Index` does, whatever keeps the documents. A new back-end joins by an entry in `index`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agentops.errors import CollectionMismatch, CollectionNotFound, DocumentError, RetrievalError
from agentops.records import Document, Query, Retrieval, SearchMode, content_hash
from agentops.retrieval import Change, Embedder, Index
from agentops.retrieval.elastic import open_index as open_elastic
from agentops.retrieval.embed import HashEmbedder, open_embedder
from agentops.retrieval.embedded import open_index as open_embedded
from agentops.sync import run_sync

ANIMALS = {
    "fox": "The quick brown fox jumps over the lazy dog.",
    "wing": "A wing in a propeller slipstream changes its lift distribution.",
    "shock": "Shock waves appear ahead of a blunt body in supersonic flow.",
    "bread": "Sourdough bread is baked at a high temperature with steam.",
}
MODES: tuple[SearchMode, ...] = ("hybrid", "vector", "lexical")


def document(key: str, text: str, **metadata: str | int | float | bool) -> Document:
    return Document(key, text, content_hash(text), metadata)


def find(index: Index, text: str, mode: SearchMode = "hybrid", k: int = 8, collection: str = "c") -> Retrieval:
    return run_sync(index.search(Query(text, collection, k, mode)))


def ids(found: Retrieval) -> list[str]:
    return [hit.document.id for hit in found.hits]


@pytest.fixture(scope="module")
def minilm(embedder_folder: Path) -> Embedder:
    return open_embedder(embedder_folder)


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str, Embedder], Index]]:
    """Opens the one store of this test in a back-end, with another embedder each time."""
    made: list[Index] = []

    def one(back_end: str, embedder: Embedder) -> Index:
        if back_end == "elastic":
            made.append(open_elastic(request.getfixturevalue("elastic_settings"), embedder))
        else:
            made.append(open_embedded(tmp_path / "index", embedder))
        return made[-1]

    yield one
    for index in made:
        index.close()


@pytest.fixture(params=["embedded-hash", pytest.param("embedded-minilm", marks=pytest.mark.model), "elastic-hash"])
def index(request: pytest.FixtureRequest, opened: Callable[[str, Embedder], Index]) -> Index:
    back_end, _, embedder = request.param.partition("-")
    return opened(back_end, HashEmbedder() if embedder == "hash" else request.getfixturevalue("minilm"))


@pytest.fixture
def filled(index: Index) -> Index:
    index.upsert("c", [document(key, text, source=f"{key}.md") for key, text in ANIMALS.items()])
    return index


@pytest.mark.parametrize("mode", MODES)
def test_the_document_that_shares_words_and_meaning_is_first(filled: Index, mode: SearchMode) -> None:
    assert ids(find(filled, "shock wave of a blunt body", mode))[0] == "shock"
    assert ids(find(filled, "baking bread with steam", mode))[0] == "bread"


def test_legs_say_who_found_a_hit_and_ranks_count_from_one(filled: Index) -> None:
    hybrid = find(filled, "the lazy fox")
    best = hybrid.hits[0]
    assert best.document.id == "fox"
    assert best.vector is not None
    assert best.lexical is not None
    assert (best.vector.rank, best.lexical.rank) == (1, 1)
    assert best.score == pytest.approx(2 / 61)
    assert [hit.lexical for hit in hybrid.hits[1:]] == [None] * 3, "no other document has a word of the query"
    assert sorted(hit.vector.rank for hit in hybrid.hits if hit.vector) == [1, 2, 3, 4]
    vector = find(filled, "the lazy fox", "vector").hits[0]
    assert vector.lexical is None
    assert vector.vector is not None
    assert vector.score == vector.vector.score
    assert -1.001 < vector.score < 1.001
    lexical = find(filled, "the lazy fox", "lexical")
    assert ids(lexical) == ["fox"]
    assert lexical.hits[0].vector is None


def test_hits_carry_the_document_as_it_was_stored(index: Index) -> None:
    stored = document("a", "Ünïcode — 東京タワー 🦊\n\ttabs\0and nul", source="d/a.md", page=3, ratio=0.5, draft=True)
    index.upsert("c", [stored])
    assert find(index, "東京タワー", "lexical").hits[0].document == stored
    assert find(index, "unicode", "vector").hits[0].document == stored


def test_times_are_measured(filled: Index) -> None:
    found = find(filled, "fox")
    assert found.embed_ms > 0
    assert found.search_ms > 0
    assert find(filled, "fox", "lexical").embed_ms == 0


def test_k_bounds_the_hits(filled: Index) -> None:
    assert len(find(filled, "fox", "vector", k=2).hits) == 2
    assert len(find(filled, "fox", "vector", k=1_000_000_000).hits) == 4
    assert find(filled, "fox", k=0).hits == ()
    assert find(filled, "fox", k=-3).hits == ()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_an_empty_query_finds_nothing(filled: Index, mode: SearchMode, text: str) -> None:
    assert find(filled, text, mode).hits == ()


def test_half_a_character_in_a_query_harms_nothing(filled: Index) -> None:
    for mode in MODES:
        assert ids(find(filled, "fox \ud800", mode))[0] == "fox"
    with pytest.raises(CollectionNotFound):
        find(filled, "fox", collection="\udcff")


@pytest.mark.parametrize("text", ["!!! ??? ...", "the of and", "zzzzqqqq"])
def test_a_query_without_a_known_word_has_no_lexical_hits(filled: Index, text: str) -> None:
    assert find(filled, text, "lexical").hits == ()


@pytest.mark.parametrize("text", ['terms:"fox', "seq:1 OR mark:1", "fox AND NOT (", "fox^1e9", "[* TO *]", "mark:1", "/.*/", "*"])
def test_a_query_is_words_and_no_language(filled: Index, text: str) -> None:
    assert set(ids(find(filled, text, "lexical"))) <= {"fox"}


def test_an_enormous_query_is_answered(filled: Index) -> None:
    assert ids(find(filled, "fox " + "x" * 300_000 + " words and words" * 100_000))


def test_an_empty_collection_finds_nothing(index: Index) -> None:
    assert index.upsert("c", []) == Change()
    for mode in MODES:
        assert find(index, "fox", mode).hits == ()
    assert [(one.name, one.documents) for one in index.collections()] == [("c", 0)]


def test_what_is_stored_already_is_left_alone(filled: Index) -> None:
    before = filled.collections()
    again = [document(key, text, source=f"{key}.md") for key, text in ANIMALS.items()]
    assert filled.upsert("c", again) == Change(unchanged=4)
    assert filled.collections() == before


def test_a_changed_document_replaces_the_old_one(filled: Index) -> None:
    change = filled.upsert("c", [document("fox", "A penguin swims.", source="fox.md"), document("new", "A new one.")])
    assert change == Change(added=1, updated=1)
    assert ids(find(filled, "fox", "lexical")) == []
    assert ids(find(filled, "penguins", "lexical")) == ["fox"]
    assert ids(find(filled, "a penguin swims", "vector"))[0] == "fox"
    assert filled.collections()[0].documents == 5


def test_changed_metadata_is_stored(filled: Index) -> None:
    moved = document("fox", ANIMALS["fox"], source="moved.md", title="Canidae")
    assert filled.upsert("c", [moved]) == Change(updated=1)
    assert find(filled, "canidae", "lexical").hits[0].document == moved
    assert filled.sources("c")["moved.md"] == ["fox"]
    assert "fox.md" not in filled.sources("c")


def test_of_equal_ids_in_one_call_the_last_counts(index: Index) -> None:
    assert index.upsert("c", [document("a", "first"), document("b", "other"), document("a", "second")]) == Change(added=2)
    assert find(index, "second", "lexical").hits[0].document.text == "second"
    assert find(index, "first", "lexical").hits == ()


def test_equal_texts_under_two_ids_are_two_documents(index: Index) -> None:
    index.upsert("c", [document("b", "the same words"), document("a", "the same words")])
    for mode in MODES:
        assert ids(find(index, "same words", mode)) == ["a", "b"], "ties are ordered by id"


def test_titles_and_headings_are_searched(index: Index) -> None:
    index.upsert("c", [document("a", "It has two.", title="Guide", heading="Guide > Propellers"), document("b", "It has three.")])
    assert ids(find(index, "propellers", "lexical")) == ["a"]
    assert ids(find(index, "propellers guide", "vector"))[0] == "a"


def test_deleted_documents_are_not_found(filled: Index) -> None:
    assert filled.delete("c", ["fox", "fox", "nobody"]) == Change(removed=1)
    for mode in MODES:
        assert "fox" not in ids(find(filled, "quick brown fox", mode))
    assert filled.delete("c", ["fox"]) == Change()
    assert "fox.md" not in filled.sources("c")
    assert filled.upsert("c", [document("fox", ANIMALS["fox"])]) == Change(added=1)
    assert ids(find(filled, "quick brown fox", "lexical")) == ["fox"]


def test_the_generation_rises_with_every_change_and_only_then(filled: Index) -> None:
    seen = [find(filled, "fox").generation]

    def risen() -> bool:
        seen.append(find(filled, "fox").generation)
        assert seen[-1] == filled.collections()[0].generation
        return seen[-1] > seen[-2]

    filled.upsert("c", [document("new", "text")])
    assert risen()
    filled.upsert("c", [document("new", "text")])
    assert not risen()
    filled.delete("c", ["new"])
    assert risen()
    filled.delete("c", ["new"])
    assert not risen()
    filled.drop("c")
    filled.upsert("c", [document("fox", "fox")])
    assert risen(), "a collection made anew must not repeat the generations of the old one"


def test_collections_are_kept_apart(filled: Index) -> None:
    filled.upsert("other", [document("fox", "Another fox.")])
    assert {hit.document.text for hit in find(filled, "fox", collection="other").hits} == {"Another fox."}
    assert [hit.document.text for hit in find(filled, "fox", "lexical").hits] == [ANIMALS["fox"]]
    filled.drop("other")
    assert [one.name for one in filled.collections()] == ["c"]
    assert ids(find(filled, "fox", "lexical")) == ["fox"]


def test_a_missing_collection_is_named_with_those_there_are(filled: Index) -> None:
    for call in (
        lambda: find(filled, "fox", collection="nope"),
        lambda: filled.delete("nope", ["a"]),
        lambda: filled.drop("nope"),
        lambda: filled.sources("nope"),
    ):
        with pytest.raises(CollectionNotFound, match="nope") as caught:
            call()
        assert "there are: c;" in caught.value.hint


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\x1b[2J", "x" * 129])
def test_a_name_that_cannot_be_shown_is_refused(index: Index, name: str) -> None:
    with pytest.raises(RetrievalError, match="cannot be a collection's name"):
        index.upsert(name, [document("a", "text")])


@pytest.mark.parametrize("name", ["../../etc", "a/b", "c'; DROP TABLE document;--", "ünï 東京", "x" * 128])
def test_any_name_that_can_be_shown_will_do(index: Index, name: str) -> None:
    index.upsert(name, [document("a", "hello")])
    assert ids(find(index, "hello", collection=name)) == ["a"]
    assert [one.name for one in index.collections()] == [name]


@pytest.mark.parametrize(
    "bad",
    [
        document("", "text"),
        Document("a", "half a \ud800 pair", "b2:0"),
        document("\udc80", "text"),
        document("a", "text", source="\udcff.md"),
        document("a", "text", number=float("nan")),
        replace(document("a", "text"), metadata={"list": [1]}),  # type: ignore[dict-item]
        replace(document("a", "text"), metadata={"none": None}),  # type: ignore[dict-item]
    ],
)
def test_a_bad_document_is_refused_and_nothing_of_its_batch_stored(filled: Index, bad: Document) -> None:
    with pytest.raises(DocumentError):
        filled.upsert("c", [document("good", "good"), bad])
    assert filled.collections()[0].documents == 4


def test_hostile_ids_are_only_ids(index: Index) -> None:
    keys = ["'; DELETE FROM document; --", '"', "%", "a\0b", "x" * 5000, "../../x", "{}", "🦊"]
    index.upsert("c", [document(key, "same", source=key) for key in keys])
    assert sorted(ids(find(index, "same", k=20))) == sorted(keys)
    assert index.delete("c", keys[:1]) == Change(removed=1)
    assert sorted(index.sources("c")) == sorted(keys[1:])


def test_a_long_document_is_found_by_its_last_word(index: Index) -> None:
    text = "filler words " * 800 + "xylophone"
    assert len(text) > 10_000
    index.upsert("c", [document("long", text), document("short", "filler words")])
    assert ids(find(index, "xylophone", "lexical")) == ["long"]
    assert find(index, "xylophone", "lexical").hits[0].document.text == text


def test_searches_and_writes_from_many_threads(filled: Index) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                filled.upsert("c", [document(f"t{number}", f"thread{number} turn{turn}")])
                found = find(filled, f"thread{number}", "hybrid")
                assert found.hits[0].document.text == f"thread{number} turn{turn}"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert filled.collections()[0].documents == 8


async def test_searches_run_beside_each_other_in_one_loop(filled: Index) -> None:
    found = await asyncio.gather(*(filled.search(Query(text, "c", 1)) for text in ANIMALS.values() for _ in range(4)))
    assert [one.hits[0].document.id for one in found] == [key for key in ANIMALS for _ in range(4)]


def test_closed_is_closed(filled: Index) -> None:
    filled.close()
    filled.close()
    for call in (lambda: find(filled, "fox"), filled.collections, lambda: filled.upsert("c", [])):
        with pytest.raises(RetrievalError, match="closed"):
            call()


class _Other(HashEmbedder):
    """Another revision with the same dimensions."""

    @property
    def revision(self) -> str:
        return "other"


@pytest.mark.parametrize("back_end", ["embedded", "elastic"])
def test_another_embedder_is_refused_and_its_words_still_serve(opened: Callable[[str, Embedder], Index], back_end: str) -> None:
    opened(back_end, HashEmbedder()).upsert("c", [document("a", "fox")])
    for embedder in (_Other(), HashEmbedder(128)):
        other = opened(back_end, embedder)
        for mode in ("hybrid", "vector"):
            with pytest.raises(CollectionMismatch, match="was made with the embedder hash"):
                find(other, "fox", mode)
        with pytest.raises(CollectionMismatch):
            other.upsert("c", [document("b", "wolf")])
        assert ids(find(other, "fox", "lexical")) == ["a"]
        assert other.collections()[0].documents == 1
