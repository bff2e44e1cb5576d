"""Every system that trains, by its row alone: it learns, trains what it says and no more, and its adapter restores it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from samlora.data.augment import Transform
from samlora.data.batch import make_batch
from samlora.data.dataset import Sample
from samlora.errors import InputError
from samlora.files import shipped
from samlora.inference.config import TestConfig
from samlora.inference.testing import load_tested
from samlora.model.baselines import BASELINES
from samlora.model.build import build_model, load_model
from samlora.model.checkpoint import load_trained, read_adapter, save_adapter
from samlora.model.methods import SYSTEMS, trained_names
from samlora.model.variants import VARIANTS
from samlora.options import read_yaml
from samlora.training.config import TrainConfig
from samlora.training.objectives import make_objective
from samlora.training.prompting import draw_objects

TRAINED = [name for name, row in SYSTEMS.items() if row.trains]
SLICES = [name for name in TRAINED if not SYSTEMS[name].volumetric]  # tests/test_patches.py has vnet learn by heart
LONG = ("attention_unet", "lite_medsam", "mobile_sam", "samus")  # to learn by heart takes them more than ten seconds
CPU = torch.device("cpu")
MOST_STEPS = 150


def test_help_and_configs_name_every_system_that_trains():
    trainable = {name for name, row in SYSTEMS.items() if row.trains}
    told = TrainConfig.__dataclass_fields__["system"].metadata["help"].split("Without prompts:")[1]
    assert set(re.findall(r"\w+", told.replace("docs/systems.md", ""))) - {"with", "prompts", "both", "networks"} == trainable
    assert {read_yaml(path.stem)["system"] for path in shipped("configs").glob("*.yaml")} == trainable


def test_the_table_of_systems_says_when_to_choose_each_and_where_it_is_from():
    page = (Path(__file__).parent.parent / "docs" / "systems.md").read_text(encoding="utf-8")
    for name in SYSTEMS:
        lines = [line for line in page.splitlines() if line.startswith(f"| `{name}` |") and line.count("|") == 10]
        assert len(lines) == 1, name
        cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
        assert all(cells) and re.search(r"arXiv \d{4}\.\d{5}|ours", cells[-1]), lines[0]


def least(system: str):
    """The smallest model that a system's row allows; on the demo base, where it fits."""
    row = SYSTEMS[system]
    if row.network:
        return build_model(system, None, image_size=max(32, 2 * BASELINES[system].multiple), num_classes=2)
    tiny = VARIANTS[row.variant].tiny
    variant, base = (row.variant, "random:1") if tiny else ("vit_ti", "default")
    side = 64 if row.base_size is None else 32  # with patches of 8 px as many tokens, and logits of 16 px
    return build_model(system, base, variant, image_size=side, num_classes=2)


def four_slices(side: int) -> list[Sample]:
    """A disc and a bar that do not touch, at other places in each slice; bright as their class."""
    y, x = np.mgrid[:side, :side] / side
    samples = []
    for n, (row, col) in enumerate([(0.28, 0.3), (0.3, 0.68), (0.7, 0.32), (0.72, 0.7)]):
        label = ((y - row) ** 2 + (x - col) ** 2 < 0.2**2).astype(np.uint8)
        label[np.abs(y - (1 - row)) < 0.17] = 2
        noise = np.random.default_rng(n).normal(0, 0.03, label.shape)
        image = (0.15 + 0.35 * label + noise).clip(0, 1).astype(np.float32)
        samples.append(Sample(f"s{n}", image, label, Transform(), (0, n)))
    return samples


def objective_for(model):
    """The system's own, with prompts that no jitter blurs, and every object of a slice asked for."""
    objective = make_objective(TrainConfig(), model)
    objective.prompting = replace(objective.prompting, box_jitter=0, max_objects=2, parts=False)
    return objective


@torch.no_grad()
def answered(model, objective, batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(answer, truth), bool, by each way the system answers: its logits' own pixels, as these are all it can decide."""
    images, labels = ([torch.from_numpy(getattr(s, kind)) for s in batch] for kind in ("image", "label"))
    side, row = model.spec.image_size, objective.row
    images, targets = make_batch(images, labels, [s.transform for s in batch], side, CPU, model.spec.pixels, model.fill, objective.low)
    ways = []
    if row.automatic:
        classes = model(images).argmax(1)
        ways.append((torch.stack([classes == c for c in (1, 2)]), torch.stack([targets == c for c in (1, 2)])))
    if row.promptable:
        objects = draw_objects(batch, objective.prompting, side, model.spec.pixels, objective.config.seed, CPU, objective.low)
        ways.append((model(images, objects.prompts)[:, 0] > 0, objects.targets > 0))
    return ways


def dice(answer: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over the first axis: classes, or objects."""
    both = (answer & truth).flatten(1).sum(1)
    return float((2 * both / (answer.flatten(1).sum(1) + truth.flatten(1).sum(1))).mean())


class Learned:
    """A model that was trained until it draws its four slices, or for MOST_STEPS."""

    def __init__(self, system: str):
        torch.manual_seed(0)
        self.model = least(system).train()
        self.objective = objective_for(self.model)
        self.batch = four_slices(self.model.spec.image_size)
        self.before = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=3e-3 if SYSTEMS[system].lora or system in LONG else 1e-3,
            weight_decay=0,
        )
        for step in range(1, MOST_STEPS + 1):
            optimizer.zero_grad()  # the samples' keys stay, and so do their prompts
            self.objective(self.model, self.batch, len(self.batch), None).total.backward()
            optimizer.step()
            if step % 10 == 0:
                self.dice = min(dice(*way) for way in answered(self.model.eval(), self.objective, self.batch))
                self.steps = step
                if self.dice > 0.95:
                    break
                self.model.train()
        self.model.eval()


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.soak if name in LONG else ()) for name in SLICES])
def learned(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Learned(request.param)
    torch.set_num_threads(threads)


def test_it_learns_four_slices_by_heart(learned):
    assert learned.dice > 0.95, f"{learned.dice:.3f} after {learned.steps} steps"


def test_what_the_row_states_trains_and_nothing_else(learned):
    model, spec = learned.model, learned.model.spec
    stated = trained_names(model, spec.system, spec.options)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == stated
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, learned.before[name])}
    assert changed == stated


def moved(system: str):
    """The least model of a system, what it trains and the statistics it learns no longer as they began."""
    torch.manual_seed(2)
    model = least(system).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        if SYSTEMS[system].network:
            model(torch.rand(2, *model.input_shape))
    return model.eval()


@pytest.fixture(scope="module", params=TRAINED)
def saved(request, shared_path):
    """A model and its adapter file."""
    model, path = moved(request.param), shared_path / "adapter.safetensors"
    save_adapter(model, path)
    yield model, path
    path.unlink()


def test_the_adapter_gives_the_same_logits_bit_by_bit(saved):
    model, path = saved
    again, row, side = load_model(path), SYSTEMS[model.spec.system], model.spec.image_size
    shape = model.input_shape if row.network else (3, side, side)
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if row.automatic:
            assert torch.equal(again(images), model(images))
        if row.promptable:
            objective = objective_for(model)
            batch = four_slices(side)[:2]
            prompts = draw_objects(batch, objective.prompting, side, model.spec.pixels, 3, CPU, objective.low).prompts
            assert torch.equal(again(images, prompts), model(images, prompts))


def test_an_adapter_of_another_system_is_refused(saved):
    model, path = saved
    system = model.spec.system
    other = TRAINED[(TRAINED.index(system) + 1) % len(TRAINED)]
    with pytest.raises(InputError) as refused:
        load_tested(TestConfig(lora_ckpt=str(path), system=other))
    assert other in str(refused.value) and system in str(refused.value) and "\n" not in str(refused.value)
    stranger = "unet" if system != "unet" else "segresnet"
    with pytest.raises(InputError) as refused:
        load_trained(least(stranger), read_adapter(path)[0], path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
