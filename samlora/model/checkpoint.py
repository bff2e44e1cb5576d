"""All weight files: base checkpoints and adapters, verified, read without unpickling, loaded strictly."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samlora.errors import InputError, MissingFileError
from samlora.files import as_path
from samlora.model.bases import advice, base_name, pixels_of, verify
from samlora.model.huggingface import meta_state
from samlora.model.lora import decoder_names, lora_names
from samlora.model.sam import Sam, build_sam, state_shapes, usual_size
from samlora.model.tensors import compare_shapes, read_tensors, write_tensors
from samlora.model.variants import VARIANTS
from samlora.pixels import SAM, SAMED, Pixels

FORMAT_VERSION = 5
# What an adapter file may hold, see Spec.holds.
TRAINED, DECODERS, MODEL = "trained", "decoders", "model"
# What adapters of an earlier format do not say, and what it was then.
_SINCE = {2: {"in_channels": 3}, 3: {"options": {}}, 5: {"holds": TRAINED}}
# Until format 3 pixels were a matter of the system alone.
_SAM_PIXELS_UNTIL_3 = ("sam", "sam_lora", "sam_prompt")

# Decoder tensors whose shape, or meaning, depends on the number of classes. They are the only tensors a
# base checkpoint may lack or hold in another shape. When classes replace SAM's masks, those that fit start from
# the base and the others fresh, as SAMed's loader does it.
CLASS_TENSORS = ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")


@dataclass(frozen=True)
class Spec:
    """What a model is: all that must be known to rebuild it from its base and its adapter file.

    num_classes counts foreground classes. lora_layers: adapted encoder blocks, empty without LoRA.
    class_names: one per foreground class. recipe: how its slices were made (samlora.data.recipe), as
    plain data. base: file name of the base weights, or "random:SEED". base_sha256: of that file. in_channels: of the
    images; other than 3 go through an input stem. options: what the system's row offers beyond these, as plain data.
    pixels: how images are prepared for the encoder. base_pixels: how the base's authors do it; None without a base.
    holds: what the adapter file has of the model. TRAINED: what trains. DECODERS: also the rest of the prompt encoder
    and the mask decoder, as SAMed's files do. MODEL: everything, LoRA merged, so that no base is needed.
    """

    system: str
    variant: str
    rank: int
    lora_layers: tuple[int, ...]
    image_size: int
    num_classes: int
    class_names: tuple[str, ...]
    base: str
    base_sha256: str | None = None
    recipe: dict | None = None
    samlora_version: str = ""
    format_version: int = FORMAT_VERSION
    in_channels: int = 3
    options: dict = field(default_factory=dict)
    pixels: Pixels = SAMED
    base_pixels: Pixels | None = SAM
    holds: str = TRAINED

    @property
    def has_base_file(self) -> bool:
        """Whether the model began with a base file: not with random weights, and it is no network without a base."""
        return self.base != "none" and not self.base.startswith("random:")


# --- base weights ----------------------------------------------------------------------------------------


def recognise_variant(state: dict[str, Tensor], path: str | os.PathLike) -> str:
    """The key of VARIANTS whose patch embedding has the file's shape. Raises InputError when there is none."""
    patches = state.get("image_encoder.patch_embed.proj.weight")
    tiny = state.get("image_encoder.patch_embed.seq.0.c.weight")
    for name, variant in VARIANTS.items():
        if variant.tiny:
            fits = tiny is not None and tiny.shape[2:] == (variant.patch, variant.patch)
        else:
            fits = patches is not None and patches.shape == (variant.width, 3, variant.stride, variant.stride)
        if fits:
            return name
    known = ", ".join(f"{name} ({v.width} wide)" for name, v in VARIANTS.items() if not v.tiny)
    found = (
        "no image_encoder.patch_embed.proj.weight" if patches is None else f"a patch embedding {tuple(patches.shape)}"
    )
    raise InputError(f"{path}: is not a SAM checkpoint: it has {found}; known variants: {known}")


@dataclass(frozen=True, eq=False)
class Base:
    """A base file that was opened: its tensors, float32, which all models built on it share (`load_base`).

    pixels: how the encoder wants its input.
    """

    path: Path
    sha256: str
    variant: str
    pixels: Pixels
    state: dict[str, Tensor]

    def __str__(self) -> str:
        return str(self.path)


def open_base(path: str | os.PathLike, variant: str | None = None, device: torch.device | str = "cpu") -> Base:
    """Reads and verifies a base checkpoint, with Meta's names or Hugging Face's.

    variant: None to take what the file holds.
    Raises MissingFileError or InputError: no file, wrong hash, another variant.
    """
    path = as_path(path)
    if path.is_dir():
        raise MissingFileError(f"{path}: is a folder; give the file of base weights in it")
    if not path.is_file():
        name = base_name(path)
        hint = advice(name) if name else "fetch SAM's with: samlora download vit_b"
        raise MissingFileError(f"no base weights at {path}; {hint}")
    sha256 = verify(path)
    state = meta_state(read_tensors(path)[0])
    found = recognise_variant(state, path)
    if variant is not None and variant != found:
        raise InputError(
            f"{path}: holds a {found} base, but {variant} was asked for; give the file of {variant} "
            f"or --vit_name {found}"
        )
    state = {name: tensor.to(device).float() for name, tensor in state.items()}
    return Base(path, sha256, found, pixels_of(path, found), state)


def load_base(
    path: str | os.PathLike | Base, variant: str | None, image_size: int | None, num_masks: int | None
) -> tuple[Sam, Base]:
    """Builds a SAM and fills it from a base checkpoint; returns it with what was opened.

    path: a file, or a `Base`, whose tensors the model then shares instead of copying them (`unshare` what is to be
    written). variant: None to take what the file holds. image_size: None for `usual_size`; position tables are
    resized to it. num_masks: mask tokens of a semantic decoder: of its CLASS_TENSORS those whose shape the file has
    start from the file and the others fresh; None keeps the file's decoder as it is. Parameters are float32.
    Raises MissingFileError or InputError: no file, wrong hash, another variant, a tensor missing,
    unexpected or of a wrong shape.
    """
    base = path if isinstance(path, Base) else open_base(path, variant)
    state, found = base.state, base.variant
    if variant is not None and variant != found:
        raise InputError(f"{base.path}: holds a {found} base, but {variant} was asked for; give the file of {variant}")
    image_size = image_size or usual_size(found)
    sam = build_sam(found, image_size, num_masks or len(state["mask_decoder.mask_tokens.weight"]))
    check_base(state, found, fresh_heads=num_masks is not None, path=base.path)
    state = resize_positions(state, found, image_size)
    if num_masks is not None:
        state = fitting(state, sam.state_dict())
    sam.load_state_dict(state, strict=num_masks is None, assign=base is path)
    return sam, base


def fitting(state: dict[str, Tensor], into: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state whose name and shape `into` has, but none of CLASS_TENSORS that has another shape."""
    return {
        name: tensor
        for name, tensor in state.items()
        if not is_class_tensor(name) or (name in into and into[name].shape == tensor.shape)
    }


def unshare(model: nn.Module, names: Iterable[str]) -> None:
    """Gives the tensors `names` memory of their own, so that a `Base` does not change when they do."""
    names = set(names)
    parameters = dict(model.named_parameters())
    for name in parameters.keys() & names:
        parameters[name].data = parameters[name].data.clone()
    # A buffer may be the very tensor that the base holds: it is exchanged, not given other memory.
    for prefix, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if f"{prefix}.{name}" in names:
                setattr(module, name, buffer.clone())


def is_class_tensor(name: str) -> bool:
    """Whether a tensor of a decoder depends on the number of classes (CLASS_TENSORS)."""
    return any(part in name for part in CLASS_TENSORS)


def own_side(state: dict[str, Tensor], variant: str, path: Path) -> int:
    """Side in pixels of the images that the position tables of a base are for. path: for messages."""
    if VARIANTS[variant].tiny:  # nothing in its encoder depends on it
        return VARIANTS[variant].image_size
    positions = state.get("image_encoder.pos_embed")
    if positions is None or positions.ndim != 4:
        raise InputError(
            f"{path}: image_encoder.pos_embed is missing or not a (1, h, w, c) table; fetch the file again"
        )
    return positions.shape[1] * VARIANTS[variant].stride


def check_base(state: dict[str, Tensor], variant: str, fresh_heads: bool, path: Path) -> None:
    """Compares a base's names and shapes with what a SAM of its own image size holds."""
    side = own_side(state, variant, path)
    masks = state.get("mask_decoder.mask_tokens.weight")
    expected = state_shapes(variant, side, 4 if masks is None else len(masks))
    compare_shapes(
        {n: t.shape for n, t in state.items() if not (fresh_heads and is_class_tensor(n))},
        {n: s for n, s in expected.items() if not (fresh_heads and is_class_tensor(n))},
        f"{path}: is not a complete {variant} base",
        "fetch the file again",
    )


def resize_positions(state: dict[str, Tensor], variant: str, image_size: int) -> dict[str, Tensor]:
    """Returns the state with its position tables resized to `image_size`, bilinear, align_corners=False.

    `pos_embed` goes to S/16 x S/16; the relative tables of the global blocks go to 2 S/16 - 1 rows, over the
    (rows, head channels) plane as SAMed does; windowed blocks keep theirs. Other entries pass untouched.
    """
    grid = image_size // VARIANTS[variant].stride
    resized = dict(state)
    if VARIANTS[variant].tiny:
        return resized
    name = "image_encoder.pos_embed"
    if state[name].shape[1] != grid:
        channels_first = state[name].float().permute(0, 3, 1, 2)
        channels_first = F.interpolate(channels_first, (grid, grid), mode="bilinear", align_corners=False)
        resized[name] = channels_first.permute(0, 2, 3, 1).contiguous()
    for block in VARIANTS[variant].global_blocks:
        for axis in "hw":
            name = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            table = state[name].float()
            if table.shape[0] != 2 * grid - 1:
                size = (2 * grid - 1, table.shape[1])
                resized[name] = F.interpolate(table[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    return resized


# --- adapters --------------------------------------------------------------------------------------------


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the adapter file of a model holds, by `Spec.holds`; what trains, for a model without a description.

    LoRA factors have SAMed's names and the rest those of the state dict. Statistics of batch normalisation whose
    weights train are learned too.
    """
    holds = getattr(getattr(model, "spec", None), "holds", TRAINED)
    if holds == MODEL:
        return model.state_dict()
    short = {name: samed for samed, name in lora_names(model).items()}
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{prefix}.weight" in trained:
            trained |= {f"{prefix}.running_{what}": getattr(module, f"running_{what}") for what in ("mean", "var")}
    if holds == DECODERS:
        state = model.state_dict()
        trained |= {name: state[name] for name in decoder_names(model)}
    return {short.get(name, name): tensor for name, tensor in trained.items()}


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes everything that trains in a model, with its description, as one safetensors file.

    Of a model that was loaded from a file with more than that, what that file held (`Spec.holds`).

    model: from `samlora.build_model` or `samlora.load_model`.
    Raises InputError when the model was not built by samlora, or the ending is not .safetensors.
    """
    spec = getattr(model, "spec", None)
    if spec is None:
        raise InputError("this model has no description (model.spec); build it with samlora.build_model or load_model")
    write_tensors(path, adapter_tensors(model), {"samlora": json.dumps(asdict(spec))})


def read_adapter(path: str | os.PathLike) -> tuple[dict[str, Tensor], Spec | None]:
    """Tensors and description of an adapter file; None for files of SAMed and plain LoRA files.

    Raises MissingFileError or InputError: no file, unreadable, not an adapter, or from a newer samlora.
    """
    path = as_path(path)
    if path.is_dir():
        raise MissingFileError(f"{path}: is a folder; give the adapter file in it, such as adapter_best.safetensors")
    if not path.is_file():
        raise MissingFileError(f"no adapter at {path}; train.py prints where it saved one")
    tensors, metadata = read_tensors(path)
    if "samlora" not in metadata:
        if "w_a_000" not in tensors:
            raise InputError(
                f"{path}: is not an adapter: it has neither samlora's description nor LoRA factors (w_a_000)"
            )
        return tensors, None
    return tensors, parse_spec(metadata["samlora"], path)


def parse_spec(text: str, path: str | os.PathLike) -> Spec:
    """The description of a model in an adapter file's metadata.

    Raises InputError where it is damaged or was written by a newer samlora. path: of the file, for messages.
    """
    try:
        description = dict(json.loads(text))
    except (ValueError, TypeError):
        description = {}
    if description.get("format_version", 0) > FORMAT_VERSION:
        written = description.get("samlora_version")
        raise InputError(f"{path}: was written by samlora {written}, newer than this one; upgrade samlora")
    for version, values in _SINCE.items():
        if description.get("format_version", FORMAT_VERSION) < version:
            description = values | description
    if description.get("format_version", FORMAT_VERSION) < 4:
        used = SAM if description.get("system") in _SAM_PIXELS_UNTIL_3 else SAMED
        description = {"pixels": asdict(used), "base_pixels": asdict(SAM)} | description
    wrong = description.keys() ^ {known.name for known in fields(Spec)}
    if wrong:
        raise InputError(f"{path}: its description is damaged ({', '.join(sorted(wrong))}); save it again")
    for name in ("lora_layers", "class_names"):
        description[name] = tuple(description[name])
    for name in ("pixels", "base_pixels"):
        if description[name] is not None:
            description[name] = Pixels(**description[name])
    return Spec(**description)


def guess_spec(tensors: dict[str, Tensor], path: str | os.PathLike) -> dict:
    """What the tensors of a SAMed or plain LoRA file tell: system, variant, rank, layers and class count.

    num_classes is None for plain LoRA files: they go with the base's own decoder.
    """
    rank, width = tensors["w_a_000"].shape if tensors["w_a_000"].ndim == 2 else (0, 0)
    variant = next((name for name, v in VARIANTS.items() if v.width == width and not v.tiny), None)
    pairs = sum(name.startswith("w_a_") for name in tensors)
    if variant is None or pairs != 2 * VARIANTS[variant].depth:
        raise InputError(
            f"{path}: {pairs} LoRA pairs of width {width} fit no SAM variant with LoRA on q and v of all blocks"
        )
    tokens = tensors.get("mask_decoder.mask_tokens.weight")
    system = "samed_s" if "sa_a_000" in tensors else "sam_lora" if tokens is None else "samed"
    return {
        "system": system,
        "variant": variant,
        "rank": rank,
        "lora_layers": tuple(range(VARIANTS[variant].depth)),
        "num_classes": None if tokens is None else len(tokens) - 1,
    }


def load_trained(model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Copies an adapter's tensors into what trains in `model`. Raises InputError unless they fit exactly."""
    own = adapter_tensors(model)
    compare_shapes(
        {n: t.shape for n, t in tensors.items()},
        {n: t.shape for n, t in own.items()},
        f"{path}: does not fit this model",
        "use the system, rank and classes it was trained with",
    )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
