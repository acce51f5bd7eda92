"""asv: how long cross-entropy, its gradient and token_log_probs take."""

import numba

import numbasoft

from .losses import FUNCTIONS, SHAPES, inputs, numbasoft_call


class Losses:
    """float32 on one thread, the gradient into a given output; the shapes of benchmarks.losses but the largest."""

    params = (list(FUNCTIONS), [f"{rows}x{n}" for rows, n in SHAPES if rows * n < 1 << 24])
    param_names = ("function", "shape")
    warmup_time = 0.1

    def setup(self, function, shape):
        if not hasattr(numbasoft, function):
            raise NotImplementedError(f"this commit has no {function}")
        numba.set_num_threads(1)
        self.call = numbasoft_call(function, *inputs(tuple(map(int, shape.split("x")))), 1)
        self.call()

    def time_loss(self, function, shape):
        self.call()
