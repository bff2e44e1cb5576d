"""A place that takes no more, met for real: every library that writes has its own way of failing there."""

import errno
import os

import numpy as np
import pytest
import torch

from samlora.data.arrays import write_case, write_slice
from samlora.data.grid import Case, Volume
from samlora.data.volume import write_volume
from samlora.errors import InputError
from samlora.files import whole
from samlora.model.tensors import write_tensors

NOISE = np.random.default_rng(0).normal(size=(60, 80, 50)).astype(np.float32)


def write_state(path):
    with whole(path) as temporary:
        torch.save({"noise": torch.from_numpy(NOISE)}, temporary)


def write_text(path):
    with whole(path) as temporary:
        temporary.write_text("x" * NOISE.size)


WRITERS = {
    "state.pt": write_state,
    "adapter.safetensors": lambda path: write_tensors(path, {"noise": torch.from_numpy(NOISE)}),
    "case.npy.h5": lambda path: write_case(Case(NOISE, (NOISE > 0).astype(np.uint8)), path),
    "slice.npz": lambda path: write_slice(path, NOISE[0].repeat(9, 0), NOISE[0].repeat(9, 0) > 0),
    **{
        f"volume{ending}": lambda path: write_volume(Volume(NOISE, np.eye(4)), path)
        for ending in (".nii", ".nii.gz", ".nrrd", ".mha", ".npy")
    },
    **{
        f"picture{ending}": lambda path: write_volume(Volume((NOISE * 40 + 99).astype(np.uint8).reshape(600, 400, 1), np.eye(4)), path)
        for ending in (".png", ".tif", ".bmp")
    },
    "table.csv": write_text,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_place_is_named_and_the_former_file_stays(name, tmp_path, files_end_at):
    path = tmp_path / name
    path.write_bytes(b"former")
    with files_end_at(2**14), pytest.raises(InputError, match="cannot be written") as caught:
        WRITERS[name](path)
    line = str(caught.value)
    assert str(path) in line and os.strerror(errno.EFBIG) in line and "\n" not in line, line
    assert path.read_bytes() == b"former" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITERS)
def test_there_is_room_again(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert (tmp_path / name).stat().st_size > 2**14


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_moves_away_meanwhile_is_named(name, tmp_path, monkeypatch):
    path, close = tmp_path / "run" / name, os.close

    def close_and_move(handle):  # `whole` closes its file, and then whoever called it begins to write
        close(handle)
        if path.parent.exists():
            path.parent.rename(tmp_path / "elsewhere")

    monkeypatch.setattr("samlora.files.os.close", close_and_move)
    with pytest.raises(InputError, match="moved or removed") as caught:
        WRITERS[name](path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_permissions_are_those_of_any_new_file_and_nobodys_mask_is_touched(tmp_path):
    paths = {umask: tmp_path / f"{umask:o}.safetensors" for umask in (0o022, 0o077)}
    for umask, path in paths.items():
        before = os.umask(umask)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "umask", None)
                write_tensors(path, {"noise": torch.zeros(3)})
        finally:
            os.umask(before)
    assert {umask: path.stat().st_mode & 0o777 for umask, path in paths.items()} == {0o022: 0o644, 0o077: 0o600}


def test_what_is_not_the_places_fault_stays_what_it_is(tmp_path):
    for error in (RuntimeError("not of the place"), OSError(errno.EIO, os.strerror(errno.EIO)), KeyError("a"), FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "another")):
        with pytest.raises(type(error)), whole(tmp_path / "x.txt"):
            raise error
    assert not list(tmp_path.iterdir())
