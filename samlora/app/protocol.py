"""What nnInteractive's client and server say to each other: arrays in bodies, JSON in a header, what a server can do.

After the official client, nninteractive-client 2 (Apache-2.0): its modules `serialization` and `_protocol`. The reader
here trusts nothing that arrives: sizes are looked at before memory is taken.
"""

import json
import math
import struct
from typing import Any

import numpy as np

from samlora.app.library import TooLargeError
from samlora.errors import InputError

META = "X-Meta"  # JSON beside an array
LEASE = "X-Lease-Token"  # whose session it is
BINARY = "application/octet-stream"

_MAGIC, _VERSION = b"NNIA", 1
_HEAD = struct.Struct("<4sBBBB")  # magic, version, codec, number of axes, length of the type's name
_CHUNK = struct.Struct("<QQ")  # bytes before and after compression
_ZSTD = 1
_MOST_AXES = 4
_TYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_FLOATS = ("float16", "float32", "float64")
_CODECS = (0, 1, 3, 4)  # blosclz, lz4, zlib, zstd
_LAST_FILTER = 2  # none, shuffle, bitshuffle
_CHUNK_BYTES = 1 << 30  # blosc2 takes less than 2 GiB at once

# Points of a stroke and boxes in one slice are what SAM was made for; strokes and outlines are turned into them.
CAPABILITIES = {
    "supported_interactions": {"points": True, "bbox2d": True, "bbox3d": True, "scribble": True, "lasso": True},
    # Where nnInteractive's network takes its prompts. There is no such network here; clients want the keys.
    "channel_mapping": {},
    "num_interaction_channels": 0,
    "interaction_decay": None,
    "supports_initial_label": True,
    "supports_zero_shot_label_refinement": False,
    "preferred_scribble_thickness": [2, 2, 2],
    "patch_size": None,
    "do_autozoom": True,
    "supports_undo": True,
    "inference_session_version": "samlora",
    "license": None,  # shown as unknown: it is that of the base and of the adapter, which files do not say
}


def unpack(body: bytes, most: int) -> np.ndarray:
    """The array of a body: numbers or bool, up to four axes. most: bytes that it may take unpacked.

    Raises TooLargeError beyond that, InputError for what is no such body.
    """
    import blosc2

    try:
        magic, version, _, axes, length = _HEAD.unpack_from(body, 0)
        at = _HEAD.size + length
        name = body[_HEAD.size : at].decode("ascii")
        shape = struct.unpack_from(f"<{axes}q", body, at) if axes <= _MOST_AXES else ()
        at += 8 * axes
        (chunks,) = struct.unpack_from("<I", body, at)
    except (struct.error, UnicodeDecodeError):
        raise InputError("the array that arrived is cut off or damaged; send it again") from None
    if magic != _MAGIC or version != _VERSION:
        raise InputError(f"arrays of form {magic!r} {version} are not known; nninteractive-client 2 sends NNIA 1")
    if not 1 <= axes <= _MOST_AXES or name not in _TYPES + _FLOATS or min(shape) < 1:
        raise InputError(
            f"an array of {axes} axes {list(shape)} of type {name[:20]!r}: 1 to 4 axes of numbers are taken"
        )
    out = np.empty(_count(shape, np.dtype(name), most), name)
    room, at = memoryview(out).cast("B"), at + 4
    for _ in range(chunks):
        if at + _CHUNK.size > len(body):
            break
        raw, packed = _CHUNK.unpack_from(body, at)
        source = memoryview(body)[at + _CHUNK.size : at + _CHUNK.size + packed]
        at += _CHUNK.size + packed
        if at > len(body) or not 0 < raw <= len(room) or not _plain(source, raw):
            break
        try:
            blosc2.decompress2(source, dst=room[:raw])
        except (RuntimeError, ValueError):
            break
        room = room[raw:]
    if len(room):
        raise InputError(f"the array that arrived lacks {len(room)} of its {out.nbytes} bytes; send it again")
    return out.reshape(shape)


def _plain(frame: memoryview, size: int) -> bool:
    """Whether a blosc2 chunk states `size` bytes, its own length, and codec and filters that blosc2 itself has.

    A chunk begins with 32 bytes: at 2 flags (codec in the upper 3 bits), at 4 and 12 the sizes, at 16 six filters
    (c-blosc2, README_CHUNK_FORMAT.rst). It believes them, and for foreign codecs and filters it loads libraries.
    """
    if len(frame) < 32:
        return False
    stated, length = struct.unpack_from("<i", frame, 4)[0], struct.unpack_from("<i", frame, 12)[0]
    return (stated, length) == (size, len(frame)) and frame[2] >> 5 in _CODECS and max(frame[16:22]) <= _LAST_FILTER


def _count(shape: tuple[int, ...], kind: np.dtype, most: int) -> int:
    count = math.prod(shape)
    if count * kind.itemsize > most:
        size = " x ".join(map(str, shape))
        raise TooLargeError(
            f"an image of {size} voxels of type {kind} takes {count * kind.itemsize >> 20} MB unpacked, more than the "
            f"{most >> 20} MB that may be handed in; crop it, or start samlora app with a larger --max_upload_mb"
        )
    return count


def pack(array: np.ndarray) -> bytes:
    """An array as a body."""
    import blosc2

    array = np.ascontiguousarray(array)
    name = array.dtype.name.encode("ascii")
    raw = memoryview(array).cast("B")
    parts = [raw[at : at + _CHUNK_BYTES] for at in range(0, len(raw), _CHUNK_BYTES)]
    head = _HEAD.pack(_MAGIC, _VERSION, _ZSTD, array.ndim, len(name)) + name
    body = [head, struct.pack(f"<{array.ndim}qI", *array.shape, len(parts))]
    for part in parts:
        # The size of an element must be right: zeros whose number of bytes it does not divide cannot be read back.
        packed = blosc2.compress2(
            part, typesize=array.itemsize, codec=blosc2.Codec.ZSTD, clevel=3, filters=[blosc2.Filter.NOFILTER]
        )
        body += [_CHUNK.pack(len(part), len(packed)), packed]
    return b"".join(body)


def message(text: str | bytes | None, what: str) -> dict[str, Any]:
    """The mapping that a JSON text holds; none is an empty one. Raises InputError naming `what`."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{what}: a mapping in JSON is needed")
    return values


def flag(values: dict[str, Any], key: str, default: bool | None = None) -> bool:
    """True or false of a message. Raises InputError where it is neither, or missing without a default."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"{key} {value!r}: true or false is needed")
    return value


def voxel(values: Any, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The voxel nearest to three coordinates. Raises InputError for one outside `shape`."""
    point = _numbers(values, (3,), "coordinates")
    index = np.floor(point + 0.5).astype(np.int64)
    if (index < 0).any() or (index >= shape).any():
        raise InputError(f"coordinates {point.tolist()}: outside of the image of {' x '.join(map(str, shape))} voxels")
    return tuple(index.tolist())


def box(values: Any, shape: tuple[int, ...]) -> tuple[slice, slice, slice]:
    """The part within `shape` of a box [[from, to], ...] ends excluded. Raises InputError if there is none."""
    ends = np.sort(_numbers(values, (3, 2), "bbox"), axis=1)
    low = np.clip(np.floor(ends[:, 0] + 0.5), 0, shape).astype(np.int64)
    high = np.clip(np.floor(ends[:, 1] + 0.5), 0, shape).astype(np.int64)
    if (low >= high).any():
        raise InputError(f"bbox {ends.tolist()}: holds no voxel of the image of {' x '.join(map(str, shape))}")
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high))


def _numbers(values: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != shape or not np.isfinite(array).all() or (np.abs(array) > 1e9).any():
        raise InputError(f"{what} {str(values)[:80]}: {' x '.join(map(str, shape))} numbers are needed")
    return array
