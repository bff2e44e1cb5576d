"""One row per system, and the three calls that make, load and rebuild a model from it."""

import fnmatch
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samlora.errors import InputError
from samlora.model import checkpoint
from samlora.model.adapters import ADAPTERS, insert_adapters
from samlora.model.baselines import BASELINES, build_baseline
from samlora.model.checkpoint import Base, Spec
from samlora.model.lora import LoRAOptions, inject_decoder, inject_encoder, translate_adapter
from samlora.model.mobile import TinyEncoder, inject_tiny
from samlora.model.sam import PIXEL_MEAN, Sam, build_decoder, build_sam, usual_size
from samlora.model.samus import base_size, insert_samus, samus_names
from samlora.model.stem import InputStem
from samlora.model.variants import STOCK_MASKS, VARIANTS
from samlora.prompting import Prompting


@dataclass(frozen=True)
class System:
    """How a system is built and what of it trains.

    trains: patterns of parameter names, of which a leading "!" takes away what an earlier one gave; or a function that
    names them. variant: the usual one. lora: LoRA on the encoder's blocks; lora_decoder: on the decoder's transformer
    too. insert: puts modules of the system's own into a SAM, by its options. base_size: at which side a base is loaded
    for a model of a side, where these differ. network: a network of samlora.model.baselines instead of a SAM.
    prompts: "none": one mask token per class and background, no prompts; "only": the base's own mask tokens, one mask
    for each prompt; "both": two decoders. normalise: images get SAM's pixel statistics inside the model; otherwise
    they enter as they are, 0 to 1. pad: images are scaled by their longer side and padded, as SAM does it; otherwise
    stretched to the square. objective: what it trains on, a key of samlora.training.objectives.OBJECTIVES.
    prompting: how its prompts are drawn from the reference.
    options: what else can be chosen when it is built, and the defaults. module: SAMed's name of it, if any.
    """

    summary: str
    trains: tuple[str, ...] | Callable[[Sam], set[str]]
    variant: str = "vit_b"
    lora: bool = True
    lora_decoder: bool = False
    insert: Callable[..., None] | None = None
    base_size: Callable[[int | None], int] | None = None
    network: bool = False
    prompts: str = "none"
    normalise: bool = False
    pad: bool = False
    objective: str = "classes"
    prompting: Prompting = Prompting()
    options: Mapping[str, Any] = field(default_factory=dict)
    module: str | None = None

    @property
    def automatic(self) -> bool:
        """Whether it draws all classes without prompts."""
        return self.prompts != "only"

    @property
    def promptable(self) -> bool:
        return self.prompts != "none"

    @property
    def volumetric(self) -> bool:
        """Whether it takes patches of volumes instead of slices."""
        return self.objective == "patches"

    @property
    def fill(self) -> tuple[float, float, float]:
        """What images are padded with, in 0..1: where the pixel mean is taken away, that mean, as SAM pads after it."""
        return tuple(mean / 255 for mean in PIXEL_MEAN) if self.normalise else (0.0, 0.0, 0.0)


# LoRA on q, v and, by option, k; on the projection and the MLP; DoRA's magnitudes.
_ENCODER_LORA = (
    "image_encoder.*.linear_[ab]_[qkv].weight",
    "image_encoder.*.linear_[ab].weight",
    "image_encoder.*.magnitude*",
)
# What LoRA can do beyond SAMed's (samlora.model.lora.LoRAOptions), all of it off.
_LORA_OPTIONS = {
    "alpha": None,
    "rslora": False,
    "dropout": 0.0,
    "dora": False,
    "targets": ["q", "v"],
    "ranks": [],
}
_STEM = "input_stem.*"  # there only for images of other than three channels, and then no base knows it
# A forward pass without prompts touches nothing of the prompt encoder but no_mask_embed, and the loss does
# not see the IoU head. SAMed marks those 21 tensors trainable all the same; under DDP they would hang.
_SEMANTIC_DECODER = (
    "prompt_encoder.no_mask_embed.weight",
    "mask_decoder.*",
    "!mask_decoder.iou_prediction_head.*",
)
# Training on prompts sees mask token 0 alone: the heads of the three others would get no gradient.
_OTHER_HEADS = "!*.output_hypernetworks_mlps.[123].*"
_PROMPTED_DECODER = ("mask_decoder.*", "!mask_decoder.iou_prediction_head.*", _OTHER_HEADS)

SYSTEMS = {
    "samed": System(
        summary="LoRA on q and v of the image encoder, whole mask decoder (SAMed, arXiv 2304.13785)",
        trains=(*_ENCODER_LORA, *_SEMANTIC_DECODER),
        options=_LORA_OPTIONS,
        module="sam_lora_image_encoder",
    ),
    "samed_s": System(
        summary="SAMed with LoRA instead of full training in the decoder's transformer",
        trains=(
            *_ENCODER_LORA,
            *_SEMANTIC_DECODER,
            "!mask_decoder.transformer.*",
            "mask_decoder.transformer.*.linear_[ab].weight",
        ),
        lora_decoder=True,
        options=_LORA_OPTIONS,
        module="sam_lora_image_encoder_mask_decoder",
    ),
    "samed_h": System(
        summary="SAMed on ViT-H",
        trains=(*_ENCODER_LORA, *_SEMANTIC_DECODER),
        variant="vit_h",
        options=_LORA_OPTIONS,
    ),
    "sam": System(
        summary="SAM as it is, with prompts; nothing trains (arXiv 2304.02643)",
        trains=(),
        lora=False,
        prompts="only",
        normalise=True,
        pad=True,
    ),
    "sam_lora": System(
        summary="LoRA on q and v of the image encoder alone, SAM's own decoder and prompts",
        trains=_ENCODER_LORA,
        prompts="only",
        normalise=True,
        pad=True,
        objective="masks",
        prompting=Prompting("pt_box"),
        options=_LORA_OPTIONS,
    ),
    "medsam": System(
        summary="image encoder and mask decoder trained whole, with boxes (MedSAM, arXiv 2304.12306)",
        # A MobileSAM file brings a classifier along that nothing uses.
        trains=("image_encoder.*", "!image_encoder.*head.*", *_PROMPTED_DECODER),
        lora=False,
        prompts="only",
        objective="masks",
        prompting=Prompting("box", box_jitter=20),
    ),
    "medsam_decoder": System(
        summary="MedSAM with the image encoder frozen, so that its embeddings can be kept",
        trains=_PROMPTED_DECODER,
        lora=False,
        prompts="only",
        objective="masks",
        prompting=Prompting("box", box_jitter=20),
    ),
    "sam_prompt": System(
        summary="SAM's own training: boxes and points, focal, Dice and IoU loss; `freeze` names what stays",
        trains=(
            "image_encoder.*",
            "prompt_encoder.point_embeddings.*",
            "prompt_encoder.no_mask_embed.weight",
            "mask_decoder.*",
            _OTHER_HEADS,
        ),
        lora=False,
        prompts="only",
        normalise=True,
        pad=True,
        objective="focal_dice_iou",
        prompting=Prompting("pt_box", box_jitter=10, sample_num=2, negative_num=1, max_objects=4, parts=True),
        options={"freeze": ("image_encoder", "prompt_encoder")},
    ),
    "samlora_joint": System(
        summary="one LoRA encoder, two decoders: all classes without prompts, and one object by prompts",
        trains=(
            *_ENCODER_LORA,
            *_SEMANTIC_DECODER,
            "prompt_decoder.*",
            "!prompt_decoder.iou_prediction_head.*",
            "!prompt_decoder.output_hypernetworks_mlps.[123].*",
        ),
        prompts="both",
        objective="joint",
        prompting=Prompting("any", box_jitter=10, max_objects=4),
        options=_LORA_OPTIONS,
    ),
    "msa": System(
        summary="bottleneck adapters in every encoder block, decoder trained (Medical SAM Adapter, arXiv 2304.12620)",
        trains=(ADAPTERS, *_PROMPTED_DECODER),
        lora=False,
        insert=insert_adapters,
        prompts="only",
        objective="masks",
        prompting=Prompting("pt"),
        options={"ratio": 0.25, "scale": 0.5, "depth": 0},
    ),
    "samus": System(
        summary="8 px patches, a CNN beside the encoder, adapters; decoder frozen (SAMUS, arXiv 2309.06824)",
        trains=samus_names,
        lora=False,
        insert=insert_samus,
        base_size=base_size,
        prompts="only",
        objective="masks",
        prompting=Prompting("pt"),
        options={"cnn": True, "adapters": True},
    ),
    "mobile_sam": System(
        summary="SAMed on MobileSAM's TinyViT, for laptops (arXiv 2306.14289)",
        trains=(*_ENCODER_LORA, *_SEMANTIC_DECODER),
        variant="vit_t",
        options=_LORA_OPTIONS,
    ),
} | {
    name: System(
        summary=network.summary,
        trains=("network.*",),
        variant=name,
        lora=False,
        network=True,
        objective="patches" if network.volumetric else "classes",
    )
    for name, network in BASELINES.items()
}
NETWORK_SIZE = 512  # usual side of images for networks without a base
PATCH_SIZE = 128  # and of patches
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")  # what the option `freeze` can name


def system_row(name: str) -> System:
    """The row of a system. Raises InputError for an unknown name."""
    if name not in SYSTEMS:
        raise InputError(f"unknown system {name!r}; known: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def named_system(system: str | None, module: str | None) -> str | None:
    """The system that a name of ours or SAMed's module name means, None for neither.

    Raises InputError for an unknown module, or when the two disagree.
    """
    if module is None:
        return system
    by_module = {row.module: name for name, row in SYSTEMS.items() if row.module}
    if module not in by_module and module not in SYSTEMS:
        raise InputError(f"--module {module} is unknown; allowed: {', '.join(by_module)}")
    named = by_module.get(module, module)
    if system is not None and system != named:
        raise InputError(f"--module {module} means the system {named}, but --system {system} was given; leave one out")
    return named


def trained_names(model: nn.Module, system: str, options: Mapping[str, Any] | None = None) -> set[str]:
    """Names of the parameters of `model` that train in `system`, built with `options`."""
    row, names = system_row(system), set()
    patterns = row.trains
    if callable(patterns):
        names, patterns = patterns(model), ()
    frozen = {**row.options, **(options or {})}.get("freeze", ())
    for pattern in (*patterns, _STEM, *(f"!{part}.*" for part in frozen)):
        found = {n for n, _ in model.named_parameters() if fnmatch.fnmatchcase(n, pattern.removeprefix("!"))}
        names = names - found if pattern.startswith("!") else names | found
    return names


def system_options(system: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """All options of a system: those given and the defaults of its row, as plain data.

    Raises InputError for one it has not, or a part that `freeze` cannot name.
    """
    row = system_row(system)
    for name in given or {}:
        if name not in row.options:
            known = ", ".join(row.options) or "none"
            raise InputError(f"{name}: the system {system} has no such option; it has: {known}")
    options = {**row.options, **(given or {})}
    if "freeze" in options:
        options["freeze"] = list(options["freeze"])
        unknown = [part for part in options["freeze"] if part not in PARTS]
        if unknown or set(options["freeze"]) == set(PARTS):
            raise InputError(f"--freeze {' '.join(options['freeze'])}: give one or two of {', '.join(PARTS)}")
    return options


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Makes the parameters `names` train and freezes all others. Raises InputError for a name not there."""
    names = set(names)
    parameters = dict(model.named_parameters())
    if names - parameters.keys():
        raise InputError(f"no parameter {min(names - parameters.keys())} in this model to train")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)


def build_model(
    system: str = "samed",
    base: str | os.PathLike | Base | None = "default",
    variant: str | None = None,
    image_size: int | None = None,
    num_classes: int = 8,
    rank: int = 4,
    lora_layers: Iterable[int] | None = None,
    class_names: Iterable[str] | None = None,
    recipe: dict | None = None,
    in_channels: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Sam:
    """Builds a system on a base, ready to train: `model(images (B, 3, S, S)) -> logits`, on the CPU, float32.

    base: a base checkpoint; "default" for the variant's file in ./checkpoints (vit_ti: the demo base that
    ships); a `checkpoint.Base` to share its tensors with other models; None for random weights, with a warning.
    variant: vit_ti, vit_b, vit_l or vit_h; None to read it from the base.
    image_size: S, a multiple of 16; None for 512 (vit_ti: 256; patches: 128).
    num_classes: foreground classes; logits are (B, num_classes + 1, S/4, S/4) with background 0.
    rank, lora_layers: of the LoRA pairs; all encoder blocks when None.
    class_names, recipe: kept in the adapter file; recipe is plain data (samlora.data.recipe).
    in_channels: channels of the images; None for 3 (patches: 1). In a SAM others than 3 go through a learned 1x1
    convolution (samlora.model.stem).
    options: what the system's row offers beyond these, such as `freeze` of sam_prompt.
    Images are in 0..1 for every system. Systems with prompts take them as `model(images, prompts)`.
    The result's `.spec` says what it is. Raises InputError or MissingFileError when something does not fit.
    """
    row = system_row(system)
    if num_classes < 1:
        raise InputError(f"num_classes {num_classes} is not possible; it counts foreground classes: give 1 or more")
    names = tuple(class_names) if class_names is not None else tuple(f"class_{i}" for i in range(1, num_classes + 1))
    if len(names) != num_classes:
        raise InputError(f"{len(names)} class names for num_classes {num_classes}; give one name per foreground class")
    chosen = system_options(system, options)
    in_channels = (1 if row.volumetric else 3) if in_channels is None else in_channels
    if in_channels < 1:
        raise InputError(f"in_channels {in_channels} is not possible; give the number of channels of the images")
    if lora_layers is not None and not row.lora:
        raise InputError(f"lora layers {list(lora_layers)}: the system {system} has no LoRA; leave them out")
    if row.network:
        usual = PATCH_SIZE if row.volumetric else NETWORK_SIZE
        sam = build_baseline(system, image_size or usual, num_classes + 1, in_channels)
        sam.variant, base_name, digest = system, "none", None
        layers: Iterable[int] = ()
    else:
        num_masks = num_classes + 1 if row.prompts == "none" else None
        side = image_size if row.base_size is None else row.base_size(image_size)
        sam, base_name, digest = _base(base, variant, row, side, num_masks)
        layers = _equip(sam, row, num_classes, rank, lora_layers, in_channels, chosen)
    names_trained = trained_names(sam, system, chosen)
    train_only(sam, names_trained)
    if isinstance(base, Base):
        checkpoint.unshare(sam, names_trained)
    sam.spec = Spec(
        system=system,
        variant=sam.variant,
        rank=rank if row.lora else 0,
        lora_layers=tuple(layers),
        image_size=sam.image_size,
        num_classes=num_classes,
        class_names=names,
        base=base_name,
        base_sha256=digest,
        recipe=recipe,
        samlora_version=_version(),
        in_channels=in_channels,
        options=chosen,
    )
    return sam


def _equip(
    sam: Sam,
    row: System,
    num_classes: int,
    rank: int,
    lora_layers: Iterable[int] | None,
    in_channels: int,
    options: Mapping[str, Any],
) -> Iterable[int]:
    """Puts into a SAM what its system has beyond it; returns the blocks that got LoRA."""
    if in_channels != 3:
        sam.input_stem = InputStem(in_channels)
    sam.normalise = row.normalise
    if row.prompts == "both":
        _add_class_decoder(sam, num_classes + 1)
    if row.insert is not None:
        row.insert(sam, **options)
    if not row.lora:
        return ()
    inject = inject_tiny if isinstance(sam.image_encoder, TinyEncoder) else inject_encoder
    layers = inject(sam.image_encoder, LoRAOptions(rank, **options), lora_layers)
    if row.lora_decoder:
        inject_decoder(sam.mask_decoder.transformer, rank)
    return layers


def _add_class_decoder(sam: Sam, num_masks: int) -> None:
    """The base's decoder becomes the one for prompts; a copy of it, with mask tokens of its own, draws the classes."""
    sam.prompt_decoder, sam.mask_decoder, sam.num_masks = sam.mask_decoder, build_decoder(num_masks), num_masks
    state = sam.prompt_decoder.state_dict()
    shared = {name: tensor for name, tensor in state.items() if not checkpoint.is_class_tensor(name)}
    sam.mask_decoder.load_state_dict(shared, strict=False)


def _base(
    base: str | os.PathLike | Base | None,
    variant: str | None,
    row: System,
    image_size: int | None,
    num_masks: int | None,
) -> tuple[Sam, str, str | None]:
    """The SAM, the name of its base and the SHA-256 of the base's file."""
    if base == "default":
        base = checkpoint.find_base(_known(variant or row.variant))
    if isinstance(base, Base):
        sam, digest = checkpoint.load_base(base, variant, image_size, num_masks)
        return sam, base.path.name, digest
    if base is not None and not str(base).startswith("random:"):
        sam, digest = checkpoint.load_base(base, variant, image_size, num_masks)
        return sam, Path(base).name, digest
    variant = _known(variant or row.variant)
    if base is None:
        # The seed is drawn from torch's generator and kept in the adapter, so that it can be rebuilt.
        seed = int(torch.randint(2**31 - 1, ()))
        warnings.warn(
            f"base=None: {variant} starts from random weights (seed {seed}), not from a trained SAM",
            stacklevel=3,
        )
    else:
        seed = int(str(base).removeprefix("random:"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = build_sam(variant, image_size or usual_size(variant), num_masks or STOCK_MASKS)
    return sam, f"random:{seed}", None


def _known(variant: str) -> str:
    if variant not in VARIANTS:
        raise InputError(f"unknown SAM variant {variant!r}; known: {', '.join(VARIANTS)}")
    return variant


def _version() -> str:
    try:
        return metadata.version("samlora")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "source"


def load_model(
    adapter: str | os.PathLike, base: str | os.PathLike | Base | None = "default", image_size: int | None = None
) -> Sam:
    """Rebuilds a trained model: `model(images) -> logits`, on the CPU, in evaluation mode.

    adapter: a file of samlora, of SAMed (`.pth`), or plain LoRA safetensors; rank and class count are read
    from it. base: the base it was trained on, its file or a `checkpoint.Base` of it; "default" or None for that
    base's usual place (or, for a model that began from random weights, those weights again). image_size: None for the
    adapter's own; SAMed's files do not know theirs and get 512.
    Raises InputError when the adapter and the base do not belong together, or a tensor is missing,
    unexpected or of another shape.
    """
    tensors, spec = checkpoint.read_adapter(adapter)
    base = "default" if base is None else base
    # Nothing below may depend on, or move, the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if spec is None:
            return _load_foreign(tensors, adapter, base, image_size).eval()
        without_file = spec.base == "none" or spec.base.startswith("random:")
        if without_file and base != "default":
            raise InputError(f"{adapter}: began with random weights ({spec.base}), not with {base}; leave the base out")
        model = build_model(
            system=spec.system,
            base=spec.base if without_file else base,
            variant=None if spec.base == "none" else spec.variant,
            image_size=image_size or spec.image_size,
            num_classes=spec.num_classes,
            rank=spec.rank,
            lora_layers=spec.lora_layers or None,
            class_names=spec.class_names,
            recipe=spec.recipe,
            in_channels=spec.in_channels,
            options=spec.options,
        )
    if model.spec.base_sha256 != spec.base_sha256:
        raise InputError(
            f"{adapter}: was trained on the base {spec.base} (SHA-256 {spec.base_sha256[:12]}...), "
            f"but {model.spec.base} "
            f"has {model.spec.base_sha256[:12]}...; give that base with --ckpt"
        )
    checkpoint.load_trained(model, tensors, adapter)
    return model.eval()


def _load_foreign(
    tensors: dict, adapter: str | os.PathLike, base: str | os.PathLike | Base, image_size: int | None
) -> Sam:
    guess = checkpoint.guess_spec(tensors, adapter)
    guess["num_classes"] = guess["num_classes"] or STOCK_MASKS - 1
    model = build_model(base=base, image_size=image_size, **guess)
    translated = translate_adapter(model, tensors, adapter)
    if isinstance(base, Base):
        checkpoint.unshare(model, translated)
    model.load_state_dict(translated, strict=False)
    return model
