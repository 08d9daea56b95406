# SPDX-License-Identifier: Apache-2.0
"""The data sets, from a folder or from their canonical addresses, each file checked against its published SHA-256.

A folder given by the user (`--data-dir` or DPSGD_OPTAX_DATA) is only read. Without one, files are kept in a cache
folder and downloaded once. Either way a missing, truncated or altered file is an error that says what to do.
"""

import gzip
import hashlib
import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.engine.problem import Arrays
from benchmarks.problems.curves import draw_curves


class DataError(Exception):
  """A data file is missing, truncated or altered. The message names it and says what to do."""


class RemoteFile(NamedTuple):
  """One published file: where it lies, how long it is, what it must hash to."""

  url: str
  size: int  # bytes
  sha256: str  # or the MD5, where nothing better was published

  @property
  def algorithm(self) -> str:
    return "md5" if len(self.sha256) == 32 else "sha256"

  @property
  def checksum(self) -> str:
    return f"{'MD5' if self.algorithm == 'md5' else 'SHA-256'} {self.sha256}"

  def check(self, path: Path, raw: bytes) -> bytes:
    """The bytes that were read from there; a DataError unless they have the published length and checksum."""
    if (found := hashlib.new(self.algorithm, raw).hexdigest()) == self.sha256:
      return raw
    what = f"is truncated ({len(raw)} of {self.size} bytes)" if len(raw) < self.size else "was altered"
    raise DataError(
      f"{path} {what}: expected {self.checksum}, found {found}. "
      f"Delete it and fetch it again from {self.url} (without `--data-dir` this is done for you)."
    )


TRAIN_X, TRAIN_Y = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_X, TEST_Y = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
SHAKESPEARE, PTB_TRAIN, PTB_TEST = "tiny_shakespeare/input.txt", "ptb/ptb.train.txt", "ptb/ptb.valid.txt"
# of the Penn Treebank the MD5, as in torchtext: nothing better was published
FILES = {key: RemoteFile(*row) for key, row in json.loads(Path(__file__).with_name("files.json").read_text()).items()}
CURVES_FILE = "digs3pts_1.mat"
CURVES_BYTES = 189_600_400  # no checksum of the original was ever published


def cache_folder() -> Path:
  """Where downloads are kept: XDG_CACHE_HOME/dpsgd_optax, or ~/.cache/dpsgd_optax."""
  return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dpsgd_optax"


def given_folder(data_dir: str | None) -> Path | None:
  """The folder the user named, by argument or by environment; None if there is none."""
  named = data_dir or os.environ.get("DPSGD_OPTAX_DATA")
  return Path(named).expanduser() if named else None


def download(key: str, path: Path, file: RemoteFile) -> None:
  """Fetch one file into the cache, under its final name only when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".part")
  try:
    with urllib.request.urlopen(file.url, timeout=60) as response, partial.open("wb") as out:
      while block := response.read(1 << 20):
        out.write(block)
  except (urllib.error.URLError, OSError) as error:
    raise DataError(
      f"{key} is not in the cache and could not be downloaded from {file.url} ({error}). "
      f"Fetch it by other means and pass `--data-dir DIR`, where DIR/{key} is the file."
    ) from error
  partial.replace(path)


def obtain(key: str, folder: Path | None) -> Path:
  """The path of a verified file: `folder/key` if a folder is given, else from the cache, downloaded if need be."""
  file, path = FILES[key], (folder or cache_folder()) / key
  if not path.exists() and folder is None:
    download(key, path, file)
  if not path.exists():
    raise DataError(
      f"{path} is missing: expected {file.size} bytes with {file.checksum}, found nothing. "
      f"Put {file.url} there, or leave out `--data-dir` to have it downloaded."
    )
  file.check(path, path.read_bytes())
  return path


def read_idx(path: Path) -> np.ndarray:
  """A gzipped IDX file of unsigned bytes: magic (its last byte is the rank), the sizes, the data; big-endian."""
  raw = gzip.decompress(path.read_bytes())
  rank = raw[3]
  shape = np.frombuffer(raw, ">i4", rank, offset=4)
  return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def images(dataset: str, data_dir: str | None) -> Arrays:
  """`mnist` or `fashion_mnist`: x (n, 28, 28, 1) in [0, 1], y (n,) in 0..9."""
  folder = given_folder(data_dir)

  def split(x: str, y: str) -> dict[str, np.ndarray]:
    pixels, labels = (read_idx(obtain(f"{dataset}/{name}", folder)) for name in (x, y))
    return {"x": pixels[..., None].astype(np.float32) / 255, "y": labels.astype(np.int32)}

  return Arrays(split(TRAIN_X, TRAIN_Y), split(TEST_X, TEST_Y), f"{dataset}: the original files")


def mapped(arrays: Arrays, f: Callable[[np.ndarray], np.ndarray], note: str = "") -> Arrays:
  """The same data with a function of x in the place of x."""
  train, test = (part | {"x": f(part["x"])} for part in (arrays.train, arrays.test))
  return Arrays(train, test, arrays.note + note)


def flat(arrays: Arrays) -> Arrays:
  """The same images as rows of pixels, without labels: the data of an autoencoder."""
  train, test, note = mapped(arrays, lambda x: x.reshape(len(x), -1))
  return Arrays({"x": train["x"]}, {"x": test["x"]}, note)


def square(arrays: Arrays) -> Arrays:
  """Rows of pixels as the square images they are, NHWC."""
  return mapped(arrays, lambda x: x.reshape(-1, *[math.isqrt(x.shape[1])] * 2, 1))


def curves(data_dir: str | None) -> Arrays:
  """CURVES: the original 20000 / 10000 x 784 images if the file is there, else drawn by `draw_curves`."""
  folder = given_folder(data_dir)
  places = [folder / CURVES_FILE, folder / "curves" / CURVES_FILE] if folder else []
  for path in filter(Path.exists, places):
    return original_curves(path)
  train, test = draw_curves(20_000, seed=1), draw_curves(10_000, seed=2)
  # `--resume` compares this text with that of earlier results, which name the file where it was then
  note = f"curves: GENERATED by benchmarks/curves.py, not the original {CURVES_FILE}; compare within this table only"
  return Arrays({"x": train}, {"x": test}, note)


def original_curves(path: Path) -> Arrays:
  """The arrays `bdata` and `bdatatest` of the Hessian-free and K-FAC papers."""
  from scipy.io import loadmat

  if (size := path.stat().st_size) != CURVES_BYTES:
    raise DataError(
      f"{path} has {size} bytes instead of {CURVES_BYTES}: it is truncated or not the original (no checksum is "
      "published). Fetch it again from https://www.cs.toronto.edu/~jmartens/digs3pts_1.mat, or remove it to use "
      "generated curves."
    )
  content = loadmat(path)
  train, test = (np.asarray(content[name], np.float32) for name in ("bdata", "bdatatest"))
  return Arrays({"x": train}, {"x": test}, f"curves: the original {CURVES_FILE}")


def digits() -> Arrays:
  """scikit-learn's 1797 real handwritten digits, 8 x 8 pixels in [0, 1]; every fifth one is for testing."""
  from sklearn.datasets import load_digits

  x, y = load_digits(return_X_y=True)
  x, y = (x / 16).astype(np.float32), y.astype(np.int32)
  held_out = np.arange(len(x)) % 5 == 4
  train, test = ({"x": x[rows], "y": y[rows]} for rows in (~held_out, held_out))
  return Arrays(train, test, "digits: scikit-learn's load_digits, every fifth sample held out")


def addition(samples: int = 50_000, length: int = 32, seed: int = 0) -> Arrays:
  """The addition task: channel 0 uniform in (-1, 1), channel 1 marks two distinct positions of the first half.

  The target is the mean of the two marked values. The last tenth of the samples is for testing.
  """
  rng = np.random.default_rng(seed)
  values = rng.uniform(-1, 1, (samples, length)).astype(np.float32)
  first = rng.integers(0, length // 2, samples)
  second = (first + rng.integers(1, length // 2, samples)) % (length // 2)  # never the same position
  marks, rows = np.zeros_like(values), np.arange(samples)
  marks[rows, first] = marks[rows, second] = 1
  x, y = np.stack([values, marks], -1), (values * marks).sum(-1, keepdims=True) / 2
  cut = samples * 9 // 10
  train, test = ({"x": x[part], "y": y[part]} for part in (slice(cut), slice(cut, None)))
  return Arrays(train, test, f"addition: {samples} generated sequences of length {length}")


def delayed_xor(length: int, samples: int = 1 << 17, seed: int = 0) -> Arrays:
  """Delayed XOR: channel 0 uniform in {-1, 1}, channel 1 marks two positions i < 0.1 length <= 0.5 length > j.

  i = floor(0.1 length u), j = floor(length (0.1 + 0.4 u')), u and u' uniform in [0, 1); y = 1 if the values there
  differ, else 0, also in the rare case i = j of a length that 10 does not divide. 131072 sequences stand for an endless
  stream: a network of a thousand parameters cannot learn a hundred thousand coin tosses by heart.
  """
  rng = np.random.default_rng([seed, length])
  total, rows = samples + samples // 32, np.arange(samples + samples // 32)
  values = rng.choice(np.array([-1, 1], np.float32), (total, length))
  first = (0.1 * length * rng.random(total)).astype(int)
  second = (length * (0.1 + 0.4 * rng.random(total))).astype(int)
  marks = np.zeros_like(values)
  marks[rows, first] = marks[rows, second] = 1
  x, y = np.stack([values, marks], -1), (values[rows, first] != values[rows, second]).astype(np.float32)
  train, test = ({"x": x[part], "y": y[part, None]} for part in (slice(samples), slice(samples, None)))
  return Arrays(train, test, f"xor: {samples} generated sequences of length {length}")


def quadratic_features(arrays: Arrays) -> Arrays:
  """x (n, d) -> all x_i and all x_i x_j, (n, d + d^2)."""
  products = lambda x: np.concatenate([x, (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)], 1)
  return mapped(arrays, products, "; all products of two pixels added")


def low_rank_tensor(rank: int = 10, shape: tuple[int, int, int] = (20, 50, 100), seed: int = 0) -> Arrays:
  """One sample: T = sum_r a_r (x) b_r (x) c_r, all entries of a, b, c normal."""
  rng = np.random.default_rng(seed)
  factors = (rng.normal(size=(rank, size)) for size in shape)
  sample = {"x": np.einsum("ri,rj,rk->ijk", *factors)[None].astype(np.float32)}
  return Arrays(sample, sample, f"tensor_decomposition: generated, of rank {rank} and shape {shape}")


def windows(tokens: np.ndarray, length: int, stride: int) -> dict[str, np.ndarray]:
  """x (n, length + 1): stretches of the text that begin every `stride` tokens; each is input and, shifted, target."""
  return {"x": np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::stride])}


def shakespeare(data_dir: str | None, length: int) -> tuple[Arrays, int]:
  """Tiny Shakespeare by characters, the first 90 % for training; and the size of the vocabulary (65)."""
  text = np.frombuffer(obtain(SHAKESPEARE, given_folder(data_dir)).read_bytes(), np.uint8)
  alphabet, tokens = np.unique(text, return_inverse=True)
  tokens, cut = tokens.astype(np.uint8), len(text) * 9 // 10
  train, test = windows(tokens[:cut], length, max(1, length // 8)), windows(tokens[cut:], length, length)
  return Arrays(train, test, f"tiny Shakespeare: windows of {length} characters, the last 10 % held out"), len(alphabet)


def ptb(data_dir: str | None, length: int) -> tuple[Arrays, int]:
  """Penn Treebank by words in the version of Mikolov, for those who hold the files; and the size of the vocabulary.

  The text is licensed: it is never downloaded. Test is the validation split.
  """
  folder = given_folder(data_dir) or cache_folder()
  train, test = (obtain(key, folder).read_text().replace("\n", " <eos> ").split() for key in (PTB_TRAIN, PTB_TEST))
  number = {word: i for i, word in enumerate(sorted(set(train)))}
  encode = lambda words: np.array([number[word] for word in words], np.int32)
  arrays = Arrays(windows(encode(train), length, length), windows(encode(test), length, length), "")
  return arrays._replace(note=f"Penn Treebank: windows of {length} words"), len(number)


def ill_conditioned(samples: int = 2_000, inputs: int = 30, outputs: int = 10, seed: int = 0) -> Arrays:
  """Linear regression without noise, y = x W, where the covariance of x has condition number 1e3."""
  rng = np.random.default_rng(seed)
  rotation = np.linalg.qr(rng.normal(size=(inputs, inputs)))[0]
  x = rng.normal(size=(samples, inputs)) * np.geomspace(1, 1e-3**0.5, inputs) @ rotation
  y = x @ rng.normal(size=(inputs, outputs))
  everywhere = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
  return Arrays(everywhere, everywhere, "quadratic: generated")


def nothing() -> Arrays:
  """One empty sample, for functions that need no data."""
  return Arrays({"x": np.zeros((1, 0), np.float32)}, {"x": np.zeros((1, 0), np.float32)}, "no data")
