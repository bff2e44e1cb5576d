"""Named tensors in files: read without unpickling, written whole or not at all, compared by shape."""

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from samlora.errors import InputError, MissingFileError
from samlora.files import whole

# Where training programs keep the weights in a checkpoint, and what they put before every name.
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")
PREFIXES = ("module.", "sam.")


def read_tensors(path: str | os.PathLike, wrapped: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a `.safetensors` file, or of a `.pth`/`.pt` file read with weights_only.

    wrapped: also take a checkpoint that keeps its tensors under a key of WRAPPERS, under names with PREFIXES.
    Raises MissingFileError when there is no such file, InputError when it cannot be read as plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no weights at {path}; check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as weights ({_first_line(error)}); fetch or save it again") from None
    except Exception as error:  # safetensors raises its own type for a broken header
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{path}: is not a safetensors file ({_first_line(error)}); fetch or save it again") from None
    if wrapped:
        tensors = _unwrapped(tensors)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path}: holds something else than named tensors; give a file of weights")
    return tensors, {}


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

    if Path(path).suffix != ".safetensors":
        raise InputError(f"{path}: adapters are written as .safetensors only; give such a name")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


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
