"""Fitting the temperature."""

import pytest
import torch

from app.report import calibration_error
from training.calibrate import fit_temperature


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 2.5])
def test_the_temperature_behind_the_labels_is_found(true_temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NK = torch.randn(20_000, 10, generator=generator) * 3
    truth_NK = (logits_NK / true_temperature).softmax(dim=1)
    labels_N = truth_NK.multinomial(1, generator=generator)[:, 0]
    said_NK = logits_NK.softmax(dim=1)
    found = fit_temperature(said_NK, labels_N)
    assert found == pytest.approx(true_temperature, rel=0.05)
    after = calibration_error((logits_NK / found).softmax(dim=1), labels_N)
    assert after < 0.01
    if true_temperature != 1.0:
        assert calibration_error(said_NK, labels_N) > 3 * after
