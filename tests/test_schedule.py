"""How fast, how long and what of it is kept: schedules, clipping, early stopping, the running average."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import samlora
from samlora.data.augment import Transform
from samlora.data.dataset import Sample
from samlora.data.volume import write_slice
from samlora.errors import InputError
from samlora.model.checkpoint import adapter_tensors
from samlora.model.sam import build_sam
from samlora.training import loop
from samlora.training.average import Average
from samlora.training.config import TrainConfig
from samlora.training.loop import optimizer_step, train
from samlora.training.objectives import make_objective
from samlora.training.schedule import Plateau, learning_rate
from samlora.training.setup import make_fabric

SCHEDULES = ("poly", "cosine", "step", "constant", "plateau")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "tiny.pth"
    torch.save(build_sam("vit_ti", 64).state_dict(), path)
    return path


@pytest.fixture
def config(base, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        label = (np.indices((32, 32)).sum(0) > 20 + number).astype(np.uint8)
        image = (label * 0.5 + rng.normal(0.1, 0.02, label.shape)).astype(np.float32)
        write_slice(tmp_path / "data" / f"case{number // 2}_slice{number % 2:03d}.npz", image, label)
    return TrainConfig(
        root_path=str(tmp_path / "data"), ckpt=str(base), output=str(tmp_path / "runs"), num_classes=1, img_size=64,
        batch_size=2, max_epochs=6, stop_epoch=6, base_lr=0.001, warmup_period=2, device="cpu", val_cases=("case1",),
    )  # fmt: skip


def rates(schedule, steps=120, **more):
    return [learning_rate(s, 2.0, 100, 10, schedule=schedule, **more) for s in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_alike_and_never_rises_again(schedule):
    ours = rates(schedule, milestones=(40, 80))
    assert ours[:11] == rates("poly")[:11] and max(ours) == 2.0
    assert all(a >= b >= 0 for a, b in zip(ours[11:], ours[12:]))
    assert learning_rate(0, 2.0, 100, schedule=schedule) == 2.0  # without warm-up the first step is the highest


def test_poly_is_samed_s_formula_bit_for_bit():
    for step in range(1, 120):
        t = step - 1
        expected = 0.005 * (t + 1) / 10 if t < 10 else 0.005 * max(0.0, 1.0 - (t - 10) / 100) ** 0.9
        assert learning_rate(step, 0.005, 100, 10) == expected


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_zero():
    ours = rates("cosine")
    assert ours[61] == pytest.approx(1.0) and ours[111] == pytest.approx(0) and ours[119] == pytest.approx(0)
    assert ours[36] == pytest.approx(1 + math.cos(math.pi / 4))


def test_steps_fall_where_they_are_named():
    ours = rates("step", milestones=(40, 80), gamma=0.5)
    assert (ours[39], ours[40], ours[79], ours[80], ours[119]) == (2.0, 1.0, 1.0, 0.5, 0.5)
    assert set(rates("constant")[11:]) == {2.0}


def test_a_plateau_is_that_of_pytorch():
    losses = [3.0, 2.0, 2.5, 1.9999, 2.0, 2.1, 1.5, 1.6, 1.6, 1.6, 1.6, 1.6, 1.4, 1.4, 1.4, 1.4, 1.4]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=2)
    ours = Plateau(2, 0.9)
    for loss in losses:
        theirs.step(loss)
        ours.update(loss - 0.25, ends_epoch=False)
        ours.update(loss + 0.25, ends_epoch=True)
        again = Plateau(2, 0.9)
        again.restore(ours.state())
        ours = again
        assert ours.scale == pytest.approx(optimizer.param_groups[0]["lr"])
    assert ours.scale < 0.9


def test_a_stopped_run_falls_on_the_same_plateaus(config, tmp_path):
    # The loss of a rate that hardly moves anything does not improve: every second epoch lowers it.
    config = replace(config, schedule="plateau", schedule_gamma=0.5, schedule_patience=0, warmup=False, base_lr=1e-12)
    config = replace(config, batch_size=1, augment="none")
    parts = replace(config, output=str(tmp_path / "parts"))
    train(replace(parts, max_iterations=5))
    rates_of = []
    for run in (train(config), train(replace(parts, resume=True))):
        with open(run / "metrics.csv", newline="") as file:
            rates_of.append([float(row["lr"]) for row in csv.DictReader(file)])
    assert rates_of[0] == rates_of[1] and len(rates_of[0]) == 12
    assert rates_of[0][:4] == [1e-12] * 4 and rates_of[0][-1] < 1e-12


def test_a_run_follows_its_schedule(config):
    config = replace(config, schedule="step", schedule_steps=(3, 5), schedule_gamma=0.5)
    with open(train(config) / "metrics.csv", newline="") as file:
        written = [float(row["lr"]) for row in csv.DictReader(file)]
    assert written == pytest.approx([0.0005, 0.0005, 0.001, 0.0005, 0.0005, 0.00025])


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"schedule": "step"}, "--schedule step.*--schedule_steps missing"),
        ({"schedule_steps": (3,)}, "--schedule poly.*--schedule_steps 3"),
        ({"schedule_gamma": 0.0}, "--schedule_gamma 0"),
        ({"ema": 1.0}, "--ema 1"),
        ({"clip_norm": -1.0}, "--clip_norm -1"),
        ({"patience": 2}, "--patience 2.*--val_cases"),
        ({"save_steps": -1}, "--save_steps -1"),
    ],
)
def test_options_that_mean_nothing_are_one_line(wrong, words):
    with pytest.raises(InputError, match=words):
        TrainConfig(**wrong)


def test_clipping_bounds_the_step_and_leaves_short_gradients_alone(base):
    image = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    samples = [[Sample("a", image, (image > 0.5).astype(np.uint8), Transform())]]

    def moved(clip_norm):
        torch.manual_seed(0)
        model = samlora.build_model("samed", base=base, image_size=64, num_classes=1)
        fabric, _ = make_fabric(TrainConfig(device="cpu"))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        wrapped, optimizer = fabric.setup(model, optimizer)
        before = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
        row = optimizer_step(fabric, wrapped, optimizer, samples, make_objective(TrainConfig(), model), clip_norm)
        after = adapter_tensors(model)
        # By SGD at rate 1 the weights move by the gradient.
        return sum((after[n] - before[n]).square().sum().item() for n in before) ** 0.5, row

    free, row = moved(0)
    assert "grad_norm" not in row
    norm, row = moved(free / 4)
    assert norm == pytest.approx(free / 4, rel=1e-3) and row["grad_norm"] == pytest.approx(free, rel=1e-3)
    assert moved(free * 2)[0] == pytest.approx(free, rel=1e-6)


def test_the_average_is_the_formula_and_gives_the_weights_back(base):
    model = samlora.build_model("samed", base=base, image_size=64, num_classes=1)
    average, weights = Average(model, 0.5), adapter_tensors(model)
    name = "w_a_000"
    expected = weights[name].clone()
    for step in range(1, 8):
        weights[name].add_(1)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights[name]
        average.update(step)
    torch.testing.assert_close(average.tensors[name], expected)
    own = weights[name].clone()
    with average.in_place():
        torch.testing.assert_close(adapter_tensors(model)[name], expected)
    assert torch.equal(adapter_tensors(model)[name], own)


def test_the_average_is_validated_and_saved_and_does_not_disturb_training(config, tmp_path):
    plain = train(config)
    averaged = train(replace(config, ema=0.5, output=str(tmp_path / "ema")))
    states = [torch.load(run / "state.pt", weights_only=True) for run in (plain, averaged)]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name])
    adapter = samlora.load_model(averaged / "adapter_last.safetensors", base=config.ckpt)
    for name, tensor in adapter_tensors(adapter).items():
        assert torch.equal(tensor, states[1]["average"][name])
    assert states[0]["average"] == {}


def test_patience_counts_validations_without_a_better_dice(config, monkeypatch, capsys):
    dice = iter([0.5, 0.6, 0.6, 0.4, 0.7, 0.8])
    monkeypatch.setattr(loop, "validate", lambda *_: {"val_dice": next(dice)})
    run = train(replace(config, patience=2))
    assert json.loads((run / "run.json").read_text())["steps"] == 4
    assert "stopped early: 2 validations" in capsys.readouterr().out
    assert (run / "epoch_3.safetensors").exists()
    train(replace(config, patience=2, resume=True))  # it has ended
    assert json.loads((run / "run.json").read_text())["steps"] == 4
    train(replace(config, patience=3, resume=True))  # more patience: it goes on, and 0.7 and 0.8 are better
    assert json.loads((run / "run.json").read_text())["steps"] == 6
