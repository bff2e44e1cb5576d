"""Fetching base weights from their public addresses: with progress, resuming, verified."""

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from samlora.errors import InputError
from samlora.model.bases import ALIASES, BASES, by_hand, differs, find_base, verify

CHUNK = 1 << 20


def download(name: str, folder: str | Path = "checkpoints", address: str | None = None) -> Path:
    """Fetches the file of a base into `folder` and returns its path; a complete file is kept.

    A broken download is continued from `FILE.part` at the next call. The finished file must have
    the hash that was published for it, where one was.

    Args:
        name: a key of `bases.BASES`, or a variant, for its usual base. Of a base that a package
            carries, or that is part of samlora, the path is returned and nothing is fetched.
        folder: for the file.
        address: to fetch from, instead of the base's own.

    Raises:
        InputError: the name is unknown, the address cannot be reached, the disk is full, or the
            file is damaged (then the part is deleted).
        MissingFileError: the package that carries the file is not installed.
    """
    name = ALIASES.get(name, name)
    if name not in BASES:
        raise InputError(f"there is no base {name!r}; known: {', '.join(BASES)}")
    base = BASES[name]
    if not base.address:
        path = find_base(name)
        verify(path)
        return path
    target = Path(folder) / base.file
    if target.is_file():
        verify(target)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{target.parent}: cannot make this folder ({error.strerror}); choose another with -o"
        ) from None
    part = Path(f"{target}.part")
    total = _fetch(name, address or base.address, part)
    size = part.stat().st_size
    wrong = differs(part, base)
    if size < total:
        raise InputError(
            f"{part}: the connection broke at {size} of {total} bytes; run the same command again "
            f"to continue"
        )
    if not wrong and _is_page(part):
        wrong = "it is a web page"
    if wrong:
        part.unlink()
        raise InputError(
            f"{base.file}: the {size} bytes fetched are not the published file: {wrong}; deleted, "
            f"run the command again, {by_hand(name, folder)}"
        )
    part.rename(target)
    return target


def _fetch(name: str, address: str, part: Path) -> int:
    """Appends to `part` what it lacks; returns the size that the server promised, 0 if none."""
    from tqdm import tqdm

    total = 0
    try:
        done = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={done}-"} if done else {}
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 206:  # the server sends the complete file
                done = 0
            total = done + int(answer.headers.get("Content-Length", 0))
            with (
                open(part, "ab" if done else "wb") as file,
                tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=BASES[name].file) as bar,
            ):
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is complete already
            raise InputError(
                f"{address}: the server answers {error.code} {error.reason}; try again later, "
                f"{by_hand(name, part.parent)}"
            ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise InputError(
            f"{address}: download stopped ({reason}); run the same command again to continue, "
            f"{by_hand(name, part.parent)}"
        ) from None
    return total


def _is_page(path: Path) -> bool:
    """Whether a file is a web page, which servers send in place of files that moved."""
    with open(path, "rb") as file:
        return file.read(512).lstrip().startswith(b"<")
