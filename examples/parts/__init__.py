"""What the examples share: networks, classifiers, supervisions, tables and pictures."""

from parts import torchvision_cpu  # noqa: F401  (before torchvision, for all modules of this package)
