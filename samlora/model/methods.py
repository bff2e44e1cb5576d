"""One row per system: how it is built and what of it trains."""

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from samlora.errors import InputError
from samlora.model.adapters import ADAPTERS, insert_adapters
from samlora.model.baselines import BASELINES
from samlora.model.lora import TARGETS, LoRAOptions
from samlora.model.sam import Sam
from samlora.model.samus import base_size, insert_samus, samus_names
from samlora.pixels import MEDSAM, SAMED, Pixels
from samlora.prompting import Prompting


@dataclass(frozen=True)
class System:
    """How a system is built and what of it trains.

    trains: patterns of parameter names, of which a leading "!" takes away what an earlier one gave; or a function that
    names them. variant: the usual one. lora: LoRA on the encoder's blocks; lora_decoder: on the decoder's transformer
    too. insert: puts modules of the system's own into a SAM, by its options. base_size: at which side a base is loaded
    for a model of a side, where these differ. network: a network of samlora.model.baselines instead of a SAM.
    prompts: "none": one mask token per class and background, no prompts; "only": the base's own mask tokens, one mask
    for each prompt; "both": two decoders. pixels: how the system prepares images on SAM's bases; None
    for SAM's own way. On a base that wants its pixels otherwise than SAM's, the base decides.
    objective: what it trains on, a key of samlora.training.objectives.OBJECTIVES.
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
    pixels: Pixels | None = SAMED
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
    "samed_decoder": System(
        summary="SAMed with the image encoder frozen, so that its embeddings can be kept",
        trains=_SEMANTIC_DECODER,
        lora=False,
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
        pixels=None,
    ),
    "sam_lora": System(
        summary="LoRA on q and v of the image encoder alone, SAM's own decoder and prompts",
        trains=_ENCODER_LORA,
        prompts="only",
        pixels=None,
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
        pixels=MEDSAM,
        objective="masks",
        prompting=Prompting("box", box_jitter=20),
    ),
    "medsam_decoder": System(
        summary="MedSAM with the image encoder frozen, so that its embeddings can be kept",
        trains=_PROMPTED_DECODER,
        lora=False,
        prompts="only",
        pixels=MEDSAM,
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
        pixels=None,
        objective="focal_dice_iou",
        prompting=Prompting("pt_box", box_jitter=10, sample_num=2, negative_num=1, max_objects=4, parts=True),
        options={"freeze": ("image_encoder", "prompt_encoder")},
    ),
    "lite_medsam": System(
        summary="LiteMedSAM's fine-tuning: all parts train, with boxes; Dice, cross-entropy and IoU loss",
        # Boxes touch the embeddings of their two corners alone.
        trains=(
            "image_encoder.*",
            "!image_encoder.*head.*",
            "prompt_encoder.point_embeddings.[23].weight",
            "prompt_encoder.no_mask_embed.weight",
            "mask_decoder.*",
            _OTHER_HEADS,
        ),
        variant="lite_medsam",
        lora=False,
        prompts="only",
        pixels=None,
        objective="dice_bce_iou",
        prompting=Prompting("box", box_jitter=5),
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
# The system of adapters without a description that hold LoRA on the encoder and answer prompts.
LORA_ALONE = "sam_lora"
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")  # what the option `freeze` can name


def system_row(name: str) -> System:
    """The row of a system. Raises InputError for an unknown name."""
    if not isinstance(name, str) or name not in SYSTEMS:
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
    """All options of a system: those given and the defaults of its row, as plain data of one form.

    Raises InputError for one it has not, or a value of another type or out of range.
    """
    row = system_row(system)
    for name in given or {}:
        if name not in row.options:
            known = ", ".join(row.options) or "none"
            raise InputError(f"{name}: the system {system} has no such option; it has: {known}")
    options = {name: _plain(name, value) for name, value in {**row.options, **(given or {})}.items()}
    for name, value in options.items():
        possible, allowed = _VALUES[name]
        if not possible(value):
            raise InputError(f"the option {name}={value!r}: give {allowed}")
    if row.lora:
        lora = LoRAOptions(**options)
        options |= {"targets": list(lora.targets), "ranks": [list(pair) for pair in lora.ranks]}
    return options


def _plain(name: str, value: Any) -> Any:
    """An option's value as a file of JSON would give it back; what is wrong with it stays wrong."""
    if name in ("targets", "freeze") and isinstance(value, str):
        return [value]
    if name == "ranks" and isinstance(value, Mapping):  # keys are text in JSON
        return [[int(key) if str(key).isdecimal() else key, rank] for key, rank in value.items()]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)  # YAML reads 1e-2 as text
    return list(value) if isinstance(value, tuple) else value


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _switch(value: Any) -> bool:
    return type(value) is bool


def _some_of(value: Any, known: Iterable[str]) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item in known for item in value)


def _ranks(value: Any) -> bool:
    """Whether these are pairs of a block and its rank, one for a block."""
    if not isinstance(value, list):
        return False
    if not all(isinstance(pair, list | tuple) and [type(item) for item in pair] == [int, int] for pair in value):
        return False
    return len({block for block, _ in value}) == len(value) and all(block >= 0 and rank > 0 for block, rank in value)


# What each option can be, and the words for it. What LoRA's may be together, LoRAOptions says.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": (lambda v: v is None or _number(v) and v > 0, "a number above 0, or leave it out"),
    "rslora": (_switch, "true or false"),
    "dropout": (lambda v: _number(v) and 0 <= v < 1, "a share from 0 to below 1"),
    "dora": (_switch, "true or false"),
    "targets": (lambda v: _some_of(v, TARGETS) and v, f"some of {', '.join(TARGETS)}"),
    "ranks": (_ranks, "a rank of 1 or more for each of some blocks, as [[3, 8], [11, 16]] or {3: 8, 11: 16}"),
    "freeze": (lambda v: _some_of(v, PARTS) and set(v) != set(PARTS), f"one or two of {', '.join(PARTS)}"),
    "ratio": (lambda v: _number(v) and v > 0, "a number above 0, such as 0.25"),
    "scale": (_number, "a number, such as 0.5"),
    "depth": (lambda v: type(v) is int and (v == 0 or v > 1), "0 for 2D, or a whole number of 2 or more slices"),
    "cnn": (_switch, "true or false"),
    "adapters": (_switch, "true or false"),
}


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Makes the parameters `names` train and freezes all others. Raises InputError for a name not there."""
    names = set(names)
    parameters = dict(model.named_parameters())
    if names - parameters.keys():
        raise InputError(f"no parameter {min(names - parameters.keys())} in this model to train")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
