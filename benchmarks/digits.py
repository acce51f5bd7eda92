"""A worked example: handwritten digits learned with numbasoft, and what its probabilities are worth.

``python -m benchmarks.digits [FOLDER]`` trains a small network on scikit-learn's digits with
``cross_entropy_value_and_grad``, with and without label smoothing, fits a temperature on held-out digits and
prints the calibration on others before and after; with a FOLDER it draws the reliability diagrams there.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np

import numbasoft

CLASSES, HIDDEN = 10, 64
TRAINING, HELD_OUT = 200, 600  # of 1797: few to learn from, so that being sure is easy and being right is not
STEPS, RATE, MOMENTUM = 500, 0.5, 0.9


def digits():
    """Images and digits to train on, to fit a temperature on, and to judge by, drawn by a fixed seed."""
    from sklearn.datasets import load_digits  # not there where asv imports this folder

    pixels, digits = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    return [(images[part], digits[part]) for part in np.split(order, [TRAINING, TRAINING + HELD_OUT])]


class Network:
    """64 pixels, 64 hidden units, 10 logits."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        shapes = (64, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)
        self.weights = [
            rng.normal(0, s[0] ** -0.5, s).astype("f4") if len(s) == 2 else np.zeros(s, "f4") for s in shapes
        ]

    def hidden(self, images):
        return np.tanh(images @ self.weights[0] + self.weights[1])

    def logits(self, images):
        return self.hidden(images) @ self.weights[2] + self.weights[3]

    def train(self, images, digits, label_smoothing):
        """Gradient descent with momentum on all images at once; the losses."""
        losses, velocity = [], [np.zeros_like(w) for w in self.weights]
        for _ in range(STEPS):
            h = self.hidden(images)
            logits = h @ self.weights[2] + self.weights[3]
            loss, grad = numbasoft.cross_entropy_value_and_grad(
                logits, digits, label_smoothing=label_smoothing, out=logits
            )
            losses.append(float(loss))
            inner = (grad @ self.weights[2].T) * (1 - h * h)
            gradients = images.T @ inner, inner.sum(0), h.T @ grad, grad.sum(0)
            for w, v, g in zip(self.weights, velocity, gradients, strict=True):
                v *= MOMENTUM
                v -= RATE * g
                w += v
        return losses


def judged(logits, digits, temperature):
    """What the probabilities at a temperature are worth."""
    p = numbasoft.softmax(logits, temperature=temperature)
    return {
        "temperature": temperature,
        "accuracy": float(np.mean(p.argmax(1) == digits)),
        "confidence": float(p.max(1).mean()),
        "loss": float(numbasoft.cross_entropy(logits, digits, temperature=temperature)),
        "expected error": numbasoft.calibration.calibration_error(p, digits),
        "classwise error": numbasoft.calibration.calibration_error(p, digits, norm="classwise"),
    }


def study():
    """Rows of a table, and the logits behind them: with and without smoothing, before and after a temperature."""
    training, held_out, judges = digits()
    rows, logits = [], {}
    for smoothing in (0.0, 0.1):
        network = Network()
        losses = network.train(*training, smoothing)
        scaler = numbasoft.calibration.TemperatureScaler().fit(network.logits(held_out[0]), held_out[1])
        logits[smoothing] = network.logits(judges[0])
        for t in (1.0, scaler.temperature_):
            rows.append(
                {"smoothing": smoothing, "last loss": losses[-1]} | judged(logits[smoothing], judges[1], t)
            )
    return rows, logits, judges[1]


def draw(rows, logits, digits, folder):
    """Reliability diagrams and histograms of all rows side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(rows), figsize=(3.4 * len(rows), 6), height_ratios=(3, 1), layout="constrained"
    )
    for row, (upper, lower) in zip(rows, axes.T, strict=True):
        p = numbasoft.softmax(logits[row["smoothing"]], temperature=row["temperature"])
        numbasoft.calibration.plot_reliability(p, digits, bins=10, ax=upper)
        numbasoft.calibration.plot_confidence(p, digits, bins=10, ax=lower)
        upper.set_title(
            f"smoothing {row['smoothing']}, T = {row['temperature']:.2f}: error {row['expected error']:.1%}",
            size=10,
        )
    path = Path(folder, "reliability.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def table(rows):
    lines = ["| label smoothing | T | accuracy | mean confidence | loss | expected error | classwise error |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        lines.append(
            f"| {r['smoothing']} | {r['temperature']:.3f} | {r['accuracy']:.1%} | {r['confidence']:.1%} | "
            f"{r['loss']:.4f} | {r['expected error']:.1%} | {r['classwise error']:.2%} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.digits", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, help="where to draw reliability.svg (needs matplotlib)"
    )
    chosen = parser.parse_args()
    for module, needed in ("sklearn", True), ("matplotlib", chosen.folder):
        if needed and importlib.util.find_spec(module) is None:
            parser.error(f"needs {module}, which is not installed: pip install '.[test,plot]'")
    if chosen.folder and chosen.folder.exists() and not chosen.folder.is_dir():
        parser.error(f"{chosen.folder} is not a folder")
    rows, logits, answers = study()
    print(table(rows))
    if chosen.folder:
        print(f"\ndrew {draw(rows, logits, answers, chosen.folder)}")


if __name__ == "__main__":
    main()
