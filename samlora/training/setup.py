"""Everything before the first step of training: engine, data, model, optimizer, plan, resumed state."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from samlora.data.dataset import (
    Batches,
    Contents,
    Sample,
    SliceDataset,
    SliceFile,
    check_slices,
    data_folder,
    find_slices,
    split_cases,
)
from samlora.data.recipe import Recipe
from samlora.device import pick_device
from samlora.engine import launch
from samlora.errors import InputError
from samlora.model import checkpoint
from samlora.model.checkpoint import Spec
from samlora.model.lora import translate_adapter
from samlora.model.methods import SYSTEMS, build_model, named_system, system_row
from samlora.model.sam import VARIANTS
from samlora.options import make, read_yaml
from samlora.training.config import TrainConfig
from samlora.training.run import Run


def make_fabric(config: TrainConfig):
    """The engine of a training run (`samlora.engine.launch`), its number formats and kernels chosen."""
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in one order only with this
        torch.use_deterministic_algorithms(True, warn_only=True)
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    wanted = config.precision
    if config.use_amp:
        wanted = "bf16" if pick_device(config.device).type == "cpu" else "fp16"
    return launch(config.device, wanted, config.n_gpu, config.num_nodes, config.strategy)


@dataclass
class Data:
    """The slices of a run and what is known about them; contents: of the training slices."""

    train: list[SliceFile]
    val: list[SliceFile]
    num_classes: int
    class_names: tuple[str, ...] | None
    recipe: dict | None
    contents: Contents


def load_data(config: TrainConfig) -> Data:
    """Finds, splits and checks the slices. Raises InputError naming the file or flag that is wrong."""
    if config.root_path is None:
        raise InputError("--root_path is missing; give the folder of prepared data (samlora prepare makes one)")
    slices = find_slices(config.root_path, config.list_dir)
    recipe = _recipe(config)
    known = None if recipe is None else recipe.num_classes
    if config.num_classes and known and config.num_classes != known:
        raise InputError(
            f"--num_classes {config.num_classes}: the data in {config.root_path} has {known} "
            f"classes ({', '.join(recipe.classes)}); leave the flag out"
        )
    num_classes = config.num_classes or known or 8
    patient_of = str if recipe is None else recipe.patient_of
    train, val = split_cases(slices, config.val_cases, config.val_fraction, config.seed, patient_of)
    contents = check_slices(train, num_classes)
    if val:
        check_slices(val, num_classes)
    names = tuple(recipe.classes) if known else None
    return Data(train, val, num_classes, names, None if recipe is None else recipe.to_dict(), contents)


def _recipe(config: TrainConfig) -> Recipe | None:
    """The recipe beside the data, if any: published data have none."""
    folder = data_folder(config.root_path, "train_npz", "--root_path")
    for place in (folder, folder.parent):
        if (place / "recipe.yaml").is_file():
            return Recipe.load(place / "recipe.yaml")
    return None


def load_system(config: TrainConfig, data: Data) -> nn.Module:
    """Builds the system on its base, and gives it the weights of --lora_ckpt if there is one."""
    system = named_system(config.system, config.module) or "samed"
    if not system_row(system).semantic:
        raise InputError(
            f"--system {system} learns from prompts, train.py from label maps; choose one of "
            f"{', '.join(n for n, r in SYSTEMS.items() if r.semantic)}"
        )
    if config.vit_name is not None and config.vit_name not in VARIANTS:
        raise InputError(f"--vit_name {config.vit_name} is unknown; allowed: {', '.join(VARIANTS)}")
    if config.ckpt == "random" and config.vit_name is None:
        raise InputError("--ckpt random needs --vit_name: " + ", ".join(VARIANTS))
    model = build_model(
        system=system,
        base=None if config.ckpt == "random" else config.ckpt or "default",
        variant=config.vit_name,
        image_size=config.img_size,
        num_classes=data.num_classes,
        rank=config.rank,
        lora_layers=config.lora_layers or None,
        class_names=data.class_names,
        recipe=data.recipe,
        in_channels=3 if data.contents.channels == 1 else data.contents.channels,
    )
    if config.lora_ckpt:
        start_from(model, config.lora_ckpt)
    return model


def start_from(model: nn.Module, adapter: str) -> None:
    """Copies an adapter's weights into a new model. Raises InputError when it is of another kind."""
    tensors, spec = checkpoint.read_adapter(adapter)
    if spec is None:
        model.load_state_dict(translate_adapter(model, tensors, adapter), strict=False)
        return
    for name in ("system", "variant", "rank", "lora_layers", "num_classes", "in_channels", "base_sha256"):
        ours, theirs = getattr(model.spec, name), getattr(spec, name)
        if ours != theirs:
            raise InputError(f"--lora_ckpt {adapter}: its {name} is {theirs}, this run's is {ours}; make them equal")
    checkpoint.load_trained(model, tensors, adapter)


def make_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW or SGD over what trains, with SAMed's settings."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.base_lr, momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(
        parameters, lr=config.base_lr, betas=(0.9, 0.999), weight_decay=0.1, fused=device.type == "cuda"
    )


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run. batch_size: samples per rank and forward pass. horizon: steps of the decay."""

    batch_size: int
    accumulate: int
    batches_per_epoch: int
    last_step: int
    horizon: int
    rank: int
    ranks: int

    @classmethod
    def of(cls, config: TrainConfig, fabric, count: int) -> "Plan":
        # With dp one process feeds all its GPUs; with ddp every process feeds one.
        in_one_process = config.n_gpu if config.n_gpu > 1 and fabric.world_size == 1 else 1
        batch_size = config.batch_size * in_one_process
        per_epoch = -(-count // (batch_size * fabric.world_size))
        steps = -(-per_epoch // config.accumulate)
        last = min(config.stop_epoch, config.max_epochs) * steps
        last = min(last, config.max_iterations or last)
        return cls(
            batch_size,
            config.accumulate,
            per_epoch,
            last,
            config.max_epochs * steps,
            fabric.global_rank,
            fabric.world_size,
        )

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.accumulate)

    @property
    def effective_batch(self) -> int:
        return self.batch_size * self.accumulate * self.ranks

    def batches_of(self, step: int) -> int:
        """Batches that make up optimizer step `step`: the last one of an epoch takes what is left."""
        return min(self.accumulate, self.batches_per_epoch - step % self.steps_per_epoch * self.accumulate)

    def batches_before(self, step: int) -> int:
        """Batches that have been used when step `step` begins."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.batches_per_epoch + within * self.accumulate


def make_loader(config: TrainConfig, dataset: SliceDataset, batches: Batches, device: torch.device):
    """Lists of samples, read by worker processes in the order of `batches`."""
    workers = config.num_workers
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=_as_list)


def _as_list(samples: list[Sample]) -> list[Sample]:
    return samples  # samples differ in size and are resized on the device


def open_run(config: TrainConfig, spec: Spec, fabric) -> Run:
    """The run folder, new or resumed; InputError, in every process, rather than overwrite another run."""
    folder = config.run_folder(spec.system, spec.variant, spec.image_size)
    # The first process looks and tells the others: once it has begun to write, they would find a run.
    problem = fabric.broadcast(_run_problem(config, folder) if fabric.is_global_zero else None)
    if problem:
        raise InputError(problem)
    return Run(folder, config, writes=fabric.is_global_zero)


def _run_problem(config: TrainConfig, folder: Path) -> str | None:
    """Why a run cannot be begun or continued in `folder`, or None."""
    if not (folder / "config.yaml").exists():
        return None
    if not config.resume:
        return f"{folder} holds a run already; continue it with --resume, or choose another --output"
    former = make(TrainConfig, read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    ours, theirs = asdict(_comparable(config)), asdict(_comparable(former))
    changed = next((name for name in ours if ours[name] != theirs[name]), None)
    if changed is None:
        return None
    return (
        f"--{changed} {ours[changed]}: the run in {folder} began with {theirs[changed]}; resume it with its own options"
    )


def _comparable(config: TrainConfig) -> TrainConfig:
    """The options that must not change between a run and its continuation."""
    free = dict(
        resume=False,
        stop_epoch=1,
        max_iterations=None,
        num_workers=None,
        save_interval=1,
        val_interval=1,
        output="",
    )
    return replace(config, **free, root_path=None if config.root_path is None else str(Path(config.root_path)))


def restore(
    config: TrainConfig, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float, float]:
    """(next step, best validation Dice or NaN, seconds so far) of a resumed run; (0, NaN, 0) of a new one."""
    if not config.resume:
        return 0, float("nan"), 0.0
    state = run.load_state()
    if state is None:
        run.say("nothing saved yet: starting from the beginning")
        return 0, float("nan"), 0.0
    checkpoint.load_trained(model, state["model"], run.folder / "state.pt")
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["best"], state["elapsed"]
