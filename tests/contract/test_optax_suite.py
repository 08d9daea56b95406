# SPDX-License-Identifier: Apache-2.0
"""Optax's own tests, as they ship in its wheel, with our optimizers in the place of its.

Their bodies are taken as they are; what they look up by name (an optimizer, a target) is found in our table first. The
Newton optimizers need the objective, which these tests do not pass: it is that of the target asked for last.
"""

import functools
import importlib
import itertools
import types
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import pytest

import dpsgd_optax as dpo

OBJECTIVE = [lambda params: optax.tree.norm(params, squared=True)]
"""Of the running test; those that ask for no target have this one, x²."""


def supplied(constructor):
  """The constructor, of a transform that takes the objective from the running test."""

  @functools.wraps(constructor)
  def make(*args, **kwargs):
    tx = constructor(*args, **kwargs)

    def update(updates, state, params=None, **extra):
      return tx.update(updates, state, params, value_fn=OBJECTIVE[-1], **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)

  return make


class Ours(NamedTuple):
  """Attributes:
  constructor: as users call it.
  options: beside those of the row.
  """

  constructor: Any
  options: dict[str, Any]

  def row(self, name: str, **wrapper: Any) -> dict[str, Any]:
    return {"opt_name": name, "opt_kwargs": self.options, **wrapper}


OURS = {
  "psgd": Ours(dpo.psgd, {"learning_rate": 1e-2}),
  "psgd_lra": Ours(dpo.psgd, {"learning_rate": 1e-2, "preconditioner": dpo.lra(rank=2)}),
  "psgd_newton": Ours(supplied(dpo.psgd), {"learning_rate": 0.1, "curvature": dpo.newton()}),
  "dpsgd": Ours(supplied(dpo.dpsgd), {"learning_rate": 0.1}),
}
WHOLE = Ours(
  supplied(dpo.psgd), {"learning_rate": 0.1, "curvature": dpo.newton(), "preconditioner": dpo.kron(max_skew=jnp.inf)}
)
OPTIMIZERS = {**OURS, "psgd_newton_whole": WHOLE}
"""Those that are let converge. The last has a dense P of a vector too, which by default is diagonal."""
BY_GRADIENT = ("psgd", "psgd_lra")
QUICK = ("psgd", "psgd_newton", "psgd_newton_whole", "dpsgd")
REAL = ("psgd_lra",)
"""Its rules have no conjugates."""


def module(name: str) -> Any:
  """The test module, or None where the wheel has none, or what it imports is missing."""
  try:
    return importlib.import_module(name)
  except ImportError:
    return None


ALIAS, CONTRIB, SCHEDULE, SAM, MECHANIC, FREE, LOOKAHEAD = map(
  module,
  (
    "optax._src.alias_test",
    "optax.contrib._common_test",
    "optax.schedules._schedule_test",
    "optax.contrib._sam_test",
    "optax.contrib._mechanic_test",
    "optax.contrib._schedule_free_test",
    "optax._src.lookahead_test",
  ),
)
pytestmark = pytest.mark.skipif(
  None in (ALIAS, CONTRIB, SCHEDULE, SAM, MECHANIC, FREE, LOOKAHEAD),
  reason="this optax is installed without its tests, or without scipy and scikit-learn, which they import",
)


def body(case: Any, name: str) -> Any:
  """The test before `parameterized` made one method of each combination."""
  test = getattr(case, name, None) or getattr(case, f"{name}0")
  return getattr(test, "__wrapped__", test)


def run(case: Any, name: str, **arguments: Any) -> None:
  """The test as absl would run it: with its `setUp`, and failed by its first failing part."""
  test = case()
  test.setUp()
  try:
    body(case, name)(test, **arguments)
  finally:
    test.tearDown()
    test.doCleanups()


def watched(target: Any) -> Any:
  """A target of the suite, whose objective becomes that of the running test."""

  @functools.wraps(target)
  def setup(dtype):
    start, end, objective = target(dtype)
    OBJECTIVE.append(objective)
    return start, end, objective

  return setup


@pytest.fixture
def suite(monkeypatch):
  """What the tests look up by name."""
  del OBJECTIVE[1:]
  find = lambda theirs: lambda *args: OPTIMIZERS[args[-1]].constructor if args[-1] in OPTIMIZERS else theirs(*args)
  monkeypatch.setattr(ALIAS, "_get_opt", find(ALIAS._get_opt))
  monkeypatch.setattr(CONTRIB, "_get_opt_factory", find(CONTRIB._get_opt_factory))
  for place in (ALIAS, CONTRIB):
    for target in [name for name in vars(place) if name.startswith("_setup_")]:
      monkeypatch.setattr(place, target, watched(getattr(place, target)))
  aliases = types.SimpleNamespace(**vars(optax), **{name: ours.constructor for name, ours in OURS.items()})
  for place in (SCHEDULE, SAM):
    monkeypatch.setattr(place, "alias", aliases)
  yield
  del OBJECTIVE[1:]


def cells(*axes: Any, quick: Any = None) -> Any:
  """One parameter for each combination; if ``quick`` is given, those of which a part is not in it are slow."""
  marks = lambda cell: [] if quick is None or all(part in quick for part in cell) else [pytest.mark.slow]
  name = lambda cell: "-".join(getattr(x, "__name__", None) or str(x) for x in cell)
  return [pytest.param(*cell, id=name(cell), marks=marks(cell)) for cell in itertools.product(*axes)]


def dtypes(*names: str) -> tuple[Any, ...]:
  return tuple(getattr(jnp, name) for name in names)


TARGETS = ("_setup_parabola", "_setup_rosenbrock")
MORE_TARGETS = (*TARGETS, "_setup_matrix_parabola", "_setup_mixed_tensor_target")
WRAPPERS = {
  "mechanize": {"weight_decay": 0.0},
  "schedule_free": {"learning_rate": 1e-2},
  "reduce_on_plateau": {},
}


def plain(name: str) -> dict[str, Any]:
  return OPTIMIZERS[name].row(name)


def inside(name: str, wrapper: str | None) -> dict[str, Any]:
  """`mechanize` finds the learning rate itself, and in the suite is given 1."""
  row = OPTIMIZERS[name].row(name, wrapper_name=wrapper, wrapper_kwargs=WRAPPERS.get(wrapper))
  return {**row, "opt_kwargs": {**row["opt_kwargs"], "learning_rate": 1.0}} if wrapper == "mechanize" else row


def unwrapped(name: str) -> dict[str, Any]:
  return inside(name, None)


@pytest.mark.usefixtures("suite")
class TestAlias:
  @pytest.mark.parametrize(
    ("name", "target", "dtype"),
    cells(OPTIMIZERS, TARGETS, dtypes("float32", "complex64"), quick=(*QUICK, "_setup_rosenbrock", jnp.float32)),
  )
  def test_optimization(self, name, target, dtype):
    if name in REAL and jnp.issubdtype(dtype, jnp.complexfloating):
      pytest.skip(f"{name} does not support complex parameters")
    run(ALIAS.AliasTest, "test_optimization", **plain(name), target=getattr(ALIAS, target), dtype=dtype)

  @pytest.mark.parametrize("name", OURS)
  @pytest.mark.parametrize(
    "test", ["test_optimizers_accept_extra_args", "test_optimizers_can_be_wrapped_in_inject_hyperparams"]
  )
  def test_promise(self, test, name):
    run(ALIAS.AliasTest, test, **plain(name))

  @pytest.mark.parametrize(("name", "dtype"), cells(OURS, ("bfloat16", "float32"), quick=(*QUICK, "bfloat16")))
  @pytest.mark.parametrize("test", ["test_preserve_dtype", "test_gradient_accumulation"])
  def test_promise_for_a_dtype(self, test, name, dtype):
    run(ALIAS.AliasTest, test, **plain(name), dtype=dtype)

  @pytest.mark.parametrize(
    ("name", "dtype"),
    cells(
      OURS,
      dtypes("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
      quick=(*QUICK, *dtypes("bfloat16", "complex64")),
    ),
  )
  def test_state_shape_dtype_shard_stability(self, name, dtype):
    run(ALIAS.AliasTest, "test_state_shape_dtype_shard_stability", **plain(name), dtype=dtype)

  @pytest.mark.parametrize("name", cells(OURS, quick=QUICK))
  def test_a_schedule_is_a_learning_rate(self, name):
    run(SCHEDULE.ScheduleAsLearningRateTest, "test_optimization", **plain(name))


@pytest.mark.usefixtures("suite")
class TestContrib:
  @pytest.mark.parametrize(("name", "target"), cells(OURS, MORE_TARGETS, quick=(*QUICK, *MORE_TARGETS[2:])))
  def test_optimizers(self, name, target):
    run(CONTRIB.ContribTest, "test_optimizers", **unwrapped(name), target=getattr(CONTRIB, target), dtype="float32")

  @pytest.mark.slow
  @pytest.mark.parametrize(("wrapper", "name", "target"), cells(WRAPPERS, OURS, MORE_TARGETS))
  def test_wrapped_optimizers(self, wrapper, name, target):
    row = inside(name, wrapper)
    run(CONTRIB.ContribTest, "test_optimizers", **row, target=getattr(CONTRIB, target), dtype="float32")

  @pytest.mark.slow
  @pytest.mark.parametrize(("wrapper", "name"), cells((None, "mechanize", "schedule_free"), OURS))
  def test_promises(self, wrapper, name):
    row = inside(name, wrapper)
    run(CONTRIB.ContribTest, "test_optimizers_accept_extra_args", **row, wrap=True)
    for dtype in ("bfloat16", "float32"):
      run(CONTRIB.ContribTest, "test_preserve_dtype", **row, dtype=dtype)
      run(CONTRIB.ContribTest, "test_gradient_accumulation", **row, dtype=dtype)

  @pytest.mark.slow
  @pytest.mark.parametrize(("wrapper", "name"), cells((None, "mechanize", "schedule_free"), OURS))
  def test_inject_hyperparams(self, wrapper, name):
    run(CONTRIB.ContribTest, "test_optimizers_can_be_wrapped_in_inject_hyperparams", **inside(name, wrapper))

  @pytest.mark.slow
  @pytest.mark.parametrize(("name", "dtype"), cells(OURS, dtypes("float16", "bfloat16", "float32", "float64")))
  def test_state_shape_dtype_shard_stability(self, name, dtype):
    run(CONTRIB.ContribTest, "test_state_shape_dtype_shard_stability", **unwrapped(name), dtype=dtype)

  @pytest.mark.slow
  @pytest.mark.parametrize("name", OURS)
  def test_a_schedule_is_a_learning_rate(self, name):
    test = "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such"
    run(CONTRIB.ContribTest, test, **unwrapped(name))


@pytest.mark.usefixtures("suite")
class TestWrappers:
  @pytest.mark.parametrize(("name", "opaque_mode"), cells(BY_GRADIENT, (False, True), quick=("psgd", False)))
  def test_sam_around_ours(self, name, opaque_mode):
    """At the rate of the suite's own sgd."""
    run(
      SAM.SAMTest,
      "test_optimization",
      base_opt_name=name,
      base_opt_kwargs={**OURS[name].options, "learning_rate": 1e-3},
      adv_opt_name="sgd",
      adv_opt_kwargs={"learning_rate": 1e-5},
      sync_period=2,
      target=SAM._setup_parabola,
      dtype="float32",
      opaque_mode=opaque_mode,
    )

  @pytest.mark.parametrize(("name", "opaque_mode"), cells(BY_GRADIENT, (False, True), quick=("psgd", False)))
  def test_ours_as_the_adversary_of_sam(self, name, opaque_mode):
    """With `reset_state=True`, its default, the state of the adversary is multiplied by zero."""
    run(
      SAM.SAMTest,
      "test_optimization",
      base_opt_name="sgd",
      base_opt_kwargs={"learning_rate": 1e-3},
      adv_opt_name=name,
      adv_opt_kwargs={**OURS[name].options, "learning_rate": 1e-4},
      sync_period=2,
      target=SAM._setup_parabola,
      dtype="float32",
      opaque_mode=opaque_mode,
    )

  @pytest.mark.parametrize("name", cells(OURS, quick=QUICK))
  def test_mechanize(self, monkeypatch, name):
    monkeypatch.setattr(MECHANIC, "_test_optimizer", lambda step: OURS[name].constructor(**OURS[name].options))
    run(MECHANIC.MechanicTest, "test_mechanized")

  @pytest.mark.parametrize(("name", "reset_state"), cells(OURS, (False, True), quick=(*QUICK, True)))
  def test_lookahead(self, monkeypatch, name, reset_state):
    monkeypatch.setattr(LOOKAHEAD, "_test_optimizer", lambda step: OURS[name].constructor(**OURS[name].options))
    run(LOOKAHEAD.LookaheadTest, "test_lookahead_state_reset", reset_state=reset_state)

  @pytest.mark.parametrize("name", cells(OURS, quick=("psgd", "dpsgd")))
  @pytest.mark.parametrize("test", ["test_learning_rate_zero", "test_scalar_preservance", "test_buffer_donation"])
  def test_schedule_free(self, monkeypatch, test, name):
    ours = OURS[name]
    base = lambda learning_rate, momentum=None: ours.constructor(**{**ours.options, "learning_rate": learning_rate})
    whole = lambda: optax.contrib.schedule_free(base(0.1), 0.1)
    free = types.SimpleNamespace(**{**vars(FREE._schedule_free), "schedule_free_sgd": whole})
    monkeypatch.setattr(FREE, "alias", types.SimpleNamespace(sgd=base))
    monkeypatch.setattr(FREE, "_schedule_free", free)
    run(FREE.ScheduleFreeTest, test)
