# SPDX-License-Identifier: Apache-2.0
"""The four pictures of the page "How it works", each computed by the library: `python notebooks/pictures/draw.py`.

The loss is L(θ) = ½ θᵀHθ, a long valley in two parameters, so that all that happens can be seen.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import dpsgd_optax as dpo

HERE = Path(__file__).parent
RED, BLUE, GREY = "#c1121f", "#1d3557", "#6c757d"
TURN = np.array([[0.8, -0.6], [0.6, 0.8]])
H = TURN @ np.diag([1.0, 12.0]) @ TURN.T
START = np.array([-2.2, 0.4])
loss = lambda p: 0.5 * p @ jnp.asarray(H, jnp.float32) @ p
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 90})


def valley(axes):
  """Level lines of the loss."""
  x, y = np.meshgrid(np.linspace(-2.8, 1.6, 200), np.linspace(-2.2, 1.4, 200))
  axes.contour(x, y, 0.5 * (H[0, 0] * x**2 + 2 * H[0, 1] * x * y + H[1, 1] * y**2), np.geomspace(0.05, 40, 7), colors="#d0d4d9")
  axes.plot(0, 0, "k+", markersize=9)
  axes.set(aspect="equal", xlabel="first parameter", ylabel="second parameter", xlim=(-2.8, 1.6), ylim=(-2.2, 1.4))


def arrow(axes, start, step, color, label):
  axes.annotate("", start + step, start, arrowprops=dict(arrowstyle="-|>", color=color, lw=2))
  axes.plot([], [], color=color, lw=2, label=label)


def save(figure, name):
  figure.savefig(HERE / f"{name}.png", bbox_inches="tight", metadata={"Software": None})
  plt.close(figure)


def fits(count):
  """P of `dense()` after 0, 1, …, count fits on Newton probes, by the library."""
  p, product = dpo.dense(init_scale=0.7), dpo.hvp(loss, jnp.zeros(2))
  state, found = p.init(jnp.zeros(2)), []
  for i in range(count + 1):
    found.append(np.stack([np.asarray(p.apply(state, e)) for e in jnp.eye(2)], 1))
    probe, fit = jax.random.split(jax.random.key(i))
    v = jax.random.normal(probe, (2,))
    state = p.fit(state, dpo.Probe(v, product(v)), key=fit, damping=0.0)
  return found


def observe():
  figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.4))
  valley(left)
  arrow(left, START, -0.12 * H @ START, BLUE, "downhill: −g")
  arrow(left, START, -START, RED, "to the minimum: −H⁻¹ g")
  left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False, ncols=2, fontsize=9)
  angles = np.linspace(0, 2 * np.pi, 200)
  circle = np.stack([np.cos(angles), np.sin(angles)])
  right.plot(*circle, color=GREY, label="probes v")
  right.plot(*(H @ circle), color=RED, label="their images H v")
  right.set(aspect="equal", xlabel="first parameter", ylabel="second parameter")
  right.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False, ncols=2, fontsize=9)
  save(figure, "observe")


def fit(found):
  figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.2))
  errors = [np.linalg.norm(p @ H - np.eye(2)) / np.sqrt(2) for p in found]
  left.semilogy(errors, color=RED)
  left.set(xlabel="fits", ylabel="‖P H − I‖ / √2")
  angles = np.linspace(0, 2 * np.pi, 200)
  circle = np.stack([np.cos(angles), np.sin(angles)])
  for count, color in ((0, "#f3b0b5"), (20, "#dd5a64"), (len(found) - 1, RED)):
    right.plot(*(found[count] @ H @ circle), color=color, label=f"P H v after {count} fits")
  right.plot(*circle, "--", color=GREY, lw=1, label="v")
  right.set(aspect="equal", xlabel="first parameter", ylabel="second parameter")
  right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
  save(figure, "fit")


def apply(found):
  """The same fitted P by hand, so that the picture shows what applying it does and nothing else."""
  figure, axes = plt.subplots(figsize=(5.4, 3.4))
  valley(axes)
  for label, p, rate, color in (("θ ← θ − 0.15 g", np.eye(2), 0.15, BLUE), ("θ ← θ − 0.4 P g", found[60], 0.4, RED)):
    path = [START]
    for _ in range(15):
      path.append(path[-1] - rate * p @ np.asarray(jax.grad(loss)(jnp.asarray(path[-1], jnp.float32))))
    axes.plot(*np.array(path).T, "o-", color=color, markersize=3, label=label)
  axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False, ncols=2)
  save(figure, "apply")


def judge():
  figure, axes = plt.subplots(figsize=(5.4, 3.2))
  curved = lambda s: 0.35 * (s - 1) ** 2 + 0.5 * np.sin(2.2 * s) * np.exp(-0.3 * s) + 0.3
  at, eps = 0.9, 1e-3
  slope, bend = (curved(at + eps) - curved(at - eps)) / (2 * eps), (curved(at + eps) - 2 * curved(at) + curved(at - eps)) / eps**2
  s = np.linspace(0.2, 3.0, 200)
  model = lambda x: curved(at) + slope * (x - at) + 0.5 * abs(bend) * (x - at) ** 2
  step = at - slope / abs(bend)
  axes.plot(s, curved(s), color=BLUE, label="the loss")
  near = np.linspace(0.2, 2.6, 100)
  axes.plot(near, model(near), "--", color=RED, label="what the model says")
  axes.plot([at], [curved(at)], "o", color="black")
  axes.plot([step, step], [model(step), curved(step)], "o-", color=GREY)
  axes.annotate("where it stands", (at, curved(at)), (at - 0.65, curved(at) - 0.12))
  axes.annotate("promised", (step, model(step)), (step - 0.12, model(step) + 0.06))
  axes.annotate("found", (step, curved(step)), (step - 0.35, curved(step) - 0.03))
  axes.set(xlabel="along the step", ylabel="loss", ylim=(0.0, 1.3))
  axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False, ncols=2)
  save(figure, "judge")


if __name__ == "__main__":
  observe()
  found = fits(200)
  fit(found)
  apply(found)
  judge()
