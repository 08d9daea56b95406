# SPDX-License-Identifier: Apache-2.0
"""Analyses of a run that was kept with `--save`, the paper's (arXiv:2402.04553): each a command that takes its name.

python -m benchmarks fashion_mnist --save --optimizers sgd,psgd --epochs 5 --evaluations 5
python -m benchmarks forgetting fashion_mnist-tuned    samples that were learned and forgotten again
python -m benchmarks entropy fashion_mnist-tuned       entropy and margin of the predictions; do the forgotten have more
python -m benchmarks sharpness fashion_mnist-tuned     the largest eigenvalue of the Hessian
python -m benchmarks plasticity "fashion_mnist-noise-0.4-tuned"   trained on with right labels, and from scratch
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import dpsgd_optax as dpo
from benchmarks.engine.calls import SpecError
from benchmarks.engine.problem import Problem, batches
from benchmarks.engine.progress import say
from benchmarks.engine.records import Plan, Results, environment, load, rounded
from benchmarks.engine.report import Table, number
from benchmarks.engine.runner import EVALUATED_SAMPLES, Evaluator, compiled
from benchmarks.engine.saved import Saved, load_saved
from benchmarks.optimizers import Contestant
from benchmarks.problems.table import build, limit

Found = dict[str, float]


def forgotten(correct: np.ndarray) -> np.ndarray:
  """How often each sample was right at one point and wrong at the next, (samples,): forgetting events.

  The point before training does not count.
  """
  trained = correct[1:]
  return np.sum(trained[:-1] & ~trained[1:], axis=0)


def forgetting(saved: Saved, problem: Problem, plan: Plan) -> Found:
  """Events of a sample, and the shares that were never forgotten and never learned (arXiv:1812.05159)."""
  del problem, plan
  correct = needed(saved, "correct")
  events, learned = forgotten(correct), correct[1:].any(0)
  return {
    "mean_events": float(events.mean()),
    "most_events": float(events.max()),
    "never_forgotten": float(np.mean((events == 0) & learned)),
    "never_learned": float(np.mean(~learned)),
  }


def uncertainty(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Entropy of each prediction in nats, and its margin: the probability of the first class less that of the second."""
  shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
  log = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  p = np.exp(log)
  first = np.sort(p, -1)
  return -(p * log).sum(-1), first[:, -1] - first[:, -2]


def entropy(saved: Saved, problem: Problem, plan: Plan) -> Found:
  """Of the test samples; and Spearman's correlation of entropy and forgetting events over the training samples."""
  from scipy.stats import spearmanr

  del problem, plan
  values, margins = uncertainty(needed(saved, "test_logits"))
  events = forgotten(needed(saved, "correct"))
  of_train, _ = uncertainty(saved.arrays["train_logits"])
  known = len(set(events)) > 1
  return {
    **{f"entropy_{name}": float(f(values)) for name, f in EXTREMES.items()},
    **{f"margin_{name}": float(f(margins)) for name, f in EXTREMES.items()},
    "spearman_with_forgetting": float(spearmanr(of_train, events).statistic) if known else math.nan,
  }


EXTREMES: dict[str, Callable[[np.ndarray], Any]] = {"min": np.min, "mean": np.mean, "max": np.max}


def largest_eigenvalue(loss: Callable[[Any], jax.Array], params: Any, tolerance: float = 1e-3) -> float:
  """Of the Hessian of the loss: Lanczos by ARPACK, on Hessian-vector products."""
  from scipy.sparse.linalg import LinearOperator, eigsh

  flat, unravel = jax.flatten_util.ravel_pytree(params)
  product = jax.jit(lambda v: jax.flatten_util.ravel_pytree(dpo.hvp(loss, params)(unravel(v)))[0])
  matvec = lambda v: np.asarray(product(jnp.asarray(v.reshape(-1), flat.dtype)))
  operator = LinearOperator((flat.size, flat.size), matvec=matvec, dtype=np.dtype(flat.dtype))
  start = np.random.default_rng(0).normal(size=flat.size).astype(flat.dtype)
  return float(eigsh(operator, k=1, which="LA", tol=tolerance, v0=start, return_eigenvectors=False)[0])


def sharpness(saved: Saved, problem: Problem, plan: Plan, samples: int = 512) -> Found:
  """Of the training loss over the first samples, running statistics held."""
  del plan
  params, statistics = problem.split(saved.variables)
  batch = {name: jnp.asarray(array[:samples]) for name, array in problem.arrays.train.items()}
  loss = lambda p: problem.loss(problem.join(p, statistics), batch)
  return {"largest_eigenvalue": largest_eigenvalue(loss, jax.tree.map(jnp.asarray, params))}


def plasticity(saved: Saved, problem: Problem, plan: Plan, contestant: Contestant) -> Found:
  """Test accuracy before and after as many epochs again with the right labels, and after them from a fresh start."""
  clean = with_right_labels(problem)
  train = jax.tree.map(jnp.asarray, clean.arrays.train)
  racer, evaluate = compiled(clean, contestant, plan, train), Evaluator(clean)
  rows = list(batches(clean, saved.seed + 1000, math.ceil(plan.epochs)))[: plan.steps]
  found = {"before": evaluate(saved.variables)["test_accuracy"]}
  for name, start in {"after": saved.variables, "from_scratch": clean.init(jax.random.key(saved.seed))}.items():
    lane = racer.start(jax.tree.map(jnp.asarray, start), saved.seed)
    lane.train(train, rows, 0)
    found[name] = evaluate(lane.variables)["test_accuracy"]
  return found


def with_right_labels(problem: Problem) -> Problem:
  """The same problem after the noise: the labels it had before."""
  train = dict(problem.arrays.train)
  if "clean" not in train:
    raise SpecError(
      f"`{problem.name}` has no wrong labels to recover from. Type `fashion_mnist(noise=0.4)`, keep that run with "
      "`--save`, and give its name."
    )
  train["y"] = train.pop("clean")
  return replace(problem, arrays=problem.arrays._replace(train=train), deficit=0)


def needed(saved: Saved, name: str) -> np.ndarray:
  if name not in saved.arrays:
    raise SpecError(f"the run of {saved.label} has no `{name}`: this analysis is of classifiers.")
  return saved.arrays[name]


STUDIES: dict[str, Callable[..., Found]] = {
  "forgetting": forgetting,
  "entropy": entropy,
  "sharpness": sharpness,
  "plasticity": plasticity,
}


def problem_of(results: Results, data_dir: str | None) -> Problem:
  """The problem of a document."""
  plan = results.plan
  built = limit(build(plan.problem, data_dir, plan.folded_biases), plan.train_size, plan.test_size)
  return replace(built, batch_size=plan.batch_size)


def study(name: str, run: str, out: Path, data_dir: str | None = None) -> dict[str, Any]:
  """One analysis of all contestants and seeds of a run."""
  if not (path := out / f"{run}.json").exists():
    raise SpecError(f"there is no run {path}. Make it, with `--save`, and give the name of its JSON without .json.")
  results = load(path)
  problem = problem_of(results, data_dir)
  found: dict[str, list[Found]] = {}
  for saved in load_saved(out, run, problem, results.contestants, results.seeds()):
    about = results.contestants[saved.label]
    more = {"contestant": Contestant(saved.label, about["name"], about["options"])} if name == "plasticity" else {}
    found.setdefault(saved.label, []).append(STUDIES[name](saved, problem, results.plan, **more))
  return {
    "study": name,
    "run": run,
    "plan": vars(results.plan),
    "seeds": results.seeds(),
    "evaluated": EVALUATED_SAMPLES,
    "environment": environment(),
    "found": found,
  }


def table(document: dict[str, Any]) -> Table:
  """Medians over the seeds."""
  names = list(next(iter(document["found"].values()))[0])
  rows = [
    (label, *(number(float(np.median([entry[name] for entry in entries]))) for name in names))
    for label, entries in document["found"].items()
  ]
  header = ("optimizer", *(name.replace("_", " ") for name in names))
  return Table(f"{document['run']}: {document['study']}, median of {len(document['seeds'])} seeds", header, rows)


def measure(name: str, run: str, out: Path, data_dir: str | None = None) -> None:
  """Do, show, save."""
  document = study(name, run, out, data_dir)
  table(document).show()
  path = out / f"study-{name}-{run}.json"
  path.write_text(json.dumps(rounded(document), indent=1) + "\n")
  say(f"wrote {path}")
