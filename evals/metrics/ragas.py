"""Ragas' metrics, on our judge and our embedder.

The formulas and the prompts are those of ragas 0.4 (`ragas.metrics.collections`). What it does not check is checked here: an
answer of the judge fits its question (0 or 1 where that was asked for, one verdict a claim), a value lies within its bounds,
calls of tools are compared with all of their arguments and as often as they were made; and whatever goes wrong leaves the
sample unscored, with the reason. No cache of ragas' is used: it gives one model's answers for another's. ragas itself is
loaded when the first score is computed.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata, util
from typing import TYPE_CHECKING, Any

from agentops.errors import AgentOpsError, UsageError
from agentops.records import Score
from agentops.text import split_sentences
from evals.judge import Judge, JudgeFailed, Schema
from evals.metrics import NO_REFERENCE, Metric, Unscored, in_one_form
from evals.samples import Sample
from evals.support import load_weights

if TYPE_CHECKING:
    from pydantic import BaseModel

    from agentops.retrieval import Embedder
    from evals.metrics._ragas import Prompt

SMALL_CONTEXT = 16_384
"""Tokens of context below which prompts go without their examples, which makes them a third as long."""

_VERSION = "2"
_TOLERANCE = 1e-6
_BINARY = ("verdict", "attributed", "noncommittal")
_SHOWN, _TEXT = 50, 500


class Settled(Exception):
    """The value is known without asking."""

    def __init__(self, value: float, comment: str) -> None:
        super().__init__(comment)
        self.value = value


@dataclass(frozen=True, slots=True)
class Kind:
    """One of ragas' metrics: the name of its class, what it is given for a sample, and its bounds. `negative` says that values
    below `low` are as bad as it, and not wrong; `check` raises `Unscored` for answers that ragas makes no sense of."""

    name: str
    ragas: str
    arguments: Callable[[Sample], dict[str, Any]]
    judged: bool = True
    embeds: bool = False
    low: float = 0.0
    high: float = 1.0
    negative: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Sequence[Mapping[str, Any]]], None] = lambda answers: None


def ragas_metrics(judge: Judge | None, embedder: Embedder | None) -> dict[str, Metric]:
    """All of them, by name; without a judge or an embedder those that need none.

    Raises:
        UsageError: ragas is not installed.
    """
    if util.find_spec("ragas") is None:
        raise UsageError("ragas is not installed", hint="install it with: pip install 'agentops-runtime[evals]'")
    return {
        kind.name: RagasMetric(kind, judge if kind.judged else None, embedder if kind.embeds else None)
        for kind in KINDS
        if (judge or not kind.judged) and (embedder or not kind.embeds)
    }


class RagasMetric:
    """A `Metric` of ragas', with the judge and the embedder that it needs. Its version names the judge: scores of two judges are
    scores of two metrics."""

    better = "high"

    def __init__(self, kind: Kind, judge: Judge | None, embedder: Embedder | None) -> None:
        self._kind, self._judge, self._embedder = kind, judge, embedder
        measured = f" {load_weights().identity}" if judge is not None and judge.how == "computed" else ""
        judged = f" {judge.identity}{measured}" if judge is not None else ""
        embedded = f" {embedder.name} {embedder.revision}" if embedder is not None else ""
        self.name, self.low, self.high = kind.name, kind.low, kind.high
        self.version = f"{_VERSION} ragas {metadata.version('ragas')}{judged}{embedded}"

    async def score(self, sample: Sample) -> Score:
        """As `Metric.score`."""
        asked = Questions(self._judge, sample)
        try:
            value = self._checked(await self._value(sample, asked))
            self._kind.check(asked.answers)
            return Score(self.name, value, self._source, judged=self._judged, comment=asked.comment, details=asked.details)
        except Settled as known:
            return Score(self.name, known.value, self._source, judged=self._judged, comment=str(known))
        except Unscored as nothing:
            return self._unscored(str(nothing), asked)
        except JudgeFailed as failure:
            return self._unscored(f"judge: {failure}", asked)
        except AgentOpsError as error:
            return self._unscored(f"{error}", asked)
        except Exception as error:
            # What this is nobody knows; so what was answered is not looked at again.
            return self._unscored(f"{type(error).__name__}: {error}"[:500])

    async def _value(self, sample: Sample, asked: Questions) -> float:
        # Importing it takes seconds, in which others go on.
        _ragas = await asyncio.to_thread(import_module, "evals.metrics._ragas")
        arguments = self._kind.arguments(sample)
        parts: dict[str, Any] = dict(self._kind.options)
        if self._judge is not None:
            parts["llm"] = _ragas.Respondent(asked.answer)
        if self._embedder is not None:
            parts["embeddings"] = _ragas.Embeddings(self._embedder)
        room = self._judge.context_tokens if self._judge is not None else None
        metric = getattr(_ragas.collections, self._kind.ragas)(**parts)
        _ragas.prepare(metric, examples=room is None or room >= SMALL_CONTEXT)
        return float((await metric.ascore(**arguments)).value)

    def _checked(self, value: float) -> float:
        if math.isnan(value):
            raise Unscored("no claims")
        if self._kind.negative:
            value = max(value, self.low)
        if not self.low - _TOLERANCE <= value <= self.high + _TOLERANCE:
            raise Unscored(f"judge: the value {value:g} is not between {self.low:g} and {self.high:g}")
        # Adding 0 makes -0.0 what it is.
        return round(min(max(value, self.low), self.high), 6) + 0.0

    def _unscored(self, reason: str, asked: Questions | None = None) -> Score:
        details = asked.details if asked is not None else {}
        return Score(self.name, None, self._source, reason=reason or "unknown", judged=self._judged, details=details)

    @property
    def _judged(self) -> str:
        return self._judge.how if self._judge is not None else ""

    @property
    def _source(self) -> Any:
        return "model" if self._judge is not None else "code"


class Questions:
    """The questions that one score asks of the judge, and what was answered."""

    def __init__(self, judge: Judge | None, sample: Sample) -> None:
        self._judge, self._sample = judge, sample
        self.answers: list[dict[str, Any]] = []

    async def answer(self, prompt: Prompt, model: type[BaseModel]) -> Any:
        """
        Raises:
            JudgeFailed, AgentOpsError, Unscored
        """
        assert self._judge is not None
        if self._judge.how == "computed":
            from evals.metrics.ragas_computed import computed

            try:
                async with asyncio.timeout(self._judge.timeout_s):
                    value = await computed(self._judge, self._sample, prompt.given)
            except TimeoutError:
                raise JudgeFailed("timeout", hint="raise judge.timeout_s") from None
        else:
            value = await self._judge.ask(prompt, narrowed(model.model_json_schema(), prompt.given))
        self.answers.append(value)
        return value

    @property
    def details(self) -> dict[str, Any]:
        """The verdicts by claim, as far as there are any, and who gave them."""
        if not self.answers or self._judge is None:
            return {}
        return {"judge": self._judge.name, "questions": len(self.answers), "verdicts": self._verdicts[:_SHOWN]}

    @property
    def comment(self) -> str:
        """What was found wanting."""
        return "; ".join(one["claim"] for one in self._verdicts if one["verdict"] == 0 and one["claim"])[:500]

    @property
    def _verdicts(self) -> list[dict[str, Any]]:
        return [verdict for answer in self.answers for verdict in _told(answer)]


def narrowed(schema: Schema, given: BaseModel) -> Schema:
    """The schema of an answer, with what the question says of it: verdicts are 0 or 1, grades are those of the rubric, there is
    one verdict for each claim that was asked about, and no text is empty that something depends on."""
    asked = type(given).__name__
    numbers: dict[str, tuple[int, int | None]] = {}
    grades: list[int] = []
    if asked == "NLIStatementInput":
        count = len(getattr(given, "statements", ()))
        numbers["statements"] = count, count
    elif asked == "TopicClassificationInput":
        count = len(getattr(given, "topics", ()))
        numbers["classifications"] = count, count
    elif asked == "ContextRecallInput":
        # How a reference is taken apart is the judge's choice, but one verdict must not stand for all of it.
        numbers["classifications"] = max(1, len(split_sentences(getattr(given, "answer", "")))), None
    elif asked == "InstanceRubricScoreInput":
        grades = sorted(_grade(name) for name in getattr(given, "rubrics", {}))

    def narrow(node: Any, name: str = "") -> Any:
        if isinstance(node, list):
            return [narrow(one) for one in node]
        if not isinstance(node, dict):
            return node
        made = {
            key: {inner: narrow(one, inner) for inner, one in value.items()} if key in ("properties", "$defs") else narrow(value)
            for key, value in node.items()
            if key not in ("title", "description")
        }
        if made.get("type") == "integer" and name in _BINARY:
            return {"enum": [0, 1]}
        if made.get("type") == "integer" and name == "score" and grades:
            return {"enum": grades}
        if made.get("type") == "array" and name in numbers:
            least, most = numbers[name]
            made |= {"minItems": least, **({"maxItems": most} if most is not None else {})}
        if made.get("type") == "array" and name == "claims":
            made["minItems"] = 1
        if made.get("type") == "string" and name in ("question", "end_state", "user_goal"):
            made["minLength"] = 1
        if made.get("type") == "object":
            made["additionalProperties"] = False
        return made

    return dict(narrow(schema))


def _told(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdicts in an answer, each with what it is about."""
    found = []
    for key in ("statements", "classifications"):
        for one in value.get(key) or ():
            if isinstance(one, dict):
                verdict = one.get("verdict", one.get("attributed"))
                found.append(
                    {"claim": str(one.get("statement", "")), "verdict": verdict, "why": str(one.get("reason", ""))[:_TEXT]}
                )
    if "verdict" in value:
        found.append({"claim": "", "verdict": int(value["verdict"]), "why": str(value.get("reason", ""))[:_TEXT]})
    if "score" in value:
        found.append({"claim": "", "verdict": value["score"], "why": str(value.get("feedback", ""))[:_TEXT]})
    return found


# --- what each metric is given ---


def _question(sample: Sample) -> str:
    return _given(sample.question, "no question")


def _answer(sample: Sample) -> str:
    return _given(sample.answer, "no answer")


def _given(text: str, reason: str) -> str:
    if not text.strip():
        raise Unscored(reason)
    return text


def _reference(sample: Sample) -> str:
    return _given(sample.reference.answer or "", NO_REFERENCE)


def _contexts(sample: Sample) -> list[str]:
    texts = [context.text for context in sample.contexts if context.text.strip()]
    if not texts:
        raise Unscored("no contexts")
    return texts


def _faithfulness(sample: Sample) -> dict[str, Any]:
    return {"user_input": _question(sample), "response": _answer(sample), "retrieved_contexts": _contexts(sample)}


def _relevancy(sample: Sample) -> dict[str, Any]:
    return {"user_input": _question(sample), "response": _answer(sample)}


def _against_reference(sample: Sample) -> dict[str, Any]:
    return {"reference": _reference(sample), "user_input": _question(sample), "retrieved_contexts": _contexts(sample)}


def _correctness(sample: Sample) -> dict[str, Any]:
    return {"reference": _reference(sample), "response": _answer(sample)}


def _topics(sample: Sample) -> dict[str, Any]:
    if not sample.reference.topics:
        raise Unscored(NO_REFERENCE)
    return {"user_input": conversation(sample), "reference_topics": list(sample.reference.topics)}


def _goal(sample: Sample) -> dict[str, Any]:
    return {"reference": _given(sample.reference.goal or "", NO_REFERENCE), "user_input": conversation(sample)}


def _rubric(sample: Sample) -> dict[str, Any]:
    rubric = sample.reference.rubric
    if not rubric:
        raise Unscored(NO_REFERENCE)
    grades = {grade: _grade(grade) for grade in rubric}
    return {
        "rubrics": {f"score{grades[name]}_description": text for name, text in rubric.items()},
        "user_input": _question(sample),
        "response": _answer(sample),
        "retrieved_contexts": [context.text for context in sample.contexts] or None,
        "reference": sample.reference.answer,
    }


def _grade(name: str) -> int:
    digits = "".join(sign for sign in name if sign.isdigit())
    if not digits or not 1 <= int(digits) <= 5:
        raise Unscored(f"the rubric's grade '{name}' is not one of 1 to 5")
    return int(digits)


def _calls(sample: Sample, *, surplus: bool) -> dict[str, Any]:
    """Calls made and expected. ragas does not see arguments that were not expected, nor calls made twice, nor the order of keys;
    so the reference gets the surplus arguments, with a value that no call has, and calls their number."""
    from evals.metrics import _ragas

    if sample.reference.trajectory is None:
        raise Unscored(NO_REFERENCE)
    made, wanted = list(sample.tool_calls), list(sample.reference.trajectory)
    if not made and not wanted:
        raise Settled(1.0, "nothing was to be called, and nothing was")
    names, expected = [call.name for call in made], [call.name for call in wanted]
    if surplus and names != expected:
        raise Settled(0.0, f"called {', '.join(names) or 'nothing'}; expected {', '.join(expected) or 'nothing'}"[:500])
    given = [{name: in_one_form(value) for name, value in call.arguments.items()} for call in made]
    asked = [{name: in_one_form(value) for name, value in call.arguments.items()} for call in wanted]
    if surplus:
        for have, want in zip(given, asked, strict=False):
            want |= {name: "" for name in have if name not in want}
    else:
        for calls, arguments in ((made, given), (wanted, asked)):
            seen: Counter[str] = Counter()
            for call, one in zip(calls, arguments, strict=True):
                key = json.dumps([call.name, one], sort_keys=True)
                one[""] = str(seen[key])
                seen[key] += 1
    calls_made = [_ragas.ToolCall(name=call.name, args=one) for call, one in zip(made, given, strict=True)]
    calls_wanted = [_ragas.ToolCall(name=call.name, args=one) for call, one in zip(wanted, asked, strict=True)]
    return {"user_input": [_ragas.AIMessage(content="", tool_calls=calls_made)], "reference_tool_calls": calls_wanted}


def _some_topic(answers: Sequence[Mapping[str, Any]]) -> None:
    refused = [answer["refused_to_answer"] for answer in answers if "refused_to_answer" in answer]
    if all(refused) and not any(any(answer.get("classifications", ())) for answer in answers):
        raise Unscored("nothing on topic was asked, and nothing else was answered")


def conversation(sample: Sample) -> list[Any]:
    """The messages as ragas has them, calls of tools at the turn that made them; what the system was told is left out.

    Raises:
        Unscored: there are none.
    """
    from evals.metrics import _ragas

    calls = [_ragas.ToolCall(name=call.name, args=dict(call.arguments)) for call in sample.tool_calls]
    made: list[Any] = []
    for message in sample.messages:
        if message.role == "user":
            made.append(_ragas.HumanMessage(content=message.content))
        elif message.role == "assistant":
            made.append(_ragas.AIMessage(content=message.content))
        elif message.role == "tool":
            if calls:
                _turn(made, _ragas.AIMessage).append(calls.pop(0))
            made.append(_ragas.ToolMessage(content=message.content))
    if not made and sample.question.strip() and sample.answer.strip():
        made = [_ragas.HumanMessage(content=sample.question), _ragas.AIMessage(content=sample.answer)]
    if not made:
        raise Unscored("no messages")
    if calls:
        last = len(made) - 1 if isinstance(made[-1], _ragas.AIMessage) else len(made)
        made.insert(last, _ragas.AIMessage(content="", tool_calls=calls))
    return made


def _turn(made: list[Any], turn: Any) -> list[Any]:
    """The calls of the turn that made the next one: the last message, where it is the assistant's."""
    if not made or not isinstance(made[-1], turn):
        made.append(turn(content=""))
    if made[-1].tool_calls is None:
        made[-1].tool_calls = []
    calls: list[Any] = made[-1].tool_calls
    return calls


KINDS = (
    Kind("faithfulness", "Faithfulness", _faithfulness),
    # One question, because a judge that is asked without chance gives the same one three times.
    Kind("answer_relevancy", "AnswerRelevancy", _relevancy, embeds=True, negative=True, options={"strictness": 1}),
    Kind("context_precision", "ContextPrecisionWithReference", _against_reference),
    Kind("context_precision_without_reference", "ContextPrecisionWithoutReference", _faithfulness),
    Kind("context_recall", "ContextRecall", _against_reference),
    Kind("factual_correctness", "FactualCorrectness", _correctness),
    Kind("topic_adherence", "TopicAdherence", _topics, check=_some_topic),
    Kind("agent_goal_accuracy", "AgentGoalAccuracyWithReference", _goal),
    Kind("tool_call_accuracy", "ToolCallAccuracy", lambda sample: _calls(sample, surplus=True), judged=False),
    Kind("tool_call_f1", "ToolCallF1", lambda sample: _calls(sample, surplus=False), judged=False),
    Kind("rubric", "InstanceSpecificRubrics", _rubric, low=1.0, high=5.0),
)
