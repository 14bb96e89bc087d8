"""What utilisation is relative to."""

from types import SimpleNamespace

import pytest
import torch

from rigpt_hf.training import diagnostics


def test_peak_is_that_of_the_fastest_product(monkeypatch):
    # Kernels are compiled in the first product, and somebody else has the machine in the last.
    seconds = [9.0, 0.5, 0.25, 4.0]
    clock = iter([reading for index, each in enumerate(seconds) for reading in (100.0 * index, 100.0 * index + each)])
    monkeypatch.setattr(diagnostics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(diagnostics, "PEAK_SIZES", {"cpu": 8})
    monkeypatch.setattr(diagnostics, "PEAK_PRODUCTS", len(seconds))
    peak = diagnostics.peak_flops(torch.device("cpu"), torch.float32)
    assert peak == pytest.approx(2 * 8**3 / 0.25)
    assert next(clock, None) is None


def test_peak_takes_as_long_as_it_says():
    assert diagnostics.PEAK_PRODUCTS >= 2 and diagnostics.PEAK_SECONDS > 0
    assert diagnostics.peak_flops(torch.device("cpu"), torch.float32) > 1e8
