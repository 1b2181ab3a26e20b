"""What every engine does, whatever is inside: one spec, run on each of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from agentops.engine import Engine, generate
from agentops.engine.local import open_engine
from agentops.engine.scripted import ScriptedEngine
from agentops.errors import ConstraintInvalid, EngineClosed, InputTooLarge, PromptTooLong, UsageError
from agentops.records import Constraint, Delta, Generation, Message, Request, ScoreRequest, Scores
from agentops.settings import load_settings

CONTEXT = 512
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def script(request: Request) -> str:
    if request.constraint is None:
        return "the quick brown fox jumps over the lazy dog and runs away from here"
    return {"choice": "no", "regex": "123", "json_schema": '{"ok": true}', "lark": "yes"}[request.constraint.kind]


@pytest.fixture(params=["scripted", "local"])
async def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    opened: Engine
    if request.param == "scripted":
        opened = ScriptedEngine(script, context_tokens=CONTEXT, input_bytes=100_000)
    else:
        folder: Path = tmp_path_factory.getbasetemp() / "conformance-model"
        if not folder.exists():
            write_tiny_model(folder, bits=4)
        flags = {"engine.kv_tokens": 2048, "engine.input_bytes": 100_000, "engine.threads": 2, "engine.kernel": "int4"}
        opened = open_engine(folder, load_settings(flags, environment={}), "tiny")
    yield opened
    await opened.close()


def asks(text: str = "what is the capital of the country", **options: object) -> Request:
    return Request(messages=(Message("user", text),), **options)  # type: ignore[arg-type]


async def events(engine: Engine, request: Request) -> list[Delta | Generation]:
    return [event async for event in engine.stream(request)]


def balanced(done: Generation) -> bool:
    return done.usage.cached_tokens + done.usage.computed_tokens == done.usage.input_tokens


async def test_info_says_what_runs(engine: Engine) -> None:
    info = engine.info
    assert info.name
    assert info.revision.startswith("b2:")
    assert info.context_tokens == CONTEXT


async def test_pieces_add_up_to_the_generation_which_comes_last(engine: Engine) -> None:
    got = await events(engine, asks(max_tokens=12))
    *deltas, last = got
    assert isinstance(last, Generation)
    assert all(isinstance(delta, Delta) and delta.text for delta in deltas)
    assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == last.text
    assert last.model == engine.info.name
    assert last.device == engine.info.device
    assert len(last.tokens) == len(last.logprobs) == last.usage.output_tokens
    assert all(logprob <= 0 for logprob in last.logprobs)


async def test_tokens_balance_and_the_second_time_some_are_cached(engine: Engine) -> None:
    request = asks("one two three " * 10, max_tokens=4)
    first, second = await generate(engine, request), await generate(engine, request)
    assert balanced(first)
    assert balanced(second)
    assert first.usage.input_tokens == second.usage.input_tokens > 0
    assert first.usage.cached_tokens == 0
    assert 0 < second.usage.cached_tokens < second.usage.input_tokens
    assert first.text == second.text


async def test_another_tenant_finds_nothing_cached(engine: Engine) -> None:
    request = {"text": "one two three " * 10, "max_tokens": 1}
    await generate(engine, asks(**request, tenant="a"))  # type: ignore[arg-type]
    assert (await generate(engine, asks(**request, tenant="b"))).usage.cached_tokens == 0  # type: ignore[arg-type]
    assert (await generate(engine, asks(**request, tenant="a"))).usage.cached_tokens > 0  # type: ignore[arg-type]


async def test_the_token_limit_is_kept_and_told(engine: Engine) -> None:
    done = await generate(engine, asks(max_tokens=3))
    assert done.usage.output_tokens == 3
    assert done.finish_reason == "length"


async def test_a_stop_string_ends_the_text_and_is_not_part_of_it(engine: Engine) -> None:
    whole = (await generate(engine, asks(max_tokens=10))).text
    stop = whole[4:7]
    got = await events(engine, asks(max_tokens=10, stop=("never to be found", stop)))
    last = got[-1]
    assert isinstance(last, Generation)
    assert last.text == whole[: whole.index(stop)]
    assert last.finish_reason == "stop"
    assert "".join(event.text for event in got[:-1]) == last.text


async def test_a_choice_is_one_of_the_choices(engine: Engine) -> None:
    done = await generate(engine, asks(constraint=Constraint("choice", ["yes", "no"])))
    assert done.text in ("yes", "no")
    assert done.finish_reason == "stop"


async def test_json_follows_its_schema(engine: Engine) -> None:
    done = await generate(engine, asks(constraint=Constraint("json_schema", SCHEMA)))
    assert isinstance(json.loads(done.text)["ok"], bool)
    assert done.finish_reason == "stop"


async def test_a_regular_expression_is_matched(engine: Engine) -> None:
    done = await generate(engine, asks(constraint=Constraint("regex", "[0-9]{3}")))
    assert len(done.text) == 3
    assert done.text.isdigit()


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("choice", []),
        Constraint("choice", [1, 2]),
        Constraint("choice", ["yes", ""]),
        Constraint("json_schema", ["no schema"]),
        Constraint("regex", "("),
        Constraint("regex", 5),
    ],
    ids=str,
)
async def test_a_constraint_that_cannot_be_is_refused(engine: Engine, constraint: Constraint) -> None:
    with pytest.raises(ConstraintInvalid):
        await generate(engine, asks(constraint=constraint))


async def test_a_prompt_that_does_not_fit_is_refused_with_both_counts(engine: Engine) -> None:
    with pytest.raises(PromptTooLong) as caught:
        await generate(engine, asks("one two three " * 400, max_tokens=20))
    assert caught.value.prompt_tokens > CONTEXT
    assert caught.value.output_tokens == 20
    assert caught.value.context_tokens == CONTEXT
    assert "--trim" in caught.value.hint
    with pytest.raises(PromptTooLong):
        await generate(engine, asks("short", max_tokens=CONTEXT, trim=True))


async def test_trim_cuts_the_oldest_and_records_how_much(engine: Engine) -> None:
    done = await generate(engine, asks("one two three " * 400, max_tokens=20, trim=True))
    assert done.usage.trimmed_tokens > 0
    assert done.usage.input_tokens <= CONTEXT - 20
    assert balanced(done)
    untouched = await generate(engine, asks("one two three", max_tokens=2, trim=True))
    assert untouched.usage.trimmed_tokens == 0


async def test_a_huge_input_is_refused_unread(engine: Engine) -> None:
    with pytest.raises(InputTooLarge):
        await generate(engine, asks("x" * 10_000_000, trim=True))
    with pytest.raises(InputTooLarge):
        await engine.score(ScoreRequest(("a",), text="x" * 10_000_000))


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": ("x",) * 40},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 1000.0},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("nan")}},
        {"stop_tokens": (-1,)},
        {"top_logprobs": 1000},
        {"n": 0},
        {"n": 1000},
        {"text": "both"},
    ],
    ids=str,
)
async def test_numbers_and_lists_have_bounds(engine: Engine, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        await generate(engine, Request(messages=(Message("user", "hi"),), **options))  # type: ignore[arg-type]


async def test_a_request_without_any_input_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError):
        await generate(engine, Request())
    with pytest.raises(UsageError):
        await engine.score(ScoreRequest(("a",)))
    with pytest.raises(UsageError):
        await engine.score(ScoreRequest((), text="hello"))


async def test_the_same_seed_draws_the_same_text(engine: Engine) -> None:
    request = asks(max_tokens=8, temperature=1.0, top_p=0.9, top_k=50, seed=11)
    assert (await generate(engine, request)).text == (await generate(engine, request)).text


async def test_a_stop_token_ends_the_text_and_is_not_part_of_it(engine: Engine) -> None:
    whole = await generate(engine, asks(max_tokens=6))
    place = next(at for at in range(1, 6) if whole.tokens[at] not in whole.tokens[:at])
    cut = await generate(engine, asks(max_tokens=6, stop_tokens=(whole.tokens[place],)))
    assert cut.finish_reason == "stop"
    assert cut.tokens[:place] == whole.tokens[:place]
    assert whole.text.startswith(cut.text)
    assert len(cut.text) < len(whole.text)


async def test_several_answers_come_of_one_prompt_that_is_computed_once(engine: Engine) -> None:
    request = asks(max_tokens=5, temperature=1.5, seed=3, top_logprobs=2, tenant="several")
    done = await generate(engine, replace(request, n=4))
    alone = await generate(engine, replace(request, tenant="alone"))
    assert done.usage.input_tokens == alone.usage.input_tokens
    assert (done.tokens, done.logprobs, done.text) == (alone.tokens, alone.logprobs, alone.text)
    assert len(done.others) == 3
    assert done.usage.output_tokens == len(done.tokens) + sum(len(one.tokens) for one in done.others)
    for one in (done, *done.others):
        assert len(one.tokens) == len(one.logprobs) == len(one.top_logprobs) > 0
        for logprob, places in zip(one.logprobs, one.top_logprobs, strict=True):
            assert max(value for _, value in places) >= logprob


async def test_a_grammar_is_kept(engine: Engine) -> None:
    done = await generate(engine, asks("yes", max_tokens=30, constraint=Constraint("lark", 'start: "no" | "yes" | "maybe"')))
    assert done.text in ("no", "yes", "maybe")


async def test_leaving_early_is_harmless_and_the_engine_goes_on(engine: Engine) -> None:
    for _ in range(5):
        stream = engine.stream(asks(max_tokens=50))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
    task = asyncio.create_task(generate(engine, asks(max_tokens=50)))
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert (await generate(engine, asks(max_tokens=3))).usage.output_tokens == 3


async def test_requests_run_together_and_do_not_mix(engine: Engine) -> None:
    prompts = [f"what is number {number}" for number in range(6)]
    alone = [(await generate(engine, asks(prompt, max_tokens=6))).text for prompt in prompts]
    together = await asyncio.gather(*(generate(engine, asks(prompt, max_tokens=6)) for prompt in prompts))
    assert [done.text for done in together] == alone


async def test_what_else_is_in_the_batch_and_in_the_cache_changes_nothing(engine: Engine) -> None:
    sizes = (3, 10, 20, 25, 40, 60, 70, 90)
    requests = [asks(f"{size} " + "one two three " * size, max_tokens=4 + size // 5) for size in sizes]
    questions = [ScoreRequest((" yes", " no maybe", " one two three"), text=f"is {size} " * size) for size in sizes[:4]]

    async def together(tenant: str, order: int = 1) -> tuple[list[Generation], list[Scores]]:
        many = [generate(engine, replace(request, tenant=tenant)) for request in requests][::order]
        scores = [engine.score(replace(request, tenant=tenant)) for request in questions][::order]
        done, scored = await asyncio.gather(asyncio.gather(*many), asyncio.gather(*scores))
        return done[::order], scored[::order]

    alone = [await generate(engine, replace(request, tenant="alone")) for request in requests]
    weighed = [await engine.score(replace(request, tenant="alone")) for request in questions]
    warm = await together("alone", -1)
    assert any(one.usage.cached_tokens for one in warm[0])
    for done, scored in (warm, await together("cold")):
        assert [(one.tokens, one.logprobs) for one in done] == [(one.tokens, one.logprobs) for one in alone]
        assert [one.choices for one in scored] == [one.choices for one in weighed]


async def test_any_event_loop_may_call(engine: Engine) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(asyncio.run(generate(engine, asks(max_tokens=5))).text)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    here = await generate(engine, asks(max_tokens=5))
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert found == [here.text] * 3


async def test_choices_are_scored_in_the_order_asked(engine: Engine) -> None:
    choices = (" yes", " no maybe", " one two three")
    scores = await engine.score(ScoreRequest(choices, text="the capital of the country " * 4))
    assert tuple(choice.text for choice in scores.choices) == choices
    assert all(choice.logprobs and all(value <= 0 for value in choice.logprobs) for choice in scores.choices)
    assert scores.best in scores.choices
    usage = scores.usage
    assert usage.cached_tokens + usage.computed_tokens == usage.input_tokens > 0
    assert usage.output_tokens == 0
    again = await engine.score(ScoreRequest(choices, text="the capital of the country " * 4))
    assert again.usage.cached_tokens > 0
    assert again.usage.input_tokens == usage.input_tokens


async def test_choices_can_follow_a_conversation(engine: Engine) -> None:
    scores = await engine.score(ScoreRequest(("yes", "no"), messages=(Message("user", "is it"),)))
    assert len(scores.choices) == 2


async def test_a_closed_engine_says_so(engine: Engine) -> None:
    await engine.close()
    await engine.close()
    with pytest.raises(EngineClosed):
        await generate(engine, asks())
    with pytest.raises(EngineClosed):
        await engine.score(ScoreRequest(("a",), text="b"))


async def test_closing_ends_what_runs(engine: Engine) -> None:
    stream = engine.stream(asks(max_tokens=400))
    await anext(stream)
    await engine.close()
    with pytest.raises(EngineClosed):
        async for _ in stream:
            pass
