"""The baseline: stock `segment_anything` modules, textbook LoRA, and every step the way SAMed published it.

fp32, scipy.ndimage per sample, MedPy on whole volumes. After github.com/hitachinsk/SAMed
(sam_lora_image_encoder.py, utils.py, datasets/dataset_synapse.py), written anew on the stock modules.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from medpy.metric import binary
from scipy import ndimage
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from samlora.data.augment import Transform
from samlora.model.build import build_model
from samlora.model.sam import Sam
from samlora.model.variants import EMBED, VARIANTS, WINDOW


class LoRAqkv(nn.Module):
    """SAMed's _LoRA_qkv: a Linear and two low-rank pairs beside it."""

    def __init__(self, qkv: nn.Linear, rank: int):
        super().__init__()
        self.qkv, self.dim = qkv, qkv.in_features
        for name in "qv":
            setattr(self, f"linear_a_{name}", nn.Linear(self.dim, rank, bias=False))
            setattr(self, f"linear_b_{name}", nn.Linear(rank, self.dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        new_q = self.linear_b_q(self.linear_a_q(x))
        new_v = self.linear_b_v(self.linear_a_v(x))
        qkv[:, :, :, : self.dim] += new_q
        qkv[:, :, :, -self.dim :] += new_v
        return qkv


class PlainSam(nn.Module):
    """Stock image encoder with LoRA, prompt encoder and mask decoder; forward as SAMed's, without prompts."""

    def __init__(self, variant: str, image_size: int, num_masks: int, rank: int):
        super().__init__()
        self.image_size, row = image_size, VARIANTS[variant]
        grid = image_size // row.stride
        self.image_encoder = ImageEncoderViT(
            img_size=image_size, embed_dim=row.width, depth=row.depth, num_heads=row.heads, use_rel_pos=True,
            window_size=WINDOW, global_attn_indexes=row.global_blocks, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
        self.image_encoder.requires_grad_(False)
        for block in self.image_encoder.blocks:
            block.attn.qkv = LoRAqkv(block.attn.qkv, rank)
        self.prompt_encoder = PromptEncoder(EMBED, (grid, grid), (image_size, image_size), mask_in_chans=16)
        self.mask_decoder = MaskDecoder(
            num_multimask_outputs=num_masks - 1,
            transformer=TwoWayTransformer(depth=2, embedding_dim=EMBED, mlp_dim=2048, num_heads=8),
            transformer_dim=EMBED,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Low-resolution logits (B, C, S/4, S/4), and the same enlarged to S; SAMed computes both in training too."""
        embeddings = self.image_encoder(images)
        sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
        logits, _ = self.mask_decoder.predict_masks(embeddings, self.prompt_encoder.get_dense_pe(), sparse, dense)
        size = (self.image_size, self.image_size)
        return logits, F.interpolate(logits, size, mode="bilinear", align_corners=False)


def random_system(variant: str, image_size: int, num_classes: int, rank: int = 4) -> Sam:
    """samlora's `samed` with random weights, also where training would begin at zero, so that nothing can hide."""
    torch.manual_seed(0)  # LoRA's A is drawn from it
    model = build_model("samed", "random:0", variant, image_size, num_classes, rank)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("rel_pos", "pos_embed", "linear_b_")):
            nn.init.normal_(parameter, std=0.02)
    return model


def plain_copy(model: Sam) -> PlainSam:
    """The baseline with the weights of `model`."""
    spec = model.spec
    plain = PlainSam(spec.variant, spec.image_size, model.num_masks, spec.rank)
    state = {}
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition("attn.qkv.")
        inside = stem and leaf in ("weight", "bias")
        state[f"{stem}attn.qkv.qkv.{leaf}" if inside else name] = tensor
    plain.load_state_dict(state)
    return plain


def dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """SAMed's calc_loss: 0.2 cross-entropy + 0.8 Dice, class by class."""
    cross_entropy = F.cross_entropy(logits, labels.long())
    probability = torch.softmax(logits, dim=1)
    classes = logits.shape[1]
    dice = 0.0
    for index in range(classes):
        score, target = probability[:, index], (labels == index).float()
        overlap, sizes = torch.sum(score * target), torch.sum(score * score) + torch.sum(target * target)
        dice = dice + 1 - (2 * overlap + 1e-5) / (sizes + 1e-5)
    return 0.2 * cross_entropy + 0.8 * dice / classes


def load_sample(path: Path, transform: Transform, side: int) -> tuple[Tensor, Tensor]:
    """A slice read, turned and zoomed by scipy: image (3, S, S) and low-resolution label (S/4, S/4)."""
    with np.load(path, allow_pickle=False) as data:
        image, label = data["image"], data["label"]
    if transform.angle:
        image, label = (ndimage.rotate(x, transform.angle, order=0, reshape=False) for x in (image, label))
    elif transform.flip_axis is not None:
        image, label = (np.flip(np.rot90(x, transform.quarter_turns), transform.flip_axis) for x in (image, label))
    height, width = image.shape
    if (height, width) != (side, side):
        image = ndimage.zoom(image, (side / height, side / width), order=3)
        label = ndimage.zoom(label, (side / height, side / width), order=0)
    low = ndimage.zoom(label, (0.25, 0.25), order=0)
    image = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
    return image.expand(3, -1, -1).contiguous(), torch.from_numpy(low.astype(np.int64))


def samed_measures(prediction: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """SAMed's calculate_metric_percase: Dice and HD95 in voxels of two masks (utils.py)."""
    prediction, reference = prediction.copy(), reference.copy()
    prediction[prediction > 0] = 1
    reference[reference > 0] = 1
    if prediction.sum() > 0 and reference.sum() > 0:
        return binary.dc(prediction, reference), binary.hd95(prediction, reference)
    return (1, 0) if prediction.sum() > 0 else (0, 0)


@torch.no_grad()
def predict_slice(model: PlainSam, image: np.ndarray, input_size: int) -> np.ndarray:
    """The labels of one slice (H, W), as SAMed's test_single_volume finds them (utils.py)."""
    shape, side = image.shape, model.image_size
    for target in (input_size, side):
        if image.shape != (target, target):
            image = ndimage.zoom(image, (target / image.shape[0], target / image.shape[1]), order=3)
    inputs = torch.from_numpy(image)[None, None].float().repeat(1, 3, 1, 1)
    labels = torch.argmax(torch.softmax(model(inputs)[1], dim=1), dim=1).squeeze(0).numpy()
    if labels.shape != shape:
        labels = ndimage.zoom(labels, (shape[0] / side, shape[1] / side), order=0)
    return labels
