"""The side of ragas: its judge and its embeddings, as subclasses of what it asks for. Importing this module imports ragas."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

# Imported before the hub is said to be away, so that models can be fetched afterwards in the same process.
import huggingface_hub.constants  # noqa: F401
from pydantic import BaseModel

from agentops.retrieval import Embedder

os.environ.setdefault("RAGAS_DO_NOT_TRACK", "true")
_said = os.environ.get("HF_HUB_OFFLINE")
os.environ["HF_HUB_OFFLINE"] = "1"
try:
    from ragas.embeddings.base import BaseRagasEmbedding
    from ragas.llms.base import InstructorBaseRagasLLM
    from ragas.messages import AIMessage, HumanMessage, ToolCall, ToolMessage
    from ragas.metrics import collections
    from ragas.prompt.metrics.base_prompt import BasePrompt
finally:
    del os.environ["HF_HUB_OFFLINE"]
    if _said is not None:
        os.environ["HF_HUB_OFFLINE"] = _said

__all__ = ["AIMessage", "Embeddings", "HumanMessage", "Prompt", "Respondent", "ToolCall", "ToolMessage", "collections", "prepare"]

Model = TypeVar("Model", bound=BaseModel)


class Prompt(str):
    """A prompt that remembers what it was made from, so that a verdict can be computed and an answer held to its question."""

    given: BaseModel

    @classmethod
    def of(cls, text: str, given: BaseModel) -> Prompt:
        prompt = cls(text)
        prompt.given = given
        return prompt


class Respondent(InstructorBaseRagasLLM):
    """What ragas asks: gets each question and gives back the value of its answer."""

    is_async = True

    def __init__(self, answer: Callable[[Prompt, type[BaseModel]], Awaitable[Any]]) -> None:
        self._answer = answer

    async def agenerate(self, prompt: str, response_model: type[Model]) -> Model:
        if not isinstance(prompt, Prompt):
            raise TypeError("ragas made a prompt in a way that is not known here")
        return response_model.model_validate(await self._answer(prompt, response_model))

    def generate(self, prompt: str, response_model: type[Model]) -> Model:
        return asyncio.run(self.agenerate(prompt, response_model))


class Embeddings(BaseRagasEmbedding):
    """Our embedder, without a cache."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self._embedder = embedder

    def embed_text(self, text: str, **_: Any) -> list[float]:
        return [float(x) for x in self._embedder.embed([text])[0]]

    async def aembed_text(self, text: str, **_: Any) -> list[float]:
        return await asyncio.to_thread(self.embed_text, text)


def prepare(metric: Any, *, examples: bool) -> Any:
    """The metric with prompts that remember what they are made from, and without their `examples` where these are too long."""
    for prompt in [value for value in vars(metric).values() if isinstance(value, BasePrompt)]:
        if not examples:
            prompt.examples = []
            if hasattr(prompt, "_all_examples"):
                prompt._all_examples = {("low", "low"): []}
        prompt.to_string = _remembering(prompt.to_string)  # type: ignore[method-assign, assignment]
    return metric


def _remembering(write: Callable[[Any], str]) -> Callable[[Any], Prompt]:
    return lambda given: Prompt.of(write(given), given)
