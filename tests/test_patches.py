"""Networks of volumes: patches cut from slices, what is trained on them, and volumes predicted by them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from samlora.cli import main
from samlora.data.augment import resize_image, resize_label
from samlora.data.dataset import find_slices
from samlora.data.grid import Volume
from samlora.data.patches import PatchDataset, patch_batch, place, stacks
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.data.volume import read_volume, write_slice, write_volume
from samlora.errors import InputError
from samlora.inference.config import TestConfig
from samlora.inference.ensemble import Averaged
from samlora.inference.slices import predict_slices
from samlora.inference.testing import wanted_input_size
from samlora.inference.volumes import patch_count
from samlora.model.baselines import BASELINES, VolumeBaseline
from samlora.model.build import build_model, load_model
from samlora.model.checkpoint import read_adapter, save_adapter
from samlora.options import make, read_yaml
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig
from samlora.training.loop import train
from samlora.training.losses import dice_ce
from samlora.training.objectives import make_objective
from samlora.training.validation import answers

ROI = (4, 8, 8)


def write_stack(folder, image, label, case="case0000", first=0):
    """Training slices of one volume (D, H, W), numbered from `first`."""
    for n, (plane, labels) in enumerate(zip(image, label), start=first):
        write_slice(
            folder / "train_npz" / f"{case}_slice{n:03d}.npz", plane.astype(np.float32), labels.astype(np.uint8)
        )
    return folder


def ball(shape=(16, 32, 32), noise=0):
    """An easy volume: class 1 is a bright ball, class 2 a brighter block beside it."""
    z, y, x = np.mgrid[tuple(slice(n) for n in shape)]
    d, h, w = shape
    label = (((z - d / 2) * h / d) ** 2 + (y - h / 2) ** 2 + (x - w / 3) ** 2 < (h / 4) ** 2).astype(np.uint8)
    label[d // 4 : -d // 4, h // 3 : -h // 3, -w // 4 : -2] = 2
    image = 0.1 + 0.4 * label + np.random.default_rng(noise).normal(0, 0.02, shape)
    return image.astype(np.float32), label


@pytest.fixture
def numbered(tmp_path):
    """A volume in which every voxel has a value of its own: (slices, image, label)."""
    image = np.arange(11 * 20 * 30, dtype=np.float32).reshape(11, 20, 30)
    label = np.zeros(image.shape, np.uint8)
    label[5:7, 9:12, 10:20] = 1
    label[3, 14, 24] = 2
    write_stack(tmp_path, image, label, first=7)
    return find_slices(tmp_path), image, label


class Small(nn.Module):
    """A network of volumes that a test can afford, with V-Net's kinds of layers."""

    def __init__(self, masks, channels):
        super().__init__()
        layers = [nn.Conv3d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.ELU(), nn.Dropout3d(0.1)]
        self.layers = nn.Sequential(*layers, nn.Conv3d(8, masks, 1))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def small(monkeypatch):
    """V-Net's row with a smaller network, and patches from 16 x 32 x 32 on."""
    row = replace(BASELINES["vnet"], multiple=16, build=lambda side, masks, channels: Small(masks, channels))
    monkeypatch.setitem(BASELINES, "vnet", row)


def pointwise(masks=3) -> VolumeBaseline:
    """A model that looks at single voxels, so that patches cannot matter."""
    torch.manual_seed(0)
    model = build_model("vnet", None, image_size=32, num_classes=masks - 1)
    model.network = nn.Conv3d(1, masks, 1)
    return model.eval()


# --- patches -------------------------------------------------------------------------------------------------


def test_a_patch_depends_on_its_key_alone(numbered):
    slices, _, _ = numbered
    one, two = PatchDataset(slices, 3, ROI), PatchDataset(slices, 3, ROI, decoded=[item.read() for item in slices])
    keys = [(epoch, index) for epoch in range(2) for index in range(len(one))]
    there, back = {k: one[k] for k in keys}, {k: two[k] for k in reversed(keys)}
    for key in keys:
        assert there[key].name == back[key].name and there[key].transform == back[key].transform
        assert np.array_equal(there[key].image, back[key].image) and np.array_equal(there[key].label, back[key].label)
    other = PatchDataset(slices, 4, ROI)
    assert len({s.name for s in there.values()}) > len(keys) / 2
    assert [other[k].name for k in keys] != [there[k].name for k in keys]


def test_a_patch_is_what_its_volume_holds_there(numbered):
    slices, image, label = numbered
    patches = PatchDataset(slices, 0, ROI, augment="none")
    starts = set()
    for epoch in range(20):
        for index in range(len(patches)):
            sample = patches[epoch, index]
            assert sample.image.shape == sample.label.shape == ROI and sample.key == (epoch, index)
            start = np.unravel_index(int(sample.image[0, 0, 0]), image.shape)
            part = tuple(slice(s, s + r) for s, r in zip(start, ROI))
            assert np.array_equal(sample.image, image[part]) and np.array_equal(sample.label, label[part])
            starts.add(tuple(map(int, start)))
    reached = np.array(sorted(starts))
    assert reached.min(0).tolist() == [0, 0, 0] and reached.max(0)[0] == 7 and (reached.max(0)[1:] >= [11, 21]).all()


def test_half_of_the_patches_have_a_class_at_their_centre_each_class_as_often(numbered):
    slices, _, label = numbered
    patches = PatchDataset(slices, 1, ROI, augment="none")
    centre = tuple(r // 2 for r in ROI)
    at = [patches[epoch, index].label[centre] for epoch in range(40) for index in range(len(patches))]
    one, two = (np.mean([value == c for value in at]) for c in (1, 2))
    by_chance = (label > 0).mean()  # about what the other half adds
    assert abs(one + two - 0.5) < 0.07 + by_chance and abs(two - 0.25) < 0.06


def test_a_volume_without_a_class_gives_patches_from_anywhere(tmp_path):
    image = np.random.default_rng(0).random((6, 12, 12))
    slices = find_slices(write_stack(tmp_path, image, np.zeros(image.shape)))
    patches = PatchDataset(slices, 0, ROI)
    assert len({patches[e, 0].name for e in range(20)}) > 5 and not patches[0, 0].label.any()


def test_a_volume_smaller_than_a_patch_lies_in_its_middle(tmp_path):
    image, label = ball((3, 6, 20))
    patches = PatchDataset(find_slices(write_stack(tmp_path, image + 1, label)), 0, (8, 16, 16), augment="none")
    for index in range(3):
        sample = patches[0, index]
        assert sample.image.shape == sample.label.shape == (8, 16, 16)
        shown = sample.image != 0
        assert shown[2:5, 5:11].all() and shown.sum() == 3 * 6 * 16 and not sample.label[~shown].any()


def test_turns_and_flips_are_the_eight_of_a_square_for_image_and_label_alike(numbered):
    slices, _, _ = numbered
    patches, plain = PatchDataset(slices, 0, ROI), PatchDataset(slices, 0, ROI, augment="none")
    seen = set()
    for epoch in range(10):
        batch = [patches[epoch, index] for index in range(len(patches))]
        assert [s.name for s in batch] == [plain[s.key].name for s in batch]
        marked = [replace(s, label=(s.image % 251).astype(np.uint8)) for s in batch]
        images, labels = patch_batch(marked, "cpu")
        assert (
            images.shape == (len(batch), 1, *ROI) and labels.shape == (len(batch), *ROI) and labels.dtype == torch.int64
        )
        assert torch.equal(images[:, 0].remainder(251).long(), labels)
        # Steps along the last axis and the one before it tell a symmetry of the square from the others.
        seen |= {(int(i[0, 0, 0, 1] - i[0, 0, 0, 0]), int(i[0, 0, 1, 0] - i[0, 0, 0, 0])) for i in images}
    assert seen == {(a, b) for a in (1, -1, 30, -30) for b in (1, -1, 30, -30) if abs(a) != abs(b)}


def test_channels_come_first(tmp_path):
    image, label = ball((5, 12, 12))
    for n in range(5):
        write_slice(tmp_path / f"case_slice{n}.npz", np.stack([image[n], 1 - image[n]], -1), label[n])
    sample = PatchDataset(find_slices(tmp_path), 0, ROI)[0, 0]
    assert sample.image.shape == (2, *ROI)
    np.testing.assert_allclose(sample.image.sum(0), 1, rtol=1e-6)
    assert patch_batch([sample], "cpu")[0].shape == (1, 2, *ROI)


def test_slices_are_in_the_order_of_their_numbers(tmp_path):
    for n in (998, 999, 1000, 1001):
        write_slice(tmp_path / f"c_slice{n:03d}.npz", np.zeros((8, 8), np.float32), np.zeros((8, 8), np.uint8))
    slices = find_slices(tmp_path)
    assert [slices[n].name[-4:] for n in stacks(slices)["c"]] == ["e998", "e999", "1000", "1001"]
    assert [item.name for item in sorted(slices, key=place)] == [slices[n].name for n in stacks(slices)["c"]]


def test_order_of_a_list_does_not_matter_and_cases_do_not_mix(tmp_path):
    for case in ("a", "b"):
        write_stack(tmp_path, np.full((5, 9, 9), ord(case)), np.zeros((5, 9, 9)), case=case)
    slices = find_slices(tmp_path)[::-1]
    assert {case: [slices[n].name for n in members] for case, members in stacks(slices).items()} == {
        case: [f"{case}_slice{n:03d}" for n in range(5)] for case in ("a", "b")
    }
    patches = PatchDataset(slices, 0, ROI)
    assert all(np.unique(patches[0, n].image).tolist() == [ord(slices[n].case)] for n in range(10))


@pytest.mark.parametrize(
    "names", [("c_slice001", "c_slice003"), ("c_slice8", "c_slice10", "c_slice7"), ("c_slicea", "c_sliceb")]
)
def test_gaps_are_refused(tmp_path, names):
    for name in names:
        write_slice(tmp_path / f"{name}.npz", np.zeros((8, 8), np.float32), np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match="keep: all") as refused:
        PatchDataset(find_slices(tmp_path), 0, ROI)
    assert "c_slice" in str(refused.value) and "\n" not in str(refused.value)


def test_slices_of_several_sizes_are_refused(tmp_path):
    write_stack(tmp_path, np.zeros((2, 8, 8)), np.zeros((2, 8, 8)))
    write_stack(tmp_path, np.zeros((1, 8, 9)), np.zeros((1, 8, 9)), first=2)
    with pytest.raises(InputError, match=r"slice002.*8 x 9 .*8 x 8"):
        PatchDataset(find_slices(tmp_path), 0, ROI)


# --- the loss, and volumes -----------------------------------------------------------------------------------


def test_the_loss_does_not_see_how_voxels_are_arranged():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 6, 5), torch.randint(3, (2, 4, 6, 5))
    flat = dice_ce(logits.reshape(2, 3, 24, 5), labels.reshape(2, 24, 5))
    for ours, theirs in zip(dice_ce(logits, labels), flat):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 10, 20), (16, 32, 32), (25, 40, 33)])
def test_volumes_of_any_size_are_predicted_voxel_by_voxel(small, shape):
    model, image = pointwise(), np.random.default_rng(0).random(shape, np.float32)
    done = []
    with torch.no_grad():
        expected = model.network(torch.from_numpy(image)[None, None])[0].argmax(0).numpy()
    found = predict_slices(model, image, 32, batch_size=40, progress=done.append)
    assert found.dtype == np.uint8 and np.array_equal(found, expected)
    assert sum(done) == len(image)
    assert np.array_equal(predict_slices(Averaged([model, model], flips=True), image, 32), expected)


@pytest.mark.parametrize("shape", [(3, 10, 20), (16, 32, 32), (25, 40, 33), (24, 48, 80)])
def test_patches_are_counted_as_they_are_taken(small, shape):
    model, calls = pointwise(), []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    predict_slices(model, np.zeros(shape, np.float32), 32)
    assert len(calls) == patch_count(shape, model.roi, 0.5)


def test_slices_are_resized_as_for_training_and_labels_back(small):
    model, image = pointwise(), ball((8, 50, 44))[0]
    resized = resize_image(image, (40, 40))
    with torch.no_grad():
        classes = model.network(torch.from_numpy(resized)[None, None])[0].argmax(0).numpy()
    assert np.array_equal(predict_slices(model, image, 32, input_size=40), resize_label(classes, (50, 44)))


# --- training ------------------------------------------------------------------------------------------------


def config_of(folder, output, **more) -> TrainConfig:
    """The shipped configuration at a size that a test can afford."""
    values = {"root_path": str(folder), "output": str(output), "num_classes": 2, "img_size": 32, "device": "cpu"}
    values |= {"max_epochs": 2, "stop_epoch": 2, "warmup_period": 2, "base_lr": 0.02}
    return make(TrainConfig, read_yaml("vnet") | values | more)


def test_the_adapter_predicts_bit_by_bit_as_the_model_did(small, tmp_path):
    torch.manual_seed(0)
    model = build_model("vnet", None, image_size=32, num_classes=2)
    assert model.spec.in_channels == 1 and model.spec.base == "none"
    image, label = ball((20, 40, 36))
    patches = PatchDataset(find_slices(write_stack(tmp_path, image, label)), 0, model.roi)
    objective = make_objective(TrainConfig(), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for step in range(12):
        result = objective(model.train(), [patches[0, 2 * step % 20], patches[1, step]], 2, None)
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
        losses.append(result.total.item())
    assert losses[-1] < 0.7 * losses[0] and result.parts.keys() == {"loss_ce", "loss_dice"} and result.finite.all()
    save_adapter(model.eval(), tmp_path / "vnet.safetensors")
    again = load_model(tmp_path / "vnet.safetensors")
    one = torch.rand(1, 1, *model.roi)
    with torch.no_grad():
        assert torch.equal(model(one), again(one))
    found = predict_slices(model, image, 32)
    assert np.array_equal(found, predict_slices(again, image, 32)) and len(np.unique(found)) > 1


def test_validation_leaves_the_model_as_it_was(small):
    """Statistics of normalisation and random numbers move in training alone, and dropout is off."""
    torch.manual_seed(0)
    model = build_model("vnet", None, image_size=32, num_classes=2).train()
    before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    images, truth = ball((20, 40, 36))
    ways = [answers(model, images, truth, Prompting(), torch.device("cpu"), torch.float32) for _ in range(2)]
    assert np.array_equal(ways[0]["automatic"], ways[1]["automatic"])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert np.array_equal(ways[0]["automatic"], predict_slices(model.eval(), images, 32))


def test_a_resumed_run_ends_in_the_same_bytes(small, tmp_path):
    data = write_stack(tmp_path / "data", *ball((10, 40, 36)))
    config = config_of(data, tmp_path / "whole")
    cached = replace(config, output=str(tmp_path / "parts"), cache_samples=str(tmp_path / "cache"), num_workers=1)
    whole = train(config)
    train(replace(cached, max_iterations=3))
    parts = train(replace(cached, resume=True))
    one, two = ((run / "adapter_last.safetensors").read_bytes() for run in (whole, parts))
    assert one == two


def test_from_scans_to_metrics_and_label_maps(small, tmp_path, capsys):
    """prepare, train --config vnet, test, predict: the three commands, on slices that the recipe resizes."""
    recipe = Recipe(
        "r", "image", size=40, classes=("ball", "block"), label_values=((1,), (2,)), test_cases=("case0002",)
    )
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    for number in range(3):
        image, label = (array.transpose(2, 1, 0) for array in ball((18, 48, 44), noise=number))
        write_volume(Volume(image.clip(0, 1), affine, 1, 1), tmp_path / f"src/img/img{number:04d}.nii.gz")
        write_volume(Volume(label, affine, 1, 1), tmp_path / f"src/label/label{number:04d}.nii.gz")
    write_yaml_recipe(tmp_path / "r.yaml", recipe)
    prepare(tmp_path / "src", tmp_path / "data", str(tmp_path / "r.yaml"), workers=1)
    small_run = "--img_size 32 --max_epochs 10 --stop_epoch 10 --base_lr 0.03 --warmup_period 2"
    options = f"--val_cases case0001 --device cpu --output {tmp_path / 'runs'} {small_run}"
    assert main(f"train --config vnet --root_path {tmp_path / 'data'} {options}".split()) == 0
    (adapter,) = (tmp_path / "runs").rglob("adapter_best.safetensors")
    assert read_adapter(adapter)[1].system == "vnet"
    assert "best validation Dice 0.9" in capsys.readouterr().out
    tested = f"--lora_ckpt {adapter} --output_dir {tmp_path / 'test'} --device cpu --is_savenii"
    assert main(f"test --volume_path {tmp_path / 'data'} {tested}".split()) == 0
    assert "slices shrunk to 40 px first" in capsys.readouterr().out
    scan = tmp_path / "src/img/img0002.nii.gz"
    assert main(f"predict {scan} --adapter {adapter} --output {tmp_path / 'out'} --device cpu".split()) == 0
    (predicted,) = (tmp_path / "out").glob("*.nii.gz")
    by_test = read_volume(tmp_path / "test/predictions/case0002_pred.nii.gz", labels=True)
    by_predict, truth = read_volume(predicted, labels=True), read_volume(tmp_path / "src/label/label0002.nii.gz")
    assert np.array_equal(by_test.array, by_predict.array) and np.array_equal(by_predict.affine, truth.affine)
    for value in (1, 2):
        a, b = by_predict.array == value, truth.array == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.9


def write_yaml_recipe(path, recipe):
    import yaml

    path.write_text(yaml.safe_dump(recipe.to_dict()))


@pytest.mark.parametrize(
    "more, words",
    [
        ({"on_bad_sample": "skip"}, "--on_bad_sample skip"),
        ({"checkpointing": True}, "--checkpointing"),
        ({"cache_embeddings": "there", "augment": "none"}, "--cache_embeddings"),
        ({"img_size": 40}, "try 32"),
        ({"prompt": "box"}, "no prompts"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(small, tmp_path, more, words):
    data = write_stack(tmp_path / "data", *ball((4, 8, 8)))
    with pytest.raises(InputError, match=words) as refused:
        train(config_of(data, tmp_path / "runs", **more))
    assert "\n" not in str(refused.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("gap", ["train", "val"])
def test_gaps_are_refused_before_anything_is_written(small, tmp_path, gap):
    for case in ("train", "val"):
        write_stack(tmp_path, *ball((4, 8, 8)), case=case)
    (tmp_path / "train_npz" / f"{gap}_slice002.npz").unlink()
    with pytest.raises(InputError, match="keep: all"):
        train(config_of(tmp_path, tmp_path / "runs", val_cases=("val",)))
    assert not (tmp_path / "runs").exists()


def test_single_slices_are_no_volumes(small, tmp_path):
    for case in "abc":
        write_stack(tmp_path, *ball((1, 8, 8)), case=case)
    with pytest.raises(InputError, match="single slice"):
        train(config_of(tmp_path, tmp_path / "runs"))


def test_colours_are_refused(tmp_path):
    for n in range(2):
        write_slice(tmp_path / f"c_slice{n}.npz", np.zeros((8, 8, 3), np.float32), np.ones((8, 8), np.uint8))
    with pytest.raises(InputError, match="3 channels"):
        train(config_of(tmp_path, tmp_path / "runs", img_size=64))


def test_without_a_recipe_the_size_of_slices_must_be_said():
    """Another size would be another scale, which no stretching to the model's square undoes."""
    spec = build_model("vnet", None, image_size=64, num_classes=1).spec
    with pytest.raises(InputError, match="--input_size"):
        wanted_input_size(TestConfig(), spec)
    assert wanted_input_size(TestConfig(input_size=0), spec) is None
    assert wanted_input_size(TestConfig(input_size=96), spec) == 96


@pytest.mark.soak
def test_the_shipped_config_trains_v_net_itself(tmp_path):
    """V-Net at its smallest patch, 32 x 64 x 64, one step; what was saved is what predicts."""
    data = write_stack(tmp_path / "data", *ball((20, 48, 48)))
    values = {"img_size": 64, "batch_size": 1, "max_iterations": 1}
    run = train(config_of(data, tmp_path / "runs", **values))
    model = load_model(run / "adapter_last.safetensors")
    assert model.spec.system == "vnet" and model.roi == (32, 64, 64)
    assert predict_slices(model, ball((20, 48, 48))[0], 64).shape == (20, 48, 48)


@pytest.mark.soak
def test_v_net_learns_a_volume_by_heart(monkeypatch, tmp_path):
    monkeypatch.setitem(BASELINES, "vnet", replace(BASELINES["vnet"], multiple=16))
    torch.manual_seed(0)
    model = build_model("vnet", None, image_size=32, num_classes=2)
    for module in model.modules():
        if isinstance(module, nn.Dropout3d):  # there to keep a network from learning by heart
            module.p = 0.0
    image, label = ball()
    patches = PatchDataset(find_slices(write_stack(tmp_path, image, label)), 0, model.roi, augment="none")
    objective = make_objective(TrainConfig(), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0)
    for step in range(80):
        optimizer.zero_grad()
        objective(model.train(), [patches[step, 0]], 1, None).total.backward()
        optimizer.step()
        if step >= 35 and step % 5 == 0:
            found = predict_slices(model.eval(), image, 32)
            dice = [2 * ((found == c) & (label == c)).sum() / ((found == c).sum() + (label == c).sum()) for c in (1, 2)]
            if min(dice) > 0.9:
                break
    assert min(dice) > 0.9, dice
