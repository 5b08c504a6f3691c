"""Losses and methods in users' surroundings: one file for each library, skipped where it is not installed."""

from parts import torchvision_cpu  # noqa: F401  (before torchvision, which many of these libraries import)
