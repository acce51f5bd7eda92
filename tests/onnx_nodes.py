"""ONNX's node tests: models of one operator with inputs and outputs, which the package onnx generates."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np


@cache
def cases(*operators: str) -> list[Any]:
    """The tests of models that are one node, of one of the operators; none where onnx is not installed.

    All are loaded at once: onnx keeps what it has generated for one operator only from all others.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from onnx.backend.test.loader import load_model_tests

            before = np.random.get_state()  # noqa: NPY002, onnx draws its inputs from this generator
            np.random.seed(0)  # noqa: NPY002
            with np.errstate(all="ignore"):
                loaded = load_model_tests(kind="node")
            np.random.set_state(before)  # noqa: NPY002
    except ImportError:
        return []
    return [
        case
        for case in loaded
        if [node.op_type for node in case.model.graph.node] in [[o] for o in operators]
    ]
