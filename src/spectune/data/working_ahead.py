"""Work on one thing while the next is made."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def with_work_done(work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[tuple[Item, Made]]:
    """Each item with what `work` makes of it, in their order.

    The work is done in one thread behind this one, so work that gives up the interpreter's lock costs no time beside
    making the items. At most two items wait for it. What the work raises is raised here, at its item's turn; who stops
    early waits for the item that is being worked on, and for no other.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="spectune")
    waiting: deque[tuple[Item, Future[Made]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 1:
                before, future = waiting.popleft()
                yield before, future.result()
        for item, future in waiting:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
