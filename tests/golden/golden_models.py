"""The models behind the reference numbers, and what is computed with them.

Used by tests/test_golden.py, tests/test_lite_medsam.py and benchmarks/gpu.py. The file is loaded by
its path, as inputs.py is: this folder is not a package.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import samlora
from samlora.model.lora import lora_names
from samlora.model.sam import Prompts, Sam, state_shapes
from samlora.model.tensors import read_tensors
from samlora.training.config import TrainConfig
from samlora.training.losses import dice_ce
from samlora.training.schedule import learning_rate
from samlora.training.setup import make_optimizer

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("golden_inputs", HERE / "inputs.py")
inputs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(inputs)

# System, image size in pixels and number of classes of each case of logits.
LOGIT_CASES = (("samed", 224, 8), ("samed", 512, 8), ("samed", 256, 1), ("samed_s", 256, 8))
LITE_CASES = ("ct_abdomen_96", "ct_abdomen_70", "dicom_ct_9", "us_0144", "xray_081")


def write_base(path: Path) -> Path:
    """Writes weights with the names and shapes of Meta's ViT-B to `path`, and returns it."""
    arrays = inputs.base_checkpoint(state_shapes("vit_b"))
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    return path


def golden_model(
    base: Path, system: str, image_size: int, num_classes: int, zero_b: bool = False
) -> Sam:
    """Builds the model of a case by way of an adapter file as SAMed writes it.

    Args:
        base: file that `write_base` wrote; the adapter is written beside it.
        system: samed or samed_s.
        image_size: side of the image, in pixels.
        num_classes: foreground classes.
        zero_b: whether the B factors of LoRA start at zero, as for the training cases.
    """
    model = samlora.build_model(system, base=base, image_size=image_size, num_classes=num_classes)
    state, stock = model.state_dict(), read_tensors(base)[0]
    tensors = {
        short: torch.from_numpy(inputs.lora(short, tuple(state[name].shape), zero_b=zero_b))
        for short, name in lora_names(model).items()
    }
    for name in state:
        skipped = system == "samed_s" and ".transformer." in name
        if name.startswith(("prompt_encoder.", "mask_decoder.")) and not skipped:
            fresh = any(part in name for part in inputs.FRESH_HEADS)
            value = inputs.fresh_head(name, tuple(state[name].shape)) if fresh else stock[name]
            tensors[name] = torch.as_tensor(value)
    path = base.with_name("epoch_159.pth")
    torch.save(tensors, path)
    return samlora.load_model(path, base=base, image_size=image_size)


def golden_image(size: int) -> Tensor:
    """The image of the cases of logits: (1, 3, size, size)."""
    return torch.from_numpy(inputs.image(0, size)).expand(1, 3, -1, -1)


def train_steps(
    model: nn.Module, device: torch.device, steps: int = 8
) -> tuple[list[list[float]], list[float]]:
    """Trains a model as the training cases do.

    Args:
        model: a model of 256 px and three classes, on `device`.
        device: where the images go.
        steps: steps of AdamW.

    Returns:
        The loss, cross-entropy and Dice loss of each step, and the learning rate after each.
    """
    optimizer = make_optimizer(TrainConfig(base_lr=0.001), model, device)
    images = torch.stack(
        [torch.from_numpy(inputs.image(i, 256)).expand(3, -1, -1) for i in (10, 11)]
    ).to(device)
    labels = torch.from_numpy(inputs.train_labels()).to(device)
    losses, rates = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 0.001, 12, warmup_period=3)
        loss, ce, dice = dice_ce(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item(), ce.item(), dice.item()])
        rates.append(learning_rate(step + 1, 0.001, 12, warmup_period=3))
    return losses, rates


@torch.inference_mode()
def lite_answer(
    model: Sam, reference: Mapping[str, np.ndarray], name: str
) -> tuple[Tensor, Tensor]:
    """What LiteMedSAM answers to a case of litemedsam_reference.npz.

    Args:
        model: LiteMedSAM, on any device.
        reference: the arrays of that file.
        name: one of LITE_CASES.

    Returns:
        The embedding (256, 64, 64) and the logits (P, 256, 256), on the model's device.
    """
    device = next(model.parameters()).device
    shown = reference[f"{name}_input"].astype(np.float32)
    height, width = shown.shape[:2]
    square = np.zeros((3, 256, 256), np.float32)
    low, high = shown.min(), shown.max()
    square[:, :height, :width] = np.moveaxis((shown - low) / (high - low), -1, 0)
    boxes = torch.from_numpy(reference[f"{name}_boxes"]).to(device)
    embedding = model.encode(torch.from_numpy(square)[None].to(device))
    first = torch.zeros(len(boxes), dtype=torch.int64, device=device)
    answer = model.answer(embedding, Prompts(boxes=boxes, image_index=first), classes=False)
    return embedding[0], answer.masks[:, 0]
