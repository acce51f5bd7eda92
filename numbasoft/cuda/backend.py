"""The intrinsics that kernels are written with: those of the GPU, or the simulator's."""

from .jit import SIMULATED

if SIMULATED:
    from .simulated import *  # noqa: F403
else:
    from .intrinsics import *  # noqa: F403
