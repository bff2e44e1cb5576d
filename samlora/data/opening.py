"""Opening image files: whatever a library raises on a broken file or a full disk becomes one line that names it."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from samlora.errors import InputError, MissingFileError
from samlora.files import whole

# Names of classes with memory addresses, objects of Python, places in the source code of a library.
_INTERNAL = (
    re.compile(r"Exception thrown in SimpleITK \w+:"),
    re.compile(r"\w*\(0x[0-9a-f]+\):?|0x[0-9a-f]{6,}"),
    re.compile(r"<[\w.]+ (object )?(name|at)\b[^<>]*>"),
    re.compile(r"\S*/\S+\.(cxx|hxx|cpp|h|c|py)\b(:\d+)?( \(\))?:?|\S+_build\S*/\S*"),
)


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns what a library raises while it reads `path` as a `kind` of file into an InputError.

    Raises MissingFileError if there is no such file.
    """
    if not path.exists():
        raise MissingFileError(f"{path}: no such file")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # zlib, zipfile, nibabel, ITK, Pillow, pydicom and h5py each have their own kinds
        raise InputError(f"{path}: cannot be read as {kind} ({_reason(error)})") from None


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path that becomes `path` if the block succeeds; library errors become an InputError."""
    try:
        with whole(path) as temporary:
            yield temporary
    except InputError:
        raise
    except (OSError, RuntimeError) as error:  # a full disk is not among these: `whole` has named it
        raise InputError(f"{path}: cannot be written ({_reason(error)}); choose another place or format") from None


def check_finite(array: np.ndarray, path: str | os.PathLike) -> None:
    """Raises InputError, naming `path`, if any value of `array` is NaN or infinite."""
    if array.dtype.kind == "f":
        count = array.size - int(np.isfinite(array).sum())
        if count:
            raise InputError(f"{path}: {count} of {array.size} values are NaN or infinite; replace them")


def _reason(error: Exception) -> str:
    """What a library says about a file, without what only its authors can use; cut after 200 characters."""
    text = " ".join(str(error).split()).split("ERROR: ")[-1]
    for pattern in _INTERNAL:
        text = pattern.sub("", text)
    text = " ".join(text.split()).strip(" :") or type(error).__name__
    return text if len(text) <= 200 else text[:200].rsplit(" ", 1)[0] + " ..."
