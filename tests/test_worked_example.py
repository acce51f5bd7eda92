"""The worked example on real data: what its README table says is what happens."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def example():
    if not (ROOT / "benchmarks" / "digits.py").exists():
        pytest.skip("the example is in the repository, not in an installed package")
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import digits
    finally:
        sys.path.remove(str(ROOT))
    return digits


@pytest.fixture(scope="module")
def study(example):
    return example.study()


def test_temperature_and_smoothing_on_digits(study):
    (plain, cooled, smooth, sharpened) = study[0]
    assert all(row["accuracy"] > 0.9 for row in study[0])
    assert plain["last loss"] < 0.01
    # a network that has learned its few images by heart is too sure of itself, a smoothed one not sure enough
    assert plain["confidence"] > plain["accuracy"] and cooled["temperature"] > 1.3
    assert smooth["confidence"] < smooth["accuracy"] and sharpened["temperature"] < 0.8
    for before, after in ((plain, cooled), (smooth, sharpened)):
        assert after["loss"] < before["loss"]
        assert after["expected error"] < before["expected error"]
        assert after["accuracy"] == before["accuracy"]


def test_the_diagrams_are_drawn(example, study, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws the diagrams")
    path = example.draw(*study, tmp_path)
    assert path.stat().st_size > 10_000
    assert example.table(study[0]).count("\n") == 5
