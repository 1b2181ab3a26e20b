"""The LangChain face of an engine: the chat model that LangGraph nodes call.

Works over any `Engine`. Token counts arrive in `usage_metadata`, why it ended in `response_metadata["finish_reason"]`.
It renders no prompts and records nothing: wrappers of the engine do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    UsageMetadata,
)
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from pydantic import BaseModel, ConfigDict, Field

from agentops.engine import generate
from agentops.errors import UsageError
from agentops.records import Constraint, Delta, Generation, Message, Request, Role
from agentops.sync import iterate_sync, run_sync

_OPTIONS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "logit_bias"),
    *("seed", "constraint", "tenant", "trim"),
)


class EngineChatModel(BaseChatModel):
    """A LangChain chat model over `engine`.

    The other fields are defaults of `Request`'s fields of the same name; each can be set for one call or with
    `bind(seed=1, constraint=Constraint("choice", ["yes", "no"]))`.

    Raises (on calls): what `Engine.stream` raises; UsageError for an option or a kind of message it does not know.
    """

    engine: Any = Field(exclude=True, repr=False)
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = Field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    tenant: str = ""
    trim: bool = False

    model_config = ConfigDict(arbitrary_types_allowed=True)

    @property
    def _llm_type(self) -> str:
        return "agentops"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        info = self.engine.info
        fields = {name: getattr(self, name) for name in _OPTIONS if name != "constraint"}
        return {"model": info.name, "revision": info.revision, **fields}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="agentops",
            ls_model_type="chat",
            ls_model_name=kwargs.get("model", self.engine.info.name),
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens", self.max_tokens),
        )
        if stop or self.stop:
            params["ls_stop"] = list(stop or self.stop)
        return params

    def _request(self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, options: dict[str, Any]) -> Request:
        for name in options:
            if name not in _OPTIONS:
                raise UsageError(f"the chat model has no option '{name}'", hint="it has " + ", ".join(_OPTIONS))
        # LangChain's way of saying that an option is not given; for a seed it is a value like others.
        chosen = {name: value for name, value in options.items() if value is not None or name == "seed"}
        given = {name: getattr(self, name) for name in _OPTIONS if name != "constraint"} | chosen
        stops = tuple(self.stop if stop is None else stop)
        return Request(messages=tuple(map(to_message, messages)), stop=stops, **given)

    async def _complete(self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> ChatResult:
        done = await generate(self.engine, self._request(messages, stop, options))
        message = AIMessage(content=done.text, usage_metadata=_usage(done), response_metadata=_metadata(done))
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _pieces(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]
    ) -> AsyncIterator[ChatGenerationChunk]:
        events = self.engine.stream(self._request(messages, stop, options))
        try:
            async for event in events:
                if isinstance(event, Delta):
                    yield ChatGenerationChunk(message=AIMessageChunk(content=event.text))
                else:
                    last = AIMessageChunk(
                        content="",
                        usage_metadata=_usage(event),
                        response_metadata=_metadata(event),
                        chunk_position="last",
                    )
                    yield ChatGenerationChunk(message=last)
        finally:
            await events.aclose()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await self._complete(messages, stop, kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return run_sync(self._complete(messages, stop, kwargs))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for piece in self._pieces(messages, stop, kwargs):
            yield piece

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        yield from iterate_sync(self._pieces(messages, stop, kwargs))

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """The model with its output held to `schema` (a pydantic model, a TypedDict or a JSON schema) while it writes.

        Pydantic models come back as instances, everything else as dicts. `method` and `strict` are accepted for
        compatibility: every method is the same constraint here, and it is always strict.
        """
        unknown = set(kwargs) - {"method", "strict", "tools"}
        if unknown:
            raise UsageError(f"with_structured_output has no option '{min(unknown)}'")
        described = convert_to_json_schema(schema)
        model = self.bind(constraint=Constraint("json_schema", described))
        parser: Runnable[Any, Any]
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            parser = PydanticOutputParser(pydantic_object=schema)
        else:
            parser = JsonOutputParser()
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def to_message(message: BaseMessage) -> Message:
    """The engine's form of a LangChain message: text only.

    Raises:
        UsageError: content other than text, or a kind of message that has no role here.
    """
    if isinstance(message.content, str):
        text = message.content
    else:
        parts = []
        for block in message.content:
            if isinstance(block, dict) and block.get("type") not in ("text", None):
                raise UsageError(f"the model reads text only, not {block.get('type')!r}", hint="send text blocks")
            parts.append(block if isinstance(block, str) else str(block.get("text", "")))
        text = "".join(parts)
    return Message(_role(message), text)


def _role(message: BaseMessage) -> Role:
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, ToolMessage):
        return "tool"
    if isinstance(message, ChatMessage) and message.role in ("system", "user", "assistant", "tool"):
        return message.role  # type: ignore[return-value]
    raise UsageError(f"a {type(message).__name__} has no role for the model", hint="send system, human, AI or tool messages")


def _usage(done: Generation) -> UsageMetadata:
    usage = done.usage
    return UsageMetadata(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.input_tokens + usage.output_tokens,
        input_token_details={"cache_read": usage.cached_tokens},
    )


def _metadata(done: Generation) -> dict[str, Any]:
    return {
        "finish_reason": done.finish_reason,
        "model_name": done.model,
        "model_provider": "agentops",
        "device": done.device,
    }
