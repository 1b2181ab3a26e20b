"""The judge: asked through the engine or a server, within bounds of time and number, and never believed unread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from judge_server import completion, judge_server

from agentops.engine import Engine
from agentops.engine.scripted import ScriptedEngine
from agentops.errors import EngineOverloaded, SettingsError, UsageError
from agentops.settings import Settings, load_settings
from evals.judge import EngineRespondent, Judge, JudgeFailed, ServerRespondent, open_judge

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "verdict": {"enum": [0, 1]}},
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}
GOOD = '{"reason": "so it is", "verdict": 1}'
MEANT = {"reason": "so it is", "verdict": 1}


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def now_ns(self) -> int:
        return int(self.seconds * 1e9)

    def monotonic_ns(self) -> int:
        return int(self.seconds * 1e9)


@asynccontextmanager
async def server_judge(url: str, **bounds: Any) -> AsyncIterator[Judge]:
    timeout_s = bounds.pop("timeout_s", 5.0)
    judge = Judge(ServerRespondent(url, "big", timeout_s=timeout_s), how="asked", timeout_s=timeout_s, pause_s=0.01, **bounds)
    try:
        yield judge
    finally:
        await judge.close()


async def failure(judge: Judge) -> str:
    with pytest.raises(JudgeFailed) as told:
        await judge.ask("Is it so?", SCHEMA)
    return str(told.value)


# --- the engine ---


async def test_the_engine_is_held_to_the_schema_while_it_writes() -> None:
    engine = ScriptedEngine([GOOD])
    judge = Judge(EngineRespondent(engine), how="asked")
    assert await judge.ask("Is it so?", SCHEMA) == MEANT
    (request,) = engine.requests
    assert request.messages[0].content == "Is it so?"
    assert request.constraint is not None
    assert request.constraint.value["properties"]["verdict"] == {"enum": [0, 1]}
    assert request.temperature == 0


async def test_an_answer_that_was_cut_is_asked_for_again_under_a_schema_whose_every_text_ends() -> None:
    wordy = {"type": "object", "properties": {"why": {"type": "string"}}, "required": ["why"]}
    engine = ScriptedEngine(['{"why": "' + "word " * 60 + '"}', '{"why": "brief"}'])
    judge = Judge(EngineRespondent(engine, max_tokens=40), how="asked")
    assert await judge.ask("Why?", wordy) == {"why": "brief"}
    first, second = (
        request.constraint.value["properties"]["why"]["maxLength"] for request in engine.requests if request.constraint
    )
    assert second < first


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (EngineOverloaded("9 requests are waiting", retry_after_s=1.0), "9 requests are waiting"),
        ("not at all", "does not satisfy"),
    ],
)
async def test_what_goes_wrong_in_the_engine_is_the_reason(answer: Any, reason: str) -> None:
    assert reason in await failure(Judge(EngineRespondent(ScriptedEngine([answer] * 9)), how="asked"))


async def test_a_prompt_that_does_not_fit_says_so() -> None:
    engine = ScriptedEngine([GOOD], context_tokens=200)
    judge = Judge(EngineRespondent(engine, max_tokens=100), how="asked")
    with pytest.raises(JudgeFailed, match=r"the prompt has [\d,]+ tokens and the context 200"):
        await judge.ask("word " * 500, SCHEMA)


@pytest.mark.model
async def test_the_real_engine_cannot_answer_anything_else(engine: Engine) -> None:
    judge = Judge(EngineRespondent(engine, max_tokens=64), how="asked")
    answers = await asyncio.gather(*(judge.ask(f"Is {n} even? Answer in JSON.", SCHEMA) for n in range(4)))
    assert all(set(answer) == {"reason", "verdict"} and answer["verdict"] in (0, 1) for answer in answers)


# --- a server ---


async def test_a_server_is_asked_with_the_schema_and_the_key_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "somebody's own")
    with judge_server(lambda body, n: completion(GOOD)) as server:
        judge = Judge(ServerRespondent(server.url, "big", "secret"), how="asked")
        keyless = Judge(ServerRespondent(server.url, "big"), how="asked")
        assert await judge.ask("Is it so?", SCHEMA) == await keyless.ask("Is it so?", SCHEMA) == MEANT
        await judge.close()
        await keyless.close()
    assert server.asked[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    assert (server.asked[0]["model"], server.asked[0]["temperature"]) == ("big", 0.0)
    assert server.keys == ["Bearer secret", "Bearer none"]


async def test_one_question_that_a_server_refuses_costs_no_other_its_schema() -> None:
    def script(body: dict[str, Any], n: int) -> tuple[int, str]:
        if "long" in body["messages"][0]["content"]:
            return 400, '{"error": {"message": "the context is 8192 tokens"}}'
        return completion(GOOD)

    with judge_server(script) as server:
        async with server_judge(server.url) as judge:
            with pytest.raises(JudgeFailed, match="its server answered 400"):
                await judge.ask("This is too long.", SCHEMA)
            assert await judge.ask("Is it so?", SCHEMA) == MEANT
        assert ["response_format" in body for body in server.asked] == [True, False, True]


async def test_a_server_without_schemas_is_asked_without() -> None:
    def script(body: dict[str, Any], n: int) -> tuple[int, str]:
        return (400, '{"error": {"message": "response_format is not known"}}') if "response_format" in body else completion(GOOD)

    with judge_server(script) as server:
        async with server_judge(server.url) as judge:
            assert [await judge.ask("Is it so?", SCHEMA) for _ in range(2)] == [MEANT, MEANT]
    assert ["response_format" in body for body in server.asked] == [True, False, False]


@pytest.mark.parametrize("text", [f"```json\n{GOOD}\n```", f"```\n{GOOD}\n```", f" {GOOD}\n"])
async def test_a_fence_around_the_answer_is_taken_off(text: str) -> None:
    with judge_server(lambda body, n: completion(text)) as server:
        async with server_judge(server.url) as judge:
            assert await judge.ask("Is it so?", SCHEMA) == MEANT


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I think that it is so.", "it is no JSON"),
        ("", "it is empty"),
        (None, "it is empty"),
        ('{"reason": "so it is", "verdict": 5}', "verdict: 5 is not one of"),
        ('{"reason": "so it is", "verdict": NaN}', "verdict: nan is not one of"),
        ('{"verdict": 1}', "'reason' is a required property"),
        ("[1]", "is not of type 'object'"),
        ("[" * 100_000, "it is no JSON"),
    ],
)
async def test_an_answer_that_cannot_be_used_is_asked_for_again_and_then_given_up(text: str | None, reason: str) -> None:
    with judge_server(lambda body, n: completion(text)) as server:
        async with server_judge(server.url, retries=2) as judge:
            assert reason in await failure(judge)
    assert len(server.asked) == 3
    assert reason in server.asked[1]["messages"][0]["content"], "the model is told what was wrong"


async def test_one_bad_answer_does_no_harm() -> None:
    with judge_server(lambda body, n: completion(GOOD if n else "hm")) as server:
        async with server_judge(server.url) as judge:
            assert await judge.ask("Is it so?", SCHEMA) == MEANT


@pytest.mark.parametrize(
    ("reply", "reason", "asked"),
    [
        ((500, "{}"), "its server answered 500", 3),
        ((429, "{}"), "its server answered 429", 3),
        ((401, "{}"), "its server answered 401", 1),
        ((404, "<html>"), "its server answered 404", 1),
        ((200, "<html>no</html>"), "no chat completion", 1),
        ((200, '{"choices": []}'), "no chat completion", 1),
    ],
)
async def test_a_server_that_fails_is_the_reason(reply: tuple[int, str], reason: str, asked: int) -> None:
    with judge_server(lambda body, n: reply) as server:
        async with server_judge(server.url) as judge:
            assert reason in await failure(judge)
    assert len(server.asked) == asked


async def test_a_server_that_hangs_is_given_up() -> None:
    gone = threading.Event()

    def hang(body: dict[str, Any], n: int) -> tuple[int, str]:
        gone.wait(20)
        return completion(GOOD)

    with judge_server(hang) as server:
        async with server_judge(server.url, timeout_s=0.3) as judge:
            assert await failure(judge) == "timeout"
        gone.set()


async def test_a_judge_that_is_down_is_not_waited_for_each_time() -> None:
    time = Time()
    up = [False]

    def script(body: dict[str, Any], n: int) -> tuple[int, str]:
        return completion(GOOD) if up[0] else (503, "{}")

    with judge_server(script) as server:
        async with server_judge(server.url, retries=1, clock=time) as judge:
            assert [await failure(judge) for _ in range(4)] == [*["its server answered 503"] * 3, "down"]
            assert len(server.asked) == 6, "it was not asked again"
            up[0] = True
            assert await failure(judge) == "down"
            time.seconds += 20
            assert await judge.ask("Is it so?", SCHEMA) == MEANT


async def test_a_server_that_is_away_for_a_moment_loses_nothing() -> None:
    with judge_server(lambda body, n: (503, "{}") if n % 3 < 2 else completion(GOOD)) as server:
        async with server_judge(server.url, retries=2) as judge:
            assert [await judge.ask("Is it so?", SCHEMA) for _ in range(5)] == [MEANT] * 5


async def test_nobody_at_the_address_is_the_reason() -> None:
    with judge_server(lambda body, n: completion(GOOD)) as server:
        url = server.url
    async with server_judge(url, retries=1) as judge:
        assert await failure(judge) == "not reachable"


# --- settings ---


def settings_with(**judge: Any) -> Settings:
    return load_settings({f"judge.{name}": value for name, value in judge.items()}, environment={})


class Large(ScriptedEngine):
    """Says that it has three billion parameters."""

    @property
    def info(self) -> Any:
        return replace(super().info, parameters=3_000_000_000)


@pytest.mark.parametrize(
    ("engine", "settings", "how", "name"),
    [
        (ScriptedEngine, {}, "computed", "scripted"),
        (Large, {}, "asked", "scripted"),
        (ScriptedEngine, {"how": "asked"}, "asked", "scripted"),
        (Large, {"how": "computed"}, "computed", "scripted"),
        (ScriptedEngine, {"url": "http://127.0.0.1:1/v1", "model": "big"}, "asked", "big"),
        (ScriptedEngine, {"url": "http://127.0.0.1:1/v1", "model": "big", "how": "computed"}, "computed", "scripted"),
    ],
)
def test_a_small_model_is_not_asked_unless_the_settings_say_so(
    engine: Callable[[], Engine], settings: dict[str, Any], how: str, name: str
) -> None:
    judge = open_judge(settings_with(**settings), engine())
    assert (judge.how, judge.name) == (how, name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "big"}, "judge.url names none"),
        ({"url": "http://127.0.0.1:1/v1"}, "no model of it"),
        ({"url": "http://me:secret@127.0.0.1:1/v1", "model": "big"}, "holds a name or a password"),
        ({"url": "ftp://127.0.0.1/v1", "model": "big"}, "cannot be"),
        ({"url": "http://127.0.0.1:99999/v1", "model": "big"}, "is no address"),
        ({"url": "http://127.0.0.1:1/v1?key=secret", "model": "big"}, "goes on behind the path"),
    ],
)
def test_an_address_that_cannot_be_right_is_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said) as told:
        open_judge(settings_with(**settings), ScriptedEngine())
    assert "secret" not in str(told.value)


def test_without_an_engine_nothing_can_be_computed() -> None:
    with pytest.raises(UsageError):
        open_judge(settings_with())
    with pytest.raises(UsageError):
        open_judge(settings_with(url="http://127.0.0.1:1/v1", model="big", how="computed"))


def test_a_key_is_not_sent_where_a_folder_says(tmp_path: Any) -> None:
    (tmp_path / "agentops.toml").write_text('[judge]\nurl = "http://somewhere.example/v1"\nmodel = "big"\n')
    settings = load_settings(environment={"AGENTOPS_JUDGE_API_KEY": "secret"}, folder=tmp_path)
    with pytest.raises(SettingsError, match="is not sent to") as told:
        open_judge(settings, ScriptedEngine())
    assert "secret" not in str(told.value)
    flag = {"judge.url": "http://127.0.0.1:1/v1"}
    open_judge(load_settings(flag, environment={"AGENTOPS_JUDGE_API_KEY": "secret"}, folder=tmp_path), ScriptedEngine())


def test_judges_that_may_answer_differently_are_told_apart() -> None:
    engine = ScriptedEngine()
    judges = [
        Judge(EngineRespondent(engine), how="asked"),
        Judge(EngineRespondent(engine), how="computed", engine=engine),
        Judge(EngineRespondent(ScriptedEngine(name="other")), how="asked"),
        Judge(ServerRespondent("http://a/v1", "big"), how="asked"),
        Judge(ServerRespondent("http://b/v1", "big"), how="asked"),
        Judge(ServerRespondent("http://b/v1", "bigger"), how="asked"),
    ]
    assert len({judge.identity for judge in judges}) == len(judges)
