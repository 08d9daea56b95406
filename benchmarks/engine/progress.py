# SPDX-License-Identifier: Apache-2.0
"""Live progress: a rich bar on a terminal, plain lines elsewhere."""

import sys
import time
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 10.0  # seconds between plain lines


def say(text: str) -> None:
  """One line of information, wherever the output goes."""
  print(text, flush=True)


class Reporter(AbstractContextManager):
  """Counts the chunks of training done, out of `total`."""

  def __init__(self, total: int):
    self.total, self.done, self.last = total, 0, time.monotonic()
    self.bar = None
    if sys.stdout.isatty():
      columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
      )
      self.bar = Progress(*columns, console=Console())
      self.task = self.bar.add_task("", total=total)

  def __enter__(self) -> "Reporter":
    if self.bar:
      self.bar.start()
    return self

  def __exit__(self, *exception: Any) -> None:
    if self.bar:
      self.bar.stop()

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
