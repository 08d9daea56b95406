# SPDX-License-Identifier: Apache-2.0
"""What stands in a compiled program: the number of its kernels, which no noise touches.

On a CPU a step of a small network costs a few microseconds for each kernel, and its compilation some 20 ms for each.
"""

import re
from collections import Counter

KINDS = ("fusion", "dot", "custom-call", "call", "copy")  # instructions that are a launch each


def kernels(text: str) -> Counter[str]:
  """How often each of KINDS stands in `compiled.as_text()`; the sum is what a step launches at most.

  All branches of a `lax.cond` count, and the body of a loop counts once. What stands inside a fusion does not count:
  it is that fusion's one kernel, whatever it computes.
  """
  fused = set(re.findall(r" fusion\(.*?calls=%?([\w.-]+)", text))
  found: Counter[str] = Counter()
  computation = ""
  for line in text.splitlines():
    if line.endswith("{") and not line.startswith(" "):
      computation = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
    elif computation not in fused and (call := re.search(r" = .*? ([a-z][a-z-]*)\(", line)) and call[1] in KINDS:
      found[call[1]] += 1
  return found
