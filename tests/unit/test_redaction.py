"""Redaction: what is taken out of texts before they are recorded, and that nothing of it is left in any byte of the home."""

from __future__ import annotations

import importlib
import operator
import random
import re
import sqlite3
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
import zstandard
from hypothesis import HealthCheck, example, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from langchain_core.callbacks import adispatch_custom_event
from langchain_core.documents import Document
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime as Node
from langgraph.types import interrupt

from agentops import Context, Runtime, ScriptedEngine, Settings
from agentops.clock import UlidSource
from agentops.engine import generate
from agentops.errors import NodeFailed, RecordError, SettingsError, UsageError
from agentops.records import Labels, Message, Request, content_hash
from agentops.replay import replay
from agentops.settings import load_settings
from agentops.store import SpanRow, open_store
from agentops.tracer import catch_up, tagged
from agentops.tracer.payload import encode
from agentops.tracer.redaction import FAILED, Redactor, Sweep, load_redactor

KINDS = ("key", "email", "iban", "card", "ip", "phone")


def redacting(settings: Settings, *rules: str) -> Settings:
    (settings.paths.home / "journal").mkdir(parents=True, exist_ok=True)
    return replace(settings, record=replace(settings.record, redact=rules))


def redactor(settings: Settings, *rules: str) -> Redactor:
    found = load_redactor(redacting(settings, *rules))
    assert found is not None
    return found


@pytest.fixture
def every(settings: Settings) -> Redactor:
    return redactor(settings, *KINDS)


# -- what is found


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("write to alice@example.com.", "write to [email]."),
        ("bob.o'neil+x@mail.example.co.uk,", "[email],"),
        ("mailto:alice%40example.com?x", "mailto:[email]?x"),
        ("grüße@exämple.de", "[email]"),
        ("call +49 151 23456789 now", "call [phone] now"),
        ("(555) 123-4567", "[phone]"),
        ("tel=+1-202-555-0173", "tel=[phone]"),
        ("0049 30 1234567", "[phone]"),
        ("030/1234567", "[phone]"),
        ("01 23 45 67 89", "[phone]"),
        ("4111 1111 1111 1111 12/29", "[card] 12/29"),
        ("22 4111-1111-1111-1111, 123", "22 [card], 123"),
        ("visa-5500000000000004-x", "visa-[card]-x"),
        ("378282246310005", "[card]"),
        ("DE89 3704 0044 0532 0130 00 AND MORE", "[iban] AND MORE"),
        ("(GB82WEST12345698765432)", "([iban])"),
        ("from 10.0.0.1:8080", "from [ip]:8080"),
        ("2001:db8::1: up", "[ip]: up"),
        ("sk-ant-api03-AbC_def-ghijklmnopqrst", "[key]"),
        ("AKIAIOSFODNN7EXAMPLE", "[key]"),
        ("Authorization: Bearer abcdefghijklmnop.qrst", "Authorization: Bearer [key]"),
        ("?token=hunter2hunter2&x=1", "?token=[key]&x=1"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "[key]"),
    ],
)
def test_a_built_in_kind_leaves_its_mark(every: Redactor, text: str, kept: str) -> None:
    assert every.redacted(text)[0] == kept
    assert every.redacted(kept) == (kept, 0)


@pytest.mark.parametrize(
    "text",
    [
        "at 2026-11-23T15:46:09+01:00",
        "01.12.2026 15:46",
        "std::string, a::b, 15:46:09",
        "v1.2.3.4.5",
        "0.4111111111111111",
        "4111 1111 1111 1112",
        "DE89370400440532013003",
        "1764000000000000000 ns",
        "user@localhost",
        "the task-list and the risk-averse",
    ],
)
def test_what_only_looks_like_it_stays(every: Redactor, text: str) -> None:
    assert every.redacted(text) == (text, 0)


@given(seed=st.integers(0, 2**64))
@effort(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_names_of_the_record_are_never_taken_for_text(every: Redactor, seed: int) -> None:
    drawn = random.Random(seed)
    for name in (UlidSource().new("run"), content_hash(str(seed)), str(uuid.UUID(int=drawn.getrandbits(128), version=4))):
        assert every.redacted(name) == (name, 0)


def test_the_time_is_in_proportion_to_the_text(every: Redactor) -> None:
    # Not a measurement: with an exponent in it this would not end.
    for piece in ("a", "0", "a.", "0 ", "AB12", "a@a.", "1:", "+1 ", "sk-a-", "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----"):
        every.redacted(piece * (200_000 // len(piece)) + "@")


# -- rules of users


def test_a_pattern_marks_by_the_name_of_its_group(settings: Settings) -> None:
    own = redactor(settings, r"(?P<employee>E\d{6})", r"\bACME-\w+")
    assert own.redacted("E123456 of ACME-West") == ("[employee] of [redacted]", 2)


def test_a_callable_is_named_by_its_module(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_rules.py").write_text("def names(text):\n    return text.replace('Ada', '[name]')\nno = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert redactor(settings, "our_rules:names").redacted("Ada, Ada") == ("[name], [name]", 1)
    with pytest.raises(SettingsError, match="cannot be called"):
        redactor(settings, "our_rules:no")
    with pytest.raises(SettingsError, match="cannot be imported"):
        redactor(settings, "our_rules:gone")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("emial", "did you mean email"),
        ("secretword", "the word itself is the pattern"),
        ("(", "no regular expression"),
        ("(a+)+$", "takes far too long"),
        (r"(\d+\s?)+[a-z]", "takes far too long"),
        ("x*", "matches nothing at all"),
    ],
)
def test_a_rule_that_is_none_is_refused_at_the_start(settings: Settings, rule: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Runtime(redacting(settings, "email", rule), engine=ScriptedEngine())
    assert said in f"{refused.value} {refused.value.hint}"
    assert not list((settings.paths.home / "journal").glob("*.seg"))


@pytest.mark.skipif(importlib.util.find_spec("presidio_analyzer") is not None, reason="presidio is installed")
def test_presidio_is_asked_for_by_its_package(settings: Settings) -> None:
    with pytest.raises(SettingsError) as refused:
        redactor(settings, "presidio")
    assert "pip install presidio-analyzer" in refused.value.hint


def test_what_presidio_finds_is_marked(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "presidio_analyzer.py").write_text(
        "from types import SimpleNamespace as Found\n"
        "class AnalyzerEngine:\n"
        "    def analyze(self, text, language):\n"
        "        at = text.index('Ada')\n"
        "        return [Found(entity_type='NRP', start=at + 1, end=at + 5), Found(entity_type='PERSON', start=at, end=at + 3)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "presidio_analyzer", raising=False)
    importlib.invalidate_caches()
    assert redactor(settings, "presidio").redacted("so Ada B. said") == ("so [person]. said", 1)
    sys.modules.pop("presidio_analyzer", None)


def test_the_rules_of_all_sources_hold(tmp_path: Path) -> None:
    (tmp_path / "agentops.toml").write_text('[record]\nredact = ["email"]\n')
    found = load_settings(environment={"AGENTOPS_CONFIG": str(tmp_path), "AGENTOPS_RECORD_REDACT": "ip"}, folder=tmp_path)
    assert found.record.redact == ("email", "ip")


# -- in values


def test_whole_numbers_names_and_tokens_are_looked_at(every: Redactor) -> None:
    value = {
        "n": 4111111111111111,
        "at": 1764000000000000000,
        "password": "hunter2",
        "a@b.co": 1,
        "c@d.co": 2,
        "answer": {"text": "a@b.co", "tokens": [1, 2], "logprobs": [-0.1, -0.2]},
        "other": {"text": "no", "tokens": [3]},
    }
    found = encode(value, 10_000, every)
    assert found.data == (
        b'{"n":"[card]","at":1764000000000000000,"password":"[key]","[email]":1,"[email]*":2,'
        b'"answer":{"text":"[email]","tokens":[],"logprobs":[]},"other":{"text":"no","tokens":[3]}}'
    )
    assert (found.redacted, found.unredacted) == (5, 0)


@given(before=st.integers(0, 12_000), after=st.integers(0, 12_000), limit=st.integers(1_000, 9_000))
@effort(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example(before=738, after=5_000, limit=1_000)
def test_no_half_of_it_is_left_where_a_text_is_cut(every: Redactor, before: int, after: int, limit: int) -> None:
    canary = "alice.of.the.wonderland@looking-glass.example.com"
    found = encode(" " * before + canary + " " * after, limit, every).data.decode()
    assert not re.search("alice|wonder|looking|glass|example", found)


def test_a_rule_that_raises_lets_nothing_through(settings: Settings) -> None:
    def broken(text: str) -> tuple[str, int]:
        if "secret" in text:
            raise KeyError(text)
        return text, 0

    found = encode({"a": "the secret", "b": "fine"}, 1_000, Redactor([broken]))
    assert found.data == b'{"a":"%s","b":"fine"}' % FAILED.encode()
    assert (found.redacted, found.unredacted) == (0, 1)


def test_a_pattern_that_takes_too_long_later_lets_nothing_through(settings: Settings) -> None:
    # Harmless on what it is tried on at the start.
    sweep = Sweep(redactor(settings, "x(?:b|c|bc)+y"))
    for _ in range(5):
        assert sweep.text("x" + "bc" * 4_000) == FAILED
    # Given up after three: no run is held up for longer than that.
    assert sweep.text("fine") == FAILED
    assert sweep.faults == 6


# -- in runs


class State(TypedDict, total=False):
    said: Annotated[list[str], operator.add]
    q: str
    card: int


def everywhere(canary: str) -> Any:
    """A graph that brings a text to every place of the record."""

    @tool
    def looks(what: str) -> str:
        """Looks something up."""
        return f"found {what}"

    async def asks(state: State, runtime: Node[Context]) -> State:
        with tagged(topic=f"of {canary}"):
            request = Request(messages=(Message("user", f"what of {canary} ?"),), max_tokens=9)
            first = await generate(runtime.context.engine, request)
        runtime.stream_writer({"seen": canary})
        await adispatch_custom_event("told", {"what": canary})
        model = GenericFakeChatModel(messages=iter([AIMessage(f"said {canary}")]))
        answer = await model.ainvoke(f"asked {canary}")
        looked = await looks.ainvoke({"what": canary})

        async def documents(_: Any) -> list[Document]:
            return [Document(page_content=canary, metadata={"by": canary, canary: 1})]

        return {"said": [first.text, str(answer.content), looked, str(await RunnableLambda(documents).ainvoke(0))]}

    def fails(state: State) -> State:
        raise ValueError(f"cannot do {canary}", canary)

    return (
        StateGraph(State, context_schema=Context)
        .add_node("asks", asks)
        .add_node("fails", fails)
        .add_edge(START, "asks")
        .add_edge("asks", "fails")
        .compile()
    )


def kept(home: Path) -> Iterator[bytes]:
    """Every byte of a home but those of the checkpoints, and what was compressed in it."""
    for file in home.rglob("*"):
        if file.is_file() and file.parent.name != "threads":
            yield file.read_bytes()
    for (blob,) in sqlite3.connect(home / "record.db").execute("SELECT data FROM payload"):
        yield zstandard.ZstdDecompressor().decompress(blob, max_output_size=100_000_000)


def remembered(home: Path, canary: str) -> int:
    words = {canary.encode(), canary.encode("unicode_escape")}
    return sum(any(word in data for word in words) for data in kept(home))


def _luhn(body: str) -> str:
    return next(f"{body}{digit}" for digit in range(10) if _sound(f"{body}{digit}"))


def _sound(number: str) -> bool:
    digits = [int(one) for one in number[::-1]]
    return (sum(digits[::2]) + sum(sum(divmod(2 * one, 10)) for one in digits[1::2])) % 10 == 0


def _iban(account: str) -> str:
    rest = 98 - int("".join(str(int(one, 36)) for one in f"{account}DE00")) % 97
    return f"DE{rest:02}{account}"


DIGITS = st.text("0123456789", min_size=18, max_size=18)
WORDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=3, max_size=12)
CANARIES = {
    "email": st.builds("{}.{}@{}.example.com".format, WORDS, WORDS, WORDS),
    "phone": st.builds(lambda digits: f"+49 {digits[:3]} {digits[3:10]}", DIGITS),
    "card": st.builds(lambda digits: _luhn(f"4{digits[:14]}"), DIGITS),
    "iban": st.builds(_iban, DIGITS),
    "ip": st.builds("{}.{}.{}.{}".format, *[st.integers(0, 255)] * 4),
    "key": st.builds(lambda word, digits: f"sk-{word}{digits}", WORDS, DIGITS),
}


@pytest.mark.parametrize("kind", CANARIES)
@given(data=st.data())
@effort(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True)
def test_no_byte_of_it_is_in_the_home(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, settings: Settings
) -> None:
    canary = data.draw(CANARIES[kind])
    home = tmp_path_factory.mktemp("home")
    mine = replace(settings, paths=replace(settings.paths, home=home), record=replace(settings.record, redact=KINDS))
    labels = Labels("ada", (canary,), {"contact": canary})
    with (
        Runtime(mine, engine=ScriptedEngine([f"it is {canary}"])) as runtime,
        pytest.raises(NodeFailed, match=re.escape(canary)),
    ):
        runtime.run(everywhere(canary), {"q": canary, "card": 5}, labels=labels)
    catch_up(mine, wait=True)
    assert remembered(home, canary) == 0
    with open_store(mine) as store:
        run = store.run("last")
        assert store.balance(run.id).balanced
        spans = store.spans(run.id)
        assert {span.kind for span in spans} >= {"workflow", "node", "generation", "event", "tool"}
        assert all(span.redacted for span in spans)
        assert f"[{kind}]" in str(run.error)
    # The state is as it was.
    assert any(canary.encode() in file.read_bytes() for file in (home / "threads").iterdir())


def test_without_redaction_the_same_search_finds_it(settings: Settings) -> None:
    canary = "alice@example.com"
    with Runtime(settings, engine=ScriptedEngine([f"it is {canary}"])) as runtime, pytest.raises(NodeFailed):
        runtime.run(everywhere(canary), {"q": canary}, labels=Labels("ada", (canary,), {}))
    catch_up(settings, wait=True)
    assert remembered(settings.paths.home, canary) > 5


def test_a_fault_of_a_rule_is_counted_and_stops_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rules.py").write_text(
        "def names(text):\n    if 'Ada' in text:\n        raise OSError('no')\n    return text\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    graph = StateGraph(State).add_node("says", lambda state: {"said": [state["q"]]}).add_edge(START, "says").compile()
    with Runtime(redacting(settings, "broken_rules:names"), engine=ScriptedEngine()) as runtime:
        run = runtime.run(graph, {"q": "of Ada"})
        other = runtime.run(graph, {"q": "of Bob"})
    assert run.output["said"] == ["of Ada"]
    catch_up(settings, wait=True)
    assert remembered(settings.paths.home, "of Ada") == 0
    with open_store(settings) as store:
        balance = store.balance(run.run_id)
        assert balance.faults > 0
        assert not balance.balanced
        assert store.balance(other.run_id).balanced
        assert store.payload(str(store.run(run.run_id).input_hash)) == {"q": FAILED}


def spans_of(settings: Settings, run_id: str) -> list[SpanRow]:
    with open_store(settings) as store:
        return store.spans(run_id)


def test_a_redacted_run_goes_on_with_what_was_true_and_is_not_replayed(settings: Settings) -> None:
    mine = redacting(settings, "email")
    said: list[str] = []

    def says(state: State) -> State:
        said.append(f"{state['q']} {interrupt('go on with a@b.co ?')}")
        return {"said": said[-1:]}

    graph = StateGraph(State).add_node("says", says).add_edge(START, "says").compile()
    with Runtime(mine, engine=ScriptedEngine()) as runtime:
        run = runtime.run(graph, {"q": "x@y.zz"})
        catch_up(mine, wait=True)
        with open_store(mine) as store:
            assert store.pending(store.run(run.run_id))[0].question == "go on with [email] ?"
        ended = runtime.resume(run.run_id, answer="yes", graph=graph)
        assert ended.output["said"] == ["x@y.zz yes"]
        with pytest.raises(RecordError, match=r"cannot be replayed exactly: \d+ parts"):
            list(replay(mine, run=run.run_id, graph=graph))


def test_a_run_without_anything_redacted_is_replayed(settings: Settings) -> None:
    mine = redacting(settings, *KINDS)
    graph = StateGraph(State).add_node("says", lambda state: {"said": [state["q"]]}).add_edge(START, "says").compile()
    with Runtime(mine, engine=ScriptedEngine()) as runtime:
        run = runtime.run(graph, {"q": "plain"})
    assert [found.same for found in replay(mine, run=run.run_id, graph=graph)] == [True]
    assert not any(span.redacted for span in spans_of(mine, run.run_id))


def test_a_run_that_ended_before_its_first_checkpoint_does_not_go_on_with_a_redacted_input(settings: Settings) -> None:
    mine = redacting(settings, "email")
    graph = StateGraph(State).add_node("says", lambda state: {"said": [state["q"]]}).add_edge(START, "says").compile()
    for asked, refused in (("a@b.co", True), ("plain", False)):
        with Runtime(mine, engine=ScriptedEngine()) as runtime:
            trace = runtime._tracer.start_run(run_id=f"run_{asked[0]}", thread_id=asked[0], graph="python:g", input={"q": asked})
            trace.end("cancelled")
            if refused:
                with pytest.raises(UsageError, match="its input was redacted"):
                    runtime.resume(trace.run_id, graph=graph)
            else:
                assert runtime.resume(trace.run_id, graph=graph).output["said"] == ["plain"]


def test_the_same_delivery_is_known_again(settings: Settings) -> None:
    mine = redacting(settings, "email")
    graph = StateGraph(State).add_node("says", lambda state: {"said": [state["q"]]}).add_edge(START, "says").compile()
    with Runtime(mine, engine=ScriptedEngine()) as runtime:
        runtime.run(graph, {"q": "a@b.co"}, run_id="once")
        assert runtime.run(graph, {"q": "a@b.co"}, run_id="once").output["said"] == ["[email]"]


def test_a_redacted_user_keeps_a_pseudonym_of_this_home(settings: Settings) -> None:
    mine = redacting(settings, "email")
    graph = StateGraph(State).add_node("says", lambda state: {"said": ["x"]}).add_edge(START, "says").compile()
    users = []
    with Runtime(mine, engine=ScriptedEngine()) as runtime:
        for name in ("a@b.co", "c@d.co", "a@b.co", "ada"):
            run = runtime.run(graph, {"q": "?"}, labels=Labels(name))
            catch_up(mine, wait=True)
            with open_store(mine) as store:
                users.append(store.run(run.run_id).settings["labels"]["user"])
    assert users[0] == users[2] != users[1]
    assert re.fullmatch(r"\[email\] [0-9a-f]{16}", users[0])
    assert users[3] == "ada"
    assert remembered(mine.paths.home, "a@b.co") == 0
