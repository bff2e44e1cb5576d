"""Networks trained from scratch, to compare with: MONAI's, behind the same contract as `Sam`.

Five take slices. They compute at full resolution, and so are their logits (`logit_stride` 1, where SAM's is 4). V-Net
takes patches of volumes (`volumetric`); `volume_logits` slides it over a whole one. Sizes are those of the papers where
these state them. None knows prompts or a base; weights start as MONAI starts them, from torch's random numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from samlora.errors import InputError
from samlora.pixels import SAMED


@dataclass(frozen=True)
class Network:
    """How one is built: build(image_size, num_masks, in_channels).

    multiple: of which the image side must be one, and at least two: normalization needs more than one pixel.
    einops: whether MONAI needs that package for it. volumetric: whether it takes patches of volumes.
    """

    summary: str
    multiple: int
    build: Callable[[int, int, int], nn.Module]
    einops: bool = False
    volumetric: bool = False


def _unet(image_size: int, num_masks: int, in_channels: int) -> nn.Module:
    from monai.networks.nets import DynUNet

    widths = (32, 64, 128, 256, 512, 512)  # nnU-Net doubles from 32 and stops at 512 in 2D
    strides = (1, 2, 2, 2, 2, 2)
    return DynUNet(
        spatial_dims=2,
        in_channels=in_channels,
        out_channels=num_masks,
        kernel_size=[3] * len(widths),
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=widths,
        norm_name=("INSTANCE", {"affine": True}),
    )


def _attention_unet(image_size: int, num_masks: int, in_channels: int) -> nn.Module:
    from monai.networks.nets import AttentionUnet

    return AttentionUnet(2, in_channels, num_masks, channels=(64, 128, 256, 512, 1024), strides=(2, 2, 2, 2))


def _segresnet(image_size: int, num_masks: int, in_channels: int) -> nn.Module:
    from monai.networks.nets import SegResNet

    return SegResNet(2, init_filters=32, in_channels=in_channels, out_channels=num_masks, dropout_prob=0.2)


def _unetr(image_size: int, num_masks: int, in_channels: int) -> nn.Module:
    from monai.networks.nets import UNETR

    network = UNETR(in_channels, num_masks, image_size, feature_size=16, spatial_dims=2)
    for block in network.vit.blocks:
        block.norm_cross_attn = nn.Identity()  # never called; parameters without gradients stall DDP
    return network


def _swin_unetr(image_size: int, num_masks: int, in_channels: int) -> nn.Module:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(in_channels, num_masks, feature_size=48, spatial_dims=2)


def _vnet(image_size: int, num_masks: int, in_channels: int) -> nn.Module:
    from monai.networks.nets import VNet

    if 16 % in_channels:  # its first layer adds the image, repeated, to 16 channels
        raise InputError(
            f"{in_channels} channels are not possible for vnet, which takes 1, 2, 4, 8 or 16; prepare the data with "
            "other channels in the recipe"
        )
    return VNet(3, in_channels, num_masks)


BASELINES = {
    "unet": Network("U-Net (arXiv 1505.04597) in the form of nnU-Net (arXiv 1809.10486), 32 to 512 wide", 32, _unet),
    "attention_unet": Network("Attention U-Net (arXiv 1804.03999), 64 to 1024 wide", 16, _attention_unet),
    "segresnet": Network("SegResNet (arXiv 1810.11654) without the autoencoder, 32 to 256 wide", 8, _segresnet),
    "unetr": Network("UNETR (arXiv 2103.10504): ViT-B of patches of 16, 16 features", 16, _unetr, einops=True),
    "swin_unetr": Network("Swin UNETR (arXiv 2201.01266), 48 features", 32, _swin_unetr, einops=True),
    "vnet": Network("V-Net (arXiv 1606.04797) on patches twice as wide as deep", 32, _vnet, volumetric=True),
}


class Baseline(nn.Module):
    """A network of slices: images (B, C, S, S) -> logits (B, num_masks, S, S).

    logit_stride: pixels of the image per pixel of the logits. volumetric: whether it takes patches of volumes instead.
    """

    volumetric = False
    logit_stride = 1
    chunk = 1  # slices that must go in together, see samlora.model.sam.Sam
    pixels = SAMED

    def __init__(self, name: str, image_size: int, num_masks: int, in_channels: int):
        super().__init__()
        self.name, self.image_size, self.num_masks, self.in_channels = name, image_size, num_masks, in_channels
        self.network = BASELINES[name].build(image_size, num_masks, in_channels)

    @property
    def logit_side(self) -> int:
        """Side of the logits in pixels."""
        return self.image_size // self.logit_stride

    @property
    def fill(self) -> tuple[float, ...]:
        """What images are padded with, one value a channel."""
        return (0.0,) * self.in_channels

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, S, S) or (C, D, S, S): shape of one input."""
        return self.in_channels, self.image_size, self.image_size

    def forward(self, images: Tensor, prompts: object = None, embeddings: object = None) -> Tensor:
        """images: (B, *input_shape) -> logits (B, num_masks, *input_shape[1:]). The other arguments are ignored.

        Raises InputError for images of another shape.
        """
        if images.shape[1:] != self.input_shape:
            raise InputError(
                f"images of shape {tuple(images.shape)} do not fit this {self.name}, which takes "
                f"(batch, {', '.join(map(str, self.input_shape))}); resize them or build it with another image_size"
            )
        return self.network(images)


class VolumeBaseline(Baseline):
    """A network of patches: (B, C, S/2, S, S) -> logits (B, num_masks, S/2, S, S), axes (depth, row, column).

    roi: (S/2, S, S); with S = 128 V-Net's own 64 x 128 x 128 voxels, there of 1.5 x 1 x 1 mm.
    """

    volumetric = True

    @property
    def roi(self) -> tuple[int, int, int]:
        return self.image_size // 2, self.image_size, self.image_size

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.in_channels, *self.roi


def check_baseline(name: str, image_size: int, num_masks: int, in_channels: int | None = None) -> int:
    """Raises InputError for what `build_baseline` cannot build; returns the channels of its images."""
    if name not in BASELINES:
        raise InputError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    row = BASELINES[name]
    step = row.multiple
    if image_size < 2 * step or image_size % step:
        raise InputError(
            f"image size {image_size} is not possible for {name}, which takes multiples of {step} from {2 * step} on; "
            f"try {max(2, round(image_size / step)) * step}"
        )
    in_channels = (1 if row.volumetric else 3) if in_channels is None else in_channels
    if in_channels < 1 or num_masks < 1:
        raise InputError(f"{in_channels} channels and {num_masks} masks are not possible; give 1 or more of each")
    if row.einops and find_spec("einops") is None:
        raise InputError(f"{name} needs the package einops; install it with: pip install samlora[baselines]")
    return in_channels


def build_baseline(name: str, image_size: int, num_masks: int, in_channels: int | None = None) -> Baseline:
    """Builds a network with random weights; torch.manual_seed decides them.

    name: a key of BASELINES. image_size: S, side of a slice, or of a patch. num_masks: classes and background.
    in_channels: of the images; None for 3, as slices come, or 1 for patches.
    Raises InputError for an unknown name, a size or number of channels that the network cannot take, or a package
    that is missing.
    """
    in_channels = check_baseline(name, image_size, num_masks, in_channels)
    kind = VolumeBaseline if BASELINES[name].volumetric else Baseline
    return kind(name, image_size, num_masks, in_channels)


@torch.inference_mode()
def volume_logits(
    model: VolumeBaseline,
    volumes: Tensor,
    overlap: float = 0.5,
    batch_size: int = 1,
    gather: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Logits of whole volumes: patches that overlap by `overlap` of their side, blended with Gaussian weights.

    model: in evaluation mode; an average of models (samlora.inference.ensemble) will do. volumes: (B, C, D, H, W) on
    the model's device, of any size; smaller than a patch they are padded with 0 and cut again. batch_size: patches per
    forward pass. gather: device on which the logits are put together, None for the volumes' own; "cpu" where those of
    a whole volume do not fit. progress: called with the number of patches done, after each pass.
    Returns (B, num_masks, D, H, W), float32. Raises InputError for volumes of other channels, or an impossible overlap.
    """
    from monai.inferers import sliding_window_inference

    if volumes.ndim != 5 or volumes.shape[1] != model.in_channels:
        raise InputError(
            f"volumes of shape {tuple(volumes.shape)} do not fit this {model.name}, which takes (batch, "
            f"{model.in_channels}, depth, height, width)"
        )
    if not 0 <= overlap < 1:
        raise InputError(f"overlap {overlap} is not possible; give a share from 0 to below 1")

    def logits_of(patches: Tensor) -> Tensor:
        logits = model(patches).float()
        if progress:
            progress(len(patches))
        return logits

    return sliding_window_inference(volumes, model.roi, batch_size, logits_of, overlap, mode="gaussian", device=gather)
