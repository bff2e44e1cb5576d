"""train.py on systems with prompts: embeddings that are kept, MedSAM's files, resuming, options, what is refused."""

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import samlora
from samlora.cli import main
from samlora.data.augment import Transform
from samlora.data.dataset import Sample, find_slices
from samlora.data.frame import Frame
from samlora.data.volume import write_medsam, write_slice
from samlora.errors import InputError
from samlora.inference.prompted import in_turn, predict_prompted
from samlora.model.tensors import read_tensors
from samlora.options import make, read_yaml, write_yaml
from samlora.pixels import SAM
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig
from samlora.training.loop import train
from samlora.training.objectives import make_objective

COMMON = {"vit_name": "vit_ti", "img_size": 64, "batch_size": 2, "num_classes": 2, "device": "cpu", "warmup": False, "schedule": "constant"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two cases of four slices, the last of each empty."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for case in range(2):
        for number in range(4):
            label = np.zeros((48, 40), np.uint8)
            if number < 3:
                label[8:24, 4 + number : 20] = 1
                label[30:44, 22:36] = 2
            image = (0.3 * label + 0.2 + rng.normal(0, 0.05, label.shape)).clip(0, 1).astype(np.float32)
            write_slice(folder / f"case{case}_slice{number:03d}.npz", image, label)
    return folder


def config(data, tmp_path, **more) -> TrainConfig:
    given = {"root_path": str(data), "output": str(tmp_path / "runs"), "max_epochs": 2, "stop_epoch": 2, "base_lr": 1e-3}
    return make(TrainConfig, COMMON | given | {"val_cases": ["case1"]} | more)


def rows(run) -> list[dict]:
    with open(run / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_kept_embeddings_train_the_same(data, tmp_path):
    plain = config(data, tmp_path, system="medsam_decoder", augment="none")
    kept = replace(plain, output=str(tmp_path / "kept"), cache_embeddings=str(tmp_path / "embeddings"))
    ways = [train(plain), train(kept)]
    curves = [[float(row["loss"]) for row in rows(run)] for run in ways]
    np.testing.assert_allclose(*curves, atol=1e-5)
    assert len(curves[0]) == 4  # three slices that show something, in twos, for two epochs
    assert rows(ways[0])[0].keys() >= {"loss_dice", "loss_bce", "val_dice"}
    assert len(list((tmp_path / "embeddings").glob("*.embeddings"))) == 1
    best = ways[0] / "adapter_best.safetensors"
    assert samlora.load_model(best).spec.system == "medsam_decoder"
    assert json.loads((ways[0] / "run.json").read_text())["train_slices"] == 3
    assert (ways[0] / "preview.png").exists() and (ways[0] / "curves.png").exists()


def test_a_stopped_run_goes_on_as_if_it_had_not(data, tmp_path):
    whole = config(data, tmp_path, system="samlora_joint", rank=2, max_epochs=2, stop_epoch=2)
    parts = replace(whole, output=str(tmp_path / "parts"))
    through = train(whole)
    train(replace(parts, max_iterations=1))
    stopped = train(replace(parts, resume=True))
    ours, _ = read_tensors(through / "adapter_last.safetensors")
    theirs, _ = read_tensors(stopped / "adapter_last.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    last = rows(through)[-1]
    assert 0 <= float(last["val_dice_prompted"]) <= 1 and last["loss_prompted"]


def test_medsams_own_files_are_slices(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    labels = np.zeros((3, 40, 40), np.uint8)
    labels[:2, 10:30, 8:30] = 1
    write_medsam(tmp_path / "npz" / "CT_one.npz", images, labels, None)
    write_medsam(tmp_path / "npz" / "CT_two.npz", images[:1], labels[:1], None)
    found = find_slices(tmp_path / "npz")
    assert [s.name for s in found] == ["CT_one_slice000", "CT_one_slice001", "CT_one_slice002", "CT_two_slice000"]
    image, label = found[1].read()
    np.testing.assert_allclose(image, images[1] / 255, atol=1e-6)
    assert np.array_equal(label, labels[1])
    run = train(config(tmp_path / "npz", tmp_path, system="medsam_decoder", num_classes=1, max_iterations=1, val_cases=[]))
    facts = json.loads((run / "run.json").read_text())
    assert facts["train_slices"] == 3 and facts["steps"] == 1


def test_options_of_a_system_are_in_the_adapter(data, tmp_path):
    given = config(data, tmp_path, system="samed", rank=2, max_iterations=1, options=["alpha=4", "targets=q,v,proj", "dora=true"])
    assert given.options == {"alpha": 4, "targets": ["q", "v", "proj"], "dora": True}
    run = train(given)
    again = make(TrainConfig, read_yaml(run / "config.yaml"))
    assert again.options == given.options
    model = samlora.load_model(run / "adapter_last.safetensors")
    assert model.spec.options["alpha"] == 4 and model.spec.options["targets"] == ["q", "v", "proj"]
    write_yaml(tmp_path / "again.yaml", again)
    assert make(TrainConfig, read_yaml(tmp_path / "again.yaml")) == again


@pytest.mark.parametrize(
    "text, value",
    [
        ("ranks=[[0,8],[1,2]]", [[0, 8], [1, 2]]),
        ("ranks={0: 8, 1: 2}", {0: 8, 1: 2}),
        ("targets=[q,k,v]", ["q", "k", "v"]),
        ("targets=q,k,v", ["q", "k", "v"]),
        ("targets=proj", "proj"),
        ("alpha=1.5", 1.5),
        ("dora=true", True),
    ],
)
def test_flags_carry_every_option(text, value):
    assert make(TrainConfig, {"options": [text]}).options == {text.partition("=")[0]: value}


class Asked(torch.nn.Module):
    """A model that keeps what it was asked for; the wrapped one answers."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, []

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def forward(self, images, prompts=None, *more, **named):
        self.asked.append(prompts)
        return self.model(images, prompts, *more, **named)


@pytest.mark.parametrize("prompt", ["pt", "pt_box"])
def test_entropy_is_measured_as_it_is_trained(prompt):
    """After the first point, both ask, and place the others where that answer is least sure: at the same places."""
    model = Asked(samlora.build_model("sam_lora", "random:1", "vit_ti", 64, num_classes=1).eval())
    label = np.zeros((1, 64, 64), np.uint8)
    label[0, 10:40, 12:50] = 1
    image = np.random.default_rng(0).random(label.shape, dtype=np.float32)
    options = {"prompt": prompt, "sample_num": 3, "negative_num": 1, "point_strategy": "entropy", "box_jitter": 0}
    objective = make_objective(make(TrainConfig, options), model)
    predict_prompted(model, image, label, objective.prompting)
    first, then = model.asked
    assert first.points.shape == (1, 2, 2) and first.labels.tolist() == [[1, 0]]
    assert then.points.shape == (1, 4, 2) and torch.equal(then.points[:, :2], first.points)

    with torch.no_grad():
        answer = model.model(torch.from_numpy(image)[None].expand(1, 3, -1, -1), first)[0, 0]
        doubt = answer.sigmoid().sub(0.5).abs()
    cols, rows = ((then.points[0, 2:] + 0.5) / 4 - 0.5).round().long().T
    assert doubt[rows[0], cols[0]] == doubt.min()
    assert then.labels[0, 2:].tolist() == Frame(64, 64, 64, pixels=SAM).label(label[0])[rows, cols].tolist()

    model.asked.clear()
    objective(model, [Sample("s", image[0], label[0], Transform(), (0, 0))], 1, None)
    trained = [prompts.points for prompts in model.asked]
    assert [points.shape[1] for points in trained] == [2, 4] and torch.equal(trained[1][:, :2], trained[0])


def test_one_point_has_no_answer_to_go_by():
    assert in_turn(Prompting("pt", point_strategy="entropy")) == (Prompting("pt"), 0)
    assert in_turn(Prompting("pt", sample_num=4, point_strategy="entropy")) == (Prompting("pt"), 3)
    assert in_turn(Prompting("pt", sample_num=4)) == (Prompting("pt", sample_num=4), 0)


def test_nothing_is_imported_once_the_clock_runs(monkeypatch):
    """--max_seconds is for steps: MONAI takes seconds to import."""
    for system in ("medsam_decoder", "sam_prompt"):
        model = samlora.build_model(system, "random:1", "vit_ti", 64, num_classes=1)
        objective = make_objective(TrainConfig(), model)
        label = np.zeros((64, 64), np.uint8)
        label[10:40, 12:50] = 1
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "monai.losses", None)
            objective(model, [Sample("s", label / np.float32(2), label, Transform(), (0, 0))], 1, None)


REFUSED = {
    "no value of YAML": (["--system", "samed", "--options", "targets=[q,k"], "[q,k is no value of YAML"),
    "no date": (["--system", "samed", "--options", "alpha=2024-13-41"], "alpha=2024-13-41"),
    "no such option": (["--system", "samed", "--options", "alfa=4"], "alfa"),
    "not a pair": (["--system", "samed", "--options", "alpha"], "NAME=VALUE"),
    "frozen altogether": (["--system", "sam_prompt", "--options", "freeze=image_encoder,prompt_encoder,mask_decoder"], "one or two of"),
    "prompts for classes": (["--system", "samed", "--prompt", "box"], "no prompts"),
    "points without points": (["--system", "sam_lora", "--prompt", "pt", "--sample_num", "0"], "--sample_num 0"),
    "entropy without a second point": (["--system", "sam_lora", "--point_strategy", "entropy"], "--sample_num 2"),
    "embeddings that move": (["--system", "medsam_decoder", "--cache_embeddings", "x"], "--augment none"),
    "embeddings that train": (["--system", "samed", "--augment", "none", "--cache_embeddings", "x"], "encoder of samed trains from its beginning"),
    "LoRA+ without LoRA": (["--system", "medsam", "--lora_plus", "16"], "has no LoRA"),
    "checkpointing without an encoder": (["--system", "unet", "--checkpointing"], "no image encoder"),
    "nothing trains": (["--system", "sam"], "nothing of it trains"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(data, tmp_path, capsys, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, words = REFUSED[name]
    variant = [] if "unet" in flags else ["--vit_name", "vit_ti"]
    code = main(["train", "--root_path", str(data), "--num_classes", "2", "--img_size", "64", "--device", "cpu", *variant, *flags])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(said) == 1 and words in said[0], said


def test_labels_that_show_nothing_cannot_be_asked_for(tmp_path):
    write_slice(tmp_path / "a_slice000.npz", np.zeros((32, 32), np.float32), np.zeros((32, 32), np.uint8))
    with pytest.raises(InputError, match="every label is empty"):
        train(config(tmp_path, tmp_path, system="medsam_decoder", val_cases=[]))


def test_a_network_trains_and_comes_back(data, tmp_path):
    run = train(config(data, tmp_path, system="unet", vit_name=None, max_iterations=1))
    path = run / "adapter_last.safetensors"
    model, images = samlora.load_model(path), torch.rand(1, 3, 64, 64)
    assert model(images).shape == (1, 3, 64, 64) and model.spec.base == "none"
    assert torch.equal(model(images), samlora.load_model(path)(images))
    with pytest.raises(InputError, match="leave the base out"):
        samlora.load_model(path, base="anything.pth")
