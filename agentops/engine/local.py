"""`LocalEngine` runs a model in this process. One thread owns the runner and computes step after step; callers hand
requests over and get events back on their own event loops.

Prefix blocks stay cached when a request ends, for later requests of the same tenant: across turns, nodes and runs.
It knows nothing of graphs, prompts or the record, and leaves what a step computes to the runner.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from agentops.clock import Clock, SystemClock
from agentops.engine.blocks import BlockPool, Namespace, NoRoom, Pins
from agentops.engine.calls import Call, Draft, Event, GenerateCall, ScoreCall
from agentops.engine.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from agentops.engine.counters import Counters, Outcome, Tally
from agentops.engine.gauges import Gauges, open_gauges
from agentops.engine.kept import KeptPrefixes
from agentops.engine.limits import check_request, check_score_request
from agentops.engine.runners import Batch, Runner
from agentops.engine.sampler import Sampler
from agentops.engine.scheduler import Scheduler
from agentops.engine.sequence import Chunk, Sequence
from agentops.engine.tokenizer import ChatTokenizer
from agentops.errors import DeadlinePassed, EngineClosed, EngineError, EngineOverloaded, PromptTooLong, UsageError
from agentops.records import Delta, Footprint, Generation, ModelInfo, Request, ScoreRequest, Scores, Usage
from agentops.settings import Settings

BLOCK = 16
"""Positions in a block of the KV cache."""

T = TypeVar("T")

_PINNED_SHARE = 2
"""One part in so many of the pool may be pinned."""
_INLINE_CHARACTERS = 50_000


def open_engine(folder: Path, settings: Settings, name: str | None = None, *, clock: Clock | None = None) -> LocalEngine:
    """Opens a model folder and starts the engine on it. `name` is what usage and traces call the model.

    Raises:
        ModelNotFound, ModelUnsafe, ModelBroken, ModelUnsupported: as `open_checkpoint`.
        SettingsError: a device was asked for that is not there.
    """
    checkpoint = open_checkpoint(folder)
    tokenizer = ChatTokenizer(checkpoint)
    from agentops.engine.linear import choose_kernel
    from agentops.engine.runners.torch import TorchRunner, choose_device

    device = choose_device(settings.engine.device)
    kernel = choose_kernel(settings.engine.kernel, checkpoint)
    blocks = settings.engine.kv_tokens // BLOCK
    runner = TorchRunner(checkpoint, kernel=kernel, device=device, blocks=blocks, block=BLOCK, threads=settings.engine.threads)
    info = _info(checkpoint, name or folder.name, device, blocks * BLOCK)
    kept = None
    if settings.engine.keep_bytes:
        place = settings.paths.home / "prefixes"
        kept = KeptPrefixes(place, settings.engine.keep_bytes, layout=runner.layout, size=BLOCK)
    return LocalEngine(runner, tokenizer, info, settings, clock=clock, kept=kept)


class LocalEngine:
    """An `Engine` over a `Runner`. Make it with `open_engine`.

    A score request's prefix and choices are made into tokens separately, and the choice's follow the prefix's: give the
    white space between them to the choice (`"The answer is"`, `" yes"`).
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: ChatTokenizer,
        info: ModelInfo,
        settings: Settings,
        *,
        clock: Clock | None = None,
        kept: KeptPrefixes | None = None,
        gauges: Gauges | None = None,
    ) -> None:
        self._runner, self._tokenizer, self._info = runner, tokenizer, info
        self._kept = kept
        self._gauges = gauges or open_gauges(info.device)
        self._settings = settings.engine
        self._seed = settings.run.seed
        self._clock = clock or SystemClock()
        self._pool = BlockPool(settings.engine.kv_tokens // BLOCK, BLOCK)
        self._scheduler = Scheduler(
            self._pool, max_batch=settings.engine.max_batch, prefill_tokens=settings.engine.prefill_tokens
        )
        self._pins = Pins(self._pool, self._pool.total // _PINNED_SHARE)
        self._change = threading.Condition()
        self._inbox: deque[Call] = deque()
        self._leaving: list[Call] = []
        self._errands: list[Callable[[], None]] = []
        self._active: set[Call] = set()
        self._closing = False
        self._tally = Tally()
        self._requests = 0
        self._mean_s = 1.0
        self._thread = threading.Thread(target=self._work, name="agentops-engine", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def counters(self) -> Counters:
        """What it has done so far; while it is at work the parts may be a step apart."""
        tally, pool, active = self._tally, self._pool, list(self._active)
        running = sum(call.admitted is not None for call in active)
        return Counters(
            taken=tally.taken,
            **tally.ended,
            refused=tally.refused,
            waiting=len(self._inbox) + len(active) - running,
            running=running,
            usage=tally.usage,
            lost=tally.lost,
            timing=tally.timing,
            steps=tally.steps,
            step_ms=tally.step_ms,
            block_tokens=pool.size,
            used_blocks=pool.used,
            cached_blocks=pool.cached,
            free_blocks=pool.free,
            pinned_blocks=self._pins.blocks,
            peak_blocks=tally.peak_blocks,
            peak_memory_bytes=self._gauges.peak_memory_bytes(),
            device=self._info.device,
        )

    @property
    def pool(self) -> BlockPool:
        """The book of KV blocks, to be looked at only."""
        return self._pool

    async def stream(self, request: Request) -> AsyncIterator[Delta | Generation]:
        """As `Engine.stream`."""
        call, events = await self._asked(request)
        self._submit(call, request)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Delta | Generation):
                    yield event
                if isinstance(event, Generation):
                    return
        finally:
            self._leave(call)

    async def prime(self, request: Request) -> Usage:
        """Computes the prompt of `request` and nothing after it, so that what begins like it finds that computed; returns what it
        cost. What else the request asks for is left out.

        Raises:
            as `Engine.stream`
        """
        return (await self._primed(request, pin=False))[0]

    async def pin(self, request: Request) -> int:
        """As `prime`; and the whole blocks of the prompt stay until they are unpinned, whatever else needs room. Returns how many
        tokens that are. At most half of the pool can be pinned.

        Raises:
            EngineError: they would be more; what was pinned stays so.
            and as `prime`
        """
        return (await self._primed(request, pin=True))[1]

    async def unpin(self, request: Request) -> int:
        """Lets go of what was pinned for the same prompt and tenant; it stays cached while there is room. Returns how many tokens
        that were, 0 where it was not pinned."""
        self._check_open()
        check_request(request, self._settings.input_bytes)
        with _panics_told():
            prompt, _ = await _aside(request, lambda: self._prompt(replace(request, max_tokens=0)))
        return await self._errand(lambda: self._pins.unpin(self._namespace(request), prompt)) * BLOCK

    async def _primed(self, request: Request, *, pin: bool) -> tuple[Usage, int]:
        plain = Request(
            request.messages,
            request.text,
            max_tokens=0,
            tenant=request.tenant,
            trim=request.trim,
            thread=request.thread,
            priority=request.priority,
            deadline_s=request.deadline_s,
        )
        call, events = await self._asked(plain)
        call.pins = pin
        self._submit(call, plain)
        try:
            event = await events.get()
            if isinstance(event, Generation):
                return event.usage, call.pinned * BLOCK
            raise event if isinstance(event, Exception) else RuntimeError("a prefix got text")
        finally:
            self._leave(call)

    async def _asked(self, request: Request) -> tuple[GenerateCall, asyncio.Queue[Event]]:
        """The request as a call, and where its events come."""
        self._check_open()
        check_request(request, self._settings.input_bytes)
        if (unknown := max(request.logit_bias, default=-1)) >= self._info.vocabulary:
            raise UsageError(f"logit_bias names token {unknown:,}, the model has {self._info.vocabulary:,}")
        grammar = None
        with _panics_told():
            prompt, trimmed = await _aside(request, lambda: self._prompt(request))
            if request.constraint is not None:
                grammar = await asyncio.to_thread(self._tokenizer.compile, request.constraint)
        with self._change:
            self._requests += 1
            number = self._requests
        # Unseeded requests differ from each other and are the same in every run of the program.
        entropy = [self._seed, number] if request.seed is None else [request.seed]
        drafts = []
        for place in range(request.n):
            generator = np.random.default_rng([*entropy, place] if place else entropy)
            rules = grammar.twin() if grammar and place else grammar
            sampler = Sampler(request, prompt=prompt, generator=generator, grammar=rules)
            drafts.append(Draft(sampler, self._tokenizer.writer(prompt, request.stop)))
        events, send = self._mailbox()
        call = GenerateCall(
            prompt,
            drafts,
            namespace=self._namespace(request),
            share=(request.tenant, request.thread),
            max_tokens=request.max_tokens,
            trimmed=trimmed,
            ends=self._tokenizer.eos.union(request.stop_tokens),
            send=send,
            info=self._info,
            clock=self._clock,
        )
        if request.n > self._settings.max_batch:
            raise UsageError(f"{request.n} answers at once are more than engine.max_batch, {self._settings.max_batch}")
        if (needed := self._scheduler.blocks_needed(call.sequence)) > self._pool.total:
            raise PromptTooLong(len(prompt), (needed - self._pool.blocks_for(len(prompt))) * BLOCK, self._pool.total * BLOCK)
        return call, events

    async def score(self, request: ScoreRequest) -> Scores:
        """As `Engine.score`. A choice's last token is predicted, not read, so it is not part of `input_tokens`."""
        self._check_open()
        check_score_request(request, self._settings.input_bytes)
        with _panics_told():
            prefix, choices = await _aside(request, lambda: self._score_tokens(request))
        events, send = self._mailbox()
        call = ScoreCall(
            prefix,
            choices,
            request,
            namespace=self._namespace(request),
            share=(request.tenant, request.thread),
            send=send,
            info=self._info,
            clock=self._clock,
        )
        if (needed := self._scheduler.blocks_needed(call.sequence)) > self._pool.total:
            raise PromptTooLong(needed * BLOCK, 0, self._pool.total * BLOCK)
        self._submit(call, request)
        try:
            event = await events.get()
            if isinstance(event, Scores):
                return event
            raise event if isinstance(event, Exception) else RuntimeError("a score request got text")
        finally:
            self._leave(call)

    async def close(self) -> None:
        """As `Engine.close`."""
        await asyncio.to_thread(self._stop)
        atexit.unregister(self._stop)

    # --- on the caller's side ---

    def _check_open(self) -> None:
        if self._closing:
            raise _closed()

    def _input(self, request: Request | ScoreRequest) -> list[int]:
        if request.text is None:
            return self._tokenizer.encode_chat(request.messages)
        return self._tokenizer.encode(request.text)

    def _prompt(self, request: Request) -> tuple[list[int], int]:
        room = self._info.context_tokens - request.max_tokens
        ids = self._input(request)
        if not ids:
            raise UsageError("the prompt is empty", hint="give the model at least one token to go on from")
        if len(ids) <= room:
            return ids, 0
        cut: list[int] | None = None
        if request.trim and room > 0:
            chat = request.text is None
            cut = self._tokenizer.trim_chat(request.messages, room) if chat else self._tokenizer.trim_text(ids, room)
        if cut is None:
            raise PromptTooLong(len(ids), request.max_tokens, self._info.context_tokens)
        return cut, len(ids) - len(cut)

    def _score_tokens(self, request: ScoreRequest) -> tuple[list[int], list[list[int]]]:
        prefix = self._input(request)
        choices = [self._tokenizer.encode_more(choice) for choice in request.choices]
        if not prefix or not all(choices):
            raise UsageError("a prefix or a choice has no tokens", hint="give the model at least one token of each")
        longest = max(map(len, choices))
        if len(prefix) + longest > self._info.context_tokens:
            raise PromptTooLong(len(prefix), longest, self._info.context_tokens)
        return prefix, choices

    def _namespace(self, request: Request | ScoreRequest) -> Namespace:
        return Namespace(self._info.revision, "", request.tenant)

    def _mailbox(self) -> tuple[asyncio.Queue[Event], Callable[[Event], None]]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def send(event: Event) -> None:
            # A loop that was closed while its request ran, which may be this moment, has nobody left to tell.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        return events, send

    def _submit(self, call: Call, request: Request | ScoreRequest) -> None:
        for part in (call.sequence, *call.sequence.forks):
            part.priority = request.priority
        if request.deadline_s:
            call.deadline = call.arrived + int(request.deadline_s * 1e9)
        with self._change:
            if self._closing:
                raise _closed()
            waiting = len(self._inbox) + len(self._scheduler.waiting)
            if waiting >= self._settings.queue:
                self._tally.refused += 1
                raise EngineOverloaded(
                    f"{waiting:,} requests are waiting, no more are taken",
                    retry_after_s=self._mean_s * waiting / self._settings.max_batch,
                )
            self._tally.taken += 1
            self._inbox.append(call)
            self._change.notify()

    async def _errand(self, do: Callable[[], T]) -> T:
        """What `do` returns, done on the worker's thread between two steps."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(do())
            except BaseException as error:
                done.set_exception(error)

        with self._change:
            self._check_open()
            self._errands.append(run)
            self._change.notify()
        return await asyncio.wrap_future(done)

    def _leave(self, call: Call) -> None:
        with self._change:
            if not call.over:
                self._leaving.append(call)
                self._change.notify()

    def _stop(self) -> None:
        with self._change:
            self._closing = True
            self._change.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    # --- on the worker's thread ---

    def _work(self) -> None:
        end: EngineError = _closed()
        try:
            self._serve()
            if self._kept is not None:
                self._kept.keep(self._pool.prefixes(), self._runner.read_block)
        # Native libraries panic with an exception that is no Exception; whoever waits must be told of that too.
        except BaseException as error:
            end = EngineClosed(f"the engine broke down: {type(error).__name__}: {error}", hint="open it again; this is a defect")
            end.__cause__ = error
        with self._change:
            self._closing = True
            self._active.update(self._inbox)
            self._inbox.clear()
            errands, self._errands = self._errands, []
        for errand in errands:
            errand()
        for call in list(self._active):
            # Books that are broken must not keep the others from hearing of it.
            with suppress(BaseException):
                self._end(call, "failed")
            call.send(end)
        self._runner.close()

    def _serve(self) -> None:
        while True:
            with self._change:
                while not (self._closing or self._inbox or self._leaving or self._errands or not self._scheduler.idle):
                    self._change.wait()
                if self._closing:
                    return
                arrived, left, errands = list(self._inbox), self._leaving, self._errands
                self._inbox.clear()
                self._leaving, self._errands = [], []
            for call in arrived:
                self._active.add(call)
                self._tally.usage += Usage(trimmed_tokens=call.trimmed)
                self._restore(call.sequence)
                self._scheduler.add(call.sequence)
            for call in left:
                self._end(call, "cancelled")
            for errand in errands:
                errand()
            self._expire()
            if chunks := self._scheduler.plan():
                self._step(chunks)
            elif (hopeless := self._scheduler.hopeless()) is not None:
                self._fail(hopeless.owner, self._crowded_out(hopeless))

    def _expire(self) -> None:
        now = self._clock.monotonic_ns()
        for call in [call for call in self._active if call.deadline is not None and call.deadline <= now]:
            waited = (now - call.arrived) / 1e9
            where = "it waited in the queue" if call.admitted is None else f"{call.made:,} tokens were made"
            told = f"the request was not done in its time and was ended after {waited:.1f} s: {where}"
            hint = "give it more time (deadline_s), a higher priority, or fewer tokens to make"
            self._fail(call, DeadlinePassed(told, hint=hint), how="expired")

    def _crowded_out(self, sequence: Sequence) -> EngineError:
        needed, pinned = self._scheduler.blocks_needed(sequence), self._pins.blocks
        return EngineError(
            f"the request needs {needed:,} blocks of the KV cache, and of its {self._pool.total:,} {pinned:,} are pinned",
            hint="unpin a prefix, ask for fewer tokens, or raise engine.kv_tokens",
        )

    def _restore(self, sequence: Sequence) -> None:
        if self._kept is not None:
            limit = sequence.wanted_from // BLOCK
            self._kept.restore(self._pool, sequence.namespace, sequence.tokens, limit, self._runner.write_block)

    def _step(self, chunks: list[Chunk]) -> None:
        """A step that fails, fails the requests in it and no other."""
        self._start(chunks)
        began = self._clock.monotonic_ns()
        try:
            logits = self._runner.step(_batch(chunks))
        except BaseException as error:
            for call in {chunk.sequence.owner for chunk in chunks}:
                self._fail(call, EngineError(f"the model failed: {type(error).__name__}: {error}"), error)
            return
        seconds = (self._clock.monotonic_ns() - began) / 1e9
        self._scheduler.took(chunks, seconds)
        self._scheduler.advance(chunks)
        self._tally.step(_read_by(chunks), seconds, self._pool.used)
        at = 0
        for chunk in chunks:
            call, wanted = chunk.sequence.owner, chunk.wanted
            rows = logits[at : at + len(wanted)]
            at += len(wanted)
            if call.over or not len(wanted):
                continue
            made = call.made
            try:
                call.take(chunk.sequence, wanted.start, rows)
                if call.over and call.pins:
                    call.pinned = self._pin(call.sequence)
            except EngineError as error:
                self._fail(call, error)
                continue
            except BaseException as error:
                self._fail(call, EngineError(f"the request failed: {type(error).__name__}: {error}"), error)
                continue
            finally:
                self._tally.usage += Usage(output_tokens=call.made - made)
            footprint = None
            if call.over:
                self._end(call, "answered")
                footprint = self._footprint(call)
            elif call.ended:
                self._scheduler.retire(call.ended)
                call.ended = []
            # Only now, so that whoever gets the last event finds the books closed and the blocks free.
            call.deliver(footprint)

    def _start(self, chunks: list[Chunk]) -> None:
        for call in {chunk.sequence.owner for chunk in chunks}:
            if call.admitted is None:
                call.start(self._gauges.energy_mj())
        at_work = [call for call in self._active if call.admitted is not None]
        if len(at_work) > 1:
            for call in at_work:
                call.shared = True

    def _pin(self, sequence: Sequence) -> int:
        try:
            return self._pins.pin(sequence.namespace, sequence.tokens)
        except NoRoom:
            raise EngineError(
                f"{self._pins.blocks * BLOCK:,} tokens are pinned, and no more than {self._pins.limit * BLOCK:,} can be",
                hint="unpin another prefix, or raise engine.kv_tokens",
            ) from None

    def _footprint(self, call: Call) -> Footprint:
        began = call.energy_mj
        return Footprint(
            blocks=call.blocks,
            used_blocks=self._pool.used,
            pinned_blocks=self._pins.blocks,
            cached_blocks=self._pool.cached,
            free_blocks=self._pool.free,
            waiting=len(self._scheduler.waiting) + len(self._inbox),
            peak_memory_bytes=self._gauges.peak_memory_bytes(),
            energy_mj=max(0, self._gauges.energy_mj() - began) if began else 0,
            shared=call.shared,
        )

    def _fail(self, call: Call, error: EngineError, cause: BaseException | None = None, how: Outcome = "failed") -> None:
        if cause is not None:
            error.__cause__ = cause
        self._end(call, how)
        call.send(error)

    def _end(self, call: Call, how: Outcome) -> None:
        if call not in self._active:
            return
        call.over = True
        self._active.discard(call)
        self._scheduler.finish([call.sequence])
        self._tally.end(how, call.usage, call.timing)
        if call.admitted is not None:
            took = (self._clock.monotonic_ns() - call.admitted) / 1e9
            self._mean_s += (took - self._mean_s) / 8


async def _aside(request: Request | ScoreRequest, make: Callable[[], T]) -> T:
    """Small inputs are made into tokens at once; big ones in a thread, so that the caller's event loop goes on."""
    size = len(request.text) if request.text is not None else sum(len(message.content) for message in request.messages)
    return make() if size < _INLINE_CHARACTERS else await asyncio.to_thread(make)


@contextmanager
def _panics_told() -> Iterator[None]:
    """A native library's panic, which is no Exception, as an error that callers know."""
    try:
        yield
    except (Exception, asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise EngineError(f"the request failed: {type(error).__name__}: {error}") from error


def _batch(chunks: list[Chunk]) -> Batch:
    starts = np.cumsum([0] + [chunk.count for chunk in chunks])
    copies = [
        (chunk.sequence.copy_from, chunk.sequence.table[chunk.start // BLOCK])
        for chunk in chunks
        if chunk.sequence.copy_from is not None
    ]
    for chunk in chunks:
        chunk.sequence.copy_from = None
    tokens = [chunk.sequence.tokens[chunk.start : chunk.start + chunk.count] for chunk in chunks]
    positions = [np.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks]
    wanted = [
        np.arange(len(chunk.wanted)) + start + (chunk.wanted.start - chunk.start)
        for chunk, start in zip(chunks, starts, strict=False)
    ]
    return Batch(
        tokens=np.concatenate([np.asarray(part, np.int64) for part in tokens]),
        positions=np.concatenate(positions).astype(np.int64),
        counts=[chunk.count for chunk in chunks],
        tables=[chunk.sequence.table for chunk in chunks],
        wanted=np.concatenate(wanted).astype(np.int64),
        copies=copies,
        made=[chunk.start >= chunk.sequence.inputs for chunk in chunks],
    )


def _read_by(chunks: list[Chunk]) -> Usage:
    """The prompt tokens that a step computed, and those that were cached before the first of them."""
    computed = cached = 0
    for chunk in chunks:
        sequence = chunk.sequence
        computed += max(0, min(chunk.start + chunk.count, sequence.inputs) - chunk.start)
        if chunk.start == sequence.cached and not sequence.private:
            cached += sequence.cached
    return Usage(input_tokens=computed + cached, cached_tokens=cached, computed_tokens=computed)


def _closed() -> EngineClosed:
    return EngineClosed("the engine was closed", hint="open it again")


def _info(checkpoint: Checkpoint, name: str, device: str, cache_tokens: int) -> ModelInfo:
    config, how = checkpoint.config, checkpoint.quantization
    group = "" if how is None or how.group_size == -1 else f", group {how.group_size}"
    return ModelInfo(
        name=name,
        revision=checkpoint.revision,
        architecture=config.architecture,
        context_tokens=min(config.context, cache_tokens),
        vocabulary=config.vocabulary,
        parameters=sum(int(np.prod(shape)) for shape in expected_shapes(config).values()),
        weight_bytes=checkpoint.weight_bytes,
        quantization="none" if how is None else f"GPTQ {how.bits}-bit{group}",
        device=device,
    )
