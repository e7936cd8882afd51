"""Several things at once for one shared model: every shard's server is asked at the same time."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from hypha.errors import HyphaError

T = TypeVar("T")


async def together(operations: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Await them all and return their results in order. The first HyphaError ends the others and is raised as it is."""
    results: dict[int, T] = {}
    failures: list[HyphaError] = []

    async def run(number: int, operation: Callable[[], Awaitable[T]]) -> None:
        try:
            results[number] = await operation()
        except HyphaError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for number, operation in enumerate(operations):
            nursery.start_soon(run, number, operation)
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(operations))]
