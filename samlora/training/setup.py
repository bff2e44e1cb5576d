"""Everything before the first step of training: engine, data, model, optimizer, plan, resumed state."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samlora.data.dataset import (
    Contents,
    SliceFile,
    check_slices,
    find_slices,
    fingerprint,
    read_recipe,
    split_cases,
)
from samlora.data.ignored import split_ignored
from samlora.data.patches import stacks
from samlora.device import pick_device
from samlora.engine import launch, together
from samlora.errors import InputError
from samlora.model import checkpoint
from samlora.model.build import build_model
from samlora.model.checkpoint import Spec
from samlora.model.lora import lora_plus_groups, translate_adapter
from samlora.model.methods import named_system, system_row
from samlora.model.variants import VARIANTS
from samlora.options import make, read_yaml
from samlora.training.config import TrainConfig
from samlora.training.run import Run, facts_of, has_state, taken
from samlora.training.state import Origin, State


def make_fabric(config: TrainConfig):
    """The engine of a training run (`samlora.engine.launch`), its number formats and kernels chosen."""
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in one order only with this
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over each new tensor; none is read unset
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    wanted = config.precision
    if config.use_amp:
        wanted = "bf16" if pick_device(config.device).type == "cpu" else "fp16"
    launched = launch(config.device, wanted, config.n_gpu, config.num_nodes, config.strategy)
    torch.backends.cudnn.allow_tf32 = config.tf32
    return launched


@dataclass
class Data:
    """The slices of a run and what is known about them.

    shown: those of train that show a class, where prompts are drawn from them; else all. contents: of the training
    slices. sums: of each slice of train and val, (N,) int64, 0 where it cannot be read. sha256: over all that can.
    """

    train: list[SliceFile]
    shown: list[SliceFile]
    val: list[SliceFile]
    num_classes: int
    class_names: tuple[str, ...] | None
    recipe: dict | None
    contents: Contents
    sums: torch.Tensor
    sha256: str


def load_data(config: TrainConfig) -> Data:
    """Finds, splits and checks the slices. Raises InputError naming the file or flag that is wrong."""
    if config.root_path is None:
        raise InputError("--root_path is missing; give the folder of prepared data (samlora prepare makes one)")
    slices = find_slices(config.root_path, config.list_dir)
    recipe = read_recipe(config.root_path)
    made_by = None if recipe is None else recipe.to_dict()
    known = None if recipe is None else recipe.num_classes
    if config.num_classes and known and config.num_classes != known:
        raise InputError(
            f"--num_classes {config.num_classes}: the data in {config.root_path} has {known} "
            f"classes ({', '.join(recipe.classes)}); leave the flag out"
        )
    num_classes = config.num_classes or known or 8
    patient_of = str if recipe is None else recipe.patient_of
    train, val = split_cases(slices, config.val_cases, config.val_fraction, config.seed, patient_of)
    row, skip = system_row(named_system(config.system, config.module) or "samed"), config.on_bad_sample == "skip"
    whole = row.volumetric or bool(config.options.get("depth"))  # patches and chunks are cut from volumes
    if whole:
        _check_stacks(train, val, config)
    looked_at = (*train, *val) if skip else () if row.automatic else train
    with ThreadPoolExecutor(4) as pool:
        shows, shown = dict(zip(looked_at, pool.map(lambda item: _shows(item, made_by), looked_at))), train
    if not row.automatic:
        shown = [item for item in train if shows[item] is not False]  # of an empty slice no prompt can be drawn
        if not shown:
            raise InputError(f"--root_path {config.root_path}: every label is empty; prompts are drawn from labels")
    if not whole:
        train = shown
    usable = [[item for item in part if not skip or shows[item] is not None] for part in (train, val)]
    # Where none can be read, the check names the first.
    contents = check_slices(usable[0] or train, num_classes, recipe=made_by)
    if val:
        check_slices(usable[1] or val, num_classes, recipe=made_by)
    names = tuple(recipe.classes) if known else None
    prints = ["" if skip and shows[item] is None else fingerprint([item]) for item in (*train, *val)]
    return Data(
        train,
        shown,
        val,
        num_classes,
        names,
        made_by,
        contents,
        torch.tensor([int(p[:15] or "0", 16) for p in prints], dtype=torch.int64),
        hashlib.sha256("".join(prints).encode()).hexdigest(),
    )


def _check_stacks(train: list[SliceFile], val: list[SliceFile], config: TrainConfig) -> None:
    """Raises InputError where the slices of cases are no volumes."""
    if config.on_bad_sample == "skip":
        raise InputError("--on_bad_sample skip: a slice left out would be a gap in a volume; leave the flag out")
    if max(map(len, stacks(train).values())) == 1:
        raise InputError(
            f"--root_path {config.root_path}: each case is a single slice, and this system is trained on volumes; "
            "choose another --system"
        )
    stacks(val)


def _shows(item: SliceFile, recipe: Mapping | None) -> bool | None:
    """Whether a slice shows any class, None where it cannot be read."""
    try:
        return bool(split_ignored(item.read()[1], recipe)[0].any())
    except InputError:
        return None


def load_system(config: TrainConfig, data: Data) -> nn.Module:
    """Builds the system on its base, and gives it the weights of --lora_ckpt if there is one."""
    system = named_system(config.system, config.module) or "samed"
    row = system_row(system)
    if not row.trains:
        raise InputError(f"--system {system}: nothing of it trains; test it as it is, or choose another system")
    if config.lora_plus != 1 and not row.lora:
        raise InputError(f"--lora_plus {config.lora_plus:g}: the system {system} has no LoRA; leave it out")
    if config.vit_name is not None and config.vit_name not in VARIANTS:
        raise InputError(f"--vit_name {config.vit_name} is unknown; allowed: {', '.join(VARIANTS)}")
    if config.ckpt == "random" and config.vit_name is None:
        raise InputError("--ckpt random needs --vit_name: " + ", ".join(VARIANTS))
    model = build_model(
        system=system,
        base=None if config.ckpt == "random" or row.network else config.ckpt or "default",
        variant=config.vit_name,
        image_size=config.img_size,
        num_classes=data.num_classes,
        rank=config.rank,
        lora_layers=config.lora_layers or None,
        class_names=data.class_names,
        recipe=data.recipe,
        in_channels=None if data.contents.channels == 1 else data.contents.channels,
        options=config.options,
    )
    if row.network:
        for flag in ("checkpointing", "cache_embeddings"):
            if getattr(config, flag):
                raise InputError(f"--{flag}: {system} has no image encoder of SAM's; leave it out")
    else:
        model.image_encoder.checkpointing = config.checkpointing
    # A run that goes on has its own weights; those it began from may lie elsewhere by now.
    goes_on = config.resume and has_state(run_folder(config, model.spec))
    if config.lora_ckpt and not goes_on:
        start_from(model, config.lora_ckpt)
    return model


def run_folder(config: TrainConfig, spec: Spec) -> Path:
    """The folder of a run, by its options and what they came to."""
    return config.run_folder(spec.system, spec.variant, spec.image_size)


def start_from(model: nn.Module, adapter: str) -> None:
    """Copies an adapter's weights into a new model. Raises InputError when it is of another kind."""
    tensors, spec = checkpoint.read_adapter(adapter)
    if spec is None:
        model.load_state_dict(translate_adapter(model, tensors, adapter), strict=False)
        return
    if spec.holds == checkpoint.MODEL:
        raise InputError(f"--lora_ckpt {adapter}: its LoRA is merged (samlora merge); give the adapter it was made of")
    for name in ("system", "variant", "rank", "lora_layers", "num_classes", "in_channels", "base_sha256", "options"):
        ours, theirs = getattr(model.spec, name), getattr(spec, name)
        if ours != theirs:
            raise InputError(f"--lora_ckpt {adapter}: its {name} is {theirs}, this run's is {ours}; make them equal")
    if spec.holds == checkpoint.DECODERS:
        model.load_state_dict(translate_adapter(model, tensors, adapter), strict=False)
        return
    checkpoint.load_trained(model, tensors, adapter)


def make_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW or SGD over what trains, with SAMed's settings."""
    usual = {"sgd": 1e-4, "adam": 0.0, "adamw": 0.1}[config.optimizer]
    decay = usual if config.weight_decay is None else config.weight_decay
    parameters: list = [p for p in model.parameters() if p.requires_grad]
    if config.lora_plus != 1 or model.spec.options.get("dora"):
        parameters = lora_plus_groups(model, config.base_lr, config.lora_plus)
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.base_lr, momentum=0.9, weight_decay=decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    # A fused step undoes fp16's loss scale by itself, so that Fabric cannot clip before it.
    fused = device.type == "cuda" and not config.clip_norm
    return kind(parameters, lr=config.base_lr, betas=(0.9, 0.999), weight_decay=decay, fused=fused)


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run. count: samples. batch_size: of a rank and forward pass. horizon: steps of the decay."""

    count: int
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
            count,
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

    def sizes_of(self, step: int) -> list[int]:
        """Samples of each batch of optimizer step `step`, over all ranks."""
        whole = self.batch_size * self.ranks
        first = step % self.steps_per_epoch * self.accumulate
        return [min(whole, self.count - n * whole) for n in range(first, first + self.batches_of(step))]

    def batches_before(self, step: int) -> int:
        """Batches that have been used when step `step` begins."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.batches_per_epoch + within * self.accumulate


def worker_count(config: TrainConfig, device: torch.device) -> int:
    """Processes that read slices: those asked for, else as many as keep the device busy."""
    if config.num_workers is not None:
        return config.num_workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def origin(data: Data, spec: Spec) -> dict[str, Origin]:
    """What a run is made from, wherever it lies: {what: how it is told apart}."""
    return {
        "number of slices": len(data.train),
        "base weights": spec.base_sha256 or spec.base,
        "slices": data.sums,
    }


def open_run(config: TrainConfig, spec: Spec, fabric) -> Run:
    """The run folder, new or resumed; InputError, in every process, rather than overwrite another run."""
    folder = run_folder(config, spec)
    # The first process looks and tells the others: once it has begun to write, they would find a run.
    problem = fabric.broadcast(_run_problem(config, folder) if fabric.is_global_zero else None)
    if problem:
        raise InputError(problem)
    with together(fabric):
        run = Run(folder, config, fabric.is_global_zero, fabric.world_size)
    return run


def _run_problem(config: TrainConfig, folder: Path) -> str | None:
    """Why a run cannot be begun or continued in `folder`, or None."""
    if not (folder / "config.yaml").exists():
        left = [p for pattern in ("*.safetensors", "state*.pt", "metrics.csv") for p in folder.glob(pattern)]
        if left:
            return f"{folder} has no config.yaml but holds {left[0].name}; choose another --output"
        return None
    if not config.resume:
        return taken(folder)
    former = make(TrainConfig, read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    ours, theirs = asdict(_comparable(config)), asdict(_comparable(former))
    changed = next((name for name in ours if ours[name] != theirs[name]), None)
    if changed is None:
        return None
    return _contradiction(changed, ours[changed], folder, theirs[changed])


def _contradiction(name: str, ours, folder: Path, theirs) -> str:
    return f"--{name} {ours}: the run in {folder} began with {theirs}; resume it with its own options"


# What a continuation may change: where things lie and on what they run, how long, how often, and what is kept.
FREE = (
    "output", "resume", "root_path", "list_dir", "ckpt", "device", "num_workers", "stop_epoch", "max_iterations",
    "max_seconds", "patience", "val_interval", "save_interval", "save_seconds", "save_steps", "on_bad_sample",
    "checkpointing", "cache_samples", "cache_embeddings",
)  # fmt: skip


def _comparable(config: TrainConfig) -> TrainConfig:
    """The options that must not change between a run and its continuation."""
    return replace(config, **{field.name: field.default for field in fields(TrainConfig) if field.name in FREE})


def continued(given: Mapping[str, Any]) -> TrainConfig:
    """The options of the run in folder given["resume"], with what else was given of FREE.

    Raises InputError when that folder holds no run, was renamed, or an option that was given contradicts it.
    """
    folder = Path(given["resume"])
    source = folder / "config.yaml"
    if not source.is_file():
        raise InputError(f"--resume {folder}: holds no run (no config.yaml); give the run folder that train.py printed")
    values = read_yaml(source)
    former = make(TrainConfig, values, str(source))
    more = {name: value for name, value in given.items() if name not in ("resume", "output")}
    ours = make(TrainConfig, values | more)
    for name in more:
        if name not in FREE and getattr(ours, name) != getattr(former, name):
            raise InputError(_contradiction(name, getattr(ours, name), folder, getattr(former, name)))
    if facts := facts_of(folder).get("model"):
        name = former.run_folder(facts["system"], facts["variant"], facts["image_size"]).name
        if folder.resolve().name != name:
            raise InputError(f"--resume {folder}: this run was renamed from {name}; give the folder that name again")
    return replace(ours, resume=True, output=str(folder.parent))


def resume(run: Run, state: State, made_from: dict[str, Origin]) -> None:
    """Restores the last saved state of a run, or says that there is none.

    Raises InputError when the run was made from something else, or by another number of processes. With
    --on_bad_sample skip slices may break and be mended; those that can be read then and now must be the same.
    """
    found = run.load_state()
    if found is None:
        run.say("nothing saved yet: starting from the beginning")
        return
    saved, path = found
    state.restore(saved, path)
    if saved["processes"] != run.processes:
        raise InputError(
            f"{path}: this run is trained by {saved['processes']} processes, now there are {run.processes}; start it "
            f"as before, so that its batches stay as they are"
        )
    for what, value in made_from.items():
        if not _same(saved["origin"][what], value, state.bad.skip):
            raise InputError(f"{path}: this run was made from other {what}; put them back, or begin a new run")


def _same(before: Origin, now: Origin, skip: bool) -> bool:
    """Whether a run goes on with what it began with. skip: of sums of slices, 0 (unreadable) equals any."""
    if not isinstance(now, torch.Tensor):
        return before == now
    if before.shape != now.shape:
        return False
    return bool(((before == now) | (skip & ((before == 0) | (now == 0)))).all())
