# SPDX-License-Identifier: Apache-2.0
"""Problems of images, with what can be done to the data on purpose as options.

noise      share of the training labels that are wrong
imbalance  share that is left of the training samples of every second class
blur       epochs in which the network sees blurred images only; then clear ones
"""

from benchmarks.engine.calls import choice
from benchmarks.engine.problem import Problem
from benchmarks.problems import cifar, data
from benchmarks.problems.models import LeNet5
from benchmarks.problems.resnet import NORMS, SIZES, ResNet
from benchmarks.problems.spoilers import spoiled
from benchmarks.problems.supervised import classifier


def lenet(
  dataset: str, data_dir: str | None, folded: bool, noise: float = 0.0, imbalance: float = 1.0, blur: int = 0
) -> Problem:
  """LeNet-5 on `mnist` or `fashion_mnist`; options: wrong labels, few samples of some classes, blurred beginnings."""
  arrays = spoiled(data.images(dataset, data_dir), noise, imbalance, blur)
  return classifier(LeNet5(folded), arrays, batch_size=64, epochs=20, evaluations=40, default_seeds=3, deficit=blur)


def cifar10(
  data_dir: str | None,
  folded: bool,
  model: str = "resnet8",
  norm: str = "batch",
  shortcuts: bool = True,
  noise: float = 0.0,
  imbalance: float = 1.0,
  blur: int = 0,
  batches: int = 5,
) -> Problem:
  """`resnet8` or `resnet18` on CIFAR-10 without augmentation; norm `batch`, `group`, `weight` or `none`.

  `batches`: how many of the five training files are read. The biases are never folded.
  """
  widths, blocks = choice(model, "model", SIZES)
  choice(norm, "norm", NORMS)
  arrays = spoiled(cifar.cifar10(data_dir, batches), noise, imbalance, blur)
  options = dict(batch_size=128, epochs=20, evaluations=40, default_seeds=3, deficit=blur)
  return classifier(ResNet(widths, blocks, norm, shortcuts), arrays, statistics=norm == "batch", **options)
