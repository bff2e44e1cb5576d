"""Writing files whole or not at all, reading text that people edit, and finding files by their names."""

import codecs
import contextlib
import errno
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from samlora.errors import InputError, MissingFileError

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x19\x1b-\x1f]")  # none of these stands in a text
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


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new folder beside `path`; on success it takes the place of `path`, and of the folder there.

    If the block raises, `path` keeps its former content and the new folder is gone.
    Raises InputError, naming `path`, where the place is to blame, as `whole` does.
    """
    path = Path(path)
    temporary = path.parent / f".part-{secrets.token_hex(4)}-{path.name}"
    former = temporary.with_name(f"{temporary.name}-former")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}); choose another folder") from None
    try:
        yield temporary
        if path.exists():
            path.rename(former)
        temporary.rename(path)
    except InputError as error:  # of a file in it
        raise InputError(str(error).replace(str(temporary), str(path))) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    finally:
        if former.exists() and not path.exists():
            former.rename(path)
        for left in (temporary, former):
            shutil.rmtree(left, ignore_errors=True)


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


def read_text(path: str | os.PathLike) -> str:
    """The text of a file that people may have edited, with "\\n" at the ends of its lines.

    UTF-8, UTF-16 and UTF-32, with or without a byte order mark; what is none of these is read as Windows' western
    code page. Raises MissingFileError or InputError: no such file, a folder, not readable, or no text at all.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
    for codec in _codecs(content):
        try:
            text = content.decode(codec)
        except UnicodeDecodeError:
            continue
        if not _CONTROL.search(text):
            return text.replace("\r\n", "\n").replace("\r", "\n")
    raise InputError(f"{path}: is no text; save it as UTF-8")


def foreign_content(path: str | os.PathLike) -> str | None:
    """What a file is that holds nothing but a note about the file that was wanted, and what to do; None for others.

    The end of a message that begins with the path. Empty files, pointers of Git LFS and git-annex, pages and messages
    of web servers, and downloads of which only the place on the disk was made.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(2048)
    except OSError:
        return None  # whoever reads it says what is wrong
    if not head:
        return "is empty; copy or download it again"
    if not any(head):
        only_zeros = len(head) == 2048 or len(head) == os.path.getsize(path)
        return "begins with zeros only, as an interrupted download does; download it again" if only_zeros else None
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:512].lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch the file with: git lfs pull"
    if b"annex/objects/" in start and b"\0" not in head:
        return "is a git-annex pointer, not the file itself; fetch the file with: git annex get"
    if re.match(rb"<(!doctype html|html|head|body|!--)", start) or (start.startswith(b"<?xml") and b"<html" in start):
        return "is a web page, not the file itself; download the file again, in a browser if that needs a login"
    if re.match(rb"(<\?xml[^>]*>\s*)?<error>", start) or re.match(rb'\{\s*"(error|message|detail)', start):
        return "is the message of a web server, not the file itself; download the file again"
    return None


def _codecs(content: bytes) -> tuple[str, ...]:
    """The encodings that a text may have, the likeliest first."""
    # The mark of UTF-32 begins like that of UTF-16.
    for mark, codec in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")):
        if content.startswith(mark):
            return (codec,)
    for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if content.startswith(mark):
            return ("utf-16",)
    if b"\0" in content:  # western letters in UTF-16 have a zero as their high byte
        even, odd = content[0::2].count(0), content[1::2].count(0)
        if max(even, odd) < 0.7 * (len(content) // 2):
            return ()
        return ("utf-16-le",) if odd > even else ("utf-16-be",)
    return ("utf-8-sig", "cp1252", "latin-1")


def as_path(path: str | os.PathLike) -> Path:
    """`path` as a Path. Raises InputError for what is none, such as an array or None."""
    try:
        return Path(path)
    except TypeError:
        kind = "None" if path is None else f"something of type {type(path).__name__}"
        raise InputError(f"the path of a file or folder is needed, not {kind}") from None


def same_name(name: str) -> str:
    """A name in the form in which names are compared: Unicode NFC, as some systems store names decomposed."""
    return unicodedata.normalize("NFC", name)


def find_file(path: str | os.PathLike) -> Path:
    """The file or folder at `path`, also where its name is written otherwise: another Unicode form, or upper case.

    `path` itself where there is none, or several that differ in upper and lower case only.
    """
    path = as_path(path)
    if path.exists() or path.parent == path:
        return path
    folder = find_file(path.parent)
    if not folder.is_dir():
        return path
    beside = [entry for entry in folder.iterdir() if not entry.name.startswith(".part-")]
    for form in (same_name, lambda name: same_name(name).casefold()):
        found = [entry for entry in beside if form(entry.name) == form(path.name)]
        if len(found) == 1:
            return found[0]
    return path


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
