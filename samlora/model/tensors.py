"""Named tensors in files: read without unpickling, written whole or not at all, compared by shape."""

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from samlora.errors import InputError, MissingFileError
from samlora.files import as_path, foreign_content, whole

# Where training programs keep the weights in a checkpoint, and what they put before every name.
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")
PREFIXES = ("module.", "sam.")


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, or of one of PyTorch read with weights_only, whatever its ending.

    Of a checkpoint that keeps its tensors under a key of WRAPPERS, or under names with PREFIXES, these tensors.
    Raises MissingFileError when there is no such file, InputError when it cannot be read as plain tensors.
    """
    path = as_path(path)
    if not path.is_file():
        is_folder = path.is_dir()
        missing = f"{path}: is a folder; give the file of weights in it" if is_folder else f"no weights at {path}"
        raise MissingFileError(missing if is_folder else f"{missing}; check the path")
    foreign = foreign_content(path)
    if foreign is not None:
        raise InputError(f"{path}: cannot be read as weights: it {foreign}")
    metadata: dict[str, str] = {}
    try:
        if _is_safetensors(path):
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata() or {}
        else:
            with open(path, "rb") as file:  # of a path PyTorch would look at the ending
                tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds of errors on broken files
        raise InputError(f"{path}: cannot be read as weights: it {_why_unreadable(error, path)}") from None
    tensors = _unwrapped(tensors)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path}: holds something else than named tensors; give a file of weights")
    check_finite(tensors, path)
    return tensors, metadata


def check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Raises InputError, naming `path`, for the first tensor that holds NaN or infinite values."""
    for name, tensor in tensors.items():
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        ends = torch.stack(torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float()))
        if not ends.isfinite().all():
            raise InputError(
                f"{path}: {name} is not finite (NaN or infinite values); its training has diverged: "
                "take an earlier file of that training, or train again with a lower learning rate"
            )


def _unwrapped(content: object) -> object:
    """What a checkpoint holds under a key of WRAPPERS, else the content itself; names without PREFIXES."""
    if not isinstance(content, dict):
        return content
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    for prefix in PREFIXES:
        if content and all(str(name).startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return content


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all. Raises InputError for another ending."""
    from safetensors.torch import save_file

    if as_path(path).suffix != ".safetensors":
        raise InputError(f"{path}: adapters are written as .safetensors only; give such a name")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def write_pth(path: str | os.PathLike, tensors: dict[str, Tensor]) -> None:
    """Writes a plain dict of tensors as a file of PyTorch, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as temporary, open(temporary, "wb") as file:  # of a path PyTorch would store the name
        torch.save(tensors, file)


def _is_safetensors(path: Path) -> bool:
    """Whether a file is one of safetensors, by its content; by its ending where that says nothing."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):  # an archive of PyTorch, or a pickle of its earlier versions
        return False
    # The length of a header of JSON in eight bytes, then the header.
    return head[8:] == b"{" or path.suffix.lower() == ".safetensors"


def _why_unreadable(error: Exception, path: Path) -> str:
    """What a library's error means to a user: the end of a message about a file, "it ..."."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class) ([\w.]+)", text)
    with open(path, "rb") as file:
        head = file.read(64)
    if not found and head.isascii() and head.decode("ascii").replace("\n", "").replace("\r", "").isprintable():
        return "is a text file, not a file of weights; fetch or save it again"
    if found or "weights_only" in text and "TorchScript" not in text and "persistent" not in text:
        named = next((name for name in (found.groups() if found else ()) if name), "")
        objects = f"Python objects ({named})" if named else "Python objects"
        return f"holds {objects} beside its tensors, which are not loaded; save the weights alone: model.state_dict()"
    if "TorchScript" in text:
        return "is a TorchScript program, not a file of weights; save model.state_dict() instead"
    if "inline_container" in text or "PytorchStreamReader" in text:
        return "is no archive of PyTorch, or one that is cut short; fetch or save it again"
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    sentence = re.split(r"(?<=[.!?])\s", line)[0].rstrip(".")
    short = textwrap.shorten(sentence, 160, placeholder=" ...")
    return f"is damaged or of another kind ({short}); fetch or save it again"


def compare_shapes(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], what: str, advice: str
) -> None:
    """Raises InputError naming the first missing, unexpected or misshapen tensor."""
    for verb, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has an unexpected", found.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{what}: it {verb} {min(names)}{more}; {advice}")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise InputError(f"{what}: {name} has shape {tuple(found[name])}, expected {tuple(shape)}; {advice}")
