# SPDX-License-Identifier: Apache-2.0
"""What an installed copy must do: ``python -I -W error tests/smoke.py``, in an environment with nothing but the wheel.

Imported without a warning, in less than a second beyond jax's own; typed; the version is that of the metadata; every
public name is there; one of each kind of optimizer trains.
"""

import importlib.metadata
import importlib.resources
import json
import subprocess
import sys

LIMIT = 1.0  # seconds
IMPORT = """
import time, jax
begin = time.process_time()
import dpsgd_optax
print(time.process_time() - begin)
"""


def import_seconds() -> float:
  """The least of three: what `import dpsgd_optax` takes once jax is there, optax included."""
  command = [sys.executable, "-I", "-W", "error", "-c", IMPORT]
  return min(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3))


def train() -> dict[str, float]:
  """Losses after 200 steps of a small regression; the first is that of the start."""
  import jax
  import jax.numpy as jnp
  import optax

  import dpsgd_optax as dpo

  x = jax.random.normal(jax.random.key(0), (32, 4)) * jnp.array([1.0, 3.0, 0.3, 1.0])
  start = {"w": jnp.zeros((4, 2)), "b": jnp.zeros(2)}
  loss = lambda p: jnp.mean((x @ p["w"] + p["b"] - jnp.sin(x[:, :2])) ** 2)
  makers = {
    "psgd": lambda: dpo.psgd(3e-2),
    "dpsgd": lambda: dpo.dpsgd(0.1),
    "gls": lambda: dpo.gls(0.3),
    "bnp": lambda: dpo.bnp(0.1),
  }
  found = {"start": float(loss(start))}
  for name, make in makers.items():
    tx = make()

    def step(carry, _, tx=tx):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params)
      updates, state = tx.update(
        grads, state, params, value=value, value_fn=loss, hvp=dpo.hvp(loss, params), layer_inputs={"w": x}
      )
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry, step=step: jax.lax.scan(step, carry, length=200))((start, tx.init(start)))
    found[name] = float(loss(params))
    assert found[name] < 0.5 * found["start"], found
  return found


def main() -> None:
  import dpsgd_optax as dpo

  version = importlib.metadata.version("dpsgd_optax")
  package = importlib.resources.files("dpsgd_optax")
  assert "site-packages" in str(package), f"not an installed copy: {package}"
  assert (package / "py.typed").is_file(), "no py.typed: type checkers would ignore the annotations"
  assert version == dpo.__version__, (version, dpo.__version__)
  missing = [name for name in dpo.__all__ if not hasattr(dpo, name)]
  assert not missing, missing
  seconds = import_seconds()
  assert seconds < LIMIT, f"`import dpsgd_optax` takes {seconds:.2f} s beyond jax"
  packages = {name: importlib.metadata.version(name) for name in ("jax", "optax", "flax")}
  found = {"version": version, **packages, "import_seconds_beyond_jax": round(seconds, 3), "losses": train()}
  print(json.dumps(found))


if __name__ == "__main__":
  main()
