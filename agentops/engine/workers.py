"""Threads that each run torch on one core.

Independent pieces of work side by side need no barrier inside an operation: torch's own threads meet at one after every
operation, and on a machine that does other work as well they wait there most of the time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Each(Protocol):
    """Results of a function on every item, in the items' order; the first error is raised."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]: ...


@contextmanager
def open_workers(threads: int = 0) -> Iterator[Each]:
    """A pool of `threads`, 0 for one a core; inference mode is on in each of them."""
    usual = torch.get_num_threads()

    def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        def one(item: T) -> R:
            with torch.inference_mode():
                return function(item)

        return list(pool.map(one, items))

    try:
        with ThreadPoolExecutor(threads or cores(), "agentops-torch", torch.set_num_threads, (1,)) as pool:
            yield each
    finally:
        # Setting it in a worker also sets what later threads begin with.
        torch.set_num_threads(usual)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
