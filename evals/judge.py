"""The judge: what gives the verdicts behind metrics, by being asked or by what it finds likely.

`Judge.ask` puts a question to a model and gives back a value that fits a JSON schema, or fails with the reason. The model is
the engine's own, held to the schema while it writes, or one behind an address with the API of OpenAI. A model that is too
small to be asked answers at chance; of such a judge `how` is "computed", and verdicts are made from likelihoods
(`evals.verdicts`). No answer is kept for later: what one judge said is never given for another's.

This module knows no metric and loads no ragas.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from agentops.address import check_address, check_secret
from agentops.clock import Clock, SystemClock
from agentops.errors import AgentOpsError, PromptTooLong, SettingsError, ToolError, UsageError
from agentops.records import Constraint, Message, Request
from agentops.schema import violation
from agentops.settings import Settings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from agentops.engine import Engine
    from agentops.retrieval import Embedder

How = Literal["asked", "computed"]
"""asked: the model writes its verdict.  computed: the verdict follows from what the model finds likely."""

Schema = dict[str, Any]

LARGE_ENOUGH = 1_000_000_000
"""Parameters from which on a model is asked. Below, asked verdicts were at chance and computed ones were not."""

_DOWN_AFTER, _DOWN_S = 3, 10.0
_FENCED = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)


class JudgeFailed(AgentOpsError):
    """There is no verdict. The message is the reason, in a few words; `unreachable` says that nobody answered at all."""

    def __init__(self, message: str, *, hint: str = "", unreachable: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.unreachable = unreachable


class _Refused(JudgeFailed):
    """A server says that it cannot answer such a question."""


class Respondent(Protocol):
    """A model that can be asked. `identity` differs between models that may answer differently; `context_tokens` is None where
    nobody knows it."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def context_tokens(self) -> int | None: ...

    async def answer(self, prompt: str, schema: Schema, attempt: int) -> str:
        """A text that should be JSON of this schema. `attempt` counts from 0.

        Raises:
            JudgeFailed
        """
        ...

    async def close(self) -> None: ...


class Judge:
    """Asks `respondent` under bounds of time and number: `timeout_s` an answer, `retries` more of them, `pause_s` and then twice
    as long before a server is tried again. `engine` and `embedder` are for verdicts that are computed, which
    take `timeout_s` at most as well."""

    def __init__(
        self,
        respondent: Respondent,
        *,
        how: How,
        engine: Engine | None = None,
        embedder: Embedder | None = None,
        timeout_s: float = 120.0,
        retries: int = 2,
        pause_s: float = 0.5,
        clock: Clock | None = None,
    ) -> None:
        self.how: How = how
        self.engine, self.embedder = engine, embedder
        self._respondent = respondent
        self.timeout_s, self._retries, self._pause_s = timeout_s, retries, pause_s
        self._clock = clock or SystemClock()
        self._unreached, self._down_until_ns = 0, 0

    @property
    def name(self) -> str:
        return self._respondent.name

    @property
    def identity(self) -> str:
        """Model and way of judging: scores of judges that differ in it are not to be mixed."""
        embedder = f" {self.embedder.name} {self.embedder.revision}" if self.embedder is not None else ""
        return f"{self.how} {self._respondent.identity}{embedder}"

    @property
    def context_tokens(self) -> int | None:
        return self._respondent.context_tokens

    async def ask(self, prompt: str, schema: Schema) -> Any:
        """The model's answer: a value that fits the schema. One that does not is asked for again, with what was wrong, and a
        server that is not reached is tried again after a pause.

        A judge that three questions in a row did not reach is not waited for by the next ones, for some seconds.

        Raises:
            JudgeFailed: nobody answered in time, or nothing that fits.
        """
        if self._clock.monotonic_ns() < self._down_until_ns:
            raise JudgeFailed("down", hint="see whether the judge's server runs, then evaluate again", unreachable=True)
        try:
            value = await self._asked(prompt, schema)
        except JudgeFailed as error:
            self._unreached = self._unreached + 1 if error.unreachable else 0
            if self._unreached >= _DOWN_AFTER:
                self._down_until_ns = self._clock.monotonic_ns() + int(_DOWN_S * 1e9)
            raise
        self._unreached = 0
        return value

    async def _asked(self, prompt: str, schema: Schema) -> Any:
        question, why = prompt, JudgeFailed("not asked")
        for attempt in range(1 + self._retries):
            try:
                async with asyncio.timeout(self.timeout_s):
                    text = await self._respondent.answer(question, schema, attempt)
            except TimeoutError:
                raise JudgeFailed("timeout", hint="raise judge.timeout_s", unreachable=True) from None
            except JudgeFailed as error:
                if not error.unreachable:
                    raise
                why = error
                if attempt < self._retries:
                    await asyncio.sleep(self._pause_s * 2**attempt)
                continue
            value, wrong = _read(text, schema)
            if not wrong:
                return value
            why = JudgeFailed(f"its answer cannot be used: {wrong}", hint="ask a larger model, or let verdicts be computed")
            question = f"{prompt}\n\nYour last answer could not be used: {wrong}. Give only the JSON, complete and valid."
        raise why

    async def close(self) -> None:
        """Ends the connection to a server; an engine is its owner's to close."""
        await self._respondent.close()


@dataclass(frozen=True, slots=True)
class EngineRespondent:
    """The engine's own model. The grammar that it writes under has no text that is longer than it may write."""

    engine: Engine
    max_tokens: int = 1024

    @property
    def name(self) -> str:
        return self.engine.info.name

    @property
    def identity(self) -> str:
        return f"{self.engine.info.name} {self.engine.info.revision}"

    @property
    def context_tokens(self) -> int | None:
        return self.engine.info.context_tokens

    async def answer(self, prompt: str, schema: Schema, attempt: int) -> str:
        """As `Respondent.answer`."""
        from agentops.engine import generate
        from agentops.tools.arguments import forms

        try:
            *_, form = list(forms("judge", schema, self.max_tokens))[: attempt + 1]
            made = await generate(
                self.engine,
                Request(
                    messages=(Message("user", prompt),),
                    max_tokens=self.max_tokens,
                    constraint=Constraint("json_schema", form),
                ),
            )
        except PromptTooLong as error:
            raise JudgeFailed(
                f"the prompt has {error.prompt_tokens:,} tokens and the context {error.context_tokens:,}"
            ) from error
        except ToolError as error:
            raise JudgeFailed(
                f"its answer does not fit into {self.max_tokens:,} tokens", hint="raise judge.max_tokens"
            ) from error
        except AgentOpsError as error:
            raise JudgeFailed(str(error), hint=error.hint) from error
        return made.text

    async def close(self) -> None:
        return None


class ServerRespondent:
    """A model behind an address with the API of OpenAI. Schemas are asked for; a server that refuses a question with one and
    answers the same question without does not know them, and is asked without from then on."""

    def __init__(self, url: str, model: str, api_key: str = "", *, timeout_s: float = 120.0, max_tokens: int = 1024) -> None:
        self._url, self._model, self._api_key = url, model, api_key
        self._timeout_s, self._max_tokens = timeout_s, max_tokens
        self._schemas = True
        self._client: AsyncOpenAI | None = None

    @property
    def name(self) -> str:
        return self._model

    @property
    def identity(self) -> str:
        return f"{self._model} {self._url}"

    @property
    def context_tokens(self) -> int | None:
        return None

    async def answer(self, prompt: str, schema: Schema, attempt: int) -> str:
        """As `Respondent.answer`."""
        if not self._schemas:
            return await self._asked(prompt)
        try:
            return await self._asked(prompt, schema)
        except _Refused as refused:
            try:
                text = await self._asked(prompt)
            except _Refused:
                # It is the question that is refused, such as one that is too long.
                raise refused from refused.__cause__
            self._schemas = False
            return text

    async def _asked(self, prompt: str, schema: Schema | None = None) -> str:
        """
        Raises:
            JudgeFailed, TimeoutError
        """
        import openai

        if self._client is None:
            # Without a key the client would look for one in the environment and send that.
            self._client = openai.AsyncOpenAI(
                base_url=self._url, api_key=self._api_key or "none", timeout=self._timeout_s, max_retries=0
            )
        form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
        asked: dict[str, Any] = {"response_format": form} if schema is not None else {}
        try:
            made = await self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0.0,
                max_tokens=self._max_tokens,
                **asked,
            )
            return made.choices[0].message.content or ""
        except openai.APITimeoutError:
            raise TimeoutError from None
        except openai.APIConnectionError as error:
            raise JudgeFailed("not reachable", hint=f"see whether a server runs at {self._url}", unreachable=True) from error
        except openai.APIStatusError as error:
            kind = _Refused if error.status_code in (400, 422) else JudgeFailed
            raise kind(
                f"its server answered {error.status_code}",
                hint="see the settings judge.url, judge.model and judge.api_key",
                unreachable=error.status_code >= 500 or error.status_code == 429,
            ) from error
        except (openai.OpenAIError, ValueError, AttributeError, IndexError, TypeError) as error:
            raise JudgeFailed("what its server answers is no chat completion") from error

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()


def open_judge(settings: Settings, engine: Engine | None = None, embedder: Embedder | None = None) -> Judge:
    """The judge that the settings name. `engine` judges where no address is set, and computes where verdicts are computed;
    `embedder` compares questions and topics.

    Raises:
        SettingsError: as `check_judge`.
        UsageError: verdicts are to come from the engine, and there is none.
    """
    check_judge(settings)
    wanted = settings.judge
    large = bool(wanted.url) or (engine is not None and engine.info.parameters >= LARGE_ENOUGH)
    how: How = wanted.how if wanted.how != "auto" else "asked" if large else "computed"
    respondent: Respondent
    if wanted.url and how == "asked":
        respondent = ServerRespondent(
            wanted.url, wanted.model, wanted.api_key, timeout_s=wanted.timeout_s, max_tokens=wanted.max_tokens
        )
    elif engine is not None:
        respondent = EngineRespondent(engine, wanted.max_tokens)
    else:
        raise UsageError("there is no engine that could judge", hint="open one, or name a server in judge.url and ask it")
    return Judge(respondent, how=how, engine=engine, embedder=embedder, timeout_s=wanted.timeout_s, retries=wanted.retries)


def check_judge(settings: Settings) -> None:
    """
    Raises:
        SettingsError: the judge's address or model is missing or cannot be right, or a key would go to an address from elsewhere.
    """
    wanted = settings.judge
    if wanted.url:
        check_address(
            settings, "judge.url", port=False, form="http://HOST:PORT/v1 or https://HOST/v1", secrets="the key as judge.api_key"
        )
        if not wanted.model:
            raise SettingsError("judge.url names a server and judge.model no model of it", hint="give its name as judge.model")
        check_secret(settings, "judge.api_key", "judge.url")
    elif wanted.model:
        raise SettingsError(
            f"{settings.source('judge.model')}: judge.model names a model of a server, and judge.url names none",
            hint="give the server's address as judge.url, such as http://127.0.0.1:8000/v1",
        )


def _read(text: str, schema: Schema) -> tuple[Any, str]:
    """The value in a text, or why there is none."""
    fenced = _FENCED.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None, "it is empty" if not text.strip() else "it is no JSON"
    return value, violation(schema, value)
