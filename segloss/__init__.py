"""Losses for weakly supervised segmentation: from tensors to a scalar."""

from segloss._checks import check_values
from segloss.size import (
    BalanceKL,
    FlatBarrier,
    LogBarrier,
    ReverseSizeKL,
    SizeBarrier,
    SizeKL,
    Suppression,
    average_prediction,
    balance_kl,
    class_balanced_weights,
    corrupt_sizes,
    flat_barrier,
    log_barrier,
    mean_relative_error,
    reverse_size_kl,
    size_barrier,
    size_kl,
    sizes_from_labels,
    suppression,
)
