"""An adapter and its base as one file, LoRA merged (`samlora merge`)."""

from dataclasses import replace
from pathlib import Path

from samlora.errors import InputError
from samlora.model.build import load_model
from samlora.model.checkpoint import MODEL, guess_spec, read_adapter, save_adapter
from samlora.model.config import MergeConfig
from samlora.model.convert import check_output, preparation
from samlora.model.lora import fold
from samlora.model.methods import system_row
from samlora.model.sam import Sam, state_shapes
from samlora.model.tensors import write_pth
from samlora.model.variants import STOCK_MASKS, VARIANTS


def merge_file(config: MergeConfig) -> str:
    """Writes a model with its LoRA merged, whole or not at all.

    A .pth file is a SAM checkpoint as Meta's, for `segment_anything` or the program that the base
    is of. A .safetensors file is a model file of samlora: everything under Meta's names, and the
    adapter's description, so that `samlora.load_model` takes it without a base.

    Args:
        config: the adapter, its base and the output.

    Returns:
        Lines for people: what was written, and what a program that loads it must know.

    Raises:
        MissingFileError: the adapter or its base is not there.
        InputError: the output is there already, or the model has a form that a SAM checkpoint does
            not have.
    """
    for name in ("adapter", "output"):
        if getattr(config, name) is None:
            raise InputError(f"--{name} is missing; give the file of the {name}")
    target = Path(config.output)
    check_output(target, (".safetensors", ".pth"), config.overwrite, "--output")
    tensors, spec = read_adapter(config.adapter)
    if spec is not None and system_row(spec.system).network:
        raise InputError(
            f"--adapter {config.adapter}: a {spec.system} has no base; its file is a whole model "
            f"already"
        )
    base = "default" if config.ckpt is None else config.ckpt
    if target.suffix == ".safetensors":
        return _write_model_file(fold(load_model(config.adapter, base)), target)
    variant = guess_spec(tensors, config.adapter)["variant"] if spec is None else spec.variant
    trained_positions = any("pos_embed" in name or "rel_pos" in name for name in tensors)
    # Where position tables are the base's, they are kept for images of the base's side, which
    # programs expect.
    side = None if trained_positions else VARIANTS[variant].image_size
    return _write_checkpoint(fold(load_model(config.adapter, base, side)), target)


def _write_model_file(model: Sam, target: Path) -> str:
    spec = model.spec
    model.spec = replace(spec, holds=MODEL)
    save_adapter(model, target)
    return (
        f"{target}: model file of samlora, {spec.system} on {spec.variant}, {spec.image_size} px, "
        f"LoRA merged; it is "
        "given as --adapter, or to samlora.load_model, and needs no base"
    )


def _write_checkpoint(model: Sam, target: Path) -> str:
    state, variant = model.state_dict(), model.variant
    stock = state_shapes(variant, model.image_size, STOCK_MASKS)
    other = sorted(
        name for name in state.keys() | stock.keys() if name not in stock or name not in state
    )
    if other or model.num_masks != STOCK_MASKS:
        what = (
            f"has {model.num_masks} masks"
            if model.num_masks != STOCK_MASKS
            else f"has parts such as {other[0]}"
        )
        raise InputError(
            f"--output {target}: a SAM checkpoint has {STOCK_MASKS} masks and SAM's own parts, "
            f"and this model {what}; "
            f"give a name that ends in .safetensors, for a model file of samlora: "
            f"{target.with_suffix('.safetensors')}"
        )
    write_pth(target, state)
    lines = [f"{target}: SAM checkpoint, {variant}, {model.image_size} px, LoRA merged"]
    usual = VARIANTS[variant].image_size
    if model.image_size != usual:
        lines.append(
            f"its position tables were trained at {model.image_size} px; programs that expect "
            f"{usual} px fail"
        )
    return "\n".join([*lines, *preparation(model.spec.pixels, model.spec.system)])
