# SPDX-License-Identifier: Apache-2.0
"""Train all contestants of one problem, interleaved, and time nothing but training.

Round robin: every contestant takes the steps between two evaluations, in a fresh random order each round, so that the
noise of a shared machine hits all alike. Same initial parameters, same batches. Compilation happens before and
evaluation between the timed regions.

The host chooses the steps on which curvature is fitted (t mod T1 = 0) and on which Levenberg-Marquardt judges
((t + 1) mod T2 = 0), and calls the variant of the step that was compiled for it: on a CPU a convolution inside
`lax.cond` is 5 to 20 times slower.

A run ends after so many steps, or after so many seconds: then each contestant takes as many steps as it can.

Gradient evaluations: a gradient counts 1, a Hessian-vector product 1 more (it shares forward and backward pass with
the gradient), the extra forward pass of a judged step 1/3.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpsgd_optax as dpo
from benchmarks.engine.contestant import FOREVER, Contestant, mean_of
from benchmarks.engine.problem import Problem, batches
from benchmarks.engine.records import Plan, Run

EVALUATED_SAMPLES = 4_000  # of the training set, at most: the first ones
TESTED_SAMPLES = 10_000  # of the test set, at most: all of MNIST's, whose first half is not its second
CHUNK = 250  # samples evaluated at once: what stays in the cache
MOST_STEPS = 1000  # between two looks at the clock
Variant = tuple[bool | None, bool | None]  # (refresh, judge); None: not for the host to choose
Records = str | None  # what of each layer the optimizer is shown: its "inputs", its output "gradients" too, or nothing


def make_plan(
  problem: Problem,
  setting: str,
  epochs: float,
  decay: float,
  folded: bool,
  evaluations: int,
  seconds: float | None = None,
  clock: str = "seconds",
) -> Plan:
  steps = max(1, round(epochs * problem.steps_per_epoch))
  return Plan(
    problem=problem.name,
    setting=setting,
    data=problem.arrays.note,
    train_size=problem.train_size,
    test_size=len(problem.arrays.test["x"]),
    evaluated_train_samples=min(problem.train_size, EVALUATED_SAMPLES),
    evaluated_test_samples=min(len(problem.arrays.test["x"]), TESTED_SAMPLES),
    batch_size=problem.batch_size,
    epochs=epochs,
    steps=steps,
    evaluate_every=max(1, round(steps / evaluations)),
    steps_per_epoch=problem.steps_per_epoch,
    decay_per_epoch=decay,
    folded_biases=folded,
    seconds=seconds,
    clock=clock,
  )


def chunks(part: dict[str, np.ndarray], most: int) -> list[dict[str, np.ndarray]]:
  """The first samples, CHUNK at a time."""
  starts = range(0, min(len(part["x"]), most), CHUNK)
  return [{name: array[:most][start : start + CHUNK] for name, array in part.items()} for start in starts]


class Evaluator:
  """Metrics over fixed sets of samples: the first ones of the training set and of the test set."""

  def __init__(self, problem: Problem):
    self.metrics = jax.jit(problem.metrics)  # (variables, batch)
    train, test = chunks(problem.arrays.train, EVALUATED_SAMPLES), chunks(problem.arrays.test, TESTED_SAMPLES)
    self.splits = jax.tree.map(jnp.asarray, {"train": train, "test": test})

  def __call__(self, variables: Any) -> dict[str, float]:
    """train_loss, test_loss and, for a classifier, train_accuracy and test_accuracy."""
    found = {}
    for split, parts in self.splits.items():
      sizes = [len(part["x"]) for part in parts]
      values = [jax.device_get(self.metrics(variables, part)) for part in parts]
      for name in values[0]:
        found[f"{split}_{name}"] = float(np.average([value[name] for value in values], weights=sizes))
    return found


def variant_at(contestant: Contestant, t: int) -> Variant:
  fit, judge = contestant.fit_period, contestant.judge_period
  if fit is None:
    return None, None
  return t % fit == 0, judge is not None and (t + 1) % judge == 0


def variants_of(contestant: Contestant, plan: Plan) -> set[Variant]:
  """Those that the run will need; all there are if nobody knows how many steps it will have."""
  if plan.seconds is None:
    return {variant_at(contestant, t) for t in range(plan.steps)}
  if contestant.fit_period is None:
    return {(None, None)}
  return set(itertools.product((False, True), (False, True) if contestant.judge_period else (False,)))


def gradients_of(variant: Variant, newton: bool = True) -> float:
  refresh, judge = variant
  return 1 + bool(refresh and newton) + bool(judge) / 3


def make_step(problem: Problem, tx: optax.GradientTransformationExtraArgs, records: Records = None) -> Callable:
  """(variables, opt_state, training data, rows of the batch) -> (variables, opt_state), both donated.

  Running statistics advance once, with the pass that gives the gradient; the other passes of a step leave them alone.
  """

  def step(variables: Any, opt_state: Any, train: Any, rows: jax.Array, variant: Variant) -> tuple[Any, Any]:
    params, statistics = problem.split(variables)
    batch = problem.take(train, rows)

    def advance(p: Any) -> tuple[jax.Array, Any]:
      return problem.advance(p, statistics, batch)

    def loss(p: Any) -> jax.Array:
      return advance(p)[0]

    refresh, judge = variant
    extra = {"value_fn": loss, "refresh": refresh, "judge": judge}
    if records is None:
      (value, statistics), grads = jax.value_and_grad(advance, has_aux=True)(params)
      if refresh:
        extra["hvp"] = dpo.hvp(loss, params)
    else:
      captured = dpo.capture(advance, has_aux=True, gradients=records == "gradients")
      (value, statistics), grads, extra["layer_inputs"] = captured(params)
    if problem.residuals is not None:
      extra |= {"residual_fn": problem.residuals(params), "grad": grads}
    updates, opt_state = tx.update(grads, opt_state, params, value=value, **extra)
    return problem.join(optax.apply_updates(params, updates), statistics), opt_state

  # an unread number of the state that is left out would shift which buffer becomes which: dozens of copies
  return jax.jit(step, static_argnums=4, donate_argnums=(0, 1), keep_unused=True)


def fresh(tree: Any) -> Any:
  """Copies of all arrays, so that donating them leaves the originals alone."""
  return jax.tree.map(jnp.copy, tree)


@dataclass
class Racer:
  """A contestant, compiled: it can start from any seed."""

  problem: Problem
  contestant: Contestant
  plan: Plan
  steps: dict[Variant, Callable]
  compile_seconds: float

  def start(self, variables: Any, seed: int) -> "Lane":
    variables = fresh(variables)
    tx = _transform(self.problem, self.contestant, self.plan, seed)
    rows = batches(self.problem, seed)
    return Lane(self, variables, fresh(tx.init(self.problem.split(variables)[0])), rows)


@dataclass
class Lane:
  """A contestant in one run: where it stands, and what it has cost so far."""

  racer: Racer
  variables: Any
  opt_state: Any
  rows: Iterator[np.ndarray]
  count: int = 0  # steps
  gradients: float = 0.0
  seconds: float = 0.0
  cpu_seconds: float = 0.0
  diverged: bool = False

  def train(self, data: Any, chunk: Iterable[np.ndarray], first: int | None = None) -> None:
    """Trains on a chunk of batches, by the clock: nothing else is timed. `first`: the number of its first step."""
    first = self.count if first is None else first
    planned = [(variant_at(self.racer.contestant, t), rows) for t, rows in enumerate(chunk, first)]
    variables, opt_state, compiled = self.variables, self.opt_state, self.racer.steps
    wall, cpu = time.perf_counter(), time.process_time()
    for variant, rows in planned:
      variables, opt_state = compiled[variant](variables, opt_state, data, rows)
    jax.block_until_ready((variables, opt_state))
    self.seconds += time.perf_counter() - wall
    self.cpu_seconds += time.process_time() - cpu
    self.gradients += sum(gradients_of(variant, self.racer.contestant.method.newton) for variant, _ in planned)
    self.count += len(planned)
    self.variables, self.opt_state = variables, opt_state

  def next(self, steps: int) -> Iterator[np.ndarray]:
    """The batches of so many steps."""
    return itertools.islice(self.rows, steps)

  def train_until(self, data: Any, mark: float) -> None:
    """Trains until the clock of the plan shows `mark` seconds; a schedule learns how many steps the run will have."""
    plan, spent = self.racer.plan, lambda: getattr(self, self.racer.plan.clock)
    assert plan.seconds is not None
    while spent() < mark:
      steps = 2 if self.count == 0 else max(1, int(0.9 * (mark - spent()) * self.count / spent()))
      self.train(data, self.next(min(steps, MOST_STEPS)))
      total = self.count * plan.seconds / spent()
      self.opt_state = optax.tree.set(self.opt_state, total=jnp.asarray(total, jnp.float32))

  @property
  def evaluated(self) -> Any:
    """The variables that are evaluated: where the contestant is, or the mean of where it was."""
    weight, problem = self.racer.contestant.iterates, self.racer.problem
    if weight is None or self.count == 0:
      return self.variables
    return problem.join(mean_of(self.opt_state, weight), problem.split(self.variables)[1])

  def point(self, metrics: dict[str, float]) -> dict[str, float]:
    """One point of every curve."""
    counters = {"step": self.count} | {name: getattr(self, name) for name in ("gradients", "seconds", "cpu_seconds")}
    judged = () if self.racer.contestant.judge_period is None else ("damping", "ratio")
    return counters | metrics | {name: float(self.diagnostic(name)) for name in judged}

  def diagnostic(self, name: str) -> Any:
    """A number that the optimizer keeps in its state under this name, or None."""
    return optax.tree.get(self.opt_state, name)


def _transform(problem: Problem, contestant: Contestant, plan: Plan, key: int) -> optax.GradientTransformationExtraArgs:
  layers = layers_of(problem, contestant.records) if contestant.records else None
  total = FOREVER if plan.seconds else plan.steps
  return contestant.build(plan.decay_per_epoch, plan.steps_per_epoch, key, layers, total)


def layers_of(problem: Problem, records: Records) -> Any:
  """The shapes of what is recorded of each layer in one batch: nothing is computed."""

  def recorded(variables: Any, batch: Any) -> Any:
    params, statistics = problem.split(variables)
    loss = lambda p: problem.advance(p, statistics, batch)
    return dpo.capture(loss, has_aux=True, gradients=records == "gradients")(params)[2]

  rows = jax.ShapeDtypeStruct((problem.batch_size,), jnp.int32)
  shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in problem.arrays.train.items()}
  batch = jax.eval_shape(problem.take, shapes, rows)
  return jax.eval_shape(recorded, jax.eval_shape(problem.init, jax.random.key(0)), batch)


def compiled(problem: Problem, contestant: Contestant, plan: Plan, train: Any) -> Racer:
  """Compile every variant of the step that the run will need, and run each once on copies."""
  variables = problem.init(jax.random.key(0))
  tx = _transform(problem, contestant, plan, key=0)
  opt_state, rows = tx.init(problem.split(variables)[0]), np.zeros(problem.batch_size, np.int32)
  step, steps, seconds = make_step(problem, tx, contestant.records), {}, 0.0
  for variant in sorted(variants_of(contestant, plan), key=str):
    start = time.perf_counter()
    steps[variant] = step.lower(variables, opt_state, train, rows, variant).compile()
    seconds += time.perf_counter() - start
    jax.block_until_ready(steps[variant](fresh(variables), fresh(opt_state), train, rows))
  return Racer(problem, contestant, plan, steps, seconds)


def describe(problem: Problem, contestant: Contestant, plan: Plan) -> dict[str, Any]:
  """What the results say about a contestant before it has run."""
  params, _ = problem.split(jax.eval_shape(problem.init, jax.random.key(0)))
  return {
    "name": contestant.name,
    "options": dict(contestant.options),
    "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
    "state_bytes": dpo.state_bytes(_transform(problem, contestant, plan, 0), params),
  }


def race(
  problem: Problem,
  racers: list[Racer],
  plan: Plan,
  train: Any,
  evaluate: Evaluator,
  seed: int,
  tell: Callable[[Run], None] = lambda run: None,
  look: Callable[[Lane], None] = lambda lane: None,
) -> list[Run]:
  """One seed, all contestants. `tell` hears of every new point; `look` sees where every contestant then is."""
  variables = problem.init(jax.random.key(seed))
  lanes = [racer.start(variables, seed) for racer in racers]
  runs = [Run(lane.racer.contestant.label, seed) for lane in lanes]
  start = evaluate(variables)
  for lane, run in zip(lanes, runs, strict=True):
    run.append(lane.point(start))
    look(lane)
  order, rounds = np.random.default_rng(seed), math.ceil(plan.steps / plan.evaluate_every)
  for k in range(rounds):
    for i in order.permutation(len(lanes)):
      lane, run = lanes[i], runs[i]
      if not lane.diverged:
        if plan.seconds:
          lane.train_until(train, plan.seconds * (k + 1) / rounds)
        else:
          lane.train(train, lane.next(min(plan.evaluate_every, plan.steps - lane.count)))
        run.append(lane.point(evaluate(lane.evaluated)))
        look(lane)
        lane.diverged = not math.isfinite(run.curves["train_loss"][-1])
      tell(run)
  for lane, run in zip(lanes, runs, strict=True):
    skipped = lane.diagnostic("skipped")
    run.finished, run.skipped = not lane.diverged, None if skipped is None else int(skipped)
  return runs
