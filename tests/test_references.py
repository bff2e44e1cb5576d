"""Headers that lead readers to other files are refused, whatever lies beside them under the names they give."""

import os

import numpy as np
import pytest
import SimpleITK

from samlora.app.references import check_references
from samlora.errors import InputError

NRRD = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 1\nencoding: raw\ndata file: {}\n"
META = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 1\nElementType = MET_UCHAR\nElementDataFile = {}\n"
HEADERS = {"nhdr": NRRD, "nrrd": NRRD, "mhd": META, "mha": META}


@pytest.fixture
def root(tmp_path):
    """The folder that may be read; the secret lies outside."""
    (tmp_path / "secret.raw").write_bytes(bytes(range(16)))
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def write(root, ending, named):
    path = root / f"a.{ending}"
    path.write_text(HEADERS[ending].format(named))
    return path


def stolen(path) -> bool:
    """Whether ITK reads the secret through this header."""
    try:
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).ravel().tolist() == list(range(16))
    except RuntimeError:
        return False


@pytest.mark.parametrize("ending", HEADERS)
@pytest.mark.parametrize("word", ["LIST", "list", "LIST 2", "LIST.raw", "List3D"])
def test_lists_beside_a_file_of_that_name(root, ending, word):
    (root / word).write_bytes(bytes(16))
    path = write(root, ending, f"{word}\n{root.parent / 'secret.raw'}")
    assert stolen(path) or word not in ("LIST", "LIST 2"), "the attack is one"
    with pytest.raises(InputError, match="voxels are in several files") as error:
        check_references(path, root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", HEADERS)
@pytest.mark.parametrize("pattern", ["p%d.raw 1 1 1", "p%01d.raw 1 1 1", "p%d.raw", "p%1d.raw\t1\t1\t1", "p.raw 1 1 1"])
def test_patterns_beside_a_file_of_that_name(root, ending, pattern):
    (root / pattern).write_bytes(bytes(16))
    os.symlink(root.parent / "secret.raw", root / "p1.raw")
    path = write(root, ending, pattern)
    assert stolen(path) or not pattern.endswith("d.raw 1 1 1"), "the attack is one"
    with pytest.raises(InputError, match="voxels are in several files"):
        check_references(path, root)


@pytest.mark.parametrize("ending", HEADERS)
@pytest.mark.parametrize("name", ["../secret.raw", "../secret.raw\0", "x" * 5000], ids=["above", "NUL", "long"])
def test_names_of_no_file_beside(root, ending, name):
    with pytest.raises(InputError, match="not beside it") as error:
        check_references(write(root, ending, name), root)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("ending", HEADERS)
@pytest.mark.parametrize("name", ["voxels.raw", "my scan 2.raw", "scan 1 2 3.raw", "a list.raw"])
def test_one_file_beside_its_header_may_be_read(root, ending, name):
    (root / name).write_bytes(bytes(16))
    check_references(write(root, ending, name), root)


def test_files_that_hold_their_voxels_may_be_read(root):
    image = SimpleITK.GetImageFromArray(np.zeros((3, 4, 5), np.uint8))
    for ending in ("nrrd", "mha"):
        SimpleITK.WriteImage(image, str(root / f"whole.{ending}"))
        check_references(root / f"whole.{ending}", root)
