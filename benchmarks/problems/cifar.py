# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 in its binary version: 10000 records a file, a byte of label and 3072 of red, green and blue, row by row.

From a folder (cifar10/cifar-10-batches-bin/data_batch_1.bin, or the same compressed, .bin.xz), or from the archive at
its canonical address, unpacked into the cache. Each file is checked against the checksum of the published one.
"""

import lzma
import tarfile
from pathlib import Path

import numpy as np

from benchmarks.problems.data import Arrays, DataError, RemoteFile, cache_folder, download, given_folder

ARCHIVE = RemoteFile(
  "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
  170052171,
  "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
ARCHIVE_KEY, FOLDER, SIZE = "cifar10/cifar-10-binary.tar.gz", "cifar10/cifar-10-batches-bin", 30_730_000
SHA256 = {
  "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
  "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
  "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
  "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
  "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
  "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
CLASSES = 10


def unpacked() -> Path:
  """The cache, with the files of the archive in it."""
  cache = cache_folder()
  if not all((cache / FOLDER / name).exists() for name in SHA256):
    path = cache / ARCHIVE_KEY
    if not path.exists():
      download(ARCHIVE_KEY, path, ARCHIVE)
    ARCHIVE.check(path, path.read_bytes())
    with tarfile.open(path) as archive:
      archive.extractall(cache / "cifar10", filter="data")
    path.unlink()
  return cache


def content(name: str, folder: Path) -> bytes:
  """The verified bytes of one file."""
  plain = folder / FOLDER / name
  packed = plain.with_name(f"{name}.xz")
  if not plain.exists() and not packed.exists():
    raise DataError(
      f"{plain} is missing, and so is {packed.name}: expected {SIZE} bytes (unpacked) with SHA-256 {SHA256[name]}, "
      f"found nothing. Unpack {ARCHIVE.url} in {folder / 'cifar10'}, or leave out `--data-dir` to have it downloaded."
    )
  file = RemoteFile(ARCHIVE.url, SIZE, SHA256[name])
  if plain.exists():
    return file.check(plain, plain.read_bytes())
  return file.check(packed, lzma.decompress(packed.read_bytes()))


def decoded(raw: bytes) -> dict[str, np.ndarray]:
  """x (n, 32, 32, 3) and y (n,)."""
  records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
  pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return {"x": np.ascontiguousarray(pixels), "y": records[:, 0].astype(np.int32)}


def cifar10(data_dir: str | None, batches: int = 5) -> Arrays:
  """x uint8 (n, 32, 32, 3), y in 0..9; the first `batches` of the five training files."""
  folder = given_folder(data_dir) or unpacked()
  parts = [decoded(content(f"data_batch_{i + 1}.bin", folder)) for i in range(batches)]
  train = {name: np.concatenate([part[name] for part in parts]) for name in ("x", "y")}
  return Arrays(train, decoded(content("test_batch.bin", folder)), f"cifar10: {batches} of 5 original training files")
