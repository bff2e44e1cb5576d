"""The options of the commands that look at adapters and rewrite them."""

from dataclasses import dataclass

from samlora.options import option

FORMATS = ("samlora", "samed", "sam_lora", "peft")


@dataclass(frozen=True)
class InfoConfig:
    """What `samlora info` shows, and how."""

    systems: bool = option(
        False, "list the systems with their options instead of looking at a file"
    )
    json: bool = option(False, "print JSON")


@dataclass(frozen=True)
class ConvertConfig:
    """All of a conversion but its two paths."""

    to: str | None = option(
        None,
        "samlora: safetensors with a description; samed: SAMed's .pth; sam_lora: only LoRA "
        "factors, safetensors; "
        "peft: a folder for Hugging Face's peft and transformers",
        FORMATS,
    )
    ckpt: str | None = option(
        None,
        "base weights, where they are needed (default: checkpoints/ file of the adapter's variant)",
    )
    img_size: int | None = option(
        None, "side of the images in pixels, for adapters that do not say it (default 512)"
    )
    overwrite: bool = option(False, "replace OUT where it is there already")


@dataclass(frozen=True)
class MergeConfig:
    """All of a merge."""

    adapter: str | None = option(None, "the adapter")
    ckpt: str | None = option(
        None, "base weights (default: checkpoints/ file of the adapter's variant)"
    )
    output: str | None = option(
        None,
        ".pth: a SAM checkpoint as Meta's; .safetensors: a model file of samlora, which every "
        "system fits into",
    )
    overwrite: bool = option(False, "replace OUT where it is there already")
