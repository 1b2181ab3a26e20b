"""Chat templates: a conversation to the one text that the model reads, by a jinja2 program from the model's folder.

The program is not trusted. It runs in jinja2's immutable sandbox, and its work is bounded: every step of a loop and every
call counts, and so does every character that it writes. It knows neither tokens nor files.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agentops.errors import ModelBroken, UsageError
from agentops.records import Message

STEPS = 300_000
"""Loop steps and calls of one rendering: far beyond what a template does with thousands of turns, over in a second."""

_WRITTEN = 4_000_000
"""Characters that a template may write beyond what the conversation holds."""

_DIGITS = 1_000
# Each makes as much as a number in the template says, out of nothing, without a loop that could be counted.
_ENDLESS_FILTERS = ("batch", "slice", "center")


class ChatTemplate:
    """A compiled template. `name` is what errors call it. May be used from several threads at once.

    Raises (when made):
        ModelBroken: it is no template.
    """

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        self._environment = _Bounded(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
        )
        try:
            tree = self._environment.parse(text)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
            self._template = self._environment.from_string(tree)
        except (TemplateError, RecursionError) as error:
            raise ModelBroken(
                f"{name}: the chat template is damaged: {error}", hint="prepare or download the model again"
            ) from error

    def render(self, messages: Sequence[Message], **tokens: str) -> str:
        """The conversation up to where the answer begins; `tokens` are the spellings that templates ask for.

        Raises:
            UsageError: the template refuses the conversation.
            ModelBroken: the template fails, or does more than any conversation asks for.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        room = _WRITTEN + 2 * sum(len(message.content) for message in messages)
        written: list[str] = []
        self._environment.begin()
        try:
            for piece in self._template.generate(messages=turns, add_generation_prompt=True, **tokens):
                written.append(piece)
                room -= len(piece)
                if room < 0:
                    raise _TooMuch("it writes without end")
        except UsageError:
            raise
        # A template can fail in any way code can.
        except Exception as error:
            raise ModelBroken(
                f"{self._name}: the chat template failed: {type(error).__name__}: {error}",
                hint="the template does not suit this conversation; send system, user and assistant turns in order",
            ) from error
        return "".join(written)


class _TooMuch(Exception):
    """The template does more than any conversation asks for."""


_COUNTED = "counted steps of a loop"


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox in which one rendering takes a bounded number of steps."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._own = threading.local()
        self.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        self.filters[_COUNTED] = self._counted
        self.globals["raise_exception"] = _refuse
        self.globals.pop("lipsum")
        for name in _ENDLESS_FILTERS:
            self.filters.pop(name)

    def begin(self) -> None:
        """A rendering begins on this thread."""
        self._own.left = STEPS

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._step()
        return super().call(context, callee, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, int) and hasattr(other, "__len__") and one * len(other) > _WRITTEN:
                raise _TooMuch("it repeats something too often")
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _DIGITS:
            raise _TooMuch("it reckons with too large numbers")
        return super().call_binop(context, operator, left, right)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _step(self) -> None:
        # Compiling folds what is constant, outside of any rendering.
        left = getattr(self._own, "left", STEPS)
        if left <= 0:
            raise _TooMuch(f"it takes more than {STEPS:,} steps")
        self._own.left = left - 1


def _refuse(message: object) -> None:
    raise UsageError(f"the model's chat template refuses the conversation: {str(message)[:500]}")
