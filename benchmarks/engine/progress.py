# SPDX-License-Identifier: Apache-2.0
"""Live progress: a rich bar on a terminal, plain lines elsewhere."""

import sys
import time
from contextlib import ExitStack

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 10.0  # seconds between plain lines


def say(text: str) -> None:
  """One line of information, wherever the output goes."""
  print(text, flush=True)


class Reporter(ExitStack):
  """Counts the chunks of training done, out of `total`; a context, at whose end the bar stops."""

  def __init__(self, total: int):
    super().__init__()
    self.total, self.done, self.last, self.bar = total, 0, time.monotonic(), None
    if sys.stdout.isatty():
      text = TextColumn("{task.description}", markup=False)
      self.bar = self.enter_context(Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()))
      self.task = self.bar.add_task("", total=total)

  def line(self, text: str) -> None:
    """A line that stays."""
    self.bar.console.print(text, highlight=False, markup=False) if self.bar else say(text)

  def advance(self, text: str) -> None:
    """One more chunk; `text` says where training stands."""
    self.done += 1
    if self.bar:
      self.bar.update(self.task, advance=1, description=text)
    elif time.monotonic() - self.last > PLAIN_INTERVAL:
      self.last = time.monotonic()
      say(f"  {self.done}/{self.total}  {text}")
