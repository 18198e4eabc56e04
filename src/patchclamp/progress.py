"""A progress bar with tokens per second and time left, on the terminal's error stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Counts `unit`s of work done out of `total`; draws itself unless it was told not to."""

    def __init__(self, title: str, total: int, unit: str = "tokens", show: bool = True) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self._started = time.perf_counter()
        self._bar = _rich_bar(title, total, unit) if show else None

    def advance(self, amount: int) -> None:
        """Say that `amount` more units are done."""
        self.done += amount
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, advance=amount)

    @property
    def seconds(self) -> float:
        """Wall seconds since the start."""
        return time.perf_counter() - self._started

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None


@contextmanager
def progress(title: str, total: int, unit: str = "tokens", show: bool = True) -> Iterator[Progress]:
    """Draw a progress bar while the block runs; it is closed whatever happens."""
    bar = Progress(title, total, unit, show)
    try:
        yield bar
    finally:
        bar.close()


def _rich_bar(title: str, total: int, unit: str):
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} {unit}/s" if speed else f"- {unit}/s", style="cyan")

    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        Speed(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=False,
    )
    bar.start()
    return bar, bar.add_task(title, total=total)
