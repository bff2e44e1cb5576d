"""Pretrains the `vit_ti` demo base on procedurally drawn images only; nothing is read but this script.

Two kinds of scenes, drawn anew for every batch. "Worlds": sixteen random arrangements of organ-like shapes
in a body, fixed by the seed, deformed and recoloured from image to image, whose eight organs have to be
named. "Tissues": random shapes over Voronoi cells, whose texture has to be named. Each step asks for masks
of objects prompted by points and boxes (SAM's task) and for the names (SAMed's task, through SAM's own mask
decoder, with tokens that are thrown away afterwards).

    python checkpoints/pretrain_demo.py --minutes 60 --output checkpoints/sam_vit_ti_demo.safetensors
"""

import argparse
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from samlora.model.checkpoint import resize_positions
from samlora.model.sam import VARIANTS, WINDOW, Sam, build_sam
from samlora.model.tensors import write_tensors

WORLDS = 16
ORGANS = 8  # named shapes per world; as many textures with names in the tissue scenes
TISSUES = WORLDS  # the index of the naming task of tissue scenes
BODY, BONES, STRAYS, DETAILS = 3, 3, 7, 3  # shapes without a name: body layers, bright fixed, random, tiny
SHAPES = BODY + BONES + STRAYS + ORGANS + DETAILS
FIRST_ORGAN = BODY + BONES + STRAYS
CELLS = 12  # Voronoi cells of a tissue scene; their object numbers follow those of the shapes
OBJECTS = 1 + SHAPES + CELLS  # 0 is what no shape covers
PIXEL_MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1) / 255
PIXEL_STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1) / 255
PLANES = {  # columns of the shape tables: what `draw` reads, in units of half an image
    name: i for i, name in enumerate(
        ("x", "y", "rx", "ry", "turn", "square", "hole", "bite_x", "bite_y", "bite", "wobble", "field"))
}


def between(low: float, high: float, *shape: int) -> Tensor:
    """Uniform random numbers of a shape."""
    return torch.empty(shape).uniform_(low, high)


def clouds(batch: int, channels: int, cells: int, size: int) -> Tensor:
    """Smooth random fields (batch, channels, size, size), about unit variance, `cells` bumps per side."""
    return F.interpolate(torch.randn(batch, channels, cells, cells), (size, size), mode="bicubic") * 1.3


def random_shapes(batch: int, count: int, smallest: float, largest: float) -> Tensor:
    """A table (batch, count, len(PLANES)) of shapes anywhere: ellipses, boxes, rings, crescents, lobes."""
    radius = smallest * (largest / smallest) ** torch.rand(batch, count)
    stretch = torch.exp(between(-0.6, 0.6, batch, count))
    columns = {
        "x": between(-0.95, 0.95, batch, count), "y": between(-0.95, 0.95, batch, count),
        "rx": radius * stretch, "ry": radius / stretch, "turn": between(0, 3.14, batch, count),
        "square": torch.rand(batch, count) ** 2,
        "hole": (torch.rand(batch, count) < 0.12) * between(0.4, 0.85, batch, count),
        "bite_x": between(-1.2, 1.2, batch, count), "bite_y": between(-1.2, 1.2, batch, count),
        "bite": (torch.rand(batch, count) < 0.25) * between(0.2, 0.8, batch, count),
        "wobble": between(0, 0.35, batch, count),
        "field": torch.randint(0, 4, (batch, count)).float(),
    }
    return torch.stack([columns[name] for name in PLANES], dim=-1)


def far_apart(count: int, x: float, y: float, gap: float) -> Tensor:
    """`count` random points (count, 2) in the ellipse of half-axes x and y, `gap` apart while room lasts."""
    points: list[Tensor] = []
    while len(points) < count:
        point = between(-1, 1, 2)
        if point.norm() < 1:
            point = point * torch.tensor([x, y])
            if all((point - other).norm() > gap for other in points):
                points.append(point)
            gap *= 0.995
    return torch.stack(points)


class Worlds:
    """The sixteen arrangements: tables of shapes, gray levels, textures and extents along the third axis."""

    def __init__(self) -> None:
        self.shapes = random_shapes(WORLDS, SHAPES, 0.09, 0.3)
        self.levels = between(0.25, 0.95, WORLDS, SHAPES)
        self.textures = torch.randint(0, 8, (WORLDS, SHAPES))
        self.middle, self.extent = torch.rand(WORLDS, SHAPES), between(0.3, 0.9, WORLDS, SHAPES)
        self.extent[:, :FIRST_ORGAN] = 9.0  # only organs end somewhere along the third axis
        self.outside = torch.where(torch.rand(WORLDS) < 0.8, 0.0, 0.9)
        column = PLANES
        for world in range(WORLDS):
            table = self.shapes[world]
            x, y = float(between(0.75, 0.97, 1)), float(between(0.55, 0.9, 1))
            for layer, size in enumerate((1.0, float(between(0.86, 0.96, 1)), float(between(0.7, 0.84, 1)))):
                table[layer, :] = 0
                table[layer, column["rx"]], table[layer, column["ry"]] = x * size, y * size
                table[layer, column["square"]], table[layer, column["wobble"]] = 0.3, 0.05
            self.levels[world, :BODY] = torch.tensor([0.12, 0.5, 0.12]) + between(-0.1, 0.15, 3)
            self.levels[world, BODY:BODY + BONES] = between(0.9, 1.3, BONES)
            places = far_apart(ORGANS + BONES, 0.72 * x, 0.72 * y, 0.4)
            table[BODY:BODY + BONES, :2] = places[:BONES]
            table[BODY:BODY + BONES, column["rx"]:column["ry"] + 1] *= 0.6
            table[FIRST_ORGAN:FIRST_ORGAN + ORGANS, :2] = places[BONES:]
            for pair in range(FIRST_ORGAN, FIRST_ORGAN + 2 * (world % 3), 2):  # twins: only the side tells
                table[pair + 1] = table[pair]
                table[pair + 1, column["x"]] *= -1
                table[pair + 1, column["turn"]] *= -1
                table[pair, column["x"]] += 0.2 * (1 if table[pair, column["x"]] > 0 else -1)
                self.levels[world, pair + 1] = self.levels[world, pair]
                self.textures[world, pair + 1] = self.textures[world, pair]


def draw(table: Tensor, ground: Tensor, size: int, upright: Tensor) -> Tensor:
    """Object numbers (batch, size, size): shapes of the table in order over the ground, on a warped plane.

    Where `upright` (batch,), the plane keeps its orientation up to 20 degrees; elsewhere it is also flipped
    and turned by quarters, as SAMed's augmentation does.
    """
    batch = len(table)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    quarter = torch.where(upright, 0, torch.randint(0, 4, (batch,))) * (torch.pi / 2)
    mirror = torch.where(upright | (torch.rand(batch) < 0.5), 1.0, -1.0)
    turn = between(-0.2, 0.2, batch) + quarter
    zoom, shift = torch.exp(between(-0.2, 0.25, batch)), between(-0.12, 0.12, 2, batch)
    cosine, sine = (turn.cos() * zoom).view(-1, 1, 1), (turn.sin() * zoom).view(-1, 1, 1)
    bend = clouds(batch, 2, 5, size) * between(0, 0.06, batch, 1, 1, 1)
    u = (cosine * axis + sine * axis[:, None] + shift[0].view(-1, 1, 1)) * mirror.view(-1, 1, 1) + bend[:, 0]
    v = cosine * axis[:, None] - sine * axis + shift[1].view(-1, 1, 1) + bend[:, 1]
    fields, rows = clouds(batch, 4, 9, size), torch.arange(batch)
    plane = ground
    for number in range(table.shape[1]):
        x0, y0, rx, ry, angle, square, hole, bite_x, bite_y, bite, wobble, field = (
            column.view(-1, 1, 1) for column in table[:, number].unbind(-1))
        x, y = u - x0, v - y0
        a = (x * (angle.cos() / rx)).addcmul_(y, angle.sin() / rx)
        b = (y * (angle.cos() / ry)).addcmul_(x, -angle.sin() / ry)
        aa, bb = a * a, b * b
        inside = torch.lerp(aa + bb, torch.maximum(aa, bb), square)
        inside.addcmul_(fields[rows, field.flatten().long()], wobble)
        covers = (inside < 1) & (inside > hole * hole - 0.5 * (hole == 0))
        if (bite > 0).any():
            covers &= (a - bite_x).square_().add_((b - bite_y).square_()) >= bite
        plane = plane.masked_fill(covers, number + 1)
    return plane


def voronoi(batch: int, size: int) -> Tensor:
    """Object numbers (batch, size, size) of random cells with wavy borders."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    bend = clouds(batch, 2, 7, size) * 0.08
    u, v = axis + bend[:, 0], axis[:, None] + bend[:, 1]
    seeds = between(-1.1, 1.1, CELLS, 2, batch, 1, 1)
    nearest, cell = torch.full((batch, size, size), 99.0), torch.zeros(batch, size, size, dtype=torch.long)
    for number, (x, y) in enumerate(seeds):
        distance = (u - x).square_().add_((v - y).square_())
        cell.masked_fill_(distance < nearest, number)
        nearest = torch.minimum(nearest, distance)
    return cell + 1 + SHAPES


def textures(batch: int, size: int) -> Tensor:
    """Eight kinds of texture (batch, 8, size, size), about unit variance; the first is none."""
    axis = torch.linspace(-1, 1, size)
    grain = torch.randn(batch, 1, size, size)
    middle, coarse = clouds(batch, 2, size // 4, size), clouds(batch, 2, size // 10, size)
    turn, pitch = between(0, 3.14, 2, batch, 1, 1), between(20, 60, 2, batch, 1, 1) * (size / 256)
    pitch = pitch * torch.tensor([1.6, 0.7]).view(2, 1, 1, 1)
    wave = [((t.cos() * axis + t.sin() * axis[:, None]) * p + 0.8 * coarse[:, i]).sin() * 1.3
            for i, (t, p) in enumerate(zip(turn, pitch, strict=True))]
    return torch.cat([
        torch.zeros_like(grain), grain, middle[:, :1], coarse[:, :1], wave[0][:, None], wave[1][:, None],
        (middle[:, 1:] > 0.9) * 2.0, 1 - coarse[:, 1:].abs() * 2], dim=1)


def paint(plane: Tensor, levels: Tensor, kinds: Tensor, strength: Tensor) -> Tensor:
    """Images (batch, 3, size, size) in 0..1: levels and textures of the objects, then a camera's faults."""
    batch, size = len(plane), plane.shape[-1]
    flat = plane.view(batch, -1)
    kind = kinds.gather(1, flat).view(batch, 1, size, size)
    image = levels.gather(1, flat).view(batch, 1, size, size)
    contrast = strength.gather(1, flat).view(batch, 1, size, size)
    image = image + textures(batch, size).gather(1, kind) * contrast
    for _ in range(2):  # partial volume: no pixel border is sharp in a CT, few are wider than two pixels
        soft = F.pad(image, (1, 1, 1, 1), mode="replicate")
        soft = (soft[..., :-2] + soft[..., 2:]) / 4 + soft[..., 1:-1] / 2  # a convolution is 20 times slower
        soft = (soft[..., :-2, :] + soft[..., 2:, :]) / 4 + soft[..., 1:-1, :] / 2
        image = torch.lerp(image, soft, torch.rand(batch, 1, 1, 1))
    image = image * (1 + clouds(batch, 1, 3, size) * between(0, 0.08, batch, 1, 1, 1))
    noise = torch.lerp(torch.randn(batch, 1, size, size), clouds(batch, 1, size // 3, size), 0.5)
    image = image + noise * 0.16 * torch.rand(batch, 1, 1, 1) ** 2
    image = (image * between(0.8, 1.2, batch, 1, 1, 1) + between(-0.08, 0.08, batch, 1, 1, 1)).clamp_(0, 1)
    image = image ** torch.exp(between(-0.3, 0.3, batch, 1, 1, 1))
    tint = torch.where(torch.rand(batch, 1, 1, 1) < 0.15, between(0.5, 1.0, batch, 3, 1, 1), 1.0)
    return image * tint


def scenes(worlds: Worlds, batch: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (batch, 3, size, size), object numbers and names (batch, size, size), naming task (batch,)."""
    task = torch.where(torch.rand(batch) < 0.65, torch.randint(0, WORLDS, (batch,)), TISSUES)
    tissue, world = task == TISSUES, task.clamp(max=WORLDS - 1)
    anywhere = random_shapes(batch, SHAPES, 0.06, 0.5)
    order = (anywhere[..., PLANES["rx"]] * anywhere[..., PLANES["ry"]]).argsort(dim=1, descending=True)
    anywhere = anywhere.gather(1, order[..., None].expand_as(anywhere))  # large first: small ones stay seen
    anywhere[:, :, 0] += 9.0 * (torch.rand(batch, SHAPES) < 0.4)  # out of the picture
    fixed = worlds.shapes[world]
    fixed[..., :2] += 0.03 * torch.randn(batch, SHAPES, 2)
    grow = torch.exp(0.13 * torch.randn(batch, SHAPES, 2))
    height = ((torch.rand(batch, 1) - worlds.middle[world]) / worlds.extent[world]).abs()
    slim = (1 - height.clamp(max=1).square()).sqrt().clamp(min=1e-3)[..., None]
    fixed[..., 2:4] *= grow * torch.where(slim > 0.25, slim, 1e-3)
    fixed[..., PLANES["turn"]] += 0.15 * torch.randn(batch, SHAPES)
    fixed[..., PLANES["field"]] = torch.randint(0, 4, (batch, SHAPES)).float()
    strays, details = slice(BODY + BONES, FIRST_ORGAN), slice(SHAPES - DETAILS, SHAPES)
    fixed[:, strays] = random_shapes(batch, STRAYS, 0.04, 0.16)
    fixed[:, details] = random_shapes(batch, DETAILS, 0.015, 0.04)
    fixed[:, strays, :2] *= 0.65
    fixed[:, details, :2] *= 0.65
    table = torch.where(tissue.view(-1, 1, 1), anywhere, fixed)

    levels, kinds = worlds.levels[world], worlds.textures[world]
    lure = torch.randint(FIRST_ORGAN, FIRST_ORGAN + ORGANS, (batch, STRAYS))
    levels[:, strays] = levels.gather(1, lure)  # strays look like organs, so place and shape must count
    kinds[:, strays] = kinds.gather(1, lure)
    levels = levels + 0.05 * torch.randn(batch, SHAPES)
    levels = torch.where(tissue[:, None], torch.rand(batch, SHAPES), levels)
    kinds = torch.where(tissue[:, None], torch.randint(0, 8, (batch, SHAPES)), kinds)
    outside = torch.where(tissue, torch.rand(batch), worlds.outside[world])[:, None]
    levels = torch.cat([outside, levels, torch.rand(batch, CELLS)], dim=1)
    cells = torch.randint(0, 8, (batch, CELLS))
    kinds = torch.cat([torch.zeros(batch, 1, dtype=torch.long), kinds, cells], dim=1)
    strength = torch.where(
        tissue[:, None], between(0.05, 0.2, batch, OBJECTS), between(0.0, 0.09, batch, OBJECTS))

    ground = torch.where(tissue.view(-1, 1, 1), voronoi(batch, size), 0)
    plane = draw(table, ground, size, torch.rand(batch) < 0.5)
    names = torch.zeros(batch, OBJECTS, dtype=torch.long)
    names[:, 1 + FIRST_ORGAN:1 + FIRST_ORGAN + ORGANS] = torch.arange(1, ORGANS + 1)
    names = torch.where(tissue[:, None], kinds, names)
    names = names.gather(1, plane.view(batch, -1)).view_as(plane)
    return paint(plane, levels, kinds, strength), plane, names, task


def prompts(plane: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Objects to ask for, from object numbers at a quarter of the size (batch, h, w).

    Returns masks (P, h, w), a point inside each (P, 1, 2) and its box (P, 4) in image pixels (x, y), and the
    image each belongs to (P,).
    """
    batch, height, width = plane.shape
    ones = torch.ones(batch, height * width)
    areas = torch.zeros(batch, OBJECTS).scatter_add_(1, plane.view(batch, -1), ones)
    weight = ((areas >= 10) & (areas < 0.6 * height * width)).float() + 1e-6
    weight[:, 0] = 1e-9
    weight[:, 1:1 + BODY] *= 0.2  # the body's layers are large and dull
    chosen = torch.multinomial(weight, count).view(-1)
    image = torch.arange(batch).repeat_interleave(count)
    keep = areas[image, chosen] >= 10
    image, chosen = image[keep], chosen[keep]
    masks = plane[image] == chosen.view(-1, 1, 1)
    spot = torch.multinomial(masks.flatten(1).float(), 1)
    points = torch.cat([spot % width, spot // width], dim=1).float() * 4 + between(0, 4, len(spot), 2)
    edges = []
    for line in (masks.any(1), masks.any(2)):  # columns give x, rows give y
        low = line.float().argmax(1)
        edges += [low, line.shape[1] - line.flip(1).float().argmax(1)]
    boxes = torch.stack([edges[0], edges[2], edges[1], edges[3]], dim=1).float() * 4
    side = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + torch.randn_like(boxes) * 0.06 * side
    return masks.float(), points[:, None], boxes, image


class Naming(nn.Module):
    """The naming tasks: tokens of our own in SAM's mask decoder, and a linear reading of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(WORLDS + 1, ORGANS + 1, 256) * 0.5)
        self.linear = nn.Parameter(torch.randn(WORLDS + 1, ORGANS + 1, 256) * 0.02)
        self.mlp = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 32))

    def forward(self, sam: nn.Module, embeddings: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, ORGANS + 1, S/4, S/4) and (B, ORGANS + 1, S/16, S/16) for the task of each image."""
        decoder, prompt = sam.mask_decoder, sam.prompt_encoder
        batch, _, height, width = embeddings.shape
        tokens = torch.cat([decoder.iou_token.weight.expand(batch, 1, -1), self.tokens[task]], dim=1)
        source = embeddings + prompt.no_mask_embed.weight.view(1, -1, 1, 1)
        places = prompt.get_dense_pe().expand(batch, -1, -1, -1)
        tokens, source = decoder.transformer(source, places, tokens)
        fine = decoder.output_upscaling(source.transpose(1, 2).reshape(batch, -1, height, width))
        logits = torch.einsum("bkc,bchw->bkhw", self.mlp(tokens[:, 1:]), fine)
        return logits, torch.einsum("bkc,bchw->bkhw", self.linear[task], embeddings)


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy plus Dice loss of logits (P, N, h, w) against masks (P, h, w), for each of (P, N)."""
    target = masks[:, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = entropy * (1 - torch.exp(-entropy.detach())).sqrt()  # borders count more than easy background
    odds = logits.sigmoid()
    dice = 1 - (2 * (odds * target).sum((2, 3)) + 1) / (odds.sum((2, 3)) + target.sum((2, 3)) + 1)
    return 2 * focal.mean((2, 3)) + dice


def step_losses(sam: nn.Module, naming: Naming, batch: tuple[Tensor, ...], kind: int, count: int, device: str
                ) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch of scenes and its readings; kind 0 prompts by points, 1 by boxes, 2 by both."""
    images, plane, names, task = batch
    plane, names = plane[:, 2::4, 2::4].contiguous(), names[:, 2::4, 2::4].to(device)
    masks, points, boxes, image = (tensor.to(device) for tensor in prompts(plane, count))
    scaled = torch.where((torch.arange(len(images)) % 2 == 0).view(-1, 1, 1, 1),
                         images, (images - PIXEL_MEAN) / PIXEL_STD).to(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        embeddings = sam.image_encoder(scaled)
        ones = torch.ones(points.shape[:2], dtype=torch.int, device=device)
        sparse, dense = sam.prompt_encoder(
            points=None if kind == 1 else (points, ones), boxes=None if kind == 0 else boxes, masks=None)
        logits, quality = sam.decode(embeddings, sparse, dense, image)
        named, coarse = naming(sam, embeddings, task.to(device))
    logits, quality, named, coarse = logits.float(), quality.float(), named.float(), coarse.float()

    losses = mask_loss(logits, masks)
    best, which = losses[:, 1:].min(dim=1)
    with torch.no_grad():
        found = logits > 0
        wanted = masks[:, None] > 0.5
        iou = (found & wanted).sum((2, 3)) / (found | wanted).sum((2, 3)).clamp(min=1)
        one_hot = F.one_hot(names, ORGANS + 1).permute(0, 3, 1, 2).float()
    guess = named.softmax(1)
    overlap, total = (guess * one_hot).sum((2, 3)), (guess + one_hot).sum((2, 3))
    dice = ((2 * overlap + 1) / (total + 1))[one_hot.sum((2, 3)) > 0].mean()
    name_loss = F.cross_entropy(named, names) + 1 - dice
    linear_loss = F.cross_entropy(coarse, F.avg_pool2d(one_hot, 4))
    loss = losses[:, 0].mean() + best.mean() + (quality - iou).square().mean() + 2 * name_loss + linear_loss
    return loss, {
        "loss": loss.item(), "iou_single": iou[:, 0].mean().item(),
        "iou_best": iou[:, 1:].gather(1, which[:, None]).mean().item(),
        "name": name_loss.item(), "name_dice": dice.item(), "linear": linear_loss.item()}


def resize_windows(state: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Cuts the windowed blocks' position tables down to their middle `rows`, or fills them up with zeros."""
    resized = dict(state)
    for index in set(range(VARIANTS["vit_ti"].depth)) - set(VARIANTS["vit_ti"].global_blocks):
        for axis in "hw":
            name = f"image_encoder.blocks.{index}.attn.rel_pos_{axis}"
            margin = (rows - len(state[name])) // 2  # negative where rows are cut
            resized[name] = F.pad(state[name], (0, 0, margin, margin))
    return resized


def build(size: int) -> Sam:
    """A SAM of `size` pixels with 4 mask tokens whose windows are no larger than the image.

    At 128 px a window of 14 x 14 tokens would be two thirds padding, and attention most of the work.
    """
    sam = build_sam("vit_ti", image_size=size, num_masks=4)
    window = min(WINDOW, size // sam.stride)
    for block in sam.image_encoder.blocks:
        if 0 < window < block.window_size:
            block.window_size = window
            for name in ("rel_pos_h", "rel_pos_w"):
                table = getattr(block.attn, name)
                setattr(block.attn, name, nn.Parameter(table.new_zeros(2 * window - 1, table.shape[1])))
    return sam


def save(state: dict[str, Tensor], size: int, output: Path, notes: dict[str, str]) -> None:
    """Writes the weights as fp16 with position tables of `size` pixels; metadata values are strings."""
    state = {name: value.detach().cpu() for name, value in state.items()}
    state = resize_windows(resize_positions(state, "vit_ti", size), 2 * WINDOW - 1)
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    try:
        release = version("samlora")
    except PackageNotFoundError:  # run from a source tree that is not installed
        release = "source tree"
    write_tensors(output, halves, notes | {
        "variant": "vit_ti", "image_size": str(size), "samlora_version": release,
        "recipe": "checkpoints/pretrain_demo.py: procedural scenes, prompted masks and naming"})


def agree(parameters: list[nn.Parameter], value: float) -> float:
    """Averages the gradients over the processes and returns the first process's `value`."""
    if dist.get_world_size() == 1:
        return value
    gradients = [p.grad for p in parameters if p.grad is not None]
    mine = torch.tensor([value if dist.get_rank() == 0 else 0.0])
    flat = torch.cat([mine, *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    parts = flat[1:].div(dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return float(flat[0])


def train(rank: int, arguments: argparse.Namespace, meeting: str) -> None:
    """One of `--threads` processes: each has its own images, all step with the average gradient."""
    workers = arguments.threads if arguments.device == "cpu" else 1
    torch.set_num_threads(1 if workers > 1 else arguments.threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    torch.manual_seed(arguments.seed)
    worlds, naming = Worlds(), Naming().to(arguments.device)
    start, samples, step, state, spent = time.monotonic(), 0, 0, None, 0.0
    for size, until, batch in ((128, arguments.first, arguments.batch), (256, 1.0, arguments.batch // 2)):
        sam = build(size).to(arguments.device)
        if state is not None:
            sam.load_state_dict(resize_windows(resize_positions(state, "vit_ti", size), 2 * WINDOW - 1))
        torch.manual_seed(arguments.seed + 1000 * rank + size)  # from here on the images differ
        live = sam.state_dict()
        for value in live.values():
            dist.broadcast(value, 0)
        average = {name: value.clone() for name, value in live.items()}
        parameters = [*sam.parameters(), *naming.parameters()]
        optimizer = torch.optim.AdamW([
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ], betas=(0.9, 0.98), fused=True)
        first_step, last_log, last_save, marked = step, time.monotonic(), time.monotonic(), 0
        readings: dict[str, list[float]] = {}
        while spent < until:
            # Steps differ in cost from machine to machine, so decay follows the clock that ends the run.
            rate = arguments.lr * min(1.0, (step - first_step + 1) / 300) * (0.02 + 0.98 * (1 - spent**2))
            for group in optimizer.param_groups:
                group["lr"] = rate
            drawn = scenes(worlds, batch // workers, size)
            loss, reading = step_losses(sam, naming, drawn, step % 3, arguments.objects, arguments.device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            spent = agree(parameters, (time.monotonic() - start) / (60 * arguments.minutes))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step, samples, marked = step + 1, samples + batch, marked + batch
            keep = min(0.998, step / (step + 10))
            with torch.no_grad():
                for name, value in average.items():
                    value.lerp_(live[name], 1 - keep)
            for name, value in reading.items():
                readings.setdefault(name, []).append(value)
            now = time.monotonic()
            if rank == 0 and now - last_log > 20:
                text = "  ".join(f"{name} {sum(v) / len(v):.4f}" for name, v in readings.items())
                print(f"{(now - start) / 60:6.2f} min  {size} px  step {step}  samples {samples}  "
                      f"{marked / (now - last_log):.1f}/s  lr {rate:.2e}  {text}", flush=True)
                last_log, marked, readings = now, 0, {}
            if rank == 0 and now - last_save > 180:
                last_save = now
                save(average, 256, arguments.output, {"seed": str(arguments.seed), "samples": str(samples)})
        state = average
    if rank == 0:
        save(state, 256, arguments.output, {"seed": str(arguments.seed), "samples": str(samples)})
        minutes = (time.monotonic() - start) / 60
        print(f"done: {samples} samples in {minutes:.1f} min -> {arguments.output}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock budget of both stages")
    parser.add_argument("--first", type=float, default=0.7, help="share of the budget at 128 px, rest at 256")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("checkpoints/sam_vit_ti_demo.safetensors"))
    parser.add_argument("--threads", type=int, default=2, help="on a CPU, processes of one thread")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=24, help="images per step; half at 256 px")
    parser.add_argument("--objects", type=int, default=3, help="prompted objects per image")
    parser.add_argument("--lr", type=float, default=8e-4)
    arguments = parser.parse_args()
    # Processes of one thread share a busy machine well; two threads wait for each other at every operation.
    workers = arguments.threads if arguments.device == "cpu" else 1
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (arguments, f"{folder}/meeting"), nprocs=workers)


if __name__ == "__main__":
    main()
