"""Work on layers in parallel, results in order: one thread per core, each with one-threaded operations.

That beats threads inside an operation, because a network has hundreds of layers and few are large.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_MOST_WORKERS = 8
_MOST_BYTES = 1 << 30  # for the buffers of all workers together


def plan_workers(threads: int, device: str, bytes_each: int = 0) -> tuple[int, int]:
    """(workers, threads each) for a number of CPU threads; 0 means torch's own number.

    bytes_each: what a worker holds; there are only as many as fit 1 GiB, but two.
    On the CPU each has one thread, always: sums split over threads would round differently on other machines.
    """
    threads = threads or torch.get_num_threads() or os.cpu_count() or 1
    if device != "cpu":
        return 2, max(1, threads // 2)  # one reads while the other computes
    affordable = max(2, _MOST_BYTES // bytes_each) if bytes_each else _MOST_WORKERS
    return max(1, min(threads, _MOST_WORKERS, affordable)), 1


def map_in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int, threads: int, check: Callable[[], None]
) -> Iterator[R]:
    """Results of function in the order of items; a few are computed ahead. check() may raise to stop.

    torch's thread count is set inside the workers and put back; what was begun is finished before an
    exception leaves, so nobody works on closed files.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "hypermerge", initializer=torch.set_num_threads, initargs=(threads,))
    ahead: deque[Future[R]] = deque()
    source = iter(items)
    try:
        while True:
            while len(ahead) < 2 * workers:
                try:
                    ahead.append(pool.submit(function, next(source)))
                except StopIteration:
                    break
            if not ahead:
                return
            check()
            while not ahead[0].done():
                _wait(ahead[0])
                check()
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
        pool.shutdown(wait=True)
        torch.set_num_threads(before)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """That many for torch in this thread, and its own number again after."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait(future: Future) -> None:
    try:
        future.exception(timeout=0.1)
    except TimeoutError:
        return
    except Exception:  # concurrent.futures has a TimeoutError of its own before Python 3.11
        return
