# SPDX-License-Identifier: Apache-2.0
"""The formulas of the docstrings, which are plain text, as LaTeX for the reference.

`converted(lines)` finds them in what a docstring says before its first section: a run of signs, letters and operators
within a sentence, or a part of an indented line. What is no formula, or has an open bracket, stays as it was.
"""

import re
import unicodedata

SIGNS = {
  "⊗": r"\otimes ", "⊙": r"\odot ", "←": r"\leftarrow ", "→": r"\to ", "↦": r"\mapsto ", "≈": r"\approx ", "≤": r"\le ",
  "≥": r"\ge ", "‖": r"\| ", "⟨": r"\langle ", "⟩": r"\rangle ", "∇": r"\nabla ", "∂": r"\partial ", "Σ": r"\sum ",
  "∈": r"\in ", "·": r"\cdot ", "−": "-", "…": r"\dots ", "×": r"\times ", "≠": r"\ne ", "~": r"\sim ", "±": r"\pm ",
  "′": "'", "∘": r"\circ ", "%": r"\%", "∞": r"\infty ", "½": r"\tfrac12 ", "¼": r"\tfrac14 ", "¾": r"\tfrac34 ",
  "⇔": r"\Leftrightarrow ", "ℓ": r"\ell ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "#": r"\#", "&": r"\&",
}  # fmt: skip
GREEK = {
  "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "η": "eta", "θ": "theta", "λ": "lambda",
  "μ": "mu", "ν": "nu", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "ω": "omega", "Δ": "Delta",
}  # fmt: skip
UPPER, LOWER = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀᴴⁿ", "₀₁₂₃₄₅₆₇₈₉₋"
PLAIN_UPPER, PLAIN_LOWER = dict(zip(UPPER, "0123456789-THn", strict=True)), dict(zip(LOWER, "0123456789-", strict=True))
FUNCTIONS = {"clip", "tr", "min", "max", "sign", "diag", "rms", "qr", "log", "exp", "mean", "triu", "momentum", "argmin", "sym"}
SPECIAL = (set(SIGNS) | set(GREEK) | set(UPPER + LOWER) | set("√=\u0302\u0303")) - set("…%~#&")
STOP = {"the", "where", "on", "of", "is", "and", "with", "for", "if", "its", "so", "as", "in"}
OPERATORS = {"=", "←", "→", "+", "−", "·", "/", "≈", "⊗", "⊙", "≤", "≥", "↦", "<", ">", "∈", "×", "~"}
RELATIONS = {"=", "←", "≈"}
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Warns|Example|Examples|Source|Sources|Departures[^:]*|Yields):")


def latex(text: str) -> str:
  """One formula."""
  text = unicodedata.normalize("NFD", text)
  text = re.sub("(.)\u0302", "\ue000\\1", text)  # signs of private use stand for a hat and a tilde
  text = re.sub("(.)\u0303", "\ue001\\1", text)
  text = unicodedata.normalize("NFC", text)
  text = re.sub(rf"[{UPPER}]+", lambda m: "^{" + "".join(PLAIN_UPPER[c] for c in m[0]) + "}", text)
  text = re.sub(rf"[{LOWER}]+", lambda m: "_{" + "".join(PLAIN_LOWER[c] for c in m[0]) + "}", text)
  for _ in range(3):
    text = re.sub(r"\^\(([^()]*(?:\([^()]*\)[^()]*)*)\)", r"^{\1}", text)
    text = re.sub(r"√\(([^()]*(?:\([^()]*\)[^()]*)*)\)", r"ROOT{\1}", text)
  text = re.sub("√([\ue000\ue001]?\\w+)", r"ROOT{\1}", text)
  text = re.sub(r"_(\w+)", lambda m: "_{" + m[1] + "}" if len(m[1]) < 4 else r"\_" + m[1], text)

  def word(m: re.Match) -> str:
    w = m[0]
    if w == "ROOT":
      return r"\sqrt"
    if w.endswith("bar") and len(w) == 4:
      return rf"\bar{{{w[0]}}}"
    if w in FUNCTIONS:
      return rf"\operatorname{{{w}}}"
    plain = w.replace(r"\_", "_")
    if len(plain) > 2 and not plain.isupper():
      return r"\mathrm{" + plain.replace("_", r"\_") + "}"
    return w

  text = re.sub(r"[A-Za-z](?:[A-Za-z]|\\_)*", word, text)
  for mark, accent in (("\ue000", r"\hat"), ("\ue001", r"\tilde")):
    text = re.sub(f"{mark}(.)", lambda m, accent=accent: f"{accent}{{{m[1]}}}", text)
  for sign, command in GREEK.items():
    text = text.replace(sign, f"\\{command} ")
  for sign, command in SIGNS.items():
    text = text.replace(sign, command) if sign not in "%#&" else text
  return text.replace("\\T", "T").replace("^{T}", r"^\top ").strip()


def _balanced(text: str) -> bool:
  return all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}", "⟨⟩")) and text.count("‖") % 2 == 0


ATOM = r"(?:[b-zB-HJ-Z]|\d+(?:\.\d+)?|[A-Za-z]_\w{1,2}|[A-Z]bar(?:_\w)?|Hv|Ph|Pg|Qh|Pv|[A-Z]{2,3})'?"
CALL = re.compile(rf"[\[(|]*(?:{'|'.join(FUNCTIONS)})\(.*")


def _formal(token: str) -> bool:
  """Whether a word of a sentence can belong to a formula."""
  bare = token.rstrip(".,;:")
  if "`" in token or not bare or '"' in token or re.search(r"'s$|[A-Za-z]{3,}-|-[A-Za-z]{3,}", token):
    return False
  if bare in OPERATORS or bare.strip("()[]") in ("I", "P", "Q") or any(c in SPECIAL for c in bare) or CALL.match(bare):
    return True
  return bool(re.fullmatch(rf"[\[(|]*-?{ATOM}[\])|]*(?:[/^]\w+)?", bare))


def _depth(words: list[str]) -> int:
  """How many brackets are open."""
  return sum((c in "([⟨") - (c in ")]⟩") for word in words for c in word)


def _joins(words: list[str], i: int, j: int) -> bool:
  """Whether a word goes on with the formula words[i:j] though it looks like none: a name or "a" between operators."""
  name = re.sub(r"/\d$", "", words[j].strip("()[],.;:"))
  if not re.fullmatch(r"[A-Za-z_]+", name) or name in STOP:
    return False
  before = words[j - 1] in OPERATORS or words[j - 1][-1] in "(," or bool(CALL.match(words[j - 1]))
  inside = _depth(words[i:j]) > 0
  after = words[j][-1] in ").,;:" or j + 1 == len(words) or words[j + 1] in OPERATORS
  after = after or (name == "a" and _formal(words[j + 1]))
  return before and (inside or after)


def _run(words: list[str], i: int) -> int:
  """Where the formula that begins with words[i] ends; i if none does."""
  j = i
  if re.fullmatch(r"[A-Za-z_]+", words[i]) and i + 1 < len(words) and words[i + 1] in RELATIONS:
    j += 1  # "updates = …"
  while j < len(words) and (_formal(words[j]) or (j > i and _joins(words, i, j))):
    j += 1
    if words[j - 1][-1] in ".,;:" and (_depth(words[i:j]) <= 0 or words[j - 1][-1] in ".;:"):
      break
  while j > i and words[j - 1] in OPERATORS:
    j -= 1
  return j


def inline(sentence: str) -> str:
  """A sentence with its formulas as :math: roles."""
  words = re.findall(r"\S*?``.*?``\S*|\S*?`.*?`\S*|\S+", sentence)
  out: list[str] = []
  i = 0
  while i < len(words):
    for j in range(_run(words, i), i, -1):  # the longest that has its brackets closed
      bare = " ".join(words[i:j]).rstrip(".,;:")
      if any(c in SPECIAL for c in bare) and _balanced(bare):
        tail = " ".join(words[i:j])[len(bare) :]
        out.append(f":math:`{latex(bare)}`{tail}")
        i = j
        break
    else:
      out.append(words[i])
      i += 1
  return " ".join(out)


def _display(line: str) -> str:
  """An indented line of formulas and remarks, set apart by two blanks or more."""
  parts = [part for part in re.split(r"\s{2,}", line.strip()) if part]
  return "| " + " \\ \\  ".join(inline(part) for part in parts)


def converted(lines: list[str]) -> list[str]:
  """A docstring with the formulas of its description as LaTeX; sections and examples as they were."""
  end = next((i for i, line in enumerate(lines) if SECTION.match(line) or line.lstrip().startswith(">>>")), len(lines))
  out: list[str] = []
  paragraph: list[str] = []

  def flush() -> None:
    if paragraph and all(line.startswith(" ") for line in paragraph):
      if any(c in "".join(paragraph) for c in "=←→") and not any(
        re.match(r"\s*(\d+\.|[-*|])\s", line) for line in paragraph
      ):
        out.extend(map(_display, paragraph))
      else:
        out.extend(map(_numbered, paragraph))
    elif any(re.search(r"\S {3,}\S", line) for line in paragraph):
      out.extend(map(_display, paragraph))
    elif paragraph and any(re.match(r"\s*([-*|]|\d+\.) ", line) for line in paragraph):
      out.extend(paragraph)
    elif paragraph:
      out.append(inline(" ".join(line.strip() for line in paragraph)))
    paragraph.clear()

  for line in [*lines[:end], ""]:
    if line.strip():
      paragraph.append(line)
    else:
      flush()
      out.append("")
  return [*out, *lines[end:]]


def _numbered(line: str) -> str:
  """A line of a numbered list of formulas: what stands behind the number, and the equation of the paper behind that."""
  head, rest = re.match(r"(\s*(?:\d+\.\s+)?)(.*)", line).groups()
  return head + "  ".join(inline(part) for part in re.split(r"\s{2,}", rest))
