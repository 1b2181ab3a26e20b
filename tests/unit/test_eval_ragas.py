"""Ragas' metrics behind our judge: what is wrong in ragas is shown, and that it does not reach a score."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judge_server import completion, judge_server

from agentops.clock import SystemClock
from agentops.engine import Engine
from agentops.engine.scripted import ScriptedEngine
from agentops.records import Message, Score, ToolCall
from evals.judge import EngineRespondent, Judge, JudgeFailed, ServerRespondent
from evals.metrics import NO_REFERENCE, Metric
from evals.metrics.ragas import ragas_metrics
from evals.samples import Context, Reference, Sample
from evals.verdicts import claims, is_evasive

JUDGED = {
    "faithfulness",
    "answer_relevancy",
    "context_precision",
    "context_precision_without_reference",
    "context_recall",
    "factual_correctness",
    "topic_adherence",
    "agent_goal_accuracy",
    "rubric",
}
BY_CODE = {"tool_call_accuracy", "tool_call_f1"}

WEATHER = ToolCall("weather", {"city": "Paris"}, "1")
CLAIMS = ["The tower is in Paris.", "It opened in 1889.", "It is painted green.", "It is made of cheese."]
SAMPLE = Sample(
    question="What is the tower?",
    answer=" ".join(CLAIMS),
    contexts=(Context("a", "The tower stands in Paris. It opened in 1889."), Context("b", "Bread is baked from flour.")),
    messages=(
        Message("system", "Be brief."),
        Message("user", "What is the weather in Paris?"),
        Message("assistant", "I look."),
        Message("tool", "sunny"),
        Message("assistant", "It is sunny."),
    ),
    tool_calls=(WEATHER,),
    reference=Reference(
        answer="The tower is in Paris.",
        trajectory=(WEATHER,),
        topics=("weather",),
        goal="The weather in Paris is told.",
        rubric={"1": "wrong", "5": "right"},
    ),
)

Say = Callable[[str, dict[str, Any]], Any]


class Voice:
    """A model that says what a test makes of the prompt and the schema: a value, a text, or an error to raise."""

    def __init__(self, say: Say, name: str = "voice") -> None:
        self.say, self.name, self.identity = say, name, name
        self.context_tokens: int | None = None
        self.prompts: list[str] = []

    async def answer(self, prompt: str, schema: dict[str, Any], attempt: int) -> str:
        self.prompts.append(prompt)
        said = self.say(prompt, schema)
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, str) else json.dumps(said)

    async def close(self) -> None:
        pass


class Letters:
    """An embedder for tests that are not about nearness: how often each letter occurs."""

    name, revision, dimensions = "letters", "1", 26

    def count_tokens(self, text: str) -> int:
        return len(text)

    def embed(self, texts: Any) -> Any:
        import numpy as np

        counts = np.array([[text.lower().count(chr(97 + i)) + 1e-6 for i in range(26)] for text in texts], dtype=np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def fill(schema: dict[str, Any], leaves: dict[str, Any], root: dict[str, Any] | None = None) -> Any:
    """The least value that fits a schema, with `leaves` for properties of these names."""
    root = root or schema
    if "$ref" in schema:
        return fill(root["$defs"][schema["$ref"].rpartition("/")[2]], leaves, root)
    if "enum" in schema:
        return schema["enum"][-1]
    if schema.get("type") == "object":
        return {name: leaves.get(name, fill(part, leaves, root)) for name, part in schema["properties"].items()}
    if schema.get("type") == "array":
        return [fill(schema["items"], leaves, root) for _ in range(schema.get("minItems", 1))]
    return {"string": "words", "integer": 1, "boolean": True, "number": 1.0}[schema["type"]]


def obliging(**leaves: Any) -> Say:
    return lambda prompt, schema: fill(schema, leaves)


def metrics(say: Say | Voice, **bounds: Any) -> dict[str, Metric]:
    voice = say if isinstance(say, Voice) else Voice(say)
    return ragas_metrics(Judge(voice, how="asked", **{"retries": 1, "pause_s": 0.0, **bounds}), Letters())


async def scored(name: str, say: Say | Voice, sample: Sample = SAMPLE) -> Score:
    return await metrics(say)[name].score(sample)


def raw(name: str, answer: Say, **parts: Any) -> Any:
    """Ragas' own metric of that name, with a judge that has no guards."""
    from evals.metrics import _ragas

    async def respond(prompt: Any, model: Any) -> Any:
        return answer(prompt, model.model_json_schema())

    metric = getattr(_ragas.collections, name)(llm=_ragas.Respondent(respond), **parts)
    return _ragas.prepare(metric, examples=True)


# --- what they are ---


def test_all_metrics_are_there_and_have_bounds() -> None:
    made = metrics(obliging())
    assert set(made) == JUDGED | BY_CODE
    for name, metric in made.items():
        assert metric.name == name
        assert metric.low < metric.high
        assert metric.better == "high"


async def test_a_judge_that_agrees_gives_full_marks_and_says_how_it_judged() -> None:
    made = metrics(obliging(noncommittal=0, refused_to_answer=False, question="What is the tower?"))
    for name, metric in made.items():
        score = await metric.score(SAMPLE)
        assert score.value == pytest.approx(metric.high), (name, score.reason)
        assert score.judged == ("asked" if name in JUDGED else "")
        assert score.source == ("model" if name in JUDGED else "code")


async def test_a_judge_that_denies_gives_none_and_its_claims_are_told() -> None:
    def deny(prompt: str, schema: dict[str, Any]) -> Any:
        filled = fill(schema, {"statements": CLAIMS, "claims": CLAIMS} if "verdict" not in json.dumps(schema) else {})
        return json.loads(json.dumps(filled).replace('"verdict": 1', '"verdict": 0'))

    score = await scored("faithfulness", deny)
    assert score.value == 0
    assert [one["verdict"] for one in score.details["verdicts"]] == [0, 0, 0, 0]
    assert score.details["judge"] == "voice"
    assert score.comment == "words; words; words; words"


async def test_a_small_context_is_spared_the_examples() -> None:
    short, long = Voice(obliging()), Voice(obliging())
    short.context_tokens = 8_192
    for name in JUDGED:
        short.prompts.clear()
        long.prompts.clear()
        assert (await metrics(short)[name].score(SAMPLE)).value == (await metrics(long)[name].score(SAMPLE)).value
        for brief, full in zip(short.prompts, long.prompts, strict=True):
            assert "EXAMPLES" in full, name
            assert "EXAMPLES" not in brief, name
            assert len(brief) < 0.75 * len(full), name


# --- what is missing ---


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (
            {"reference": Reference()},
            dict.fromkeys(
                (
                    *("context_precision", "context_recall", "factual_correctness", "topic_adherence"),
                    *("agent_goal_accuracy", "tool_call_accuracy", "tool_call_f1", "rubric"),
                ),
                NO_REFERENCE,
            ),
        ),
        ({"answer": " "}, {"faithfulness": "no answer", "answer_relevancy": "no answer", "rubric": "no answer"}),
        ({"question": ""}, {"faithfulness": "no question", "answer_relevancy": "no question"}),
        ({"contexts": ()}, {"faithfulness": "no contexts", "context_precision_without_reference": "no contexts"}),
        (
            {"messages": (), "question": "", "answer": ""},
            {"topic_adherence": "no messages", "agent_goal_accuracy": "no messages"},
        ),
        (
            {"reference": Reference(rubric={"1": "bad", "9": "good"})},
            {"rubric": "the rubric's grade '9' is not one of 1 to 5"},
        ),
    ],
)
async def test_what_is_missing_is_the_reason(change: dict[str, Any], reasons: dict[str, str]) -> None:
    voice = Voice(obliging())
    made = metrics(voice)
    sample = replace(SAMPLE, **change)
    assert {name: (await made[name].score(sample)).reason for name in reasons} == reasons
    assert not voice.prompts, "nobody needs to be asked for that"


async def test_an_answer_without_claims_is_not_scored() -> None:
    score = await scored("faithfulness", obliging(statements=[]))
    assert (score.value, score.reason) == (None, "no claims")


# --- the defects of ragas ---


async def test_a_judge_that_answers_five() -> None:
    five = {"reason": "very good", "verdict": 5}
    metric = raw("ContextPrecisionWithReference", lambda prompt, schema: five)
    arguments = {"user_input": "q", "reference": "r", "retrieved_contexts": ["a", "b"]}
    assert (await metric.ascore(**arguments)).value > 4, "ragas takes it"
    score = await scored("context_precision", lambda prompt, schema: five)
    assert score.value is None
    assert score.reason == "judge: its answer cannot be used: verdict: 5 is not one of [0, 1]"


async def test_one_verdict_for_four_claims() -> None:
    def lazy(prompt: str, schema: dict[str, Any]) -> Any:
        if "verdict" not in json.dumps(schema):
            return dict.fromkeys(schema["properties"], CLAIMS)
        return {"statements": [{"statement": CLAIMS[0], "reason": "so it is", "verdict": 1}]}

    metric = raw("Faithfulness", lazy)
    arguments = {"user_input": "q", "response": SAMPLE.answer, "retrieved_contexts": ["The tower stands in Paris."]}
    assert (await metric.ascore(**arguments)).value == 1.0, "ragas takes it"
    score = await scored("faithfulness", lazy)
    assert score.value is None
    assert score.reason.startswith("judge: its answer cannot be used: statements: ")
    assert (await scored("factual_correctness", lazy)).value is None


async def test_one_verdict_for_a_reference_of_four_sentences() -> None:
    one = {"classifications": [{"statement": CLAIMS[0], "reason": "so it is", "attributed": 1}]}
    metric = raw("ContextRecall", lambda prompt, schema: one)
    arguments = {"user_input": "q", "reference": " ".join(CLAIMS), "retrieved_contexts": ["The tower stands in Paris."]}
    assert (await metric.ascore(**arguments)).value == 1.0, "ragas takes it"
    four = replace(SAMPLE, reference=Reference(answer=" ".join(CLAIMS)))
    assert (await scored("context_recall", lambda prompt, schema: one, four)).value is None
    assert (await scored("context_recall", lambda prompt, schema: one)).value == 1.0


async def test_classes_for_fewer_topics_than_there_are() -> None:
    said = {"topics": ["sun", "rain"], "refused_to_answer": False, "classifications": [True]}

    def lazy(prompt: str, schema: dict[str, Any]) -> Any:
        return {name: said[name] for name in schema["properties"]}

    from evals.metrics import _ragas

    metric = raw("TopicAdherence", lazy)
    messages = [_ragas.HumanMessage(content="Sun or rain?"), _ragas.AIMessage(content="Sun.")]
    assert 0 < (await metric.ascore(user_input=messages, reference_topics=["weather"])).value < 1, "ragas fills it up"
    assert (await scored("topic_adherence", lazy)).value is None


async def test_a_refusal_of_all_that_is_off_topic_is_not_a_failure() -> None:
    said = {"topics": ["bombs"], "refused_to_answer": True, "classifications": [False]}

    def strict(prompt: str, schema: dict[str, Any]) -> Any:
        return {name: said[name] for name in schema["properties"]}

    from evals.metrics import _ragas

    messages = [_ragas.HumanMessage(content="How is a bomb made?"), _ragas.AIMessage(content="I will not say.")]
    theirs = await raw("TopicAdherence", strict).ascore(user_input=messages, reference_topics=["weather"])
    assert theirs.value == 0.0, "ragas divides nothing by nothing"
    score = await scored("topic_adherence", strict)
    assert (score.value, score.reason) == (None, "nothing on topic was asked, and nothing else was answered")


@pytest.mark.parametrize("garbage", ["I cannot judge that.", "{}", "[]", "null", '{"verdict": "yes"}', ""])
async def test_a_judge_that_answers_garbage(garbage: str) -> None:
    voice = Voice(lambda prompt, schema: garbage)
    made = metrics(voice)
    for name in JUDGED:
        voice.prompts.clear()
        score = await made[name].score(SAMPLE)
        assert score.value is None, name
        assert score.reason.startswith("judge: its answer cannot be used"), name
        assert len(voice.prompts) == 2, "asked once and once more"


async def test_a_garbage_judge_raises_in_one_of_ragas_metrics_and_is_nan_in_another() -> None:
    with pytest.raises(ValueError, match="verdict"):
        await raw("ContextPrecisionWithReference", lambda prompt, schema: {"verdict": "maybe"}).ascore(
            user_input="q", reference="r", retrieved_contexts=["a"]
        )
    empty = raw("ContextRecall", lambda prompt, schema: {"classifications": []})
    assert math.isnan((await empty.ascore(user_input="q", reference="r", retrieved_contexts=["a"])).value)
    score = await scored("context_recall", lambda prompt, schema: {"classifications": []})
    assert score.value is None


async def test_an_empty_question_is_not_an_irrelevant_answer() -> None:
    from evals.metrics import _ragas

    empty = {"question": "", "noncommittal": 0}
    metric = raw("AnswerRelevancy", lambda prompt, schema: empty, embeddings=_ragas.Embeddings(Letters()))
    assert (await metric.ascore(user_input="q", response="a")).value == 0.0, "ragas takes it"
    assert (await scored("answer_relevancy", lambda prompt, schema: empty)).value is None


async def test_a_grade_outside_the_rubric() -> None:
    seven = {"feedback": "splendid", "score": 7}
    arguments = {"rubrics": {"score1_description": "bad"}, "user_input": "q", "response": "a"}
    assert (await raw("InstanceSpecificRubrics", lambda prompt, schema: seven).ascore(**arguments)).value == 7, "ragas takes it"
    assert (await scored("rubric", lambda prompt, schema: seven)).value is None
    three = {"feedback": "between", "score": 3}
    assert (await scored("rubric", lambda prompt, schema: three)).value is None, "the rubric has the grades 1 and 5"
    assert (await scored("rubric", lambda prompt, schema: {"feedback": "right", "score": 5})).value == 5


async def test_answers_of_one_model_are_not_given_for_anothers() -> None:
    from ragas.cache import CacheInterface, cacher

    class Memory(dict[str, Any], CacheInterface):
        def set(self, key: str, value: Any) -> None:
            self[key] = value

        def has_key(self, key: str) -> bool:
            return key in self

    class Client:
        def __init__(self, verdict: int, cache: Any) -> None:
            self.verdict = verdict
            self.generate = cacher(cache)(self.generate)  # type: ignore[method-assign]

        def generate(self, prompt: str) -> int:
            return self.verdict

    cache = Memory()
    assert [Client(1, cache).generate("so?"), Client(0, cache).generate("so?")] == [1, 1], "ragas' key has no model in it"

    yes, no = Voice(obliging(), "yes"), Voice(lambda prompt, schema: fill(schema, {"verdict": 0}), "no")
    first, second = metrics(yes)["context_precision"], metrics(no)["context_precision"]
    assert [(await first.score(SAMPLE)).value, (await second.score(SAMPLE)).value] == [1, 0]
    assert first.version != second.version


# --- calls of tools ---


@pytest.mark.parametrize(
    ("made", "expected", "accuracy", "f1"),
    [
        ([("f", {"a": 1})], [("f", {"a": 1})], 1.0, 1.0),
        ([("f", {"a": 1, "force": True})], [("f", {"a": 1})], 0.5, 0.0),
        ([("f", {"force": True})], [("f", {})], 0.0, 0.0),
        ([("f", {"a": {"x": 1, "y": 2}})], [("f", {"a": {"y": 2, "x": 1}})], 1.0, 1.0),
        ([("f", {"a": 1.0})], [("f", {"a": 1})], 1.0, 1.0),
        ([("f", {"a": {"x": [1.0]}})], [("f", {"a": {"x": [1]}})], 1.0, 1.0),
        ([("f", {"a": "1"})], [("f", {"a": 1})], 0.0, 0.0),
        ([("f", {"a": 1}), ("f", {"a": 1})], [("f", {"a": 1})], 0.0, 0.6667),
        ([("f", {}), ("g", {})], [("g", {}), ("f", {})], 0.0, 1.0),
        ([], [("f", {})], 0.0, 0.0),
        ([("f", {})], [], 0.0, 0.0),
        ([], [], 1.0, 1.0),
    ],
)
async def test_calls_are_compared_with_all_their_arguments(
    made: list[tuple[str, dict[str, Any]]], expected: list[tuple[str, dict[str, Any]]], accuracy: float, f1: float
) -> None:
    def calls(given: list[tuple[str, dict[str, Any]]]) -> tuple[ToolCall, ...]:
        return tuple(ToolCall(name, arguments, str(n)) for n, (name, arguments) in enumerate(given))

    sample = replace(SAMPLE, tool_calls=calls(made), reference=Reference(trajectory=calls(expected)))
    both = metrics(obliging())
    values = [(await both[name].score(sample)).value for name in ("tool_call_accuracy", "tool_call_f1")]
    assert values == [pytest.approx(accuracy), pytest.approx(f1)]


async def test_ragas_does_not_see_surplus_arguments_or_calls_made_twice() -> None:
    from evals.metrics import _ragas

    def asked(*arguments: dict[str, Any]) -> list[Any]:
        return [_ragas.AIMessage(content="", tool_calls=[_ragas.ToolCall(name="f", args=one) for one in arguments])]

    expected = [_ragas.ToolCall(name="f", args={"a": 1})]
    accuracy, f1 = _ragas.collections.ToolCallAccuracy(), _ragas.collections.ToolCallF1()
    surplus = await accuracy.ascore(user_input=asked({"a": 1, "force": True}), reference_tool_calls=expected)
    twice = await f1.ascore(user_input=asked({"a": 1}, {"a": 1}), reference_tool_calls=expected)
    assert (surplus.value, twice.value) == (1.0, 1.0)
    assert (await f1.ascore(user_input=asked(), reference_tool_calls=[])).value == 0.0, "nor that nothing was to be called"


async def test_calls_of_tools_reach_the_judge() -> None:
    from langchain_core.messages import AIMessage, HumanMessage
    from ragas.integrations.langgraph import convert_to_ragas_messages

    call = {"name": "weather", "args": {"city": "Paris"}, "id": "1"}
    theirs = convert_to_ragas_messages([HumanMessage("weather?"), AIMessage("I look.", tool_calls=[call])])
    assert not theirs[1].tool_calls, "ragas' own converter drops them"

    voice = Voice(obliging())
    assert (await metrics(voice)["agent_goal_accuracy"].score(SAMPLE)).value == 1
    assert "AI: I look.\\nTools:\\n  weather: {'city': 'Paris'}\\nToolOutput: sunny\\nAI: It is sunny." in voice.prompts[0]
    assert "Be brief" not in voice.prompts[0]
    late = replace(SAMPLE, messages=tuple(message for message in SAMPLE.messages if message.role != "tool"))
    assert (await metrics(voice)["agent_goal_accuracy"].score(late)).value == 1
    assert "Tools:\\n  weather: {'city': 'Paris'}" in voice.prompts[2]


# --- a judge that is down ---


async def test_what_was_scored_before_the_judge_went_down_stays() -> None:
    def script(body: dict[str, Any], n: int) -> tuple[int, str]:
        if n >= 4:
            return 503, "{}"
        return completion(json.dumps(fill(body["response_format"]["json_schema"]["schema"], {})))

    with judge_server(script) as server:
        judge = Judge(ServerRespondent(server.url, "big", timeout_s=5.0), how="asked", retries=0)
        metric = ragas_metrics(judge, Letters())["context_precision"]
        scores = [await metric.score(SAMPLE) for _ in range(6)]
        await judge.close()
    assert [score.value for score in scores] == [1, 1, None, None, None, None]
    assert [score.reason for score in scores[2:]] == [*["judge: its server answered 503"] * 3, "judge: down"]
    assert len(server.asked) == 7


async def test_a_judge_that_hangs_leaves_samples_unscored() -> None:
    class Hanging(Voice):
        async def answer(self, prompt: str, schema: dict[str, Any], attempt: int) -> str:
            await asyncio.sleep(60)
            return ""

    made = metrics(Hanging(obliging()), timeout_s=0.05)
    begin = SystemClock().monotonic_ns()
    reasons = [(await made["faithfulness"].score(SAMPLE)).reason for _ in range(5)]
    assert reasons == [*["judge: timeout"] * 3, *["judge: down"] * 2]
    assert SystemClock().monotonic_ns() - begin < 5e9


@pytest.mark.parametrize("error", [JudgeFailed("no"), RuntimeError("a defect"), KeyError("x"), RecursionError()])
async def test_whatever_a_judge_raises_is_a_reason(error: Exception) -> None:
    made = metrics(lambda prompt, schema: error)
    for name in JUDGED:
        assert (await made[name].score(SAMPLE)).value is None
        assert (await made[name].score(SAMPLE)).reason


# --- computed ---


async def test_a_verdict_that_cannot_be_computed_is_not_made_up() -> None:
    engine = ScriptedEngine()
    judge = Judge(EngineRespondent(engine), how="computed", engine=engine, embedder=Letters())
    score = await ragas_metrics(judge, Letters())["rubric"].score(SAMPLE)
    assert score.value is None
    assert score.reason == "judge: it must be one that can be asked; name a server in judge.url and its model in judge.model"
    assert not engine.requests


async def test_evasive_answers_are_not_relevant_and_refusals_are_not_answers() -> None:
    engine = ScriptedEngine()
    judge = Judge(EngineRespondent(engine), how="computed", engine=engine, embedder=Letters())
    made = ragas_metrics(judge, Letters())
    evasive = replace(SAMPLE, answer="I do not know: the documents do not answer that.")
    assert (await made["answer_relevancy"].score(evasive)).value == 0
    assert (await made["faithfulness"].score(evasive)).reason == "no claims"


# --- many ---


async def test_of_five_hundred_judgements_each_is_scored_or_says_why_not() -> None:
    chance = random.Random(7)

    def moody(prompt: str, schema: dict[str, Any]) -> Any:
        mood = chance.random()
        if mood < 0.1:
            return chance.choice(["", "no idea", "{", "NaN", "[1, 2]", '{"verdict": Infinity}', '{"score": -1}'])
        if mood < 0.15:
            return chance.choice([JudgeFailed("not reachable"), ValueError("broken"), TimeoutError()])
        if mood < 0.25:
            return fill(schema, {"verdict": 5, "score": 99, "statements": [], "classifications": [], "noncommittal": 7})
        return fill(schema, {"statements": CLAIMS[: chance.randint(0, 3)]} if "verdict" not in json.dumps(schema) else {})

    answers = (
        "",
        "Yes.",
        "I do not know.",
        SAMPLE.answer,
        "word " * 3_000,
        "да 是 نعم \U0001f600",
        '{"verdict": 5}',
        "\x00\x1b[2J",
    )
    references = (SAMPLE.reference, Reference(), replace(SAMPLE.reference, rubric={"good": "good"}))
    samples = [
        replace(SAMPLE, answer=answers[n % len(answers)], reference=references[n % 3], contexts=SAMPLE.contexts[: n % 4])
        for n in range(56)
    ]
    made = metrics(moody, retries=0)
    judged = [(made[name], await made[name].score(sample)) for sample in samples for name in sorted(JUDGED)]
    assert len(judged) >= 500
    for metric, score in judged:
        assert (score.value is None) == bool(score.reason)
        assert score.value is None or metric.low <= score.value <= metric.high
        json.dumps(dict(score.details), allow_nan=False)
    assert sum(score.value is not None for _, score in judged) > 100
    assert sum(score.reason.startswith("judge") for _, score in judged) > 100


# --- the real model ---


BRIDGE = Sample(
    question="When was the harbour bridge opened?",
    answer="The harbour bridge was opened in 1932 [1].",
    contexts=(
        Context("1", "The harbour bridge was opened in March 1932 after eight years of work. It carries eight lanes of traffic."),
        Context("2", "Sourdough bread rises slowly, because wild yeast works at its own pace."),
    ),
    messages=(
        Message("user", "When was the harbour bridge opened?"),
        Message("assistant", "The harbour bridge was opened in 1932."),
        Message("user", "How do I bake bread?"),
        Message("assistant", "I cannot help with that."),
    ),
    reference=Reference(
        answer="The bridge was opened in 1932.",
        topics=("bridges and buildings",),
        goal="The harbour bridge was opened in 1932.",
        rubric={"1": "wrong", "5": "right"},
    ),
)
INVENTED = replace(BRIDGE, answer="Dolphins painted the walls of an old opera house; nobody had asked the mayor of Vienna.")


@pytest.fixture
def computing(engine: Engine, embedder_folder: Path) -> tuple[Judge, dict[str, Metric]]:
    from agentops.retrieval.embed import open_embedder

    embedder = open_embedder(embedder_folder, 2)
    judge = Judge(EngineRespondent(engine), how="computed", engine=engine, embedder=embedder)
    return judge, ragas_metrics(judge, embedder)


@pytest.mark.model
async def test_the_small_model_computes_verdicts(computing: tuple[Judge, dict[str, Metric]]) -> None:
    _, made = computing
    good = {name: await made[name].score(BRIDGE) for name in JUDGED - {"rubric"}}
    bad = {name: await made[name].score(INVENTED) for name in ("faithfulness", "factual_correctness", "answer_relevancy")}
    swapped = await made["context_precision"].score(replace(BRIDGE, contexts=BRIDGE.contexts[::-1]))
    assert all(score.judged == "computed" for score in good.values())
    for name in ("faithfulness", "context_precision", "context_recall", "factual_correctness", "agent_goal_accuracy"):
        assert good[name].value == 1, (name, good[name])
    assert good["topic_adherence"].value == 1, good["topic_adherence"]
    assert swapped.value == 0.5
    assert bad["faithfulness"].value == bad["factual_correctness"].value == 0
    assert len(bad["faithfulness"].details["verdicts"]) == 2, "two clauses"
    assert (bad["answer_relevancy"].value or 0) < 0.3 < (good["answer_relevancy"].value or 0)


@pytest.mark.model
async def test_the_small_model_can_be_asked_and_always_answers_in_form(engine: Engine) -> None:
    judge = Judge(EngineRespondent(engine, 48), how="asked")
    made = ragas_metrics(judge, Letters())
    scores = await asyncio.gather(*(made[name].score(BRIDGE) for name in ("context_precision", "agent_goal_accuracy", "rubric")))
    assert [score.reason for score in scores] == [""] * 3
    assert all(score.judged == "asked" for score in scores)


# --- claims ---


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The tower is in Paris. It opened in 1889 [1].", ["The tower is in Paris.", "It opened in 1889."]),
        ("The tower opened in 1889, and it is painted brown.", ["The tower opened in 1889", "it is painted brown."]),
        ("Bread, cheese, and a glass of wine.", ["Bread, cheese, and a glass of wine."]),
        ("Is it so? I do not know that.", []),
        ("I do not know: the documents do not answer it. The nearest they have is about: Metrics; Runs are kept.", []),
        ("42", ["42"]),
        ("Yes.", ["Yes."]),
        ("", []),
        ("- one tower\n- two bridges", ["one tower", "two bridges"]),
    ],
)
def test_a_text_is_taken_apart_into_what_it_claims(text: str, found: list[str]) -> None:
    assert claims(text) == found


@pytest.mark.parametrize(
    ("text", "evasive"),
    [
        ("I do not know: the documents do not answer that.", True),
        ("The nearest they have is about: Metrics > Judged; Runs.", True),
        ("The closest star is about four light years away.", False),
        ("I'm sorry, but I can't help with that.", True),
        ("It depends.", True),
        ("The tower opened in 1889.", False),
        ("Nobody knows the tower better than its painter.", False),
    ],
)
def test_evasive_answers_are_known_by_their_words(text: str, evasive: bool) -> None:
    assert is_evasive(text) is evasive


@pytest.mark.parametrize(
    ("answer", "reference", "unscored"),
    [
        (
            "I don't know.",
            "I do not know that.",
            {"faithfulness", "factual_correctness", "context_precision", "context_precision_without_reference", "context_recall"},
        ),
        ("I don't know.", "It opened in 1889.", {"faithfulness", "context_precision_without_reference"}),
        ("It opened in 1889.", "I do not know that.", {"context_precision", "context_recall"}),
    ],
)
async def test_what_claims_nothing_is_not_wrong_for_that(answer: str, reference: str, unscored: set[str]) -> None:
    engine = ScriptedEngine()
    judge = Judge(EngineRespondent(engine), how="computed", engine=engine, embedder=Letters())
    made = ragas_metrics(judge, Letters())
    sample = replace(BRIDGE, answer=answer, reference=Reference(answer=reference))
    names = ("faithfulness", "factual_correctness", "context_precision", "context_precision_without_reference", "context_recall")
    scores = {name: await made[name].score(sample) for name in names}
    assert {name for name in names if scores[name].value is None} == unscored
    assert {score.reason for score in scores.values() if score.value is None} == {"no claims"}
    if "factual_correctness" not in unscored:
        assert scores["factual_correctness"].value == 0, "one claims something and the other does not"


async def test_a_computed_verdict_has_a_limit_of_time_as_well() -> None:
    engine = ScriptedEngine(delay_s=5)
    judge = Judge(EngineRespondent(engine), how="computed", engine=engine, embedder=Letters(), timeout_s=0.1)
    assert (await ragas_metrics(judge, Letters())["faithfulness"].score(SAMPLE)).reason == "judge: timeout"
