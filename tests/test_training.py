"""Training, from files to an adapter, at the smallest size."""

import contextlib
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import samlora
from samlora.cli import main
from samlora.data.augment import Transform
from samlora.data.dataset import Sample
from samlora.data.grid import Case
from samlora.data.ignored import IGNORE
from samlora.data.recipe import Recipe
from samlora.data.volume import read_slice, write_case, write_slice
from samlora.errors import InputError
from samlora.model.methods import system_row
from samlora.model.sam import build_sam
from samlora.model.variants import VARIANTS
from samlora.options import make, read_yaml, write_yaml
from samlora.training.config import TrainConfig
from samlora.training.loop import optimizer_step, train
from samlora.training.objectives import make_objective
from samlora.training.setup import Plan, make_fabric, make_optimizer

ROOT = Path(__file__).parent.parent


def draw(rng, size=32):
    """An easy slice: class 1 is bright, class 2 brighter."""
    y, x = np.mgrid[:size, :size]
    label = np.zeros((size, size), np.uint8)
    for value, radius in ((1, 9), (2, 5)):
        centre = rng.uniform(10, size - 10, 2)
        label[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = value
    return (label * 0.4 + rng.normal(0.1, 0.02, label.shape)).astype(np.float32), label


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for case in range(3):
        for n in range(4):
            write_slice(folder / "train_npz" / f"case{case:04d}_slice{n:03d}.npz", *draw(rng))
    stack = [draw(rng) for _ in range(5)]
    image, label = (np.stack(arrays) for arrays in zip(*stack))
    write_case(Case(image, label), folder / "test_vol_h5" / "case0007.npy.h5")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "tiny.pth"
    torch.save(build_sam("vit_ti", 64).state_dict(), path)
    return path


@pytest.fixture
def config(data, base, tmp_path):
    return TrainConfig(
        root_path=str(data), ckpt=str(base), output=str(tmp_path / "runs"), num_classes=2, img_size=64, batch_size=4,
        max_epochs=3, stop_epoch=2, base_lr=0.001, warmup_period=2, device="cpu",
    )  # fmt: skip


def test_a_run_leaves_what_it_promises(config, data, base, capsys):
    run = train(replace(config, val_cases=("case0002",), save_interval=1))
    names = {path.name for path in run.iterdir()}
    promised = "config.yaml run.json metrics.csv log.txt state.pt curves.png preview.png adapter_last adapter_best epoch_0 epoch_1"
    for name in promised.split():
        assert name in names or f"{name}.safetensors" in names, name
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert run.name == "Synapse_64_samed_vit_ti_epo3_bs4_lr0.001"

    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [bool(row["val_dice"]) for row in rows] == [False, True, False, True]
    facts = json.loads((run / "run.json").read_text())
    assert facts["effective_batch"] == 4 and facts["val_cases"] == ["case0002"] and facts["steps"] == 4
    assert facts["peak_memory_bytes"] > 1e8 and torch.__version__.startswith(facts["versions"]["torch"])
    saved = make(TrainConfig, read_yaml(run / "config.yaml"))
    assert saved == replace(config, val_cases=("case0002",), save_interval=1)

    said = capsys.readouterr().out
    for words in (
        "trains 3,8",
        "effective batch 4",
        "device",
        "next: python test.py --volume_path",
        str(base),
    ):
        assert words in said, words


def test_slices_with_ignored_pixels_train_where_the_recipe_says_so(config, data, tmp_path):
    shutil.copytree(data / "train_npz", tmp_path / "data/train_npz")
    for path in (tmp_path / "data/train_npz").iterdir():
        image, label = read_slice(path)
        label[:6] = IGNORE
        write_slice(path, image, label)
    marked = replace(config, root_path=str(tmp_path / "data"), val_cases=("case0002",), stop_epoch=1)
    with pytest.raises(InputError, match="label values 255 are outside 0..2"):
        train(marked)
    two = {"classes": ("a", "b"), "label_values": ((1,), (2,))}
    recipe = Recipe("marked", "image", ignore=(9,), **two)
    (tmp_path / "data/recipe.yaml").write_text(json.dumps(recipe.to_dict()))
    with open(train(marked) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert np.isfinite(float(rows[-1]["val_dice"]))


def test_an_adapter_of_training_predicts_as_the_model_did(config, base):
    run = train(config)
    model = samlora.load_model(run / "adapter_last.safetensors", base=base)
    assert model.spec.class_names == ("class_1", "class_2") and model.spec.image_size == 64
    trained = load_file(run / "adapter_last.safetensors")
    assert any(trained[name].abs().sum() > 0 for name in trained if name.startswith("w_b_"))


def test_same_seed_same_bytes(config, tmp_path):
    runs = [train(replace(config, output=str(tmp_path / name))) for name in "ab"]
    a, b = ((run / "adapter_last.safetensors").read_bytes() for run in runs)
    assert a == b
    other = train(replace(config, output=str(tmp_path / "c"), seed=5))
    assert (other / "adapter_last.safetensors").read_bytes() != a


def test_decoded_slices_and_checkpointing_change_no_byte(config, tmp_path):
    ways = {"plain": {}, "cached": {"cache_samples": str(tmp_path / "cache")}, "again": {"checkpointing": True}}
    runs = [train(replace(config, stop_epoch=1, output=str(tmp_path / name), **way)) for name, way in ways.items()]
    plain, cached, again = ((run / "adapter_last.safetensors").read_bytes() for run in runs)
    assert plain == cached == again
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stopped", [{"stop_epoch": 1}, {"max_iterations": 1}], ids=["epoch", "middle"])
def test_a_resumed_run_ends_in_the_same_bytes(config, tmp_path, optimizer, stopped):
    """Stopped after an epoch or in the middle of one, with accumulation and validation in between."""
    config = replace(config, batch_size=2, accumulate=2, val_cases=("case0002",), optimizer=optimizer)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    begun = replace(config, output=str(tmp_path / "parts"))
    train(replace(begun, **stopped))
    parts = train(replace(begun, resume=True))
    for name in ("adapter_last", "epoch_1"):
        assert (whole / f"{name}.safetensors").read_bytes() == (parts / f"{name}.safetensors").read_bytes()
    steps = [path.read_text().splitlines() for path in (whole / "metrics.csv", parts / "metrics.csv")]
    assert len(steps[0]) == 5 and steps[0][2:] == steps[1][2:]  # the first step's row has a validation more


def test_resume_before_anything_was_saved_starts_and_says_so(config, capsys):
    train(replace(config, resume=True))
    assert "nothing saved yet" in capsys.readouterr().out


def test_a_run_is_never_overwritten(config):
    run = train(replace(config, max_iterations=1))
    before = (run / "adapter_last.safetensors").read_bytes()
    with pytest.raises(InputError, match="--resume"):
        train(config)
    with pytest.raises(InputError, match="base_lr|rank"):
        train(replace(config, resume=True, rank=2))
    assert (run / "adapter_last.safetensors").read_bytes() == before


def test_lora_ckpt_starts_a_new_run_from_weights(config, tmp_path):
    first = train(config)
    second = train(
        replace(
            config,
            output=str(tmp_path / "second"),
            lora_ckpt=str(first / "adapter_last.safetensors"),
            base_lr=1e-9,
        )
    )
    a, b = (load_file(run / "adapter_last.safetensors") for run in (first, second))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="rank"):
        train(
            replace(
                config,
                output=str(tmp_path / "third"),
                lora_ckpt=str(first / "adapter_last.safetensors"),
                rank=2,
            )
        )


@pytest.mark.parametrize("classes", [1, 2, 20])
def test_it_learns(tmp_path, base, classes):
    """A few slices of 1, 2 or 20 bright shapes are learned by heart."""
    torch.manual_seed(0)
    model = samlora.build_model("samed", base=base, image_size=64, num_classes=classes)
    y, x = np.mgrid[:64, :64]
    label = ((y // 13) * 5 + x // 13 + 1).clip(0, 25) * (np.arange(26) <= classes)[
        ((y // 13) * 5 + x // 13 + 1).clip(0, 25)
    ]
    image = (label / classes).astype(np.float32)
    samples = [[Sample("a", image, label.astype(np.uint8), Transform())]]
    config = TrainConfig(base_lr=0.002, device="cpu")
    fabric, _ = make_fabric(config)
    wrapped, optimizer = fabric.setup(model, make_optimizer(config, model, torch.device("cpu")))
    objective = make_objective(config, model)
    losses = [optimizer_step(fabric, wrapped, optimizer, samples, objective)["loss"] for _ in range(60)]
    assert losses[-1] < 0.35 * losses[0], losses[::10]


def test_accumulation_weighs_samples_alike(base):
    """Cross-entropy over batches of 3 and 1 equals cross-entropy over 4; Dice is taken per batch."""
    rng = np.random.default_rng(0)
    samples = [Sample(str(i), *draw(rng), Transform()) for i in range(4)]
    weights = []
    for parts in ([samples], [samples[:3], samples[3:]]):
        torch.manual_seed(0)
        model = samlora.build_model("samed", base=base, image_size=64, num_classes=2)
        fabric, _ = make_fabric(TrainConfig(device="cpu"))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        wrapped, optimizer = fabric.setup(model, optimizer)
        optimizer_step(fabric, wrapped, optimizer, parts, make_objective(TrainConfig(dice_param=0.0), model))
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_loss_that_is_not_finite_names_the_samples(base):
    model = samlora.build_model("samed", base=base, image_size=64, num_classes=2)
    fabric, _ = make_fabric(TrainConfig(device="cpu"))
    wrapped, optimizer = fabric.setup(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    )
    bad = Sample("case0005_slice042", np.full((32, 32), 1e38, np.float32), np.zeros((32, 32), np.uint8), Transform())
    with pytest.raises(InputError, match="case0005_slice042"):
        optimizer_step(fabric, wrapped, optimizer, [[bad]], make_objective(TrainConfig(), model))


class Ranks:
    def __init__(self, world_size):
        self.world_size, self.global_rank = world_size, 0


@pytest.mark.parametrize(
    "count, batch, accumulate, ranks", [(100, 12, 2, 1), (10, 3, 4, 1), (7, 8, 1, 2), (50, 4, 3, 2)]
)
def test_plan_counts_batches(count, batch, accumulate, ranks):
    plan = Plan.of(
        TrainConfig(batch_size=batch, accumulate=accumulate, max_epochs=3, stop_epoch=3), Ranks(ranks), count
    )
    used = 0
    for step in range(plan.last_step):
        assert plan.batches_before(step) == used
        used += plan.batches_of(step)
    assert used == 3 * -(-count // (batch * ranks)) and plan.effective_batch == batch * accumulate * ranks


def test_published_plan_is_samed():
    """2211 slices on two GPUs of 12: 93 iterations per epoch, 18,600 to decay over, 14,880 done."""
    plan = Plan.of(TrainConfig(accumulate=2), Ranks(1), 2211)
    assert (plan.effective_batch, plan.steps_per_epoch, plan.horizon, plan.last_step) == (
        24,
        93,
        18600,
        14880,
    )


def test_options_round_trip(tmp_path):
    config = TrainConfig(root_path="a", lora_layers=(1, 2), val_cases=("0005",), base_lr=1e-4, resume=True)
    write_yaml(tmp_path / "config.yaml", config)
    assert make(TrainConfig, read_yaml(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_every_shipped_config_trains(name, config, tmp_path):
    """Every YAML as it stands but for sizes that a test can afford."""
    shipped = read_yaml(name)
    row = system_row(shipped["system"])
    small = {"img_size": 64, "batch_size": 2, "max_iterations": 1, "val_cases": (), "val_fraction": 0.0, "compile": False}
    if not row.network:
        tiny = VARIANTS[shipped.get("vit_name", row.variant)].tiny
        small |= {"ckpt": "random", "vit_name": shipped.get("vit_name", row.variant) if tiny else "vit_ti"}
    if "cache_embeddings" in shipped:
        small["cache_embeddings"] = str(tmp_path / "kept")
    values = shipped | small
    values |= {"root_path": config.root_path, "output": str(tmp_path), "num_classes": 2, "device": "cpu"}
    with contextlib.nullcontext() if row.network else pytest.warns(UserWarning, match="random weights"):
        run = train(make(TrainConfig, values))
    assert json.loads((run / "run.json").read_text())["model"]["system"] == shipped["system"]


def test_samed_commands_work(data, base, tmp_path, capsys):
    """The two commands people know, flag by flag."""
    arguments = f"train --root_path {data} --output {tmp_path} --warmup --AdamW --num_classes 2 --img_size 64 --ckpt {base} --vit_name vit_ti"
    arguments += (
        " --batch_size 4 --n_gpu 1 --max_epochs 1 --stop_epoch 1 --base_lr 0.001 --seed 7 --rank 2 --warmup_period 2"
    )
    arguments += " --module sam_lora_image_encoder_mask_decoder --dice_param 0.8 --lr_exp 0.9 --deterministic 1 --max_iterations 30000 --device cpu --no-tf32"
    assert main(arguments.split()) == 0
    (run,) = tmp_path.glob("Synapse_64_samed_s_vit_ti_epo1_bs4_lr0.001_s7")
    out = tmp_path / "out"
    arguments = f"test --config {run / 'config.yaml'} --volume_path {data} --output_dir {out} --is_savenii --metric-policy samed --input_size 24 --device cpu"
    assert main(arguments.split()) == 0
    assert {p.name for p in out.iterdir()} == {
        "metrics.csv",
        "summary.json",
        "log.txt",
        "report.html",
        "overlays",
        "predictions",
    }
    assert {p.name for p in (out / "predictions").iterdir()} == {
        f"case0007_{kind}.nii.gz" for kind in ("pred", "img", "gt")
    }
    said = capsys.readouterr().out
    assert "class_2" in said and "samed" in said and "strict" in said


ERRORS = {
    "no data": ("train --root_path {tmp}/none", "none", "samlora prepare"),
    "no flag": ("train --ckpt {base}", "--root_path", "samlora prepare"),
    "no base": ("train --root_path {data} --num_classes 2 --ckpt {tmp}/sam_vit_b_01ec64.pth", "sam_vit_b_01ec64.pth", "samlora download vit_b"),
    "wrong hash": ("train --root_path {data} --num_classes 2 --ckpt {tmp}/x/sam_vit_b_01ec64.pth", "MD5", "samlora download vit_b"),
    "other variant": ("train --root_path {data} --num_classes 2 --ckpt {base} --vit_name vit_b", "vit_ti", "vit_b"),
    "unknown variant": ("train --root_path {data} --num_classes 2 --vit_name vit_x", "vit_x", "vit_h"),
    "label outside": ("train --root_path {data} --num_classes 1 --ckpt {base} --img_size 64", "case0000_slice000.npz", "0..1"),
    "empty folder": ("train --root_path {tmp}/empty", "empty", "no training slices"),
    "size": ("train --root_path {data} --num_classes 2 --ckpt {base} --img_size 250", "250", "256"),
    "module": ("train --root_path {data} --num_classes 2 --ckpt {base} --module foo", "foo", "sam_lora_image_encoder"),
    "system": ("train --root_path {data} --num_classes 2 --ckpt {base} --system sam", "sam", "nothing of it trains"),
    "optimizer": ("train --root_path {data} --config {tmp}/bad.yaml", "bad.yaml", "lion"),
    "config key": ("train --root_path {data} --config {tmp}/key.yaml", "key.yaml", "did you mean base_lr"),
    "no config": ("train --config nothing.yaml", "nothing.yaml", "samed_h"),
    "flag": ("train --batchsize 3", "--batchsize", "--help"),
    "flag value": ("train --batch_size many", "--batch_size", "many"),
    "command": ("trian", "trian", "prepare"),
    "epochs": ("train --root_path {data} --max_epochs 0", "--max_epochs 0", "1 or more"),
    "case": ("train --root_path {data} --num_classes 2 --val_cases case0099", "case0099", "case0001"),
    "cuda": ("train --root_path {data} --num_classes 2 --device cuda --ckpt {base}", "cuda", "available"),
    "fp16": ("train --root_path {data} --device cpu --precision fp16", "fp16", "bf16"),
    "test no adapter": ("test --volume_path {data} --lora_ckpt {tmp}/none.safetensors", "none.safetensors", "train.py"),
    "test no flag": ("test --volume_path {data}", "--lora_ckpt", "adapter"),
    "test no volumes": ("test --volume_path {tmp}/empty --lora_ckpt {tmp}/a.safetensors", "empty", "no test volumes"),
    "test classes": ("test --volume_path {data} --lora_ckpt {tmp}/a.safetensors --ckpt {base} --num_classes 9", "--num_classes 9", "2"),
    "test rank": ("test --volume_path {data} --lora_ckpt {tmp}/a.safetensors --ckpt {base} --rank 9", "--rank 9", "4"),
    "test size": ("test --volume_path {data} --lora_ckpt {tmp}/a.safetensors --ckpt {base} --img_size 512", "--img_size 512", "64"),
    "test module": ("test --volume_path {data} --lora_ckpt {tmp}/a.safetensors --ckpt {base} --module sam_lora_image_encoder_mask_decoder", "samed_s", "samed"),
    "test base": ("test --volume_path {data} --lora_ckpt {tmp}/a.safetensors --ckpt {tmp}/other.pth", "SHA-256", "--ckpt"),
    "prepare": ("prepare {tmp}/none -o {tmp}/out --dataset synapse", "none", "no such folder"),
    "recipe": ("prepare {data} -o {tmp}/out --dataset nosuch", "nosuch", "synapse"),
}  # fmt: skip


@pytest.fixture(scope="module")
def junk(tmp_path_factory, base):
    tmp = tmp_path_factory.mktemp("junk")
    (tmp / "empty").mkdir()
    (tmp / "x").mkdir()
    (tmp / "x" / "sam_vit_b_01ec64.pth").write_bytes(b"not meta's")
    (tmp / "bad.yaml").write_text("optimizer: lion\n")
    (tmp / "key.yaml").write_text("base_rl: 0.1\n")
    torch.save({n: t + 1 for n, t in torch.load(base, weights_only=True).items()}, tmp / "other.pth")
    samlora.save_adapter(samlora.build_model("samed", base=base, image_size=64, num_classes=2), tmp / "a.safetensors")
    return tmp


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_and_code_2(name, data, base, junk, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *words = ERRORS[name]
    assert main(command.format(data=data, base=base, tmp=junk).split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("samlora: ") and all(word in said for word in words), said
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_preview_predicts_the_slices_that_it_shows(config, tmp_path, monkeypatch):
    """Of a case of hundreds of slices the preview took longer than an epoch."""
    from samlora.training import validation

    rng = np.random.default_rng(0)
    folder = tmp_path / "deep" / "train_npz"
    folder.mkdir(parents=True)
    for index in range(30):
        label = np.zeros((40, 40), np.uint8)
        label[5 : 10 + index, 5:20] = 1
        np.savez(folder / f"case0001_slice{index:03d}.npz", image=rng.random((40, 40), np.float32), label=label)
    seen = []
    answers = validation.answers

    def counted(model, images, *rest):
        seen.append(len(images))
        return answers(model, images, *rest)

    monkeypatch.setattr(validation, "answers", counted)
    run = train(replace(config, root_path=str(tmp_path / "deep"), num_classes=1, max_iterations=1, val_cases=()))
    assert seen == [8] and (run / "preview.png").stat().st_size
