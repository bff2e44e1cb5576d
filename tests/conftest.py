"""Fixtures that several test files use."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from samlora.data.grid import Volume
from samlora.data.volume import write_volume
from samlora.model import bases

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("SAMLORA_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "ct_abdomen").is_dir():
        pytest.skip(f"no real images: {folder} has no ct_abdomen; set SAMLORA_DATA to the folder that has")
    return folder


@pytest.fixture(scope="module")
def shared_path(tmp_path_factory):
    """A folder for what the tests of one file share; gone after the last, as bases and runs are large."""
    path = tmp_path_factory.mktemp("shared")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def without_lite_medsam(tmp_path, monkeypatch):
    """LiteMedSAM is neither in ./checkpoints nor in a package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bases, "_in_package", lambda *_: [])


@pytest.fixture
def files_end_at():
    """A context in which no file of this process grows beyond some bytes, as on a disk that is full by then."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def make_case(tmp_path):
    """Writes an image (HU, each voxel different) and a label as NIfTI below tmp_path; returns the folder."""

    def make(image: str, label: str | None, shape=(9, 8, 5), seed: int = 0, values=(0, 1, 2, 5)) -> Path:
        rng = np.random.default_rng(seed)
        affine = np.diag([-0.75, -0.75, 2.5, 1.0])
        affine[:3, 3] = 100, -20.5, 7
        hu = rng.permutation(np.prod(shape)).reshape(shape).astype(np.int16) * 2 - 300
        write_volume(Volume(hu, affine, 1, 1), tmp_path / image)
        if label is not None:
            write_volume(Volume(rng.choice(values, shape).astype(np.uint8), affine, 1, 1), tmp_path / label)
        return tmp_path

    return make


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; tests that need it are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("no browser: none of chromium, chromium-browser, google-chrome is installed")
    switches = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    switches += " --disable-background-networking --disable-component-update --disable-dev-shm-usage"
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=switches.split())
        yield chromium
        chromium.close()
