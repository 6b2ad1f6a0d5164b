"""What a training shows while it goes on: bars in a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Any

import rich.console
import rich.progress
import rich.text

from sparse_optax.experiments.train import Activity, Progress

# Plain lines: those of epochs and steps come in the first epoch, after each tenth of
# the run, and wherever nothing was said for so many seconds.
SILENCE = 30.0
_PARTS = 10


def clock(seconds: float) -> str:
    """A time as m:ss, or h:mm:ss from an hour on.

    Args:
      seconds: the time.

    Returns:
      The text.

    Examples:
      >>> from sparse_optax.experiments import progress
      >>> progress.clock(7.9), progress.clock(3 * 3600 + 65)
      ('0:07', '3:01:05')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display:
    """Shows the stages of a run, with the time since the command was given.

    Used as a context. Lines stay; in a terminal there is a bar for each stage below.

    Args:
      console: where to.
      started: when the command was given, by ``time.monotonic``.
      quiet: show nothing.
    """

    def __init__(
        self, console: rich.console.Console, started: float, *, quiet: bool = False
    ):
        """Makes a display; nothing is shown yet."""
        self._console, self._started, self._quiet = console, started, quiet
        self._last = started
        self._epochs: dict[str, int] = {}
        self._bars: dict[str, rich.progress.TaskID] = {}
        live = console.is_terminal and not quiet
        self._live = _bars(console, started) if live else None

    def __enter__(self) -> "Display":
        """Starts the bars."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the bars; what they showed last stays."""
        if self._live is not None:
            self._live.stop()

    @property
    def trained(self) -> bool:
        """Whether an epoch was trained."""
        return any(self._epochs.values())

    def line(self, text: str) -> None:
        """Shows a line that stays, behind the time."""
        if self._quiet:
            return
        self._last = time.monotonic()
        console = self._console if self._live is None else self._live.console
        passed = clock(self._last - self._started)
        console.print(f"{passed} {text}", soft_wrap=True, markup=False)

    def on_activity(self, activity: Activity) -> None:
        """Shows what a run does now."""
        stage, text = activity.stage, activity.text
        if activity.brief:
            text = f"epoch {self._epochs.get(stage, 0) + 1}, {text}"
        if self._live is not None:
            self._live.update(self._bar(stage), text=text)
            if text.startswith("going on"):
                self.line(f"{stage}: {text}")
        elif not activity.brief or time.monotonic() - self._last >= SILENCE:
            self.line(f"{stage}: {text}")

    def on_epoch(self, progress: Progress) -> None:
        """Shows what an epoch ended with."""
        stage, epoch, epochs = progress.stage, progress.epoch, progress.epochs
        first = stage not in self._epochs
        self._epochs[stage] = epoch
        text = f"test error {progress.metrics['test_error']:.2f}%"
        if self._live is not None:
            bar = self._bar(stage)
            self._live.update(bar, total=epochs, completed=epoch, text=text)
            return
        part = epoch * _PARTS // epochs > (epoch - 1) * _PARTS // epochs
        if first or part or time.monotonic() - self._last >= SILENCE:
            self.line(f"{stage}: epoch {epoch} of {epochs}, {text}")

    def _bar(self, stage: str) -> Any:
        assert self._live is not None
        if stage not in self._bars:
            for other, bar in self._bars.items():
                if other not in self._epochs:
                    self._live.update(bar, text=f"after {stage}")
            self._bars[stage] = self._live.add_task(
                stage, total=None, text="", passed=""
            )
        return self._bars[stage]


class _Elapsed(rich.progress.ProgressColumn):
    """The time since the command was given."""

    def __init__(self, started: float):
        super().__init__()
        self._started = started

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        if task.finished_time is None or not task.fields["passed"]:
            task.fields["passed"] = clock(time.monotonic() - self._started)
        return rich.text.Text(task.fields["passed"])


class _Epochs(rich.progress.ProgressColumn):
    """How many epochs are done, once that is known."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        known = task.total is not None
        return rich.text.Text(f"{task.completed:.0f}/{task.total:.0f}" if known else "")


def _bars(console: rich.console.Console, started: float) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        _Epochs(),
        _Elapsed(started),
        rich.progress.TimeRemainingColumn(compact=True),
        rich.progress.TextColumn("{task.fields[text]}"),
        console=console,
    )
