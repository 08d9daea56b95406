# SPDX-License-Identifier: Apache-2.0
"""Scale on paper: step time and memory of large transformers on 8 to 1024 devices under whitening PSGD.

What is measured: flops of a Kronecker fit (cost_analysis at several shapes, two coefficients), flops of a gradient, and
on eight virtual devices the flops and the bytes exchanged by whole steps, read from the compiled programs. What is
exact: the bytes of params and state on each device, from `jax.eval_shape` and `partition_specs`. What is assumed: the
speed of the hardware, given as arguments, and that it is reached: these are floors, to be read as ratios.

Notation
  N          parameters                       T   tokens of a device in a step
  D          devices                          n   of them, those that a bucket is divided over
  S          sum of 2 rows columns d over the dense factors of a matrix, d their size: the flops of P g
  C          sum of 2 d³ over them;  a fit is fit_s S + fit_c C

Exchanges per device, with f = (D − 1) / D: data parallel, the gradient is all-reduced (2 f 4N bytes) and the updates
are gathered (4 bytes (n − 1) / n of each bucket); fully sharded, the params are gathered twice and the gradient
is scattered (3 f 4N), a bucket goes to those who apply it and back (8 / n bytes of it), twice more on a fit.
"""

import math
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dpsgd_optax as dpo
from benchmarks.engine.arguments import positive
from benchmarks.engine.devices import COLLECTIVES, LAYOUTS, QUICK_TO_COMPILE, specs_of
from benchmarks.engine.progress import say
from benchmarks.engine.records import environment
from benchmarks.engine.report import Table, number, publish
from benchmarks.problems.models import Transformer
from dpsgd_optax._trees.buckets import make_buckets
from dpsgd_optax._trees.mesh import Split

HARDWARE = {
  "peak": (8e14, "flop/s of a device in bfloat16, for the gradient; an H100's"),
  "optimizer-peak": (4e14, "flop/s in TF32, for P"),
  "memory-bandwidth": (3.3e12, "byte/s of a device's memory"),
  "link-bandwidth": (4.5e11, "byte/s that a device exchanges with the others"),
}
TOKENS = 16_384  # T
RATES = {"floor": 0.03, "every step": 1.0}  # fits per step


class Model(NamedTuple):
  layers: int
  width: int
  vocabulary: int
  context: int

  def network(self) -> Transformer:
    return Transformer(self.vocabulary, self.layers, self.width, max(1, self.width // 64))

  def shapes(self) -> Any:
    tokens = jnp.zeros((1, self.context), jnp.int32)
    return jax.eval_shape(self.network().init, jax.random.key(0), tokens)


MODELS = {
  "124M": Model(12, 768, 50_304, 1024),
  "1.3B": Model(24, 2048, 50_304, 2048),
  "7B": Model(32, 4096, 32_000, 2048),
}
DEVICES = (8, 64, 256, 1024)
CHECKED = ((LAYOUTS[0], True), (LAYOUTS[1], False), (LAYOUTS[1], True))
SMALL = Model(8, 64, 65, 32)  # what is compiled here, on as many devices as it has layers


def size_of(tree: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def optimizer() -> optax.GradientTransformationExtraArgs:
  return dpo.psgd(1e-3, dpo.kron(max_size=jnp.inf), b1=0.9, every=33)


def gradient_flops(model: Model, tokens: int) -> float:
  """6 per weight of a product and token, and the attention's 12 context · width per layer and token."""
  products = 12 * model.layers * model.width**2 + model.vocabulary * model.width
  return tokens * (6 * products + 12 * model.layers * model.context * model.width)


def dense_sizes(shape: tuple[int, ...]) -> list[int]:
  """The dense factors of `kron(max_size=inf)` on a matrix: d² ≤ rows · columns, or d ≤ 8."""
  return [d for d in shape if d > 1 and d * d <= max(math.prod(shape), 64)]


def apply_flops(shape: tuple[int, ...]) -> float:
  """S."""
  return sum(2 * math.prod(shape) * d for d in dense_sizes(shape))


def cubes(shape: tuple[int, ...]) -> float:
  """C."""
  return sum(2 * d**3 for d in dense_sizes(shape))


class Share(NamedTuple):
  """A bucket, as one device sees it."""

  shape: tuple[int, ...]
  matrices: int
  divided: int  # n


def shares(params: Any, mesh: Any) -> list[Share]:
  split = Split(mesh, tuple(mesh.shape))
  count = lambda b: math.prod(mesh.shape[axis] for axis in split.over(b.size))
  return [Share(b.shape, b.size, count(b)) for b in make_buckets(params)]


def optimizer_flops(found: Iterable[Share], fit: dict[str, float], rate: float) -> float:
  """Of one device: S for P g, and rate · (fit_s S + fit_c C)."""
  each = lambda b: apply_flops(b.shape) * (1 + rate * fit["fit_s"]) + rate * fit["fit_c"] * cubes(b.shape)
  return sum(b.matrices / b.divided * each(b) for b in found)


def exchanged(found: list[Share], parameters: int, devices: int, layout: str, rate: float) -> dict[str, float]:
  """Bytes that a device sends in a step: for the gradient, and for the updates."""
  f = (devices - 1) / devices
  numbers = lambda b: b.matrices * math.prod(b.shape)
  if layout == LAYOUTS[0]:
    return {"gradient": 2 * f * 4 * parameters, "updates": sum(4 * numbers(b) * (1 - 1 / b.divided) for b in found)}
  moved = sum(4 * numbers(b) / b.divided for b in found if b.divided > 1)
  whole = sum(4 * numbers(b) for b in found if b.divided == 1)  # gathered: every device applies all of it
  return {"gradient": 3 * f * 4 * parameters, "updates": (2 + 2 * rate) * moved + (1 + rate) * f * whole}


def bytes_of(shapes: Any, specs: Any, mesh: Any) -> float:
  """What one device holds of a tree."""

  def one(x: Any, spec: P) -> float:
    dtype = jax.eval_shape(jax.random.key_data, x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    names = [name for entry in spec if entry is not None for name in (entry if isinstance(entry, tuple) else (entry,))]
    return math.prod(dtype.shape) * dtype.dtype.itemsize / math.prod(mesh.shape[name] for name in names)

  return sum(jax.tree.leaves(jax.tree.map(one, shapes, specs)))


def bytes_held(tx: optax.GradientTransformation, params: Any, specs: Any, mesh: Any) -> tuple[float, float]:
  """What one device holds of the params and of the optimizer's state."""
  state = bytes_of(jax.eval_shape(tx.init, params), dpo.partition_specs(tx, params, specs, mesh), mesh)
  return bytes_of(params, specs, mesh), state


def predict(model: Model, devices: int, layout: str, fit: dict[str, float], hardware: dict[str, float]) -> dict:
  """Milliseconds and bytes of one device. The mesh has an axis for every factor 2 of D, so that n is the largest."""
  axes = tuple(f"axis{i}" for i in range(devices.bit_length() - 1))
  mesh = AbstractMesh((2,) * len(axes), axes)
  params, tx = model.shapes(), optimizer()
  held, state = bytes_held(tx, params, specs_of(layout, params, mesh), mesh)
  found, parameters = shares(params, mesh), size_of(params)
  gradient = 1e3 * gradient_flops(model, TOKENS) / hardware["peak"]
  ms = lambda sent: 1e3 * sent / hardware["link-bandwidth"]
  row: dict[str, Any] = {
    "parameters": parameters,
    "params_bytes": held,
    "state_bytes": state,
    "adam_state_bytes": 2 * held,
    "divided_by": [b.divided for b in found if len(b.shape) > 1],
    "gradient_ms": gradient,
  }
  for name, rate in RATES.items():
    sent = exchanged(found, parameters, devices, layout, rate)
    products = 1e3 * optimizer_flops(found, fit, rate) / hardware["optimizer-peak"]
    traffic = 1e3 * ((1 + rate) * state + 5 * held) / hardware["memory-bandwidth"]
    adam = gradient + ms(sent["gradient"]) + 1e3 * 7 * held / hardware["memory-bandwidth"]
    whole = gradient + products + traffic + ms(sum(sent.values()))
    row[name] = {
      "products_ms": products,
      "memory_ms": traffic,
      "gradient_exchange_ms": ms(sent["gradient"]),
      "update_exchange_ms": ms(sent["updates"]),
      "step_ms": whole,
      "step_over_adam": whole / adam,
    }
  return row


def flops_of(compiled: jax.stages.Compiled) -> float:
  return float(compiled.cost_analysis()["flops"])


def measured_fit(shape: tuple[int, ...]) -> float:
  """Flops of one whitening fit of one matrix."""
  p = dpo.kron(max_size=jnp.inf)
  x = jnp.zeros(shape)
  fit = jax.jit(lambda state, h, key: p.fit(state, dpo.Probe(None, h), key=key, damping=0.0))
  return flops_of(fit.lower(p.init(x), x, jax.random.key(0)).compile())


def calibrate(shapes: Iterable[tuple[int, int]] = ((128, 128), (256, 256), (128, 512), (256, 1024))) -> dict[str, Any]:
  """fit_s and fit_c by least squares on relative errors."""
  shapes = list(shapes)
  flops = np.array([measured_fit(shape) for shape in shapes])
  terms = np.array([[apply_flops(shape), cubes(shape)] for shape in shapes])
  found = np.linalg.lstsq(terms / flops[:, None], np.ones(len(flops)), rcond=None)[0]
  ratios = terms @ found / flops
  return {"fit_s": found[0], "fit_c": found[1], "shapes": shapes, "flops": flops.tolist(), "ratios": ratios.tolist()}


def bytes_sent(compiled: jax.stages.Compiled, devices: int) -> dict[str, float]:
  """Bytes that a device sends, by collective: sizes of the results in the program's text, times the ring's factor."""
  f = (devices - 1) / devices
  factors = {"all-gather": f, "all-reduce": 2 * f, "all-to-all": f, "collective-permute": 1.0, "reduce-scatter": f}
  found = dict.fromkeys(COLLECTIVES, 0.0)
  for result, kind in re.findall(rf" = (\S.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text()):
    sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"[fsu]\d+\[([\d,]*)\]", result)]
    found[kind] += 4 * sum(sizes) * factors[kind]
  return found


def programs(layout: str, refresh: bool, model: Model = SMALL) -> tuple[jax.stages.Compiled, Any, Mesh]:
  """The whole step of the small model on all devices, and its preconditioners alone (the state's shapes, the mesh)."""
  devices = model.layers
  mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
  shapes, network = model.shapes(), model.network()
  specs = specs_of(layout, shapes, mesh)
  tx = dpo.sharded(optimizer(), mesh, specs)

  def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any]:
    def loss(p: Any) -> jax.Array:
      logits = network.apply(p, tokens[:, :-1])
      return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params, refresh=refresh)
    return optax.apply_updates(params, updates), state

  on = lambda tree, specs: jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)), tree, specs
  )
  state = on(jax.eval_shape(tx.init, shapes), dpo.partition_specs(tx, shapes, specs, mesh))
  tokens = jax.ShapeDtypeStruct((devices, model.context + 1), jnp.int32, sharding=NamedSharding(mesh, P("data")))
  compiled = jax.jit(step).lower(on(shapes, specs), state, tokens).compile()
  return compiled, (tx, shapes, specs), mesh


def check(layout: str, refresh: bool, fit: dict[str, float], model: Model = SMALL) -> dict[str, Any]:
  """Flops, exchanged bytes and argument bytes of the small model: predicted over compiled."""
  compiled, (tx, shapes, specs), mesh = programs(layout, refresh, model)
  found, rate = shares(shapes, mesh), float(refresh)
  sent = bytes_sent(compiled, mesh.size)
  predicted = exchanged(found, size_of(shapes), mesh.size, layout, rate)
  flops = gradient_flops(model, model.context) + optimizer_flops(found, fit, rate)
  return {
    "layout": layout,
    "fit": refresh,
    "flops": flops_of(compiled),
    "flops_ratio": flops / flops_of(compiled),
    "sent": sent,
    "sent_ratio": sum(predicted.values()) / sum(sent.values()),
    "held_ratio": sum(bytes_held(tx, shapes, specs, mesh)) / compiled.memory_analysis().argument_size_in_bytes,
  }


def measure(hardware: dict[str, float]) -> dict[str, Any]:
  fit = calibrate()
  say(f"  a fit costs {fit['fit_s']:.2f} S + {fit['fit_c']:.2f} C flops")
  checks = []
  for layout, refresh in CHECKED:
    checks.append(check(layout, refresh, fit))
    say(f"  {checks[-1]}")
  rows = [
    {"model": name, "devices": devices, "layout": layout, **predict(model, devices, layout, fit, hardware)}
    for name, model in MODELS.items()
    for layout in LAYOUTS
    for devices in DEVICES
  ]
  settings = {"tokens": TOKENS, "rates": RATES, "models": {name: model._asdict() for name, model in MODELS.items()}}
  return {
    "hardware": hardware,
    "settings": settings | {"small": SMALL._asdict()},
    "environment": environment(),
    "fit": fit,
    "checks": checks,
    "rows": rows,
  }


def tables(document: dict[str, Any]) -> tuple[Table, Table]:
  """How far the model is from what was compiled, and what it predicts."""
  rows = []
  for c in document["checks"]:
    ratios = f"{c['flops_ratio']:.2f}", f"{c['sent_ratio']:.2f}", f"{c['held_ratio']:.3f}"
    rows.append((f"{c['layout']}, {'fit' if c['fit'] else 'no fit'}", *ratios))
  header = ("a step of the small model on 8 devices", "flops", "bytes sent", "bytes held")
  checked = Table("Predicted over compiled", header, rows)
  rows = [
    (
      f"{row['model']}, {row['layout']}",
      str(row["devices"]),
      f"{max(row['divided_by'])}",
      number((row["params_bytes"] + row["state_bytes"]) / 1e9),
      number(row["gradient_ms"]),
      *(number(row[name]["step_ms"]) for name in RATES),
      *(f"{row[name]['step_over_adam']:.2f}" for name in RATES),
    )
    for row in document["rows"]
  ]
  times = [f"step, fit at {name}, ms" for name in RATES] + [f"× Adam, {name}" for name in RATES]
  header = ("model", "devices", "buckets over", "params + state, GB", "gradient, ms", *times)
  hardware = ", ".join(f"{name} {value:g}" for name, value in document["hardware"].items())
  notes = (
    f"{document['settings']['tokens']} tokens on each device; {hardware}. Floors: nothing overlaps, everything runs at "
    "its peak. Activations are not counted. Adam: its memory traffic and the same exchange of the gradient.",
  )
  return checked, Table("Large transformers on paper", header, rows, notes)


def add_arguments(parser: ArgumentParser) -> None:
  for option, (value, text) in HARDWARE.items():
    parser.add_argument(f"--{option}", type=positive(float), default=value, help=f"{text} (default: %(default)g)")


def run(args: Namespace) -> None:
  """Asks for virtual devices, which must come before anything runs."""
  jax.config.update("jax_num_cpu_devices", SMALL.layers)
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}".strip()
  document = measure({option: vars(args)[option.replace("-", "_")] for option in HARDWARE})
  publish(document, args.out / "scale.json", *tables(document))
