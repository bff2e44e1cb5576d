"""Several processes do together what one does: train, validate, prepare. Two of them here, over gloo on the CPU."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import samlora
from samlora.data.augment import Transform
from samlora.data.dataset import Batches, Sample, SliceFile
from samlora.data.grid import Volume
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.data.volume import write_slice, write_volume
from samlora.engine import gathered, together
from samlora.errors import InputError
from samlora.model.sam import build_sam
from samlora.options import write_yaml
from samlora.pixels import SAMED
from samlora.processes import team
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig
from samlora.training.loop import optimizer_step, train
from samlora.training.losses import dice_ce
from samlora.training.objectives import make_objective
from samlora.training.reading import BadSamples
from samlora.training.setup import Data, Plan, make_fabric
from samlora.training.validation import validate

SEVERAL = ["under_torchrun", pytest.param("by_fabric", marks=pytest.mark.soak)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SIZE = 64


def draw(rng, brightest=2):
    """A slice with discs of classes 1.. (brighter, higher): image (64, 64) float32, label uint8."""
    y, x = np.mgrid[:SIZE, :SIZE]
    label = np.zeros((SIZE, SIZE), np.uint8)
    for value in range(1, brightest + 1):
        centre = rng.uniform(16, SIZE - 16, 2)
        label[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < (22 - 6 * value) ** 2] = value
    return (label * 0.4 + rng.normal(0.1, 0.02, label.shape)).astype(np.float32), label


def a_config(folder: Path, **changed) -> TrainConfig:
    """Nine slices in batches of four (of all processes): 4, 4 in one step and 1 in the next, so one process has none."""
    config = TrainConfig(
        root_path=str(folder / "data"), ckpt=str(folder / "tiny.pth"), num_classes=2, img_size=SIZE, accumulate=2,
        optimizer="sgd", base_lr=0.05, warmup_period=1, clip_norm=1.0, max_epochs=2, stop_epoch=2, device="cpu",
        val_cases=("val0", "val1", "val2"), patience=9,
    )  # fmt: skip
    return replace(config, **changed)


@pytest.fixture(scope="module")
def folder(shared_path):
    """Slices of 9 training and 3 validation cases, a base, and scans to prepare, one of them broken."""
    folder = shared_path
    rng = np.random.default_rng(0)
    for n in range(9):
        write_slice(folder / "data" / f"case{n}_slice000.npz", *draw(rng))
    for case, slices in enumerate((3, 1, 2)):
        for n in range(slices):
            write_slice(folder / "data" / f"val{case}_slice{n:03d}.npz", *draw(rng))
    torch.manual_seed(0)
    torch.save(build_sam("vit_ti", SIZE).state_dict(), folder / "tiny.pth")
    for place, count in (("scans", 5), ("broken", 3)):
        for n in range(count):
            hu = rng.integers(-200, 300, (12, 11, 4)).astype(np.int16)
            label = rng.integers(0, 3, hu.shape).astype(np.uint8)
            for kind, array in (("images", hu), ("labels", label)):
                write_volume(Volume(array, np.diag([-1.0, -1, 3, 1]), 1, 1), folder / place / kind / f"p{n}.nii.gz")
    (folder / "broken" / "labels" / "p1.nii.gz").write_bytes(b"garbage")
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """The run of one process."""
    return train(a_config(folder, output=str(folder / "one"), batch_size=4))


@pytest.fixture(scope="module")
def laws(folder, three):
    """What `in_each_process` found in two processes under torchrun: {what: value} of each."""
    answer = subprocess.run([*TORCHRUN, __file__, str(folder)], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def under_torchrun(folder, laws):
    (run,) = (folder / "torchrun").iterdir()
    return run


@pytest.fixture(scope="module")
def by_fabric(folder):
    config = a_config(folder, output=str(folder / "fabric"), batch_size=2, n_gpu=2, strategy="ddp")
    write_yaml(folder / "ddp.yaml", config)
    command = [sys.executable, "-m", "samlora", "train", "--config", str(folder / "ddp.yaml")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    (run,) = (folder / "fabric").iterdir()
    return run


def rows_of(run: Path) -> list[dict[str, float]]:
    with open(run / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("several", SEVERAL)
def test_two_processes_train_as_one(one, several, request):
    """The same curve and the same weights to 1e-5: Dice, cross-entropy, norms of gradients, with an uneven end."""
    several = request.getfixturevalue(several)
    ours, theirs = rows_of(one), rows_of(several)
    assert len(ours) == len(theirs) == 4 and ours[0].keys() == theirs[0].keys() >= {"loss", "loss_dice", "grad_norm"}
    for a, b in zip(ours, theirs):
        for name in ("lr", "loss", "loss_ce", "loss_dice", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), (name, a, b)
    a, b = (load_file(run / "adapter_last.safetensors") for run in (one, several))
    assert a.keys() == b.keys() and not any(name.startswith("module.") for name in b)
    born = samlora.build_model("samed", base=one.parent.parent / "tiny.pth", image_size=SIZE, num_classes=2)
    moved = max((a[n] - t).abs().max().item() for n, t in born.state_dict().items() if n in a)
    assert moved > 1e-3  # what training changed is large beside the tolerance
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("several", SEVERAL)
def test_two_processes_leave_what_one_leaves(one, several, request):
    several = request.getfixturevalue(several)
    assert {p.name.split(".")[0] for p in one.iterdir()} == {p.name.split(".")[0] for p in several.iterdir()}
    facts = [json.loads((run / "run.json").read_text()) for run in (one, several)]
    assert facts[0]["effective_batch"] == facts[1]["effective_batch"] == 8
    dice = [[row["val_dice"] for row in rows_of(run) if "val_dice" in row] for run in (one, several)]
    assert len(dice[0]) == 2 and dice[0] == pytest.approx(dice[1], abs=1e-3)  # a pixel may fall to the other side


def test_only_the_first_process_writes(laws):
    assert any(path.endswith("metrics.csv") for path in laws[0]["opened"]) and laws[1]["opened"] == []


# Samples of the whole batch of which each of two processes has every second: one may have none.
PARTS = (5, 4, 1)


def whole_batch(count: int):
    """A model, and logits (count, 3, 8, 8) of it with labels."""
    rng = torch.Generator().manual_seed(count)
    model = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        model.weight.normal_(generator=rng)
        model.bias.normal_(generator=rng)
    images, labels = torch.randn(count, 2, 8, 8, generator=rng), torch.randint(0, 3, (count, 8, 8), generator=rng)
    return model, images, labels


@pytest.mark.parametrize("count", PARTS)
def test_the_loss_of_parts_is_the_loss_of_the_whole(laws, count):
    """Loss, its parts and the mean of the gradients, where the parts differ in size or one is empty."""
    model, images, labels = whole_batch(count)
    losses = torch.stack(dice_ce(model(images), labels, 0.8))
    losses[0].backward()
    for found in laws:
        torch.testing.assert_close(found[f"losses of {count}"], losses.detach(), atol=1e-6, rtol=1e-6)
    mean = sum(found[f"gradient of {count}"] for found in laws) / 2
    torch.testing.assert_close(mean, model.weight.grad, atol=1e-7, rtol=1e-5)
    assert not torch.allclose(laws[0][f"gradient of {count}"], laws[1][f"gradient of {count}"])


def test_a_loss_that_is_not_finite_ends_all_and_names_the_culprit(laws):
    for found in laws:
        assert "samples sick1;" in found["not finite"] and "\n" not in found["not finite"]


def test_an_error_in_one_process_is_raised_in_all(laws):
    for found in laws:
        assert found["together"] == "of the second" and found["gathered"] == ["from 0", "from 1"]


def test_files_that_any_process_left_out_are_counted_in_all(laws):
    for found in laws:
        assert found["counts"] == {"both.npz": 2, "one.npz": 1}
        assert found["said"] == ["warning: left out: both", "warning: left out: one"]


class ByBrightness(nn.Module):
    """A model that sees classes 0, 1, 2 by their brightness in `draw`, roughly, and never class 3."""

    spec = SimpleNamespace(system="samed", num_classes=3, class_names=("a", "b", "c"), image_size=SIZE, recipe=None)
    pixels, fill, logit_side = SAMED, (0, 0, 0), SIZE // 4

    def forward(self, images):
        pooled = nn.functional.avg_pool2d(images[:, :1], 4)
        return -(pooled - torch.tensor([0.1, 0.45, 0.95, 99.0]).view(1, 4, 1, 1)).square()


def validated(folder: Path, fabric, cases: int) -> tuple[float, list[str]]:
    """Validation Dice of ByBrightness on the first cases of folder/three, and what was said."""
    slices = [SliceFile(path, path.stem[:5]) for path in sorted((folder / "three").glob("*.npz"))]
    held = [item for item in slices if int(item.case[4]) < cases]
    said: list[str] = []
    bad = BadSamples(False, said.append)
    run = SimpleNamespace(say=said.append)
    data = Data([], [], held, 3, None, None, None, None, "")
    figures = validate(ByBrightness(), data, fabric, torch.float32, run, bad, Prompting())
    return figures["val_dice"], said


@pytest.fixture(scope="module")
def three(folder):
    """Three cases: class 2 in the second alone, class 3 (which the model never sees) in the third."""
    rng = np.random.default_rng(1)
    for case, (slices, brightest) in enumerate(((1, 1), (3, 2), (2, 3))):
        for n in range(slices):
            write_slice(folder / "three" / f"case{case}_slice{n:03d}.npz", *draw(rng, brightest))


@pytest.mark.parametrize("cases", [3, 1])
def test_validation_shared_is_validation_alone(folder, laws, cases):
    """To the bit, with one case more or fewer than processes; warnings are about all cases."""
    fabric, _ = make_fabric(TrainConfig(device="cpu"))
    dice, said = validated(folder, fabric, cases)
    assert 0.3 < dice < 1 and len(said) == (cases == 3) and all("(label 3)" in line for line in said)
    for found in laws:
        assert found[f"validated {cases}"] == (dice, said)


@pytest.mark.parametrize("count, batch, accumulate, ranks", [(9, 2, 2, 2), (10, 3, 1, 2), (5, 8, 1, 4), (12, 4, 3, 1)])
def test_sizes_are_those_of_one_process(count, batch, accumulate, ranks):
    """What the plan says of each batch is what is drawn, without what only keeps a process in step."""
    config = TrainConfig(batch_size=batch, accumulate=accumulate, max_epochs=2, stop_epoch=2)
    plan = Plan.of(config, SimpleNamespace(world_size=ranks, global_rank=0), count)
    alone = list(Batches(count, batch * ranks, 2, seed=0))
    dealt = [list(Batches(count, batch, 2, seed=0, rank=r, ranks=ranks)) for r in range(ranks)]
    sizes = [size for step in range(plan.last_step) for size in plan.sizes_of(step)]
    assert sizes == [len(drawn) for drawn in alone]
    for size, drawn, *parts in zip(sizes, alone, *dealt):
        own = [part[: len(range(rank, size, ranks))] for rank, part in enumerate(parts)]
        assert sorted(sum(own, [])) == sorted(drawn)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_processes_that_were_stopped_go_on_to_the_same_bytes(folder, laws):
    """With dropout: each process draws its own numbers, also where its share of a batch was smaller."""
    whole, parts = (next((folder / "dropout" / name).iterdir()) for name in ("whole", "parts"))
    assert (whole / "adapter_last.safetensors").read_bytes() == (parts / "adapter_last.safetensors").read_bytes()


def test_two_processes_prepare_what_one_prepares(folder, laws):
    recipe = Recipe("drawn", "ct", window=(-200, 300), size=16)  # its classes are found in the labels
    (folder / "drawn.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    alone = prepare(folder / "scans", folder / "alone", recipe, test_cases=["p3"], workers=1)
    command = [*TORCHRUN, "-m", "samlora", "prepare", folder / "scans", "-o", folder / "shared", "--dataset"]
    command += [folder / "drawn.yaml", "--test_cases", "p3"]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert len(alone.records) == 5 and str(alone).splitlines()[0] in answer.stdout
    ours, theirs = files_of(folder / "alone"), files_of(folder / "shared")
    assert ours.keys() == theirs.keys() and "lists/train.txt" in ours
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert [found["share"] for found in laws] == [[0, 2, 4], [1, 3]]


def test_a_case_that_cannot_be_prepared_ends_all_processes(folder, laws):
    assert laws[0]["broken"] == laws[1]["broken"] and "p1.nii.gz" in laws[0]["broken"]
    made = {name for name in files_of(folder / "prepared") if name.startswith("cases/")}
    assert made == {"cases/p0.json", "cases/p2.json"}  # of the first process; a later run keeps them


def in_each_process(folder: Path) -> None:
    """Runs under torchrun and leaves what it found in folder/foundRANK.pt."""
    rank, opened = int(os.environ["RANK"]), []

    def watch(event, arguments):
        if event == "open" and str(arguments[0]).startswith(str(folder / "torchrun")):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    train(a_config(folder, output=str(folder / "torchrun"), batch_size=2))
    found: dict = {"opened": opened[:]}
    for name, ends in (("whole", (4,)), ("parts", (1, 4))):
        place = {"output": str(folder / "dropout" / name), "batch_size": 2, "options": {"dropout": 0.3}}
        for end in ends:
            train(a_config(folder, max_iterations=end, resume=end != ends[0], **place))
    fabric, _ = make_fabric(TrainConfig(device="cpu"))
    for count in PARTS:
        model, images, labels = whole_batch(count)
        losses = torch.stack(dice_ce(model(images[rank::2]), labels[rank::2], 0.8, total=count))
        losses[0].backward()
        found |= {f"losses of {count}": losses.detach(), f"gradient of {count}": model.weight.grad}

    model = samlora.build_model("samed", base=folder / "tiny.pth", image_size=SIZE, num_classes=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wrapped, optimizer = fabric.setup(model, optimizer)
    image = np.full((SIZE, SIZE), 1e38 if rank else 0.5, np.float32)
    sample = Sample(f"{'sick' if rank else 'well'}{rank}", image, np.zeros((SIZE, SIZE), np.uint8), Transform())
    try:
        optimizer_step(fabric, wrapped, optimizer, [[sample]], make_objective(TrainConfig(), model), sizes=[2])
    except InputError as error:
        found["not finite"] = str(error)

    try:
        with together(fabric):
            if rank == 1:
                raise InputError("of the second")
    except InputError as error:
        found["together"] = str(error)
    found["gathered"] = gathered(fabric, f"from {rank}")

    said: list[str] = []
    bad = BadSamples(True, said.append)
    bad.met("both.npz", "both")
    if rank == 1:
        bad.met("one.npz", "one")
    bad.share(fabric)
    bad.share(fabric)  # what was shared is not counted again
    found |= {"counts": bad.counts, "said": said}
    for cases in (3, 1):
        found[f"validated {cases}"] = validated(folder, fabric, cases)

    with team() as processes:
        found["share"] = list(processes.share(range(5)))
    recipe = Recipe("drawn", "ct", window=(-200, 300), classes=("a", "b"), label_values=((1,), (2,)))
    try:
        prepare(folder / "broken", folder / "prepared", recipe, workers=1)
    except InputError as error:
        found["broken"] = str(error)
    torch.save(found, folder / f"found{rank}.pt")


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]))
