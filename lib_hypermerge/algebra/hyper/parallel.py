"""Many small operations on parts of a whole, each part in one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ...lazy import torch

A = TypeVar("A")
B = TypeVar("B")


def one_thread_each(function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """Results of function in the order of items, as many at a time as torch has threads, which it has again after."""
    threads = torch.get_num_threads()
    try:
        if threads == 1 or len(items) < 2:
            torch.set_num_threads(1)
            yield from map(function, items)
            return
        with ThreadPoolExecutor(threads, "hypermerge", torch.set_num_threads, (1,)) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(threads)
