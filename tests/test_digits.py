"""Real input: scikit-learn's handwritten digits, learned with numbasoft and gradient descent alone."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import numbasoft

pytest.importorskip("sklearn", reason="scikit-learn is not installed, whose digits are learned here")
from sklearn.datasets import load_digits

CLASSES = 10


class Model:
    """Multinomial logistic regression: logits = images @ weights, with a column of ones for the bias."""

    def __init__(self, pixels):
        self.weights = np.zeros((pixels, CLASSES), np.float32)

    def logits(self, images):
        return images @ self.weights

    def train(self, images, digits, steps, rate=0.5, momentum=0.9):
        """Full-batch gradient descent with momentum on the mean cross-entropy; returns the losses."""
        one_hot = np.eye(CLASSES, dtype=np.float32)[digits]
        velocity, losses = np.zeros_like(self.weights), []
        for _ in range(steps):
            log_p = numbasoft.log_softmax(self.logits(images))
            losses.append(-float(np.sum(one_hot * log_p)) / len(images))
            gradient = images.T @ numbasoft.log_softmax_backward(-one_hot / np.float32(len(images)), log_p)
            velocity = np.float32(momentum) * velocity - np.float32(rate) * gradient
            self.weights += velocity
        return losses


@pytest.fixture(scope="module")
def split():
    """Training images and digits, held-out images and digits: 1300 and 497, drawn by a fixed seed."""
    pixels, digits = load_digits(return_X_y=True)
    images = np.column_stack([pixels / 16, np.ones(len(pixels))]).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1300], order[1300:]
    return images[train], digits[train], images[test], digits[test]


@pytest.fixture(scope="module")
def trained(split):
    images, digits, _, _ = split
    model = Model(images.shape[1])
    return model, model.train(images, digits, steps=200)


def test_at_least_95_percent_of_held_out_digits_are_right(split, trained):
    _, _, images, digits = split
    model, losses = trained
    assert model.weights.dtype == np.float32
    assert losses[0] == pytest.approx(np.log(CLASSES), rel=1e-6), "zero weights know nothing"
    assert losses[-1] < 0.1
    assert np.mean(model.logits(images).argmax(1) == digits) >= 0.95


def test_gradient_of_the_cross_entropy_is_probability_less_one_hot(split, trained):
    images, digits, _, _ = split
    logits = trained[0].logits(images).astype(np.float64)
    one_hot = np.eye(CLASSES)[digits]
    gradient = numbasoft.log_softmax_backward(-one_hot, numbasoft.log_softmax(logits))
    np.testing.assert_allclose(gradient, numbasoft.softmax(logits) - one_hot, atol=1e-14)


def test_softmax_backward_descends_to_the_same_loss(split, trained):
    """The same loss through softmax: its gradient with respect to p is -one_hot / p."""
    images, digits, _, _ = split
    logits = trained[0].logits(images).astype(np.float64)
    one_hot = np.eye(CLASSES)[digits]
    p = numbasoft.softmax(logits)
    gradient = numbasoft.softmax_backward(-one_hot / p, p)
    np.testing.assert_allclose(gradient, p - one_hot, atol=1e-12)


def test_the_command_line_on_the_logits_of_the_model(split, trained, tmp_path):
    _, _, images, digits = split
    logits = trained[0].logits(images)
    np.save(tmp_path / "logits.npy", logits)
    package = str(pathlib.Path(numbasoft.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, "-m", "numbasoft", "softmax", "logits.npy", "probs.npy"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True,
    )  # fmt: skip
    probs = np.load(tmp_path / "probs.npy")
    assert probs.dtype == np.float32
    np.testing.assert_array_equal(probs, numbasoft.softmax(logits))
    assert np.mean(probs.argmax(1) == digits) >= 0.95
