"""Chunks of neighbouring slices, for encoders that see them together: dealt, trained on, predicted."""

import numpy as np
import pytest
import torch
from test_patches import ball, write_stack
from weights import randomised

from samlora.cli import main
from samlora.data.chunks import ChunkDataset, slices_from
from samlora.data.dataset import SliceDataset, find_slices
from samlora.data.frame import Frame
from samlora.data.grid import Case
from samlora.errors import InputError
from samlora.inference.predictor import Predictor
from samlora.inference.prompted import encode_slices, predict_prompted
from samlora.model.build import build_model, load_model
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig
from samlora.training.loop import train
from samlora.training.setup import load_data


@pytest.fixture
def stack(tmp_path):
    """Ten slices of which 3 to 6 show something: (slices, image, label); every voxel of the image has its own value."""
    image = np.arange(10 * 16 * 20, dtype=np.float32).reshape(10, 16, 20)
    label = np.zeros(image.shape, np.uint8)
    label[3:7, 4:9, 5:12] = 1
    write_stack(tmp_path, image, label, first=4)
    return find_slices(tmp_path), image, label


@pytest.mark.parametrize(
    "first, count, depth, wanted",
    [
        (4, 10, 4, [4, 5, 6, 7]),
        (8, 10, 4, [6, 7, 8, 9]),
        (-2, 10, 4, [0, 1, 2, 3]),
        (0, 3, 5, [0, 1, 2, 2, 2]),
        (7, 10, 1, [7]),
    ],
)
def test_chunks_stay_inside_the_volume(first, count, depth, wanted):
    assert slices_from(first, count, depth) == wanted


def test_a_chunk_is_neighbouring_slices_around_one_that_shows_something(stack):
    slices, image, _ = stack
    chunks = ChunkDataset(slices, slices[3:7], 0, 3, augment="none")
    assert len(chunks) == 4
    places = set()
    for epoch in range(12):
        for index in range(4):
            chunk = chunks[epoch, index]
            numbers = [int(sample.image[0, 0]) // (16 * 20) for sample in chunk]
            assert numbers == list(range(numbers[0], numbers[0] + 3)) and 3 + index in numbers
            assert all(np.array_equal(s.image, image[n]) for s, n in zip(chunk, numbers))
            assert [s.key for s in chunk] == [(epoch, n) for n in numbers]
            places.add(numbers.index(3 + index))
    assert places == {0, 1, 2}


def test_a_chunk_depends_on_its_key_alone_and_lies_in_one_transform(stack):
    slices, _, _ = stack
    shown, decoded = slices[3:7], [item.read() for item in slices]
    one, two = ChunkDataset(slices, shown, 3, 4), ChunkDataset(slices, shown, 3, 4, decoded=decoded)
    keys = [(epoch, index) for epoch in range(6) for index in range(len(one))]
    there, back = {k: one[k] for k in keys}, {k: two[k] for k in reversed(keys)}
    for key in keys:
        assert [s.name for s in there[key]] == [s.name for s in back[key]]
        assert all(np.array_equal(a.image, b.image) for a, b in zip(there[key], back[key]))
        assert len({s.transform for s in there[key]}) == 1 and there[key][0].transform == back[key][0].transform
    assert len({there[k][0].transform for k in keys}) > 3
    other = ChunkDataset(slices, shown, 4, 4)
    assert [[s.name for s in other[k]] for k in keys] != [[s.name for s in there[k]] for k in keys]


def with_depth(depth: int):
    return randomised(build_model("msa", "random:1", "vit_ti", 64, num_classes=2, options={"depth": depth}))


@pytest.mark.parametrize("count", [2, 3, 7, 9])
def test_every_slice_is_encoded_in_one_chunk_of_its_volume_whatever_else_is_asked_for(count):
    model, image = with_depth(3), np.random.default_rng(0).random((count, 40, 48)).astype(np.float32)
    frame = Frame(40, 48, 64, low=model.logit_side)
    with torch.no_grad():
        at_once = encode_slices(model, image, range(count), frame)
        assert sorted(at_once) == list(range(count))
        for index in range(count):
            alone = encode_slices(model, image, [index], frame)
            chunk = [n for n in range(count) if n // 3 == index // 3]
            assert sorted(alone) == chunk
            torch.testing.assert_close(alone[index], at_once[index], atol=1e-5, rtol=1e-4)
        if count > 2:
            image[1] = 0  # a slice sees the others of its chunk, and none else
            changed = encode_slices(model, image, range(count), frame)
            seen = [(changed[n] - at_once[n]).abs().max().item() > 1e-4 for n in range(count)]
            assert seen == [n < 3 for n in range(count)]


def test_the_predictor_answers_as_whole_stacks_do():
    """Click after click it encodes whole chunks, keeps them, and gives what predict_prompted gives."""
    model, (image, label) = with_depth(4), ball((10, 40, 40))
    prompting = Prompting("box")
    found = predict_prompted(model, image, label == 1, prompting, batch_size=3)
    predictor = Predictor(model)
    encoded, encode = [], model.encode
    model.encode = lambda images: encoded.append(len(images)) or encode(images)
    predictor.set_image(np.repeat((image[..., None] * 255).astype(np.uint8), 3, axis=3)[5], index=0)
    assert encoded == [4]  # a picture is its own neighbour
    encoded.clear()
    predictor.set_image(Case(image, None, None), index=4)
    for index in range(10):
        predictor.select(index)
        if not (label[index] == 1).any():
            continue
        rows, cols = np.nonzero(label[index] == 1)
        box = [cols.min(), rows.min(), cols.max(), rows.max()]
        assert np.array_equal(predictor.draw_box(*box), found[index] == 1)
    assert encoded == [4, 4, 4]


def test_it_learns_saves_and_answers(tmp_path):
    """The command trains chunks; what it saves restores the model, and is measured by evaluate-prompts."""
    image, label = ball((8, 64, 64))
    for case in ("case0000", "case0001"):
        write_stack(tmp_path / "data", image, label, case)
    config = TrainConfig(
        root_path=str(tmp_path / "data"), output=str(tmp_path / "out"), system="msa", vit_name="vit_ti", img_size=64,
        options={"depth": 4}, batch_size=2, max_epochs=15, stop_epoch=15, max_iterations=30, base_lr=3e-4, augment="none",
        warmup=False, num_classes=2, val_cases=("case0001",), val_interval=15, seed=1, optimizer="adam",
    )  # fmt: skip
    run = train(config)
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    dice = [float(row[rows[0].index("val_dice")]) for row in rows[1:] if row[rows[0].index("val_dice")]]
    assert dice[-1] > 0.8
    model = load_model(run / "adapter_last.safetensors")
    assert model.chunk == 4 and any("depth_adapter.up" in n and p.abs().max() > 0 for n, p in model.named_parameters())
    answered = predict_prompted(model, image, label, Prompting("pt"))
    overlap = [2 * ((answered == c) & (label == c)).sum() / ((answered == c).sum() + (label == c).sum()) for c in (1, 2)]
    assert np.mean(overlap) > 0.8


def test_slices_without_a_class_stay_in_their_volumes(stack, tmp_path):
    config = TrainConfig(root_path=str(tmp_path), system="msa", num_classes=1)
    assert len(load_data(config).train) == 4
    config = TrainConfig(root_path=str(tmp_path), system="msa", num_classes=1, options={"depth": 3})
    assert len(load_data(config).train) == 10 and len(load_data(config).shown) == 4


def test_what_cannot_be_cut_into_chunks_is_refused(stack, tmp_path, capsys):
    slices, _, _ = stack
    slices[5].path.unlink()
    flags = ["train", "--root_path", str(tmp_path), "--system", "msa", "--num_classes", "1", "--vit_name", "vit_ti"]
    assert main([*flags, "--options", "depth=3", "--output", str(tmp_path / "out")]) == 2
    assert "prepare the data with keep: all" in capsys.readouterr().err
    with pytest.raises(InputError, match="keep: all"):
        ChunkDataset(find_slices(tmp_path), find_slices(tmp_path), 0, 3)
    single = SliceDataset(find_slices(tmp_path), 0)
    assert len(single) == 9
    assert main([*flags, "--options", "depth=3", "--on_bad_sample", "skip"]) == 2
    assert "gap" in capsys.readouterr().err
