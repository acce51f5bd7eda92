"""Elements of a row where a mask keeps them, else -inf: what every forward pass begins with."""

from functools import lru_cache

from . import jit
from .backend import count, gather_kept, gatherer, keeper, loader, select
from .elementary import arithmetic_of

INFINITY = float("inf")


@lru_cache
def masked_loader(storage, vectors, aligned, masked, early=False):
    """``loader``'s function for rows with a mask, or without one."""
    load = loader(storage, arithmetic_of(storage).compute, vectors, aligned, -INFINITY, early)
    kept_of = keeper(storage, vectors)

    @jit.device
    def load_masked(at, mask_at, mask_step, thread, team, n):
        """A thread's elements of the row of n at an address, and how many of them the mask keeps."""
        # the mask first: 64 registers instead of 74, and none spilled (softmax float32, four vectors)
        kept = at - at
        if masked:
            keep = kept_of(at, mask_at, mask_step, thread, team, n)
            kept = count(keep)
        v = load(at, at, thread, team, n)
        if masked:
            v = select(keep, v, -INFINITY)
        return v, kept

    return load_masked


@lru_cache
def masked_gatherer(storage, masked):
    """``gatherer``'s function for columns with a mask, or without one."""
    gather = gatherer(storage, arithmetic_of(storage).compute, -INFINITY)

    @jit.device
    def gather_masked(at, step, mask_at, mask_step, first, distance, n):
        """Elements of a column of n from its element ``first`` on, and how many of them the mask keeps."""
        kept = at - at
        if masked:
            keep = gather_kept(mask_at, mask_step, first, distance, n)
            kept = count(keep)
        v = gather(at, step, first, distance, n)
        if masked:
            v = select(keep, v, -INFINITY)
        return v, kept

    return gather_masked
