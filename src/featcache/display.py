"""What people see while a command runs: lines, progress bars, and objects in a notebook."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from featcache.errors import shown, visible

LATE_BAR_S = 2.0


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    return getattr(shell and shell.get_ipython(), "kernel", None) is not None


def bar_hidden() -> bool | None:
    """Tqdm's `disable`: False shows the bar in notebooks; None lets tqdm look for a terminal."""
    return True if muted() else False if in_notebook() else None


def mute(on: bool) -> None:
    """Stop, or start again, showing lines and bars: of several processes, one shows them."""
    (_MUTED.set if on else _MUTED.clear)()


def muted() -> bool:
    """Whether another process shows lines, bars and reports."""
    return _MUTED.is_set()


_MUTED = threading.Event()


def say(text: str) -> None:
    """Print one line for people on stderr, with control characters escaped.

    A closed or full stderr loses the line and does not stop the work.
    """
    if sys.stderr is not None and not muted():  # print would fall back to stdout
        with contextlib.suppress(OSError):
            print(visible(text), file=sys.stderr, flush=True)  # noqa: T201


class Facts:
    """Shows an object by a few facts: a line as its `repr`, a small table in notebooks."""

    def _facts(self) -> dict[str, object]:
        """The facts by name, in order; texts may be a stranger's."""
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = "; ".join(f"{name}: {shown(str(fact))}" for name, fact in self._facts().items())
        return f"<{type(self).__name__} {facts}>"

    def _repr_html_(self) -> str:
        from html import escape

        rows = [
            f'<tr><th style="text-align:left">{escape(name)}</th>'
            f'<td style="text-align:left">{escape(shown(str(fact)))}</td></tr>'
            for name, fact in self._facts().items()
        ]
        return f"<table><caption>{type(self).__name__}</caption>{''.join(rows)}</table>"


def progress(total: int | None, title: str = "", *, late: bool = False, **options: Any) -> Any:
    """A progress bar for terminals and notebooks.

    Args:
        total: The number of steps, None where it is unknown.
        title: Shown before the bar.
        late: Show the bar only after two seconds, and remove it at the end.
        options: Passed to tqdm, for example `unit`, which is "img" (images) by default.
    """
    if late:
        return LateBar(functools.partial(progress, total, title, leave=False, **options))
    from importlib.util import find_spec

    if in_notebook() and find_spec("ipywidgets"):
        from tqdm.notebook import tqdm
    else:
        from tqdm import tqdm

    options = {"disable": bar_hidden(), "unit": "img", **options}
    return tqdm(total=total, desc=visible(title), **options)


class LateBar:
    """A bar made after two seconds: importing tqdm would take a tenth of a short command.

    Args:
        make: Makes the bar, given how far the work is.

    Attributes:
        n: Steps that are done, as tqdm calls them.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make, self._start = make, time.perf_counter()
        self.n, self._bar = 0, None

    def update(self, num: int = 1) -> None:
        """Count steps that are done."""
        if self._bar is not None:
            self._bar.update(num)
        elif time.perf_counter() - self._start >= LATE_BAR_S:
            self._bar = self._make(initial=self.n + num)
        self.n += num

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
