"""What benchmarks/students.py computes of its own."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import students


@pytest.mark.parametrize(
    "frequency, decibels", [(75, -48), (300, -6), (1000, 0), (3400, -6)]
)
def test_a_telephone_passes_its_band(frequency, decibels):
    """Butterworth: 3 dB less at each corner, 12 dB an octave, all twice."""
    times = torch.arange(students.SAMPLE_RATE) / students.SAMPLE_RATE
    wav = 0.5 * torch.sin(2 * math.pi * frequency * times)
    heard = students.over_telephone(wav)
    # Without the first half, in which the filters swing in.
    level = heard[8000:].square().mean() / wav[8000:].square().mean()
    assert 10 * math.log10(level) == pytest.approx(decibels, abs=0.3)


def test_right_captions_name_the_class_beside_them():
    """Words, and not parts of other ones."""
    captions = pd.Series(
        ["A dog barks", "Rain falls", "A train passes", "Dogs in the rain"]
    )
    labels = pd.Series(["dog", "dog", "rain", "rain"])
    right = students.is_right(captions, labels)
    np.testing.assert_array_equal(right, [True, False, False, True])


def test_gains_are_over_the_teacher_of_the_same_loop():
    """Means and deviations over loops, against figures worked out by hand."""
    accuracies = {"teacher": (0.5, 0.7), "longer": (0.6, 0.6)}
    accuracies |= dict.fromkeys(students.MODELS[1:], (0.6, 0.9))
    rows = [
        {"fold": fold, "seed": 0, "model": model, "accuracy": values[i]}
        for model, values in accuracies.items()
        for i, fold in enumerate((2, 3))
    ]
    table = students.summarize(pd.DataFrame(rows))
    assert list(table.index) == ["teacher", *students.MODELS]
    assert table.loc["ADS soft", "accuracy"] == pytest.approx(75)
    assert table.loc["ADS soft", "over teacher"] == pytest.approx(15)
    deviation = table.loc["ADS soft", "sd over teacher"]
    assert deviation == pytest.approx(math.sqrt(50))
    assert table.loc["ADS soft", "over longer"] == pytest.approx(15)
