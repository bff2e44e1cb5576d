"""What systems train on: prompts and targets of a batch, and the losses made of the answers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss

from samlora.data.augment import Transform, sample_transform
from samlora.data.dataset import Sample, find_slices
from samlora.data.frame import Frame
from samlora.data.ignored import IGNORE
from samlora.data.volume import write_slice
from samlora.errors import InputError
from samlora.inference.prompted import as_prompts, draw_prompt, least_sure, predict_prompted
from samlora.model.build import build_model
from samlora.model.methods import SYSTEMS, system_row
from samlora.pixels import SAM, SAMED
from samlora.prompting import Prompting
from samlora.training import validation
from samlora.training.config import TrainConfig
from samlora.training.embeddings import EmbeddingCache
from samlora.training.objectives import OBJECTIVES
from samlora.training.prompting import draw_objects
from samlora.training.reading import BadSamples

SIDE = 64
CPU = torch.device("cpu")


def sample(number: int, shape=(SIDE, SIDE), transform: Transform | None = None, empty: bool = False) -> Sample:
    random = np.random.default_rng(number)
    label = np.zeros(shape, np.uint8)
    if not empty:
        label[8:28, 12:36] = 1
        label[40:60, 4:24] = 2
        label[40:56, 40:60] = 2
    image = (0.3 * label + random.random(shape)).clip(0, 1).astype(np.float32)
    return Sample(f"s{number}", image, label, transform or Transform(), (0, number))


def tiny(system: str, **options):
    return build_model(system, "random:1", "vit_ti", SIDE, num_classes=2, **options)


def objective_of(model, config=None, **prompting):
    row = system_row(model.spec.system)
    config = config or TrainConfig()
    return OBJECTIVES[row.objective](config, model, replace(row.prompting, **prompting))


def test_prompts_depend_on_the_key_alone():
    prompting = Prompting("any", box_jitter=8, sample_num=2, negative_num=1, max_objects=3, parts=True)
    batch = [sample(n, transform=sample_transform(np.random.default_rng(n))) for n in range(3)]
    together = draw_objects(batch, prompting, SIDE, SAMED, 5, CPU)
    alone = draw_objects(batch[1:2], prompting, SIDE, SAMED, 5, CPU)
    mine = together.prompts.image_index == 1
    torch.testing.assert_close(together.targets[mine], alone.targets, rtol=0, atol=0)
    again = draw_objects(batch, prompting, SIDE, SAMED, 5, CPU)
    torch.testing.assert_close(again.prompts.points, together.prompts.points, rtol=0, atol=0)
    other = draw_objects([replace(s, key=(1, s.key[1])) for s in batch], prompting, SIDE, SAMED, 5, CPU)
    assert not torch.equal(other.prompts.points, together.prompts.points)


@pytest.mark.parametrize("pad", [False, True])
def test_prompts_lie_on_what_they_ask_for(pad):
    """Wide images: stretched or padded, points are on the target and boxes around it."""
    batch = [sample(n, (64, 100)) for n in range(2)]
    objects = draw_objects(batch, Prompting("pt_box", sample_num=3, negative_num=2, max_objects=9, parts=True), SIDE, SAM if pad else SAMED, 0, CPU)
    prompts = objects.prompts
    assert len(objects.targets) == 6 and objects.counts(1).sum() == 3
    for target, inside, box, points, labels in zip(objects.targets, objects.inside, prompts.boxes, prompts.points, prompts.labels):
        rows, cols = torch.where(target > 0)
        assert inside[rows, cols].all()
        edges = torch.tensor([cols.min(), rows.min(), cols.max(), rows.max()]) * 4.0
        assert (box - edges).abs().max() <= 6  # a target pixel is four pixels wide
        at = (points / 4).long()
        near = torch.nn.functional.max_pool2d(target[None, None], 3, 1, 1)[0, 0]
        assert (near[at[:, 1], at[:, 0]][labels == 1] == 1).all()
        assert (target[at[:, 1], at[:, 0]][labels == 0]).sum() <= 1  # on the edge a target pixel holds both
    assert objects.inside.all() != pad


def test_boxes_move_outwards_by_no_more_than_the_jitter():
    batch = [sample(0)]
    tight = draw_objects(batch, Prompting("box"), SIDE, SAMED, 0, CPU)
    moved = [draw_objects([replace(batch[0], key=(e, 0))], Prompting("box", box_jitter=5), SIDE, SAMED, 0, CPU) for e in range(30)]
    steps = torch.stack([m.prompts.boxes[0] for m in moved if torch.equal(m.targets, tight.targets)]) - tight.prompts.boxes
    outwards = steps * torch.tensor([-1.0, -1, 1, 1])
    assert (outwards >= -1e-4).all() and 4 < outwards.max() <= 5 + 1e-4


def test_a_batch_without_objects_asks_for_something_that_does_not_count():
    model = tiny("medsam_decoder")
    losses = objective_of(model)(model, [sample(0, empty=True)], 1, None)
    assert losses.total.item() == 0
    losses.total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_masks_are_monais_dice_and_cross_entropy():
    torch.manual_seed(0)
    model = tiny("medsam")
    batch = [sample(0), sample(1)]
    objective = objective_of(model, max_objects=3)
    losses = objective(model, batch, 2, None)
    objects = draw_objects(batch, objective.prompting, SIDE, SAMED, 1234, CPU)
    images, _ = objective._inputs(model, batch)
    logits = model(images, objects.prompts)
    expected = DiceCELoss(sigmoid=True, squared_pred=True)(logits, objects.targets[:, None])
    torch.testing.assert_close(losses.total, expected)


def test_samples_that_do_not_count_do_not_count():
    torch.manual_seed(0)
    model = tiny("sam_prompt")
    objective = objective_of(model)
    one, two = sample(0), sample(7)
    torch.testing.assert_close(objective(model, [one, two], 1, None).total, objective(model, [one], 1, None).total)


def test_padding_is_not_part_of_the_loss():
    """The same answer, wherever it is wrong in the padding, costs the same."""
    model = tiny("sam_lora")
    objective = objective_of(model)
    objects = draw_objects([sample(0, (32, 64))], objective.prompting, SIDE, SAM, 0, CPU)
    logits = torch.randn(objects.targets.shape)
    other = torch.where(objects.inside, logits, torch.randn(logits.shape) * 9)
    iou = torch.zeros(len(logits))
    for a, b in zip(objective._each(logits, iou, objects), objective._each(other, iou, objects)):
        torch.testing.assert_close(a, b)
    assert not torch.equal(logits, other)


@pytest.mark.parametrize("system", ["sam_lora", "sam_prompt", "lite_medsam"])
def test_what_is_ignored_is_no_object_and_in_no_loss_of_masks(system):
    model = tiny(system)
    recipe = {"ignore": [3]}
    model.spec = replace(model.spec, recipe=recipe)
    objective = objective_of(model, max_objects=9)
    plain = sample(0)
    label = plain.label.copy()
    label[30:38] = IGNORE
    label[8:12, 12:36] = IGNORE  # a part of an object
    batch = [replace(plain, label=label)]
    objects = draw_objects(batch, objective.prompting, SIDE, SAM, 0, CPU, None, recipe)
    count = 3 if objective.prompting.parts else 2
    assert len(objects.targets) == count and not objects.inside.all()
    logits = torch.randn(objects.targets.shape)
    other = torch.where(objects.inside, logits, torch.randn(logits.shape) * 9)
    iou = torch.zeros(len(logits))
    filled = [x.masked_fill(~objects.inside, -30.0) for x in (logits, other)]
    for a, b in zip(*(objective._each(x, iou, objects) for x in filled)):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(objective._each(x, iou, objects) for x in (logits, other))):
        torch.testing.assert_close(a, b)
    assert torch.isfinite(objective(model, batch, 1, None).total)


@pytest.mark.parametrize("system", ["samed", "samlora_joint"])
def test_what_is_ignored_is_in_no_loss_of_classes(system):
    """The label at ignored pixels may be anything: the losses are equal."""
    torch.manual_seed(0)
    model = tiny(system)
    model.spec = replace(model.spec, recipe={"ignore": [3]})
    objective = objective_of(model)
    plain = sample(0)
    label = plain.label.copy()
    label[30:38] = IGNORE
    batch = [replace(plain, label=label)]
    losses = objective(model, batch, 1, None)
    assert torch.isfinite(losses.total)
    _, targets = objective._inputs(model, batch)
    assert (targets == IGNORE).any()
    images, _ = objective._inputs(model, batch)
    if system == "samed":
        wanted = torch.nn.functional.cross_entropy(model(images), targets, ignore_index=IGNORE)
        torch.testing.assert_close(losses.parts["loss_ce"], wanted)


def test_validation_does_not_measure_what_is_ignored(tmp_path, monkeypatch):
    label = sample(0).label.copy()
    label[30:38] = IGNORE
    write_slice(tmp_path / "a_slice000.npz", sample(0).image, label)
    model = tiny("samed")
    model.spec = replace(model.spec, recipe={"ignore": [3]})

    def answers(model, images, truth, *_):
        assert truth.max() == 2  # prompts are drawn from it
        return {"automatic": np.where(np.arange(SIDE)[:, None] // 8 == 4, 1, truth)}

    monkeypatch.setattr(validation, "answers", answers)
    data = SimpleNamespace(val=find_slices(tmp_path))
    fabric = SimpleNamespace(global_rank=0, world_size=1, device=CPU)
    run, bad = SimpleNamespace(say=print), BadSamples(False, print)
    rest = torch.float32, run, bad, Prompting("box")
    assert 0.9 < validation.validate(model, data, fabric, *rest)["val_dice"] < 1
    label[32:40] = IGNORE
    write_slice(tmp_path / "a_slice000.npz", sample(0).image, label)
    assert validation.validate(model, data, fabric, *rest)["val_dice"] == 1


def test_focal_dice_and_iou():
    model = tiny("sam_prompt")
    objective = objective_of(model)
    objects = draw_objects([sample(0)], objective.prompting, SIDE, SAM, 0, CPU)
    logits = torch.where(objects.targets > 0, 20.0, -20.0)
    perfect = objective._each(logits, torch.ones(len(logits)), objects)
    assert all(part.max() < 1e-3 for part in perfect)
    p, t = torch.tensor(0.3), 1.0
    flat = objective._each(torch.full_like(logits, float(torch.logit(p))), torch.zeros(len(logits)), objects)
    share = objects.targets.mean((1, 2))
    on, off = -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
    torch.testing.assert_close(flat[0], share * on * t + (1 - share) * off, rtol=1e-4, atol=1e-6)
    assert objective._sum({"loss_focal": 1.0, "loss_dice": 2.0, "loss_iou": 3.0}) == 25.0


def test_dice_cross_entropy_and_iou():
    torch.manual_seed(0)
    model = tiny("lite_medsam")
    batch = [sample(0, (32, 64)), sample(1, (32, 64))]
    objective = objective_of(model)
    objects = draw_objects(batch, objective.prompting, SIDE, SAM, 1234, CPU)
    images, _ = objective._inputs(model, batch)
    answer = model(images, objects.prompts, details=True)
    logits = answer.masks[:, 0].masked_fill(~objects.inside, -30.0)
    drawn, truth = logits > 0, objects.targets > 0
    iou = (drawn & truth).sum((1, 2)) / (drawn | truth).sum((1, 2))
    expected = torch.nn.functional.mse_loss(answer.iou[:, 0], iou)
    losses = objective(model, batch, 2, None)
    torch.testing.assert_close(losses.parts["loss_iou"], expected)
    torch.testing.assert_close(losses.total, sum(losses.parts.values()))
    assert list(losses.parts) == ["loss_dice", "loss_bce", "loss_iou"]


def test_joint_is_both():
    torch.manual_seed(0)
    model = tiny("samlora_joint")
    batch = [sample(0), sample(1)]
    parts = objective_of(model, TrainConfig(prompt_ratio=0.25))(model, batch, 2, None)
    samed = 0.2 * parts.parts["loss_ce"] + 0.8 * parts.parts["loss_dice"]
    torch.testing.assert_close(parts.total, 0.75 * samed + 0.25 * parts.parts["loss_prompted"])
    images = torch.rand(2, 3, SIDE, SIDE)
    answer = model(
        images,
        as_prompts([draw_prompt(batch[0].label == 1, Prompting("box"), Frame(SIDE, SIDE, SIDE), np.random.default_rng(0))] * 2, [0, 1], Prompting("box"), CPU),
        details=True,
    )
    torch.testing.assert_close(answer.classes, model(images))
    assert answer.masks.shape == (2, 4, 16, 16)


def test_the_next_points_go_where_the_model_is_least_sure():
    objects = draw_objects([sample(0)], Prompting("pt", max_objects=1), SIDE, SAMED, 0, CPU)
    logits = torch.full((1, 16, 16), 5.0)
    logits[0, 3, 9] = 0.1
    more = least_sure(objects.prompts, logits, objects.targets, objects.inside, 1, SIDE)
    assert more.points[0, -1].tolist() == [9 * 4 + 1.5, 3 * 4 + 1.5] and more.labels.dtype == torch.int64
    assert more.labels[0, -1] == (objects.targets[0, 3, 9] > 0)


def test_missing_boxes_say_what_sam_says_without_a_box():
    model = tiny("sam")
    points, labels = torch.tensor([[[10.0, 12]], [[30.0, 40]]]), torch.ones(2, 1, dtype=torch.int64)
    boxes = torch.tensor([[float("nan")] * 4, [4.0, 5, 50, 60]])
    from samlora.model.sam import Prompts

    sparse, _ = model.embed_prompts(Prompts(points, labels, boxes), 2)
    alone, _ = model.embed_prompts(Prompts(points[1:], labels[1:], boxes[1:]), 1)
    torch.testing.assert_close(sparse[1:], alone)
    torch.testing.assert_close(sparse[0, 1:], model.prompt_encoder.not_a_point_embed.weight.expand(2, -1))


@pytest.mark.parametrize("system", ["medsam_decoder", "sam_lora", "samlora_joint"])
def test_predict_prompted_paints_each_class_on_the_images_pixels(system):
    model = tiny(system).eval()
    stack = np.stack([sample(n, (50, 70)).image for n in range(3)])
    truth = np.stack([sample(n, (50, 70), empty=n == 1).label for n in range(3)])
    painted = predict_prompted(model, stack, truth, system_row(system).prompting, batch_size=2)
    again = predict_prompted(model, stack, truth, system_row(system).prompting, batch_size=1)
    assert painted.shape == truth.shape and not painted[1].any()
    assert (painted != again).mean() < 1e-3  # batches differ in rounding alone
    assert set(np.unique(painted)) <= {0, 1, 2}


class _Slices:
    """Samples by (epoch, index), with nothing done to them."""

    def __init__(self, files):
        from samlora.data.dataset import SliceDataset

        self.slices, self._data = files, SliceDataset(files, 0, augment="none")

    def __len__(self):
        return len(self._data)

    def __getitem__(self, key):
        return self._data[key]


@pytest.fixture
def slices(tmp_path):
    from samlora.data.dataset import find_slices
    from samlora.data.volume import write_slice

    for number in range(5):
        one = sample(number, (40, 64))
        write_slice(tmp_path / f"a_slice{number:03d}.npz", one.image, one.label)
    return _Slices(find_slices(tmp_path))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_cached_embeddings_train_alike(slices, tmp_path, precision):
    model = tiny("medsam_decoder")
    cache = EmbeddingCache(tmp_path / "cache", model, slices, precision, batch=2)
    assert len(cache) == 5
    batch = [slices[0, n] for n in (3, 1)]
    objective = objective_of(model)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        plain = objective(model, batch, 2, None)
        cached = objective(model, batch, 2, None, cache.batch([3, 1], CPU))
    torch.testing.assert_close(cached.total, plain.total, atol=1e-5 if precision == torch.float32 else 5e-3, rtol=0)
    again = EmbeddingCache(tmp_path / "cache", model, slices, precision, batch=2)
    assert torch.equal(again.batch([0], CPU).values, cache.batch([0], CPU).values)
    assert len(list((tmp_path / "cache").glob("*.embeddings"))) == 1
    EmbeddingCache(tmp_path / "cache", model, slices, precision, batch=3)
    other = build_model("medsam_decoder", "random:2", "vit_ti", SIDE, num_classes=2)
    EmbeddingCache(tmp_path / "cache", other, slices, precision, batch=3)
    assert len(list((tmp_path / "cache").glob("*.embeddings"))) == 3


# System, variant, blocks with LoRA, and how many steps of the encoder are then frozen.
PARTLY_FROZEN = [
    ("samed", "vit_ti", [10, 11], 10),
    ("samed_s", "vit_ti", [11], 11),
    ("sam_lora", "vit_ti", [1, 5], 1),
    ("samlora_joint", "vit_ti", [11], 11),
    ("medsam_decoder", "vit_ti", None, 12),
    ("samed", "vit_t", [8, 9], 13),
    ("samed", "lite_medsam", None, 3),
    ("sam_lora", "lite_medsam", [2, 9], 6),
    ("samlora_joint", "lite_medsam", [9], 14),
    ("medsam_decoder", "lite_medsam", None, 15),
]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("system, variant, layers, frozen", PARTLY_FROZEN)
def test_gradients_are_those_without_the_cache(slices, tmp_path, system, variant, layers, frozen, precision):
    torch.manual_seed(0)
    model = build_model(system, "random:1", variant, SIDE, num_classes=2, lora_layers=layers).train()
    for name, parameter in model.named_parameters():
        if ".linear_b" in name:  # with B at zero, A would get no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    cache = EmbeddingCache(tmp_path / "cache", model, slices, precision, batch=2)
    kept = cache.batch([3, 1], CPU)
    assert kept.step == frozen and kept.values.dtype in (torch.float32, precision)
    objective, batch, gradients = objective_of(model), [slices[0, n] for n in (3, 1)], []
    for known in (None, kept):
        model.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            objective(model, batch, 2, None, known).total.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 3
    largest = max(float(gradient.norm()) for gradient in gradients[0].values())
    close = 1e-4 if precision == torch.float32 else 0.15
    for name, gradient in gradients[0].items():
        scale = float(gradient.norm()) + largest * 1e-2  # of a key's bias it is 0 but for rounding
        assert float((gradients[1][name] - gradient).norm()) <= close * scale, name


@pytest.mark.parametrize("variant", ["vit_ti", "lite_medsam"])
def test_an_encoder_in_two_parts_is_the_whole(variant):
    encoder = build_model("sam", "random:1", variant, SIDE, num_classes=1).eval().image_encoder
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        whole = encoder(images)
        for step in range(len(encoder.steps) + 1):
            parts = encoder.forward_from(encoder.forward_to(images, step), step)
            torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    "system, variant, options",
    [
        ("samed", "vit_ti", {}),
        ("samed", "vit_ti", {"lora_layers": [11], "in_channels": 2}),
        ("medsam", "lite_medsam", {}),
        ("msa", "vit_ti", {"options": {"depth": 2}}),
        ("samus", "vit_ti", {}),
        ("samus", "vit_ti", {"options": {"cnn": False, "adapters": False}}),
    ],
)
def test_nothing_is_kept_of_an_encoder_that_trains_from_its_beginning(slices, tmp_path, system, variant, options):
    model = build_model(system, "random:1", variant, SIDE, num_classes=2, **options)
    with pytest.raises(InputError, match=f"encoder of {system} trains from its beginning") as refused:
        EmbeddingCache(tmp_path / "cache", model, slices, torch.float32, batch=2)
    assert "\n" not in str(refused.value) and not (tmp_path / "cache").exists()


def test_parts_of_an_encoder_are_kept_apart(slices, tmp_path):
    for layers in ([11], [10, 11], [11]):
        model = tiny("samed", lora_layers=layers)
        EmbeddingCache(tmp_path / "cache", model, slices, torch.float32, batch=2)
    assert len(list((tmp_path / "cache").glob("*.embeddings"))) == 2


def test_every_objective_has_a_system():
    assert {row.objective for row in SYSTEMS.values()} == set(OBJECTIVES)


def test_half_precision_leaves_places_alone():
    """Lightning Fabric turns what goes into a model to half precision, as far as it finds it."""
    from lightning_fabric import Fabric

    seen = []

    class Looks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images, prompts):
            seen.append((images.dtype, prompts.points.dtype, prompts.points.max().item()))
            return images * self.weight

    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    prompts = as_prompts(
        [draw_prompt(np.ones((500, 500), bool), Prompting("pt", sample_num=5), Frame(500, 500, 512), np.random.default_rng(0))],
        [0],
        Prompting("pt", sample_num=5),
        CPU,
    )
    fabric.setup(Looks())(torch.rand(1, 3, 8, 8), prompts)
    assert seen[0][1:] == (torch.float32, prompts.points.max().item())
