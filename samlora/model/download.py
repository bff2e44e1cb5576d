"""Fetching Meta's base weights: with progress, resuming, verified."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from samlora.errors import InputError
from samlora.model.bases import BASES, verify

ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything/"
CHUNK = 1 << 20
META = ("vit_b", "vit_l", "vit_h")


def download(variant: str, folder: str | Path = "checkpoints", address: str | None = None) -> Path:
    """Fetches a variant's official file into `folder` and returns its path; a complete file is kept.

    A broken download is continued from `NAME.part` at the next call. The finished file must have the MD5
    its name promises. Raises InputError when the address cannot be reached, the disk is full, or the file
    is damaged (then the part is deleted).
    """
    from tqdm import tqdm

    if variant not in META:
        raise InputError(f"there is no public file for {variant!r}; allowed: {', '.join(META)}")
    name, address = BASES[variant].file, address or ADDRESS
    target, part = Path(folder) / name, Path(folder) / (name + ".part")
    if target.is_file():
        verify(target)
        return target
    total = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{target.parent}: cannot make this folder ({error.strerror}); choose another with -o"
        ) from None
    try:
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(address + name, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 206:  # the server sends the whole file
                done = 0
            total = done + int(answer.headers.get("Content-Length", 0))
            with (
                open(part, "ab" if done else "wb") as file,
                tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=name) as bar,
            ):
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is complete already
            raise InputError(
                f"{address + name}: the server answers {error.code} {error.reason}; try again later"
            ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise InputError(
            f"{address + name}: download stopped ({reason}); run the same command again to continue"
        ) from None
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    promised = name.rsplit("_", 1)[1].split(".")[0]
    if not digest.startswith(promised):
        size = part.stat().st_size
        if size < total:
            raise InputError(
                f"{part}: the connection broke at {size} of {total} bytes; run the same command again to continue"
            )
        part.unlink()
        raise InputError(
            f"{name}: the {size} bytes fetched have MD5 {digest[:6]}..., not {promised}...; "
            f"deleted, run the command again"
        )
    part.rename(target)
    return target
