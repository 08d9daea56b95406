# SPDX-License-Identifier: Apache-2.0
"""What the pages point at exists: files, sections, names of the library, one repository; and their code runs."""

import builtins
import re
import tomllib
from pathlib import Path

import jax
import pytest

import dpsgd_optax
from dpsgd_optax import training

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
  *sorted(ROOT.glob("*.md")),
  ROOT / "benchmarks" / "README.md",
  ROOT / "benchmarks" / "RESULTS.md",
  *sorted((ROOT / "notebooks").glob("*.md")),
  *sorted((ROOT / ".github").rglob("*.md")),
]
CODE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.S | re.M)
LIMIT = 12288  # bytes of the README: one screen, and what belongs to it
READ_ELSEWHERE = ("README.md", "your_loop.md", "science.md")  # others run their blocks
MADE = "notebooks/reference/"  # by the build of the site


def ids(path):
  return str(path.relative_to(ROOT))


def prose(path):
  return CODE.sub("", path.read_text())


def anchors(path):
  """The sections of a page, as GitHub and the site name them."""
  titles = re.findall(r"^#+ +(.*)$", prose(path), re.M)
  return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).replace(" ", "-") for title in titles}


def links(path):
  return re.findall(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)", prose(path))


def has_name(dotted, root=dpsgd_optax):
  for part in dotted.split("."):
    if not hasattr(root, part):
      return False
    root = getattr(root, part)
  return True


def test_the_readme_is_short():
  assert len(README.read_bytes()) <= LIMIT


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_every_link_leads_somewhere(path):
  for link in links(path):
    if re.match(r"\w+:", link):
      continue
    file, _, section = link.partition("#")
    target = (path.parent / file).resolve() if file else path
    if str(target).startswith(str(ROOT / MADE)):
      continue
    assert target.exists(), f"{ids(path)}: no file {file}"
    if section:
      assert section in anchors(target), (
        f"{ids(path)}: {ids(target)} has no section {section}: {sorted(anchors(target))}"
      )


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_every_name_of_the_library_exists(path):
  """Of all that is written `dpo.name`, in prose and in code. What a name *was* before is left out."""
  text = path.read_text().split("## An earlier checkout")[0]
  for name in set(re.findall(r"\b(?:dpo|dpsgd_optax)\.([A-Za-z]\w*(?:\.\w+)*)", text)):
    root = training if name.startswith("training") else dpsgd_optax
    assert name == "training" or has_name(name.removeprefix("training."), root), f"{ids(path)}: no dpsgd_optax.{name}"


CALLED = [README, *(ROOT / "notebooks" / f"{name}.md" for name in ("choosing", "how_it_works", "performance"))]


@pytest.mark.parametrize("path", CALLED, ids=ids)
def test_every_call_in_the_prose_is_one_of_ours(path):
  """Of `name(…)` between backquotes, where no package stands before the name."""
  places = [dpsgd_optax, training, dpsgd_optax.solvers, dpsgd_optax.penalties, builtins]
  for code in re.findall(r"`([^`]+)`", prose(path)):
    for name in re.findall(r"(?<![\w.])([A-Za-z_]\w*)\(", code):
      assert any(hasattr(place, name) for place in places), f"{ids(path)}: `{code}` calls {name}, which is not here"


@pytest.mark.parametrize("path", [path for path in PAGES if path.name not in READ_ELSEWHERE], ids=ids)
def test_every_block_of_python_runs(path):
  namespace = {}
  for language, block in CODE.findall(path.read_text()):
    if language == "python":
      before = jax.config.values.copy()
      exec(compile(block, path.name, "exec"), namespace)
      assert jax.config.values == before, "a block of a page may not change JAX's configuration"


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_every_file_that_is_named_exists(path):
  """Between backquotes, from one of the folders of the repository."""
  for file in re.findall(r"`((?:tests|benchmarks|notebooks|dpsgd_optax)/[\w./-]*\w)/?`", path.read_text()):
    assert (ROOT / file).exists(), f"{ids(path)}: no {file}"


def test_the_repository_has_one_address():
  urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
  files = [*PAGES, ROOT / "CITATION.cff", *(ROOT / ".github").rglob("*.yml"), *(ROOT / "notebooks").glob("[0-9]*.py")]
  for path in files:
    for address in re.findall(r"https://[\w./-]*/dpsgd_optax\b", path.read_text()):
      if "colab" in address:
        assert address.endswith(urls["Repository"].removeprefix("https://github.com/")), ids(path)
      else:
        assert address == urls["Repository"], ids(path)
  assert all(url.startswith(urls["Repository"]) for url in urls.values())


def test_the_version_is_the_same_everywhere():
  version = dpsgd_optax.__version__
  assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
  newest = re.search(r"^## \[(\d\S*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
  assert newest[1] == version and re.fullmatch(r"\d{4}-\d\d-\d\d", newest[2])
  assert f"date-released: {newest[2]}\n" in (ROOT / "CITATION.cff").read_text()


def test_what_is_said_of_soap_holds():
  """The pages say that SOAP exists here, as a preconditioner of `psgd`."""
  assert "soap" in dpsgd_optax.__all__ and "soap()" in README.read_text()
  soap = dpsgd_optax.psgd(1e-3, dpsgd_optax.soap(), b1=0.95, every=1)
  assert soap.init({"w": jax.numpy.ones((3, 2))})


def test_the_extra_for_the_site_names_what_the_site_imports():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  said = " ".join(project["optional-dependencies"]["docs"])
  conf = (ROOT / "notebooks" / "conf.py").read_text()
  assert "myst-nb" in said and "myst_nb" in conf
  assert re.search(r'html_theme = "(\w+)"', conf)[1].replace("_", "-") in said
