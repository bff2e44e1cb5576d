"""What can be opened: the images below one folder, and files that are handed in; nothing else on the disk."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from samlora.app.image import Image
from samlora.app.references import check_references
from samlora.data.dicom import choose, list_series
from samlora.data.folders import Pair, is_dicom_folder
from samlora.data.sources import find_images, read_image
from samlora.data.volume import VOLUMES
from samlora.errors import InputError, MissingFileError

_MOST_FILES = 5000  # of one upload: slices of a DICOM series


class Library:
    """The images of one file or folder; None: none. They are opened by the names that `names` lists, never by a path.

    What lies elsewhere and is only linked to is left out: a folder of images may come from others.
    Raises MissingFileError or InputError where there is nothing to open.
    """

    def __init__(self, path: Path | None):
        self.root = None if path is None else path.resolve()
        self._pairs: dict[str, Pair] = {}
        if path is not None and not path.exists():
            raise MissingFileError(f"{path}: no such file or folder; give an image, or a folder of images")
        if path is not None and not self.names:
            raise InputError(f"{path}: its images lie elsewhere and are only linked to; give the folder they lie in")

    @property
    def names(self) -> list[str]:
        """The names of the images, looked up anew."""
        found = [] if self.root is None else find_images(self.root)
        self._pairs = {pair.name: pair for pair in found if self._within(pair)}
        return list(self._pairs)

    def open(self, name: str, series: str | None = None) -> Image:
        """The image of that name. Raises InputError if there is none, or as `read_volume` does."""
        return _read(self._pair(name), self._below, series)

    def series(self, name: str) -> list[str]:
        """The series that the image of that name may be, in order; empty unless it is a DICOM folder."""
        return _series(self._pair(name).images[0])

    def _pair(self, name: str) -> Pair:
        pair = self._pairs.get(name)
        if pair is None or not self._within(pair):  # looked at once more: a link may have taken its place
            raise InputError(f"{name[:80]!r}: no image of that name in the opened folder; choose one from the list")
        return pair

    @property
    def _below(self) -> Path:
        return self.root if self.root.is_dir() else self.root.parent

    def _within(self, pair: Pair) -> bool:
        return all(_inside(path, self._below) for path in pair.images)


def _inside(path: Path, root: Path) -> bool:
    """Whether a file, or a folder and all files in it, lies below `root` when links are followed."""
    files: Iterator[Path] = path.iterdir() if path.is_dir() else iter(())
    return all(one.resolve().is_relative_to(root) for one in (path, *files))


def _series(path: Path) -> list[str]:
    return [str(series) for series in list_series(path)] if path.is_dir() else []


def _read(pair: Pair, below: Path, series: str | None) -> Image:
    """The image of a pair, of which no file lies elsewhere than in `below`. Raises what `read_image` raises."""
    for path in pair.images:
        check_references(path, below)
    volume = read_image(pair, series)
    source = pair.images[0] if len(pair.images) == 1 else None
    return Image(volume, pair.name, source, series, _modality(source, series))


def _modality(source: Path | None, series: str | None) -> str:
    """The modality that a DICOM source states, "" for other files."""
    if source is None or not (source.is_dir() or source.suffix.lower() == ".dcm"):
        return ""
    return choose(source, series)[0].modality


class Upload:
    """Files that are handed in one after the other, kept in a folder of their own until `close`.

    most: bytes of all of them together.
    """

    def __init__(self, most: int):
        self._folder = Path(tempfile.mkdtemp(prefix="samlora-app-"))
        self._left = most
        self._most = most

    def path(self, name: str) -> Path:
        """Where a file of that name is to be written. Raises InputError for what is no plain file name."""
        plain = Path(name.replace("\\", "/")).name
        if not plain or plain != name or plain.startswith(".") or len(plain) > 200 or not plain.isprintable():
            raise InputError(f"{name[:80]!r}: is no plain file name; rename the file")
        if sum(1 for _ in self._folder.iterdir()) >= _MOST_FILES:
            raise InputError(f"more than {_MOST_FILES} files at once; open the folder with: samlora app FOLDER")
        return self._folder / plain

    def take(self, count: int) -> None:
        """Counts bytes that arrive. Raises InputError when they are more than may come."""
        self._left -= count
        self.check(0)

    def check(self, count: int) -> None:
        """Raises InputError if `count` bytes more would be too many."""
        if count > self._left:
            limit = f"{self._most / 2**20:g}"
            raise TooLargeError(f"upload larger than {limit} MB; open it with: samlora app FILE, or --max_upload_mb")

    def series(self) -> list[str]:
        """The series that the files are, in order; empty unless they are DICOM."""
        return _series(self._folder) if is_dicom_folder(self._folder) else []

    def open(self, series: str | None = None) -> Image:
        """The image that the files are: one file, or the slices of a series. Raises InputError otherwise."""
        files = sorted(self._folder.iterdir())
        if not files:
            raise InputError("no file has arrived; choose files once more")
        if len(files) == 1 and files[0].name.lower().endswith(VOLUMES):
            pair = Pair(files[0].name.split(".")[0] or files[0].name, (files[0],), None)
        elif is_dicom_folder(self._folder):
            pair = Pair("DICOM series", (self._folder,), None)
        else:
            raise InputError(
                f"{files[0].name}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: choose one image "
                f"({' '.join(VOLUMES[:3])} ...), or all slices of one DICOM series"
            )
        return _read(pair, self._folder.resolve(), series)

    def close(self) -> None:
        """Removes the files."""
        shutil.rmtree(self._folder, ignore_errors=True)


class TooLargeError(InputError):
    """More bytes than may be handed in."""
