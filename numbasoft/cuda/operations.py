"""What an operation is to those who launch it: its kernels, by regime."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Forward(NamedTuple):
    """Each kernel is a factory (see ops/*/cuda.py) that gives the function and its signature."""

    rows: Callable  # that fit into registers
    columns: Callable  # along another axis
    resident: Callable  # that fit into shared memory
    last: Callable  # the last step of a long row; those before are the same for all (split.py)
    others: bool  # whether the sum is that without the maxima
    reduced: bool  # whether there is one result a row


class Backward(NamedTuple):
    rows: Callable
    columns: Callable
    resident: Callable
    last: Callable
    product: bool  # whether the sum is over g * y, or over g


# What a target puts on the classes. CLASS: all on the class of each row; SMOOTHED: and the same on every class;
# SPREAD: and some on every class. PROBABILITIES: given for all classes; WEIGHTED: times weights, and some on
# every class.
CLASS, SMOOTHED, SPREAD = OF_CLASSES = "class", "smoothed", "spread"
PROBABILITIES, WEIGHTED = "probabilities", "weighted"

# Cells of memory: of a block's tally; of the numbers of a row for the gradient of its segments; and what of a
# segment is summed, by target: see the kernels.
TALLY, NUMBERS = 3, 11
REGIONS = {CLASS: 1, SMOOTHED: 2, SPREAD: 2, PROBABILITIES: 5, WEIGHTED: 5}


class ClassLoss(NamedTuple):
    """The kernels of a loss of logits over classes."""

    scales: Callable  # what a mean divides by
    class_weights: Callable
    rows: Callable  # that fit into registers
    columns: Callable  # along another axis
    segment_shares: Callable  # what a segment of a long row holds of the target
    combine: Callable  # the losses of long rows
    segments: Callable  # their gradients
    picked: Callable  # the losses of log-probabilities
    placed: Callable  # their gradients


NUMBER = "number"  # in place of the storage of a gradient: it is one number, which the host has


class Elementwise(NamedTuple):
    kernel: Callable  # no element needs another
    few: bool  # whether it needs so many registers that a thread does a single vector


class Sample(NamedTuple):
    draw: Callable  # one class per row
    relaxed: Callable  # softmax with noise
    hardened: Callable  # 1 at the largest of a row, 0 elsewhere


class Moments(NamedTuple):
    rows: Callable  # the slope and curvature of every row's loss in 1 / T


class Divergence(NamedTuple):
    rows: Callable  # that fit into registers, two at a time
    columns: Callable  # along another axis
    last: Any  # the last steps of long rows
