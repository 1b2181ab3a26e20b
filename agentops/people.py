"""Asking a person: how a node stops for one, what is asked, and whether an answer fits.

A node that stops runs again from its beginning when it is answered, so it should ask first and act afterwards.
This module neither starts nor resumes runs; the runtime does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from agentops.errors import AnswerUnfit, UsageError
from agentops.records import Decision, Interrupt, content_hash
from agentops.schema import violation

if TYPE_CHECKING:
    from langgraph.types import Interrupt as Raised

_DECISION: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["approve", "edit", "reject"]},
        "content": {},
        "reason": {"type": "string"},
        "of": {"type": "string"},
    },
    "required": ["kind"],
    "additionalProperties": False,
}


def approve(question: str, content: Any, *, schema: dict[str, Any] | None = None) -> Decision:
    """Stops the run until a person has approved, edited or rejected `content`, which is text or JSON.

    `schema` is what an edited content must fit; without one it must be of the same JSON type. The decision's content is
    what to go on with: the proposal, or what the person made of it. A decision holds for what the person was shown: where the
    node proposes something else when it runs again, the person is asked anew.
    """
    from langgraph.types import interrupt

    asked = {"kind": "approval", "question": question, "content": content, "schema": schema}
    shown = _shown(question, content)
    while True:
        answer = interrupt(asked, response_schema=_DECISION)
        if answer.get("of") == shown:
            break
    decision = Decision(answer["kind"], answer.get("content"), answer.get("reason", ""))
    return decision if decision.kind == "edit" else Decision(decision.kind, content, decision.reason)


def ask(question: str, *, schema: dict[str, Any] | None = None) -> Any:
    """Stops the run until a person has answered; the answer fits `schema`, or is anything where there is none."""
    from langgraph.types import interrupt

    return interrupt({"kind": "question", "question": question}, response_schema=schema)


def read(raised: Raised, node: str) -> Interrupt:
    """What LangGraph's interrupt asks for: one of ours, or any value that somebody else's graph stops with."""
    value, schema = raised.value, raised.response_schema
    about = value if isinstance(value, dict) else {}
    if about.get("kind") == "approval" and isinstance(about.get("question"), str) and "content" in about:
        return Interrupt(raised.id, "approval", about["question"], node, about["content"], about.get("schema"))
    named = next((about[key] for key in ("question", "message", "prompt") if isinstance(about.get(key), str)), None)
    question = value if isinstance(value, str) else named or f"{node} asks"
    content = None if isinstance(value, str) or set(about) == {"kind", "question"} else value
    return Interrupt(raised.id, "question", question, node, content, schema if isinstance(schema, dict) else None)


def fitting(asked: Interrupt, answer: Any) -> Any:
    """The answer in the form in which the graph takes it, plain data.

    Raises:
        AnswerUnfit
    """
    if asked.kind == "pause":
        if answer is None or answer is True or (isinstance(answer, Decision) and answer.kind == "approve"):
            return None
        raise _unfit(asked, "nothing is asked there", "go on with: --approve")
    if asked.kind == "approval":
        return {**asdict(_decision(asked, answer)), "of": _shown(asked.question, asked.content)}
    if isinstance(answer, Decision):
        # Somebody else's graph: yes and no are the values such graphs test for.
        answer = answer.content if answer.kind == "edit" else answer.kind == "approve"
    if answer is None:
        raise _unfit(asked, "no answer was given", "give one with --answer")
    if asked.schema is not None and isinstance(answer, str) and violation(asked.schema, answer):
        answer = _parsed(answer)
    if asked.schema is not None and (wrong := violation(asked.schema, answer)):
        raise _unfit(asked, wrong, f"the answer must fit: {json.dumps(asked.schema)[:400]}")
    return answer


def _decision(asked: Interrupt, given: Any) -> Decision:
    answer = given
    if isinstance(answer, bool):
        answer = Decision("approve" if answer else "reject")
    if isinstance(answer, str):
        answer = _parsed(answer)
    if isinstance(answer, dict):
        if wrong := violation(_DECISION, answer):
            raise _unfit(asked, wrong)
        answer = Decision(answer["kind"], answer.get("content"), answer.get("reason", ""))
    if not isinstance(answer, Decision):
        raise _unfit(asked, f"{str(answer)[:80]!r} is no decision")
    if answer.kind != "edit":
        return answer
    if isinstance(answer.content, str) and not isinstance(asked.content, str):
        answer = Decision("edit", _parsed(answer.content), answer.reason)
    if asked.schema is not None:
        if wrong := violation(asked.schema, answer.content):
            raise _unfit(asked, f"the edited content does not fit: {wrong}", f"it must fit: {json.dumps(asked.schema)[:400]}")
    elif type(answer.content) is not type(asked.content):
        kinds = {"str": "text", "dict": "a JSON object", "list": "a JSON list"}
        kind = type(asked.content).__name__
        wanted = kinds.get(kind, kind)
        raise _unfit(asked, "the edited content is of another kind", f"it must be {wanted}")
    if answer.content in ("", None):
        raise _unfit(asked, "the edited content is empty", "to refuse it, use --reject")
    return answer


def _shown(question: str, content: Any) -> str:
    return content_hash(json.dumps([question, content], sort_keys=True, default=repr))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _unfit(asked: Interrupt, what: str, hint: str = "") -> AnswerUnfit:
    return AnswerUnfit(
        f"interrupt {asked.id} ({asked.question[:100]}): {what}",
        hint=hint or "it takes --approve, --edit FILE or --reject",
    )


@dataclass(frozen=True, slots=True)
class Answers:
    """What a person said to a waiting run: one answer for its only interrupt, or several by the interrupts' ids."""

    one: Any = None
    by_id: Mapping[str, Any] | None = None

    def fitted(self, asked: Sequence[Interrupt], run_id: str, *, waiting: bool) -> dict[str, Any]:
        """What each answered interrupt is resumed with, by its id.

        Raises:
            AnswerUnfit, UsageError
        """
        open_ones = ", ".join(f"{one.id} ({one.question[:60]})" for one in asked) or "none"
        given: dict[str, tuple[Interrupt, Any]] = {}
        for key, answer in (self.by_id or {}).items():
            found = [one for one in asked if one.id.startswith(key)] if key else []
            if len(found) != 1:
                why = "more than one interrupt begins with" if found else "nothing waits under"
                raise AnswerUnfit(f"{why} '{key}' in run {run_id}; it may be answered already", hint=f"open: {open_ones}")
            if found[0].id in given:
                raise AnswerUnfit(f"interrupt {found[0].id} is answered twice", hint="give each one answer")
            given[found[0].id] = found[0], answer
        if self.one is not None:
            if not asked:
                raise AnswerUnfit(f"run {run_id} waits for no answer", hint=f"go on without: agentops resume {run_id}")
            if len(asked) > 1:
                raise AnswerUnfit(f"run {run_id} waits for {len(asked)} answers; say which is meant", hint=f"open: {open_ones}")
            given[asked[0].id] = asked[0], self.one
        if not given and waiting and any(one.kind != "pause" for one in asked):
            raise UsageError(f"run {run_id} waits for an answer", hint=f"see what it asks: agentops inbox {run_id}")
        made = {key: fitting(one, answer) for key, (one, answer) in given.items()}
        return {key: answer for key, answer in made.items() if answer is not None}
