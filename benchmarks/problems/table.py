# SPDX-License-Identifier: Apache-2.0
"""The table of problems: what is minimised, over which data, in which batches. To add one: one function, one row.

The arguments of a row after the first two are its options on the command line: xor(length=55, cell=lstm).
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.engine import calls
from benchmarks.engine.calls import SpecError, choice
from benchmarks.engine.problem import Metrics, Problem, classifier, regression, supervised
from benchmarks.problems import data, layered, science, vision
from benchmarks.problems.models import MLP, Elman, LanguageLSTM, LastOfLSTM, NormNet, Transformer


def digits(data_dir: str | None, folded: bool) -> Problem:
  """Real handwritten digits, 8 x 8; an MLP 64-128-64-10. Ships with scikit-learn: the problem of the demo."""
  return classifier(MLP((128, 64, 10), folded), data.digits(), batch_size=64, epochs=12, evaluations=36)


def digits_bn(data_dir: str | None, folded: bool, norm: str = "batch", model: str = "conv") -> Problem:
  """The digits again, two convolutions or with `model=mlp` dense layers, and norm layers after them.

  `norm` is `batch`, `layer`, `group`, `weight` or `none`.

  The biases are never folded. Batch norm is evaluated with its running statistics.
  """
  arrays = data.square(data.digits())
  window = choice(model, "model", {"conv": (3, 3), "mlp": ()})
  network = NormNet(choice(norm, "norm", ("batch", "layer", "group", "weight", "none")), window=window)
  return classifier(network, arrays, statistics=norm == "batch", batch_size=64, epochs=10, evaluations=30)


def curves(data_dir: str | None, folded: bool) -> Problem:
  """The 12-layer autoencoder of the CURVES experiments, 842340 parameters."""
  model = MLP((400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784), folded)
  return regression(model, data.curves(data_dir), "x", batch_size=64, epochs=20, evaluations=40, default_seeds=3)


def mnist_autoencoder(data_dir: str | None, folded: bool) -> Problem:
  """784-300-100-10-100-300-784 on MNIST, 533994 parameters."""
  arrays = data.flat(data.images("mnist", data_dir))
  options = dict(batch_size=64, epochs=20, evaluations=40, default_seeds=3)
  return regression(MLP((300, 100, 10, 100, 300, 784), folded), arrays, "x", **options)


def addition(data_dir: str | None, folded: bool) -> Problem:
  """An Elman network adds two marked numbers out of 32."""
  options = dict(batch_size=100, epochs=50, evaluations=100, default_seeds=3)
  return regression(Elman(20, folded), data.addition(), "y", **options)


def xor(data_dir: str | None, folded: bool, length: int = 32, cell: str = "rnn") -> Problem:
  """Delayed XOR of two marked bits, logistic loss; 30 units, `rnn` (orthogonal, tanh) or `lstm`. Chance is log 2.

  Solved once the loss is below 0.1. Only the optimizer makes this hard: the signal has to survive `length` steps.
  """
  model = choice(cell, "cell", {"rnn": Elman, "lstm": LastOfLSTM})(30, folded)

  def metrics(logits: jax.Array, batch: Mapping[str, jax.Array]) -> Metrics:
    loss = optax.losses.sigmoid_binary_cross_entropy(logits, batch["y"]).mean()
    return {"loss": loss, "accuracy": jnp.mean((logits > 0) == batch["y"])}

  options = dict(batch_size=128, epochs=8, evaluations=160, default_seeds=3)
  return supervised(model, data.delayed_xor(length), metrics, **options)


def logistic(data_dir: str | None, folded: bool) -> Problem:
  """Softmax regression on the digits' 64 pixels and their 4096 products: convex, 41610 parameters."""
  arrays = data.quadratic_features(data.digits())
  return classifier(MLP((10,), folded), arrays, batch_size=500, epochs=200, evaluations=40, default_seeds=3)


def tensor_decomposition(data_dir: str | None, folded: bool, rank: int = 10) -> Problem:
  """sum (T - sum_r x_r (x) y_r (x) z_r)^2 for T of rank 10, 20 x 50 x 100; 1.9e6 at a normal start, minimum 0."""
  arrays = data.low_rank_tensor(rank)

  def metrics(params: Any, batch: Mapping[str, jax.Array]) -> Metrics:
    found = jnp.einsum("ri,rj,rk->ijk", params["x"], params["y"], params["z"])
    return {"loss": jnp.sum((batch["x"][0] - found) ** 2)}

  def init(key: jax.Array) -> Any:
    named = zip("xyz", jax.random.split(key, 3), arrays.train["x"].shape[1:], strict=True)
    return {name: jax.random.normal(k, (rank, size)) for name, k, size in named}

  return Problem(init, metrics, arrays, batch_size=1, epochs=1000, evaluations=100)


def _language(model: nn.Module, arrays: data.Arrays, **options: Any) -> Problem:
  """Mean cross-entropy of each token of a window after the first, in nats; the test loss is the validation loss."""

  def metrics(params: Any, batch: Mapping[str, jax.Array]) -> Metrics:
    tokens = batch["x"].astype(jnp.int32)
    logits = model.apply(params, tokens[:, :-1])
    return {"loss": optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()}

  def init(key: jax.Array) -> Any:
    return model.init(key, jnp.asarray(arrays.train["x"][:1, :-1], jnp.int32))

  return Problem(init=init, metrics=metrics, arrays=arrays, default_seeds=3, **options)


def charlm(
  data_dir: str | None, folded: bool, model: str = "transformer", layers: int = 2, width: int = 64, block: int = 64
) -> Problem:
  """The next character of tiny Shakespeare: a nanoGPT-like `transformer` (heads of 32) or an `lstm`.

  The default has 113089 parameters and takes 2000 steps of 16 windows; chance is log 65 = 4.17.
  """
  arrays, vocabulary = data.shakespeare(data_dir, block)
  transformer = partial(Transformer, heads=max(1, width // 32))
  kind = choice(model, "model", {"transformer": transformer, "lstm": LanguageLSTM})
  network = kind(vocabulary=vocabulary, layers=layers, width=width, folded=folded)
  problem = _language(network, arrays, batch_size=16, epochs=1, evaluations=20)
  return replace(problem, epochs=2000 / problem.steps_per_epoch)


def ptb(data_dir: str | None, folded: bool, layers: int = 1, width: int = 200, block: int = 35) -> Problem:
  """The next word of the Penn Treebank, LSTM. For users who hold the files: DIR/ptb/ptb.train.txt, ptb.valid.txt."""
  arrays, vocabulary = data.ptb(data_dir, block)
  network = LanguageLSTM(vocabulary, layers, width, folded)
  return _language(network, arrays, batch_size=20, epochs=10, evaluations=20)


def rosenbrock(data_dir: str | None, folded: bool, size: int = 10, start: float = -1.0, pairs: bool = False) -> Problem:
  """sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2 from a random point near (start, ..., start); minimum 0 at (1, ..., 1).

  The sum is over all neighbours, or with `pairs` over x_1 x_2, x_3 x_4, ...: size / 2 times the function of two.
  """
  step = 2 if pairs else 1

  def metrics(params: Any, batch: Mapping[str, jax.Array]) -> Metrics:
    left, right = params["x"][:-1:step], params["x"][1::step]
    return {"loss": jnp.sum(100 * (right - left**2) ** 2 + (1 - left) ** 2) + 0 * jnp.sum(batch["x"])}

  def init(key: jax.Array) -> Any:
    return {"x": 0.1 * jax.random.normal(key, (size,)) + start}

  return Problem(init, metrics, data.nothing(), batch_size=1, epochs=2000, evaluations=100)


def quadratic(data_dir: str | None, folded: bool) -> Problem:
  """1/2 mean ||c (x W - y)||^2 with Hessian cov(x) (x) diag(c^2): condition number 1e5, minimum 0."""
  arrays = data.ill_conditioned()
  inputs, outputs = arrays.train["x"].shape[1], arrays.train["y"].shape[1]
  c = np.geomspace(1, 0.1, outputs, dtype=np.float32)

  def metrics(params: Any, batch: Mapping[str, jax.Array]) -> Metrics:
    return {"loss": jnp.mean(jnp.sum((c * (batch["x"] @ params["w"] - batch["y"])) ** 2, -1)) / 2}

  def init(key: jax.Array) -> Any:
    return {"w": jax.random.normal(key, (inputs, outputs))}

  return Problem(init, metrics, arrays, batch_size=100, epochs=50, evaluations=50)


ROWS = (
  *(digits, digits_bn, vision.cifar10, curves, mnist_autoencoder, addition, rosenbrock, quadratic, xor, logistic),
  *(tensor_decomposition, charlm, ptb, layered.mlp_mnist, layered.mlp_cifar10, layered.ae_digits, layered.ae_cifar10),
  *(layered.uci, layered.single_layer, *science.ROWS),
)
PROBLEMS: dict[str, Callable[..., Problem]] = {row.__name__: row for row in ROWS}
PROBLEMS |= {name: partial(vision.lenet, name) for name in ("mnist", "fashion_mnist")}


def build(text: str, data_dir: str | None, folded: bool) -> Problem:
  """The problem of a name, or of a name with options: xor(length=55, cell=lstm); its own name is the text."""
  if (name := calls.name_of(text)) not in PROBLEMS:
    raise SpecError(calls.unknown("problem", name, PROBLEMS))
  _, options = calls.parse(text, "xor(length=55, cell=lstm)")
  own = list(inspect.signature(PROBLEMS[name]).parameters.values())[2:]
  if unknown := sorted(options.keys() - {parameter.name for parameter in own}):
    known = ", ".join(f"{parameter.name}={parameter.default}" for parameter in own) or "none"
    raise SpecError(f"`{name}` has no option {', '.join(unknown)}. Its options and their defaults: {known}.")
  return replace(PROBLEMS[name](data_dir, folded, **options), name=text.replace(" ", ""))
