"""How many threads a matrix product gets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# Below so many multiplications per pass over the rows a second thread costs more than it gains:
# it is woken and waited for at every product, and on a busy machine the wait is long.
SMALL_PASS = 1 << 26


@contextlib.contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """Keep small products on one thread.

    Args:
        multiplications: Of one pass over the rows: rows * features * classes.
    """
    if multiplications >= SMALL_PASS:
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield
