"""Writing files whole or not at all, and finding the files that ship with samlora."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from samlora.errors import InputError, MissingFileError

_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EISDIR)


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    If the block raises, `path` keeps its former content and the temporary file is gone. The temporary
    name ends like `path`, so that writers which look at the ending (NIfTI, PNG) do the right thing.
    Raises InputError, naming `path`, where the place is to blame: a full or read-only disk, no permission, a folder
    that was moved or removed meanwhile.
    """
    path = Path(path)
    temporary = path.parent / f".part-{secrets.token_hex(4)}-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}); choose another folder") from None
    # The permissions any new file gets. Asking for the umask would set it, for all threads, for a moment.
    mode = os.fstat(handle).st_mode & 0o777
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(mode)  # safetensors puts a file of its own there, private to the user
        temporary.replace(path)
    except InputError:
        raise
    except Exception as error:
        reason = _refusal(error, temporary)
        if reason is None:
            raise
        raise InputError(f"{path}: cannot be written {reason}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _refusal(error: Exception, temporary: Path) -> str | None:
    """Why the place does not take the file, and what to do; None where the place is not to blame.

    torch, safetensors and ITK raise errors of their own on a full disk. safetensors quotes the system's; for the
    others the place is asked to take a little more.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        number = int(quoted[1]) if quoted else None
    if number is None:
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_APPEND), "wb") as file:
                file.write(bytes(2**16))
                file.flush()
                os.fsync(file.fileno())
        except OSError as refusal:
            number = refusal.errno
    if number in _PLACE:
        return f"({os.strerror(number)}); free some space or choose another place"
    if number == errno.ENOENT and not temporary.exists():  # else another file is missing, which is none of ours
        return f"({os.strerror(number)}); its folder was moved or removed: put it back or choose another place"
    return None


def identity(path: Path) -> list:
    """Name, number, size and time of change of a file, or of the files of a folder: differs when they do."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    changed = max((s.st_mtime_ns for s in stats), default=0)
    return [path.name, len(files), sum(s.st_size for s in stats), changed]


def shipped(folder: str) -> Path:
    """The directory of files that ship with samlora: "checkpoints", "configs" or "datasets".

    In a source tree they lie at the top level, in an installed wheel inside the package.
    """
    package = Path(__file__).resolve().parent
    source = {"datasets": "preprocess/datasets"}.get(folder, folder)
    for candidate in (package / folder, package.parent / source):
        if candidate.is_dir():
            return candidate
    raise MissingFileError(f"the folder {folder} that ships with samlora is missing; install samlora again")
