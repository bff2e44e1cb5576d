"""Image files that name other files, which would be read in their place or beside them."""

import re
from pathlib import Path

from samlora.errors import InputError

_HEADERS = (".nrrd", ".nhdr", ".mha", ".mhd")
_MOST_HEADER = 1 << 16  # bytes
# Wherever they stand: readers differ in what they take for the begin of a line. "= or :": both separate in MetaImage.
_NRRD_DATA = re.compile(rb"data ?file\s*:=?[ \t]*([^\r\n]*)", re.I)
_META_DATA = re.compile(rb"ElementDataFile\s*[=:][ \t]*([^\r\n]*)", re.I)
# What readers take for several files, whether or not one is called so: LIST and what follows, after which lines name
# the files; a pattern, with the numbers to put into it behind.
_SEVERAL = re.compile(r"^LIST|%|\s-?\d+\s+-?\d+$", re.I)


def check_references(path: Path, root: Path) -> None:
    """Raises InputError if reading the image `path` would read a file that does not lie below `root`.

    Headers of NRRD and MetaImage may name the file of their voxels, by any path; lists and patterns of files are
    refused altogether. HDF5 may link to other files, or keep voxels in them.
    """
    name = path.name.lower()
    if name.endswith(_HEADERS):
        for found in _data_files(path):
            if _SEVERAL.search(found):
                raise InputError(f"{path.name}: its voxels are in several files, {found[:80]!r}; give one file")
            if not _is_file_below(root, path.parent / found):
                raise InputError(
                    f"{path.name}: its voxels are in {found[:80]!r}, which is not beside it; give one file"
                )
    elif name.endswith(".h5"):
        _check_h5(path)


def _is_file_below(root: Path, path: Path) -> bool:
    try:
        target = path.resolve()
        return target.is_relative_to(root) and target.is_file()
    except (OSError, ValueError):  # no file can have such a name, be it for a NUL or its length
        return False


def _data_files(path: Path) -> list[str]:
    """The files that a header names; none where the voxels follow in the file itself."""
    with open(path, "rb") as file:
        head = file.read(_MOST_HEADER)
    if path.name.lower().endswith((".mha", ".mhd")):
        found = _META_DATA.findall(head)
        whole = bool(found)
    else:
        found = _NRRD_DATA.findall(head)
        whole = len(head) < _MOST_HEADER or b"\n\n" in head or b"\r\n\r\n" in head
    if not whole:
        raise InputError(f"{path.name}: no end of its header within {_MOST_HEADER >> 10} KB; save it again")
    return [name for value in found if (name := value.decode("latin-1").strip()).upper() != "LOCAL"]


def _check_h5(path: Path) -> None:
    import h5py

    elsewhere: list[str] = []  # h5py does not pass on what is raised in a visit

    def look_at_link(name: str, link: object) -> None:
        if isinstance(link, h5py.ExternalLink):
            elsewhere.append(name)

    def look_at(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
            elsewhere.append(name)

    try:
        with h5py.File(path, "r") as file:
            file.visititems_links(look_at_link)
            file.visititems(look_at)
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read as HDF5 ({str(error).splitlines()[0][:80]})") from None
    if elsewhere:
        raise InputError(f"{path.name}: the values of {elsewhere[0]} are in another file; copy them into this one")
