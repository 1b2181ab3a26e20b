"""Arguments that a model writes: they fit whatever schema a tool has, and are never cut. The model has random weights, so
that nothing but the grammar keeps it from writing anything at all."""

from __future__ import annotations

import enum
import json
import re
import sys
import uuid
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.tools import StructuredTool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from agentops.engine import generate
from agentops.engine.checkpoint import open_checkpoint
from agentops.engine.local import LocalEngine, open_engine
from agentops.engine.tokenizer import ChatTokenizer
from agentops.errors import ToolError
from agentops.records import Constraint, Generation, Request
from agentops.settings import load_settings
from agentops.sync import run_sync
from agentops.tools import Toolbox
from agentops.tools.arguments import check, forms, read
from tests.tiny_model import VOCABULARY, write_tiny_model

TOKENS = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LocalEngine]:
    opened = open_engine(folder, load_settings({"engine.kv_tokens": 4096, "engine.threads": 1}))
    yield opened
    run_sync(opened.close())


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer(open_checkpoint(folder))


def offered(schema: dict[str, Any]) -> Toolbox:
    """A box with a tool of that schema, as servers of tools have them."""
    return Toolbox([StructuredTool(name="f", description="Does.", args_schema=schema, func=print)])


async def write(
    engine: LocalEngine, box: Toolbox, seed: int = 0, tokens: int = TOKENS
) -> tuple[dict[str, Any], list[Generation]]:
    made: list[Generation] = []

    async def ask(form: dict[str, Any]) -> Generation:
        request = Request(text="x", max_tokens=tokens, temperature=2.0, seed=seed, constraint=Constraint("json_schema", form))
        made.append(await generate(engine, request))
        return made[-1]

    return await box.write("f", ask, max_tokens=tokens), made


class Colour(enum.Enum):
    RED = "red"
    BLUE = 'blue \\ "and" é'


class Inner(BaseModel):
    a: int
    b: str | None = None


class Tree(BaseModel):
    name: str
    children: list[Tree] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


class Outer(BaseModel):
    inner: Inner
    more: dict[str, Inner] = {}


class Loose(TypedDict, total=False):
    x: int
    y: str


TYPES: list[Any] = [
    *(int, str, float, bool, None, dict, list, Any, Decimal, bytes, Path, uuid.UUID, datetime, date, time, timedelta),
    *(int | None, int | str, int | None | list[str], Literal["a", "b", 3], Colour, Inner, Outer, Tree, Tree | None, Loose),
    *(list[int], list[str], list[Outer], list[list[list[int]]], list[Cat | Dog], set[int], frozenset[str], tuple[int, str]),
    *(tuple[int, ...], dict[str, int], dict[str, list[float]], dict[Literal["a", "b"], int], dict[str, Any]),
    Annotated[Cat | Dog, Field(discriminator="kind")],
    Annotated[int, Field(ge=1, le=5)],
    Annotated[int, Field(gt=10**17)],
    Annotated[int, Field(multiple_of=7)],
    Annotated[float, Field(gt=0, lt=1)],
    Annotated[float, Field(multiple_of=0.01)],
    Annotated[str, Field(pattern=r"^[A-Z]{2}-\d{4}$")],
    Annotated[str, Field(pattern=r"\w+@\w+")],
    Annotated[str, Field(pattern="^[A-F0-9]{50}$")],
    Annotated[str, Field(min_length=3, max_length=5)],
    Annotated[list[int], Field(min_length=2, max_length=3)],
    Annotated[set[Literal["a", "b", "c"]], Field(max_length=2)],
]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: str(kind)[:60])
async def test_arguments_of_every_type_parse_and_fit(engine: LocalEngine, kind: Any) -> None:
    def f(x, y="left out"):  # type: ignore[no-untyped-def]
        """Does."""

    f.__annotations__ = {"x": kind, "y": str}
    box = Toolbox([f])
    for seed in range(2):
        arguments, made = await write(engine, box, seed, tokens=160)
        assert box.misfit("f", arguments) == ""
        assert "x" in arguments
        assert made[-1].finish_reason == "stop"
        assert json.loads(json.dumps(arguments)) == arguments


SCHEMAS: dict[str, dict[str, Any]] = {
    "all of": {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 9}]},
    "all of references": {"allOf": [{"$ref": "#/$defs/short"}], "description": "a short one"},
    "types": {"type": ["string", "integer", "null"]},
    "one of": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    "constant": {"const": {"a": [1, None]}},
    "choice": {"enum": ["é\n", 1, 2.5, None, {"a": 1}]},
    "no type": {"minLength": 3},
    "no type, number": {"minimum": 3, "maximum": 4},
    "definitions": {"$ref": "#/definitions/old"},
    "itself": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    "closed": {"type": "object", "additionalProperties": False},
    "needed but not named": {"type": "object", "required": ["k"], "additionalProperties": {"type": "integer"}},
    "entries": {"type": "object", "minProperties": 2, "maxProperties": 3, "additionalProperties": {"type": "boolean"}},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False, "minItems": 2},
    "unique": {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True},
    "formats": {"type": "array", "minItems": 3, "items": {"type": "string", "format": "email"}},
    "address": {"type": "string", "format": "uri"},
    "ip": {"anyOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]},
    "unknown format": {"type": "string", "format": "phone"},
    "extensions": {"type": "string", "x-order": 1, "nullable": True, "deprecated": True, "examples": ["a"]},
    "odd names": {"type": "object", "properties": {'a "b" \\ é': {"type": "integer"}}, "required": ['a "b" \\ é']},
    "one branch that cannot be held to": {"anyOf": [{"type": "string", "pattern": "(?=a)"}, {"type": "integer"}]},
    "a left-out one that cannot be held to": {"type": "object", "properties": {"p": {"not": {}}, "q": {"type": "null"}}},
    "true": {"type": "object", "properties": {"a": True}, "required": ["a"]},
    "large": {"type": "integer", "minimum": 10**17},
    "deep": {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": {"type": "object"}}}},
}
DEFINITIONS = {
    "$defs": {"short": {"type": "string", "maxLength": 3}},
    "definitions": {"old": {"type": "object", "properties": {"again": {"$ref": "#/definitions/old"}}}},
}


@pytest.mark.parametrize("name", SCHEMAS)
async def test_arguments_of_every_schema_parse_and_fit(engine: LocalEngine, name: str) -> None:
    box = offered({"type": "object", "properties": {"x": SCHEMAS[name]}, "required": ["x"], **DEFINITIONS})
    for seed in range(2):
        arguments, _ = await write(engine, box, seed, tokens=160)
        assert box.misfit("f", arguments) == ""


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
        ({"not": {"type": "string"}}, "it has 'not'"),
        ({"if": {"type": "string"}, "then": {"maxLength": 2}}, "it has 'if'"),
        ({"type": "array", "contains": {"type": "integer"}}, "it has 'contains'"),
        ({"type": "object", "patternProperties": {"^a": {}}}, "it has 'patternProperties'"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "what keys look like"),
        ({"$ref": "http://example.com/schema.json"}, "which is not in it"),
        ({"$ref": "#/$defs/nowhere"}, "which is not in it"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "two things of 'type'"),
        ({"type": "strng"}, "'strng' is no type"),
        ({"$ref": "#"}, "have no end"),
        ({"enum": []}, "have no end"),
        (False, "have no end"),
        ({"type": "string", "minLength": 2_000}, "may need 8,0"),
        ({"type": "integer", "minimum": 10**20}, "nsatisfiable"),
        ({"enum": [2**53 + 1]}, "whole numbers beyond"),
        ({"type": "array", "minItems": 200, "items": {"type": "integer"}}, "may need"),
    ],
)
async def test_what_cannot_be_held_to_is_told_before_a_model_is_asked(engine: LocalEngine, schema: Any, said: str) -> None:
    box = offered({"type": "object", "properties": {"x": schema}, "required": ["x"]})
    with pytest.raises(ToolError, match=said) as refused:
        await write(engine, box)
    assert "'f'" in str(refused.value)
    assert refused.value.hint


async def test_what_needs_more_tokens_than_it_gets_is_written_with_less(engine: LocalEngine) -> None:
    names = [f"name_{number}" for number in range(8)]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names[:2]}
    for tokens in (100, 200, 400, 1000):
        arguments, made = await write(engine, offered(schema), tokens=tokens)
        assert set(names[:2]) <= set(arguments)
        assert made[-1].usage.output_tokens <= tokens
    with pytest.raises(ToolError, match=r"may need \d+ tokens, and 8 are given"):
        await write(engine, offered(schema), tokens=8)
    with pytest.raises(ToolError, match=r"they were cut after 30 tokens") as cut:
        await write(engine, offered(schema), tokens=30)
    assert cut.value.hint == "give it more tokens"


def test_a_schema_that_explodes_when_unrolled_is_refused_or_written_small() -> None:
    wide = {f"p{number}": {"anyOf": [{"$ref": "#"}, {"type": "null"}]} for number in range(40)}
    (form, *_) = forms("f", {"type": "object", "properties": wide}, TOKENS)
    assert len(json.dumps(form)) < 100_000


# Whatever the schema


def between(kind: str, least: str, most: str, low: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda low, more: {"type": kind, least: low, most: low + more}, low, st.integers(0, 5))


scalars = st.one_of(
    st.just({"type": "string"}),
    st.just({"type": "integer"}),
    st.just({"type": "number"}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({}),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, st.integers(0, 5), st.integers(0, 9)
    ),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, st.integers(-99, 99), st.integers(0, 99)
    ),
    st.sampled_from(["date", "time", "date-time", "duration", "uuid", "ipv4", "email", "uri"]).map(
        lambda form: {"type": "string", "format": form}
    ),
    st.lists(st.one_of(st.text(max_size=5), st.integers(), st.none(), st.booleans()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.just({"$ref": "#"}),
)
names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=6)


def inside(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner,
            st.integers(0, 2),
            st.integers(0, 3),
        ),
        st.builds(lambda items: {"type": "array", "items": items}, inner),
        st.builds(lambda values: {"anyOf": values}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda value: {"type": "object", "additionalProperties": value}, inner),
        st.dictionaries(names, inner, max_size=3).flatmap(
            lambda named: st.builds(
                lambda needed: {"type": "object", "properties": named, "required": sorted(needed)},
                st.sets(st.sampled_from(sorted(named))) if named else st.just(set()),
            )
        ),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    properties=st.dictionaries(names, st.recursive(scalars, inside, max_leaves=6), min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_may_follow_in_the_surer_form_ends_in_time_and_fits(
    tokenizer: ChatTokenizer, properties: dict[str, Any], seed: int
) -> None:
    """Tokens are drawn evenly from those that the grammar allows: a worse writer than any model."""
    schema = {"type": "object", "properties": properties, "required": sorted(properties)[:1], "additionalProperties": False}
    try:
        _, *surer = forms("f", schema, TOKENS)
        check("f", schema)
    except ToolError as error:
        assert re.search("have no end|tokens, and|whole numbers beyond", str(error)) is not None  # noqa: PT017
        return
    if not surer:
        return
    random = np.random.default_rng(seed)
    grammar = tokenizer.compile(Constraint("json_schema", surer[0]))
    writer = tokenizer.writer([], ())
    text, over = "", False
    for _ in range(TOKENS):
        token = int(random.choice(np.flatnonzero(grammar.allowed(VOCABULARY))))
        if over := token in tokenizer.eos:
            break
        text += writer.add(token)
        if over := grammar.accept(token):
            break
    assert over, text + writer.finish()
    box = offered(schema)
    arguments, wrong = read(box.schema("f"), text + writer.finish())
    assert wrong == ""
    assert box.misfit("f", arguments) == ""


# The real model

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.model
async def test_calls_of_the_function_calling_leaderboard_all_parse_and_fit(
    model_folder: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    bench = __import__("tools_bfcl")
    opened = open_engine(model_folder, load_settings({"engine.threads": 2}))
    try:
        cases = bench.some(bench.load(shared_data / "bfcl", "simple_python"), 12)
        made = await bench.all_of(cases, lambda case: bench.constrained(opened, case), "calls")
    finally:
        await opened.close()
    assert [one.case.id for one in made if not (one.parses and one.fits)] == []
    assert sum(one.right for one in made) >= 2
    sys.modules.pop("tools_bfcl")
