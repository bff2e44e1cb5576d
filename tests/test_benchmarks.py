"""The benchmarks' own assertions of equality, on small shapes; times are measured there, not here."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ("encoder", "loading", "metrics", "plain", "report", "step", "timing")


@pytest.fixture
def script(monkeypatch):
    """Imports a script as it imports its neighbours; nothing of it stays in sys.modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def one_thread():
    """Operations this small wait for a second thread longer than they work; loading.py sets one by itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_encoder(script):
    result = script("encoder").measure("vit_ti", 64, 2, 1, torch.device("cpu"))
    assert result["equality"]["relative_error_bf16"] < 0.05
    assert result["seconds"].keys() == {"stock fp32", "samlora fp32", "samlora bf16"}
    assert "stock fp32" not in result["times_as_fast_as_stock_fp32"]


def test_step(script):
    result = script("step").measure("vit_ti", 64, 2, 1, torch.device("cpu"))
    losses = result["losses_of_two_steps"]
    assert losses["samlora bf16"] == pytest.approx(losses["stock fp32"], abs=1e-2)
    assert losses["stock fp32"][0] != losses["stock fp32"][1]  # the step does step


def test_loading(script, tmp_path):
    script("loading").main(
        ["--sources", "20", "32", "--size", "32", "--count", "9", "--batch", "4", "--repeats", "1", "--output", str(tmp_path / "loading.json")]
    )
    record = json.loads((tmp_path / "loading.json").read_text())
    assert record["stored_side"].keys() == {"20", "32"} and record["config"]["threads"] == 1


def test_metrics(script):
    metrics = script("metrics")
    prediction, reference = np.zeros((2, 6, 6, 6), bool)
    prediction[1:4, 2:4, 2:5], reference[2:5, 2:4, 1:5] = True, True
    result = metrics.compare(
        lambda p, r: metrics.surface_distances(p, r, metrics.SPACING).hd95(),
        lambda p, r: metrics.binary.hd95(p, r, metrics.SPACING),
        (prediction, reference), 2, 1,
    )  # fmt: skip
    assert result["samlora"]["repeats"] == 2 and result["medpy"]["repeats"] == 1


def test_the_page_shows_what_was_recorded(script):
    report = script("report")
    assert (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text() == report.page(BENCHMARKS / "results")
    assert "not measured; run `python benchmarks/step.py`" in report.page(Path("nowhere"))
