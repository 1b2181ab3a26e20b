"""Does anybody wait for what others want? The default model under mixed load.

Stalls: four conversations are written while prompts of about 700 new tokens keep coming; how much longer is the gap between two
tokens at its worst (p99) than it usually is (p50)? The peer is the same engine with prompts read in pieces of a fixed size
(`engine.prefill_tokens`, 1,024), in the same run.
Fairness: with 64 requests of one thread waiting, how long does a single request of another take, against its time alone? The peer
is the same request as the 65th of that thread, first come first served.
Not measured: other models, and a GPU. What else the machine did meanwhile is in `load`: on two cores more than 2 is other work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from contextlib import suppress
from typing import cast

from agentops.engine import generate
from agentops.engine.local import LocalEngine
from agentops.engine.pace import Pace
from agentops.parts import open_engine
from agentops.records import Delta, Request
from agentops.settings import load_settings

WORDS = ("river", "bridge", "market", "garden", "winter", "copper", "letter", "engine", "harbour", "signal", "window", "mirror")


def text(words: int, luck: random.Random) -> str:
    return " ".join(luck.choice(WORDS) + str(luck.randrange(1000)) for _ in range(words))


class Fixed(Pace):
    """Learns nothing, so that prompts are read in pieces as large as the settings allow."""

    @property
    def known(self) -> bool:
        return False


async def gaps(engine: LocalEngine, seconds: float, luck: random.Random) -> list[float]:
    """Milliseconds between tokens of four conversations while long prompts come."""
    found: list[float] = []
    until = time.perf_counter() + seconds

    async def talk(number: int) -> None:
        while time.perf_counter() < until:
            last = 0.0
            async for event in engine.stream(Request(text=text(12, luck), max_tokens=64, thread=f"talk {number}")):
                now = time.perf_counter()
                if isinstance(event, Delta):
                    if last:
                        found.append((now - last) * 1e3)
                    last = now

    async def read() -> None:
        while time.perf_counter() < until:
            await generate(engine, Request(text=text(170, luck), max_tokens=1, thread="reader"))
            await asyncio.sleep(0.2)

    await asyncio.gather(*(talk(number) for number in range(4)), read())
    return found


async def single(engine: LocalEngine, others: int, thread: str, tokens: int, luck: random.Random) -> float:
    """Seconds that one request takes, a second after so many of the thread "crowd" were asked."""

    def asks(of: str) -> Request:
        return Request(text=text(20, luck), max_tokens=tokens, thread=of)

    crowd = [asyncio.create_task(generate(engine, asks("crowd"))) for _ in range(others)]
    await asyncio.sleep(1.0 if others else 0.0)
    began = time.perf_counter()
    await generate(engine, asks(thread))
    took = time.perf_counter() - began
    for task in crowd:
        task.cancel()
    for task in crowd:
        with suppress(asyncio.CancelledError):
            await task
    return took


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measure(engine: LocalEngine, quick: bool) -> list[dict[str, object]]:
    luck = random.Random(1)
    seconds, rounds, tokens = (6.0, 1, 16) if quick else (25.0, 3, 32)
    await gaps(engine, 3.0, luck)
    ours = await gaps(engine, seconds, luck)
    pace, engine._scheduler.pace = engine._scheduler.pace, Fixed()
    theirs = await gaps(engine, seconds, luck)
    engine._scheduler.pace = pace
    rows: list[dict[str, object]] = []
    for name, share in (("gap_p50", 0.5), ("gap_p99", 0.99)):
        mine, fixed = percentile(ours, share), percentile(theirs, share)
        rows.append(row(name, mine, "pieces of a fixed size", fixed, fixed / mine, "ms"))
    mine, fixed = (percentile(found, 0.99) / percentile(found, 0.5) for found in (ours, theirs))
    rows.append(row("gap_p99_by_p50", mine, "pieces of a fixed size", fixed, fixed / mine, "x"))
    alone = statistics.median([await single(engine, 0, "single", tokens, luck) for _ in range(rounds + 2)])
    fair = statistics.median([await single(engine, 64, "single", tokens, luck) for _ in range(rounds)])
    behind = await single(engine, 64, "crowd", tokens, luck)
    rows.append(row("single_alone", alone, "-", None, None, "s"))
    rows.append(row("single_beside_64", fair, "first come first served", behind, behind / fair, "s"))
    rows.append(row("single_beside_64_by_alone", fair / alone, "first come first served", behind / alone, behind / fair, "x"))
    return rows


def row(metric: str, ours: float, peer: str, theirs: float | None, ratio: float | None, unit: str) -> dict[str, object]:
    numbers = {"ours": ours, "theirs": theirs, "ratio": ratio}
    told = {name: None if value is None else round(value, 2) for name, value in numbers.items()}
    return {"metric": metric, "ours": told["ours"], "peer": peer, "theirs": told["theirs"], "ratio": told["ratio"], "unit": unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="shorter windows, one round")
    quick = parser.parse_args().quick

    async def run() -> list[dict[str, object]]:
        engine = open_engine(load_settings())
        try:
            return await measure(engine, quick)
        finally:
            await engine.close()

    rows = asyncio.run(run())
    print(f"{'':28} {'ours':>9} {'peer':>9} {'ratio':>7}")
    for one in rows:
        theirs, ratio = (cast("float | None", one[name]) for name in ("theirs", "ratio"))
        shown = " ".join(
            "-".rjust(width) if value is None else f"{value:{width}.2f}" for value, width in ((theirs, 9), (ratio, 7))
        )
        print(f"{one['metric']!s:28} {cast('float', one['ours']):9.2f} {shown}  {one['unit']}, peer: {one['peer']}")
    load = round(os.getloadavg()[0], 1)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), "load": load}
    print(json.dumps({"bench": "mixed", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
