# SPDX-License-Identifier: Apache-2.0
"""Problems of layers and of images: their data, what is done to the data on purpose, and how the runner feeds them."""

import hashlib
import itertools
import json
import lzma
import math
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from benchmarks.__main__ import main
from benchmarks.engine.calls import SpecError
from benchmarks.engine.problem import Arrays, Problem, batches, classifier
from benchmarks.engine.runner import fresh, layers_of, make_step
from benchmarks.optimizers import contestant as entered_as
from benchmarks.optimizers import gls_curvature
from benchmarks.problems import cifar, data, tabular, vision
from benchmarks.problems.layered import PixelMLP
from benchmarks.problems.models import MLP
from benchmarks.problems.resnet import NORMS, SIZES, ResNet
from benchmarks.problems.table import PROBLEMS, build
from benchmarks.studies import gls

RNG = np.random.default_rng(0)


def toy(**options) -> Problem:
  """Three classes of 12 images of 4 x 4, an MLP 16-3."""
  x, y = RNG.random((12, 4, 4, 1)).astype(np.float32), np.arange(12, dtype=np.int32) % 3
  arrays = Arrays({"x": x, "y": y}, {"x": x, "y": y}, "toy")
  return Problem(
    lambda key: None, lambda variables, batch: {}, arrays, batch_size=4, epochs=2, evaluations=2, **options
  )


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(monkeypatch):
  """Two records a file, the checksums those of the files as far as cifar.py can tell."""
  found = {name: RNG.integers(0, 256, 2 * 3073).astype(np.uint8) % 10 for name in cifar.SHA256}
  for name, raw in found.items():
    monkeypatch.setitem(cifar.SHA256, name, hashlib.sha256(raw.tobytes()).hexdigest())
  return {name: raw.tobytes() for name, raw in found.items()}


def test_cifar_is_read_plain_or_compressed_with_channels_last(files, tmp_path):
  folder = tmp_path / cifar.FOLDER
  folder.mkdir(parents=True)
  for i, (name, raw) in enumerate(files.items()):
    path = folder / (name if i % 2 else f"{name}.xz")
    path.write_bytes(raw if i % 2 else lzma.compress(raw))
  arrays = cifar.cifar10(str(tmp_path), batches=2)
  records = np.frombuffer(files["data_batch_2.bin"], np.uint8).reshape(2, 3073)
  assert arrays.train["x"].shape == (4, 32, 32, 3) and arrays.train["x"].dtype == np.uint8
  assert (
    arrays.train["y"][3] == records[1, 0] and arrays.train["x"][3, 5, 7, 2] == records[1, 1 + 2 * 1024 + 5 * 32 + 7]
  )
  assert arrays.test["x"].shape[0] == 2
  (folder / "data_batch_2.bin").write_bytes(b"short")
  with pytest.raises(data.DataError, match=r"data_batch_2\.bin is truncated \(5 of 30730000 bytes\)"):
    cifar.cifar10(str(tmp_path), batches=2)


def test_cifar_without_the_files_says_what_to_put_where(tmp_path, monkeypatch, files):
  with pytest.raises(data.DataError, match=r"data_batch_1\.bin is missing.*SHA-256.*cifar-10-binary\.tar\.gz") as error:
    cifar.cifar10(str(tmp_path))
  assert "--data-dir" in str(error.value)
  archive, cache = tmp_path / "made.tar.gz", tmp_path / "cache"
  with tarfile.open(archive, "w:gz") as out:
    for name, raw in files.items():
      (tmp_path / name).write_bytes(raw)
      out.add(tmp_path / name, f"cifar-10-batches-bin/{name}")
  raw = archive.read_bytes()
  known = data.RemoteFile(f"file://{archive}", len(raw), hashlib.sha256(raw).hexdigest())
  monkeypatch.setattr(cifar, "ARCHIVE", known)
  monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
  monkeypatch.delenv("DPSGD_OPTAX_DATA", raising=False)
  assert len(cifar.cifar10(None).train["y"]) == 10  # downloaded, verified, unpacked
  archive.unlink()
  assert len(cifar.cifar10(None).train["y"]) == 10  # and kept


def put(folder, key, text, monkeypatch):
  path = folder / key
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  raw = text.encode()
  monkeypatch.setitem(data.FILES, key, data.RemoteFile("nowhere", len(raw), hashlib.sha256(raw).hexdigest()))


def test_tables_are_standardised_by_their_training_part(tmp_path, monkeypatch):
  rows = "\n".join(f"{i} {i * i} {7 - i} {3}" for i in range(6))
  for part, text in zip(tabular.PARTS, (rows, "0.0 2.0 3.0 5.0", "1.0 4.0"), strict=True):
    put(tmp_path, f"uci/energy/data/{part}", text, monkeypatch)
  head = "longitude,ocean_proximity,median_house_value"
  places = "\n".join(f"{i},{'INLAND' if i % 2 else 'ISLAND'},{i if i != 3 else ''}" for i in range(11))
  put(tmp_path, tabular.HOUSING, f"{head}\n{places}", monkeypatch)
  energy, houses = (tabular.regression(name, str(tmp_path)) for name in ("energy", "california"))
  assert energy.train["x"].shape == (4, 3) and energy.test["x"].shape == (2, 3)
  assert houses.train["x"].shape == (9, 3) and len(houses.test["x"]) == 1  # one row is incomplete
  for arrays in (energy, houses, tabular.regression("diabetes", None)):
    x, y = arrays.train["x"], arrays.train["y"]
    assert np.allclose(x.mean(0), 0, atol=1e-5) and abs(y.mean()) < 1e-5
    assert np.allclose(x.std(0), 1, atol=1e-5)
  with pytest.raises(SpecError, match="`table` must be one of diabetes"):
    build("uci(table=boston)", None, False)


# --- on purpose ---------------------------------------------------------------------------------------------------


def test_noise_replaces_the_share_of_labels_it_says_by_other_classes():
  y = np.arange(5000, dtype=np.int32) % 10
  found = vision.noisy_labels(Arrays({"x": y, "y": y}, {}, "toy"), share=0.4)
  changed = found.train["y"] != y
  assert abs(changed.mean() - 0.4) < 5 * math.sqrt(0.24 / 5000) and np.array_equal(found.train["clean"], y)
  assert np.all(np.bincount((found.train["y"][changed] - y[changed]) % 10, minlength=10)[1:] > 150)
  assert "40% of the training labels wrong" in found.note


def test_imbalance_thins_every_second_class():
  y = np.arange(5000, dtype=np.int32) % 10
  counts = np.bincount(vision.imbalanced(Arrays({"x": y, "y": y}, {}, "toy"), share=0.1).train["y"])
  assert np.all(counts[::2] == 500) and np.all((20 < counts[1::2]) & (counts[1::2] < 90))


def test_blur_keeps_what_is_flat_and_loses_what_is_fine():
  flat, fine = np.full((1, 8, 8, 1), 0.3, np.float32), np.indices((8, 8)).sum(0)[None, ..., None] % 2
  assert np.allclose(vision.blurred(flat), 0.3) and np.allclose(vision.blurred(fine.astype(np.float32)), 0.5)
  assert np.all(vision.blurred(np.full((1, 8, 8, 1), 200, np.uint8)) == 200)


def test_the_deficit_lasts_for_the_epochs_it_says():
  problem = toy(deficit=1)
  arrays = vision.spoiled(problem.arrays, 0.0, 1.0, 1)
  rows = np.stack(list(itertools.islice(batches(problem, seed=1), 2 * problem.steps_per_epoch))).reshape(2, -1)
  assert sorted(rows[0]) == list(range(12, 24)) and sorted(rows[1]) == list(range(12))
  for epoch, name in enumerate(("spoiled", "x")):
    batch = problem.take({k: jnp.asarray(v) for k, v in arrays.train.items()}, jnp.asarray(rows[epoch]))
    assert np.array_equal(batch["x"], arrays.train[name][rows[epoch] % 12])
    assert np.array_equal(batch["y"], arrays.train["y"][rows[epoch] % 12])
  with pytest.raises(SpecError, match="shares"):
    vision.spoiled(problem.arrays, 1.5, 1.0, 0)


# --- models and the runner ----------------------------------------------------------------------------------------


def test_resnets_have_the_parameters_they_say():
  def size(name, **options):
    shapes = jax.eval_shape(ResNet(*SIZES[name], **options).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))

  assert size("resnet8") == 78042 and size("resnet18") == 11_173_962  # 11.17 million: the paper's table
  assert size("resnet8") - size("resnet8", shortcuts=False) == (16 * 32 + 32 * 64) + 2 * (32 + 64)
  assert len({size("resnet8", norm=norm) for norm in NORMS}) == 2  # scale and bias of each channel, or a bias
  with pytest.raises(SpecError, match="`norm` must be one of batch"):
    PROBLEMS["cifar10"](None, False, norm="layer")


class Normed(nn.Module):
  """Batch norm of 16 pixels, three classes."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.reshape(len(x), -1)))


def test_running_statistics_advance_once_a_step_whatever_the_optimizer_evaluates():
  """0.9 m + 0.1 mean of the batch, from the pass that gives the gradient; a fit and a judgement leave it alone."""
  arrays = toy().arrays
  problem = classifier(Normed(), arrays, True, batch_size=4, epochs=1, evaluations=1)
  variables = problem.init(jax.random.key(0))
  params, statistics = problem.split(variables)
  batch = problem.take(arrays.train, np.arange(4))
  _, expected = problem.training(variables, batch)
  assert not jax.tree.all(jax.tree.map(np.allclose, statistics, expected))
  contestant = entered_as("dpsgd", "dpsgd", {"learning_rate": 0.1, "max_size": 1, "max_vector_size": None})
  tx = contestant.build(1.0, 1, key=0)
  step = make_step(problem, tx)
  after, _ = step(fresh(variables), fresh(tx.init(params)), arrays.train, np.arange(4), (True, True))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), problem.split(after)[1], expected)
  assert float(problem.metrics(after, batch)["loss"]) > 0  # evaluated with them


def run_steps(problem: Problem, options: dict, name: str = "gls", steps: int = 3):
  contestant = entered_as(name, name, options)
  tx = contestant.build(1.0, 1, 0, layers_of(problem, contestant.records))
  variables = problem.init(jax.random.key(0))
  step, state = make_step(problem, tx, contestant.records), fresh(tx.init(variables))
  variables = fresh(variables)
  for _ in range(steps):
    variables, state = step(variables, state, problem.arrays.train, np.arange(problem.batch_size), (True, False))
  return variables


@pytest.mark.full
def test_layerwise_optimizers_are_shown_their_layers():
  """In the dual form the step from output gradients is that from the gradient; all make the loss fall."""
  problem = build("single_layer(samples=8, inputs=12)", None, False)
  batch, start = problem.arrays.train, problem.init(jax.random.key(0))
  before = float(problem.loss(start, batch))
  rate = {"learning_rate": 1.0, "decay": None}
  plain, direct = run_steps(problem, rate), run_steps(problem, rate | {"from_outputs": True})
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, direct)
  others = {"bnp": {"learning_rate": 0.1}, "gls": {"learning_rate": 1.0, "output_damping": 0.1}}
  found = [plain, *(run_steps(problem, options, name) for name, options in others.items())]
  assert all(float(problem.loss(variables, batch)) < before for variables in found)


def test_the_curvature_step_divides_by_the_curvature_of_the_outputs():
  """c/2 (z - y)^2: the step is 1/c of plain GLS, and so reaches the least-squares solution at once."""
  x, y, c = jnp.asarray(RNG.normal(size=(9, 3))), jnp.asarray(RNG.normal(size=(9, 1))), 7.0
  loss = lambda p: c * jnp.mean((x @ p["w"] - y) ** 2) / 2
  tx, params = gls_curvature(1.0, decay=0.0, damping=1e-7), {"w": jnp.ones((3, 1))}
  step, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss, layer_inputs={"w": x})
  solution = np.linalg.lstsq(np.asarray(x), np.asarray(y), rcond=None)[0]
  np.testing.assert_allclose(params["w"] + step["w"], solution, atol=1e-3)


def test_the_claims_are_measured_kept_and_not_done_again(tmp_path, monkeypatch, capsys):
  name = "single_layer(samples=8,inputs=3)"
  entered = {"Adam": ("adam", {}, (0.01, 0.1)), "SGD": ("sgd", {}, (0.1, 1.0))}
  entered["GLS, length of SGD"] = ("gls", {"match": "match_total"}, (0.1, 1.0))
  monkeypatch.setattr(gls, "RACES", {name: ({"epochs": 4, "evaluations": 2}, entered)})
  monkeypatch.setattr(gls, "CLASSIFIERS", {label: entered[label] for label in ("Adam", "SGD")})
  monkeypatch.setattr(gls, "COSTS", (name,))
  assert main(["gls", "--seeds", "2", "--out", str(tmp_path)]) == 0
  document = json.loads((tmp_path / "gls.json").read_text())
  found = document["races"][name]
  assert found["contestants"]["Adam"]["step_to_adam"] == [1.0, 1.0] and len(found["irls"]["sweeps"]) == 2
  assert set(found["contestants"]["SGD"]["trials"]) == {"0.1", "1"}
  assert document["cost"][name]["ratios"]["Adam"]["cpu"] == [1, 1, 1]
  document["cost"][name]["ratios"]["GLS"] = document["cost"][name]["ratios"]["SGD"]
  (row,) = gls.summary(document).rows
  assert row[0] == name and row[3] == "GLS, length of SGD"
  monkeypatch.setattr(gls, "measure", lambda *arguments: pytest.fail("done again"))
  assert main(["gls", "--seeds", "2", "--out", str(tmp_path)]) == 0
  assert "Train loss at equal step length" in capsys.readouterr().out


def test_pixels_reach_an_mlp_as_rows_between_0_and_1():
  bytes_, floats = np.full((2, 3, 3, 1), 255, np.uint8), np.ones((2, 3, 3, 1), np.float32)
  model = PixelMLP((2,))
  params = model.init(jax.random.key(0), bytes_)
  inner = {"params": params["params"]["MLP_0"]}
  assert np.allclose(model.apply(params, bytes_), MLP((2,)).apply(inner, np.ones((2, 9))))
  assert np.allclose(model.apply(params, bytes_), model.apply(params, floats))
