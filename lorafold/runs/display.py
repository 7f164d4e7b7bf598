"""What a run shows in the terminal: stages, a progress line while it trains, and plain lines where nobody watches."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lorafold.train.loop import Step
from lorafold.train.memory import resident_bytes

_PLAIN_SECONDS = 15.0  # between two lines of progress when the output is not a terminal


class Display:
    """Progress and messages of one command, on standard error unless told otherwise.

    Args:
        quiet: show nothing but results.
    """

    def __init__(self, quiet: bool = False):
        self.console = Console(stderr=True, highlight=False, quiet=quiet, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar; call what is yielded with the number of items done and, if wanted, a note."""
        if self.console.is_terminal and not self.console.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(
                *columns,
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            ) as bar:
                task = bar.add_task(label, total=total, note="")
                yield lambda n=1, note="": bar.update(task, advance=n, note=note)
            return
        yield _PlainBar(label, total, self.say)


class _PlainBar:
    """Progress as a line now and then, for log files."""

    def __init__(self, label: str, total: int, say: Callable[[str], None]):
        self.label, self.total, self.say = label, total, say
        self.done = 0
        self.began = self.shown = time.monotonic()

    def __call__(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if now - self.shown >= _PLAIN_SECONDS or (self.done >= self.total and note):
            self.shown = now
            left = (now - self.began) / self.done * max(0, self.total - self.done)
            done = min(self.done, self.total)
            self.say(f"{self.label}: {done}/{self.total}, {left:.0f} s left{', ' + note if note else ''}")


def follow(
    running: Iterable[Step], steps: list[Step], total: int, display: Display, after: Callable[[Step], None]
) -> None:
    """Let a run train to its end, each step counted in a bar, kept and then given to `after`.

    Args:
        running: what trains as it is asked for the next step.
        steps: those that are done, which grow.
        total: steps of the whole run.
    """
    with display.bar("training", total) as advance:
        advance(len(steps))
        for step in running:
            steps.append(step)
            advance(1, _training_note(step.loss, step.tokens / step.seconds))
            after(step)


def _training_note(loss: float, tokens_per_second: float) -> str:
    """What stands beside the training bar."""
    return f"loss {loss:.3f}  {tokens_per_second:.0f} tokens/s  {resident_bytes() / 1e9:.2f} GB"


def output(text: str) -> None:
    """A result, on standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
