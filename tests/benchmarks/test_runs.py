# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: data that is checked, results that can be resumed, figures with known answers, and a tiny demo."""

import gzip
import hashlib
import itertools
import math
import struct
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from benchmarks import hyperparameters
from benchmarks.engine import analysis
from benchmarks.engine.calls import SpecError
from benchmarks.engine.plots import plot
from benchmarks.engine.problem import Arrays, batches, limit
from benchmarks.engine.records import Plan, Results, ResumeError, Run, load, resume, rounded, save
from benchmarks.engine.report import claim_table, tables
from benchmarks.engine.runner import fresh, gradients_of, make_step, variant_at
from benchmarks.optimizers import OPTIMIZERS, contestant, contestants, parse, split
from benchmarks.problems import data
from benchmarks.problems.curves import draw_curves
from benchmarks.problems.models import Elman, LeNet5
from benchmarks.problems.table import PROBLEMS, build

CHEAP = "sgd(learning_rate=0.3),adam(learning_rate=0.01)"


def idx(array: np.ndarray) -> bytes:
  """The array as a gzipped IDX file."""
  head = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
  return gzip.compress(head + array.tobytes())


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A data folder with a small `mnist` whose checksums are the published ones, as far as data.py can tell."""
  rng = np.random.default_rng(0)
  for key in [key for key in data.FILES if key.startswith("mnist/")]:
    shape = (20, 28, 28) if "images" in key else (20,)
    raw = idx(rng.integers(0, 10, shape).astype(np.uint8))
    path = tmp_path / key
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw)
    known = data.RemoteFile(f"file://{path}", len(raw), hashlib.sha256(raw).hexdigest())
    monkeypatch.setitem(data.FILES, key, known)
  return tmp_path


def made(finals: dict[str, list[float]], seconds: float = 1.0) -> Results:
  """Results whose loss falls from 1 to the given final values, one per seed, in 10 steps."""
  plan = Plan("toy", "tuned", "made up", 10, 10, 10, 10, 1, 10.0, 10, 5, 1, 1.0, False)
  about = {"options": {}, "state_bytes": 8, "compile_seconds": 1.0}
  results = Results("toy", plan, {label: {"name": label} | about for label in finals})
  for label, values in finals.items():
    for seed, final in enumerate(values, 1):
      losses = [1.0, final**0.5, final]
      times = [0.0, seconds, 2 * seconds]
      curves = {"step": [0, 5, 10], "gradients": [0, 5, 10], "seconds": times, "cpu_seconds": times}
      curves |= {"train_loss": losses, "test_loss": losses}
      results.runs.append(Run(label, seed, finished=True, curves=curves))
  return results


def test_images_are_read_scaled_and_shaped(folder):
  found = data.images("mnist", str(folder))
  assert found.train["x"].shape == (20, 28, 28, 1) and found.train["x"].dtype == np.float32
  assert found.train["x"].max() <= 9 / 255 and found.test["y"].dtype == np.int32
  assert data.flat(found).train["x"].shape == (20, 784)


def test_missing_file_is_named_with_its_checksum_and_a_remedy(folder):
  key = f"mnist/{data.TEST_Y}"
  (folder / key).unlink()
  with pytest.raises(data.DataError, match="missing") as error:
    data.images("mnist", str(folder))
  assert key in str(error.value) and data.FILES[key].sha256 in str(error.value) and "--data-dir" in str(error.value)


@pytest.mark.parametrize(
  ("damage", "word"), [(lambda raw: raw[:-7], "truncated"), (lambda raw: raw[:-1] + b"!", "altered")]
)
def test_damaged_file_is_named_with_both_checksums(folder, damage, word):
  key = f"mnist/{data.TRAIN_X}"
  raw = damage((folder / key).read_bytes())
  (folder / key).write_bytes(raw)
  with pytest.raises(data.DataError, match=word) as error:
    data.images("mnist", str(folder))
  message = str(error.value)
  assert key in message and data.FILES[key].sha256 in message and hashlib.sha256(raw).hexdigest() in message


def test_without_a_folder_files_are_downloaded_to_the_cache_and_verified(folder, tmp_path, monkeypatch):
  monkeypatch.delenv("DPSGD_OPTAX_DATA", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  assert data.images("mnist", None).train["y"].shape == (20,)
  assert (tmp_path / "cache" / "dpsgd_optax" / "mnist" / data.TRAIN_X).exists()


def test_failed_download_says_where_to_put_the_file(folder, tmp_path, monkeypatch):
  monkeypatch.delenv("DPSGD_OPTAX_DATA", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  (folder / "mnist" / data.TRAIN_X).unlink()
  with pytest.raises(data.DataError, match=r"could not be downloaded.*--data-dir"):
    data.images("mnist", None)


def test_curves_are_reproducible_images_and_said_to_be_generated(monkeypatch):
  images = draw_curves(5, seed=1)
  assert images.shape == (5, 784) and images.dtype == np.float32
  assert images.min() >= 0 and images.max() <= 1 and images.max(1).min() > 0.5
  assert np.array_equal(images, draw_curves(5, seed=1)) and not np.array_equal(images, draw_curves(5, seed=2))
  monkeypatch.setattr(data, "draw_curves", lambda count, seed: draw_curves(4, seed))
  assert "GENERATED" in data.curves(None).note


def test_a_file_that_is_not_the_original_curves_is_refused(tmp_path):
  (tmp_path / data.CURVES_FILE).write_bytes(b"short")
  with pytest.raises(data.DataError, match="5 bytes instead of 189600400"):
    data.curves(str(tmp_path))


def test_addition_targets_are_the_mean_of_two_marked_values():
  arrays = data.addition(samples=100, length=12).train
  values, marks = arrays["x"][..., 0], arrays["x"][..., 1]
  assert np.all(marks.sum(1) == 2) and np.all(marks[:, 6:] == 0)
  assert np.allclose(arrays["y"][:, 0], np.where(marks == 1, values, 0).sum(1) / 2)


def test_xor_target_is_the_exclusive_or_of_the_marked_bits():
  """By brute force over every sequence; one mark in the first tenth, one between it and the middle."""
  for x, y in zip(*(data.delayed_xor(length=30, samples=64).train[name] for name in "xy"), strict=True):
    first, second = np.flatnonzero(x[:, 1])
    assert set(x[:, 0]) == {-1, 1} and first < 3 <= second < 15
    assert y[0] == (x[first, 0] * x[second, 0] < 0)


def test_xor_bits_targets_and_marks_are_evenly_spread():
  """Means of 4096 draws, within 5 standard deviations; every admissible position of the marks occurs."""
  found = data.delayed_xor(length=20, samples=4096)
  assert abs(found.train["x"][..., 0].mean()) < 5 / math.sqrt(20 * 4096) and abs(found.train["y"].mean() - 0.5) < 0.04
  assert set(np.flatnonzero(found.train["x"][..., 1].any(0))) == set(range(10))
  assert not np.array_equal(found.train["x"][:128], found.test["x"][:128])
  assert np.array_equal(found.train["x"], data.delayed_xor(length=20, samples=4096).train["x"])


def test_quadratic_features_are_all_products():
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  arrays = data.quadratic_features(Arrays({"x": x}, {"x": x}, "toy"))
  assert np.array_equal(arrays.train["x"][1], [3, 4, 5, 9, 12, 15, 12, 16, 20, 15, 20, 25])


def test_generated_tensor_has_the_rank_it_says():
  (tensor,) = data.low_rank_tensor(rank=3, shape=(4, 5, 6)).train["x"]
  for axis in range(3):
    assert np.linalg.matrix_rank(np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1), tol=1e-4) == 3


def put(folder: Path, key: str, raw: bytes, monkeypatch) -> None:
  """A file in the data folder whose checksum is, as far as data.py can tell, the published one."""
  path = folder / key
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(raw)
  digest = hashlib.new(data.FILES[key].algorithm, raw).hexdigest()
  monkeypatch.setitem(data.FILES, key, data.RemoteFile("nowhere", len(raw), digest))


@pytest.fixture
def texts(tmp_path, monkeypatch):
  """A data folder with a small Shakespeare and a small Penn Treebank."""
  put(tmp_path, data.SHAKESPEARE, b"the quick brown fox jumps over the lazy dog. " * 20, monkeypatch)
  put(tmp_path, data.PTB_TRAIN, b" a b c\n c b a\n" * 20, monkeypatch)
  put(tmp_path, data.PTB_TEST, b" c a b\n" * 10, monkeypatch)
  return tmp_path


def test_characters_and_words_are_numbered_in_windows_of_the_text(texts):
  arrays, vocabulary = data.shakespeare(str(texts), length=16)
  assert vocabulary == 28 and arrays.train["x"].shape[1:] == (17,)
  assert np.array_equal(arrays.train["x"][1][:-2], arrays.train["x"][0][2:])
  arrays, vocabulary = data.ptb(str(texts), length=3)
  assert vocabulary == 4 and arrays.train["x"].tolist()[:2] == [[1, 2, 3, 0], [0, 3, 2, 1]]  # <eos> a b c


def test_ptb_without_the_files_says_what_to_put_where(tmp_path, monkeypatch):
  with pytest.raises(data.DataError, match=r"ptb\.train\.txt is missing.*MD5 f26c4b92.*LDC") as error:
    data.ptb(str(tmp_path), length=3)
  assert "5101618 bytes" in str(error.value)
  monkeypatch.delenv("DPSGD_OPTAX_DATA", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  with pytest.raises(data.DataError, match="is missing"):  # it is never downloaded
    data.ptb(None, length=3)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("model", "shape", "parameters"), [(LeNet5, (2, 28, 28, 1), 44426), (Elman, (2, 32, 2), 481)])
def test_models_have_the_number_of_parameters_of_the_paper(model, shape, parameters, folded):
  """44426 and 481, in both layouts of the biases."""
  params = jax.eval_shape(model(folded=folded).init, jax.random.key(0), np.zeros(shape, np.float32))
  leaves = jax.tree.leaves(params)
  assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters
  assert not folded or all(leaf.ndim == 2 for leaf in leaves)


@pytest.mark.parametrize("name", ["digits", "rosenbrock", "quadratic"])
def test_embedded_problems_have_finite_losses(name):
  problem = PROBLEMS[name](None, False)
  batch = {key: array[: problem.batch_size] for key, array in problem.arrays.train.items()}
  assert np.isfinite(problem.loss(problem.init(jax.random.key(0)), batch))


@pytest.mark.full
@pytest.mark.parametrize(
  ("text", "optimizer"),
  [
    ("xor(length=12)", "psgd_whiten(learning_rate=0.01, every=1)"),
    ("xor(length=12, cell=lstm)", "adam(learning_rate=0.01)"),
    ("logistic", "lbfgs(learning_rate=0.1)"),
    ("tensor_decomposition(rank=2)", "psgd_newton(learning_rate=0.2)"),
    ("rosenbrock(size=4, start=0)", "psgd_newton(learning_rate=0.5, preconditioner=dense(step_size=0.5))"),
    ("charlm(layers=1, width=8, block=8)", "adamw(learning_rate=0.01)"),
    ("charlm(model=lstm, layers=1, width=8, block=8)", "momentum(learning_rate=0.3, clip=1.0)"),
    ("ptb(width=8, block=4)", "adam(learning_rate=0.01)"),
  ],
)
def test_loss_falls_on_a_repeated_batch(text, optimizer, texts, monkeypatch):
  monkeypatch.setattr(data.delayed_xor, "__defaults__", (64, 0))
  problem = limit(build(text, str(texts), False), 32)
  (entered,) = contestants(optimizer, {}, text)
  tx, params = entered.build(1.0, 1, key=0), problem.init(jax.random.key(1))
  step, opt_state = make_step(problem, tx), fresh(tx.init(params))
  before = float(problem.loss(params, problem.arrays.train))
  train, rows = {name: np.asarray(array) for name, array in problem.arrays.train.items()}, np.arange(problem.train_size)
  for _ in range(20):
    params, opt_state = step(params, opt_state, train, rows, variant_at(entered, 0))
  assert problem.name == text.replace(" ", "") and float(problem.loss(params, problem.arrays.train)) < before


def test_rosenbrock_in_pairs_is_the_function_of_two_side_by_side():
  """Of size 2 both are 100 (x2 - x1^2)^2 + (1 - x1)^2 = 4 at (-1, 1); ones are the minimum of any size."""
  point, batch = {"x": np.array([-1.0, 1.0] * 3)}, {"x": np.zeros((1, 0))}
  chained, pairs = build("rosenbrock(size=6)", None, False), build("rosenbrock(size=6, pairs=True)", None, False)
  assert float(pairs.loss(point, batch)) == 12 and float(chained.loss(point, batch)) == 12 + 2 * 400
  assert all(float(problem.loss({"x": np.ones(6)}, batch)) == 0 for problem in (chained, pairs))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("xor(lenght=3)", "no option lenght.*length=32, cell=rnn"),
    ("xor(cell=gru)", "`cell` must be one of rnn, lstm, got 'gru'"),
    ("xor(32)", "name=value, for example xor"),
    ("digits(size=1)", "Its options and their defaults: none"),
    ("cifar", "no problem is called `cifar`; known are digits"),
  ],
)
def test_a_problem_that_cannot_be_understood_is_explained(text, message):
  with pytest.raises(SpecError, match=message):
    build(text, None, False)


def test_batches_cover_the_data_once_an_epoch_and_depend_on_the_seed_only():
  problem = limit(PROBLEMS["digits"](None, False), 128)
  one_epoch = lambda seed: np.concatenate(list(itertools.islice(batches(problem, seed), problem.steps_per_epoch)))
  first = one_epoch(1)
  assert sorted(first) == list(range(128))
  assert np.array_equal(first, one_epoch(1))
  assert not np.array_equal(first, one_epoch(2))


def test_options_are_read_as_typed():
  text = "sgd, dpsgd(average=two_tap(0.9, 0.1), judge_every=10),psgd+damping(form=additive)"
  assert [parse(part) for part in split(text)] == [
    ("sgd", {}),
    ("dpsgd", {"average": "two_tap(0.9, 0.1)", "judge_every": 10}),
    ("psgd+damping", {"form": "additive"}),
  ]
  assert split("ablation") == list(hyperparameters.ABLATION)


@pytest.mark.parametrize("text", ["adamax", "sgd(0.1)", "dpsgd(average=)", "dpsgd(form=nonsense)", "sgd"])
def test_what_cannot_be_understood_is_explained(text):
  with pytest.raises(SpecError):
    contestants(text, {}, "digits")[0].build(1.0, 1, key=0)


def test_every_optimizer_of_every_setting_can_be_built():
  norm = {"scale": np.zeros(2, np.float32), "bias": np.zeros(2, np.float32)}
  for problem in PROBLEMS:
    for name in ("author", "tuned"):
      chosen = hyperparameters.setting(name, problem)
      ready = [optimizer for optimizer, options in chosen.optimizers.items() if "learning_rate" in options]
      for entered in contestants(",".join(ready), chosen.optimizers, problem):
        jax.eval_shape(entered.build(0.5, 3, key=1).init, {"w": np.zeros((3, 2), np.float32), "norm": norm})


def test_grids_are_of_one_size_and_tuned_rates_are_among_their_trials():
  assert set(hyperparameters.GRIDS) == set(OPTIMIZERS)
  assert len({len(grid) for grid in hyperparameters.GRIDS.values()}) == 1
  assert set(hyperparameters.GROUPS["demo"]) <= hyperparameters.tuned("digits").keys() <= hyperparameters.GRIDS.keys()
  assert hyperparameters.tuned("no such problem") == {}
  for problem in PROBLEMS:
    assert all(rate in hyperparameters.GRIDS[name] for name, rate in hyperparameters.tuned(problem).items())


def test_options_of_the_factors_are_typed_beside_those_of_dpsgd():
  """dpsgd(average=None, judge_every=3): the first is `damped_kron`'s, the second its own."""
  make, params = OPTIMIZERS["dpsgd"].make, {"w": np.ones((3, 2), np.float32)}
  average = lambda **options: optax.tree.get(make(0.1, judge_every=3, **options).init(params), "average")
  assert average(average=None) is None and average(average=0.5) is not None


def test_the_host_chooses_fits_and_judgements():
  """A fit when t mod T1 = 0, a judgement when (t + 1) mod T2 = 0; 1 + 1 + 1/3 gradients when both."""
  dpsgd = contestant("dpsgd", "dpsgd", {"every": 2, "judge_every": 3})
  variants = [variant_at(dpsgd, t) for t in range(4)]
  assert variants == [(True, False), (False, False), (True, True), (False, False)]
  assert [gradients_of(variant) for variant in variants] == pytest.approx([2, 1, 7 / 3, 1])
  assert variant_at(contestant("psgd", "psgd", {}), 4) == (True, False)
  assert variant_at(contestant("adam", "adam", {}), 4) == (None, None)


def test_target_is_reached_where_the_logarithm_of_the_loss_is():
  assert analysis.reached([0, 10, 20], [1.0, 0.1, 0.001], 0.01) == pytest.approx(15)
  assert analysis.reached([0, 10], [1.0, 0.1], 0.1) == 10
  assert analysis.reached([0, 10], [1.0, 0.1], 2.0) == 0
  assert analysis.reached([0, 10], [1.0, 0.1], 0.01) == math.inf
  assert analysis.reached([0, 10, 20], [1.0, math.nan, 0.1], 0.2) > 10
  assert analysis.reached([0, 10], [1.0, 0.0], 0.5) < 1


def test_quartiles_know_infinity():
  assert analysis.spread([3.0, 1.0, 2.0]) == (2.0, 1.5, 2.5)
  assert analysis.spread([1.0, math.inf, math.nan]) == (math.inf, math.inf, math.inf)
  assert analysis.spread([1.0, 2.0, 3.0, 4.0, math.inf]) == (3.0, 2.0, 4.0)


def test_ratio_to_the_target_of_the_same_seed():
  """PSGD needs 10 steps to its own final loss 0.01; a contestant that ends at 1e-4 passes it after half of its time."""
  results = made({"psgd": [1e-2, 1e-2], "dpsgd": [1e-4, 1e-4]})
  targets = analysis.psgd_targets(results)
  assert analysis.ratios(results, "dpsgd", "seconds", targets) == pytest.approx([0.5, 0.5])
  assert analysis.ratios(results, "dpsgd", "seconds", {1: 2.0, 2: 1e-2}) == pytest.approx(
    [0.5]
  )  # 2.0: before the first step
  assert analysis.ranks(analysis.losses_at_equal(results, "step")) == {"dpsgd": 1, "psgd": 2}


def test_equal_seconds_are_those_of_the_fastest():
  slow, fast = made({"dpsgd": [1e-4]}, seconds=10.0), made({"sgd": [1e-2]}, seconds=1.0)
  slow.contestants |= fast.contestants
  slow.runs += fast.runs
  losses = analysis.losses_at_equal(slow, "seconds")
  assert losses["sgd"].median == pytest.approx(1e-2) and losses["dpsgd"].median == pytest.approx(1e-4**0.1)


def test_results_survive_a_round_trip(tmp_path):
  results = made({"psgd": [1e-2], "dpsgd": [math.nan]})
  save(results, tmp_path / "toy.json")
  again = load(tmp_path / "toy.json")
  assert again.plan == results.plan and again.contestants == results.contestants and again.seeds() == [1]
  assert math.isnan(again.of("dpsgd")[0].curves["train_loss"][-1])
  assert rounded({"a": [1 / 3, math.inf]}) == {"a": [0.333333, None]}


def test_resume_refuses_other_settings(tmp_path):
  results = made({"psgd": [1e-2]})
  save(results, tmp_path / "toy.json")
  assert resume(tmp_path / "toy.json", results.plan, results.contestants) is not None
  assert resume(tmp_path / "other.json", results.plan, results.contestants) is None
  other = Plan(**(vars(results.plan) | {"steps": 20}))
  with pytest.raises(ResumeError, match=r"steps \(10 there, 20 now\)"):
    resume(tmp_path / "toy.json", other, results.contestants)
  changed = {"psgd": results.contestants["psgd"] | {"options": {"learning_rate": 1.0}}}
  with pytest.raises(ResumeError, match="options of psgd"):
    resume(tmp_path / "toy.json", results.plan, changed)


def test_tables_and_plot_of_results_with_damping(tmp_path):
  results = made({"psgd": [1e-2, 2e-2], "dpsgd": [1e-4, 4e-4]})
  for run in results.of("dpsgd"):
    run.curves |= {"damping": [1.0, 0.5, 0.2], "ratio": [math.nan, 0.9, 0.5]}
  text = "\n".join(table.markdown() for table in tables(results, [0.5]))
  assert "-50 %" in text and text.index("| dpsgd ") < text.index("| psgd ")
  claim = claim_table([results])
  assert claim is not None and "-50 %" in claim.markdown()
  plot(results, tmp_path / "toy.png")
  assert (tmp_path / "toy.png").stat().st_size > 10_000
