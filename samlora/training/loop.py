"""Training: `files -> dataset -> batch -> model -> loss -> optimizer -> adapter file`."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import nn

from samlora.data.augment import make_batch
from samlora.data.dataset import Batches, Sample, SliceDataset, data_folder, fingerprint, read_geometry
from samlora.data.grid import Case, to_show
from samlora.data.volume import read_slice
from samlora.device import DTYPES, device_name, peak_memory
from samlora.errors import InputError
from samlora.evaluation.metrics import evaluate, summarise
from samlora.evaluation.report import contact_sheet, curves
from samlora.inference.slices import predict_slices
from samlora.model.checkpoint import Spec, adapter_tensors, save_adapter
from samlora.training.config import TrainConfig
from samlora.training.losses import dice_ce
from samlora.training.run import Run
from samlora.training.schedule import learning_rate
from samlora.training.setup import (
    Data,
    Plan,
    load_data,
    load_system,
    make_fabric,
    make_loader,
    make_optimizer,
    open_run,
    restore,
)

SECONDS_BETWEEN_STATES = 120
SECONDS_BETWEEN_LINES = 60  # for those who read a log, where no bar moves


def train(config: TrainConfig) -> Path:
    """Trains an adapter and returns its run folder.

    Raises InputError, before anything is written, for data, base weights or options that do not fit
    together; and later when the loss is not finite, naming the samples.
    """
    fabric, precision = make_fabric(config)
    torch.manual_seed(config.seed)
    data = load_data(config)
    model = load_system(config, data)
    spec: Spec = model.spec
    run = open_run(config, spec, fabric)
    optimizer = make_optimizer(config, model, fabric.device)
    wrapped, optimizer = fabric.setup(torch.compile(model) if config.compile else model, optimizer)
    plan = Plan.of(config, fabric, len(data.train))
    step, best, elapsed = restore(config, run, model, optimizer)
    batches = Batches(
        len(data.train),
        plan.batch_size,
        config.max_epochs,
        config.seed,
        plan.batches_before(step),
        plan.rank,
        plan.ranks,
    )
    loader = iter(make_loader(config, SliceDataset(data.train, config.seed), batches, fabric.device))
    run.open_metrics(step)
    facts = announce(run, config, data, model, plan, step, fabric.device, precision)
    run.describe(facts)
    bar = progress_bar(plan.last_step, step, visible=fabric.is_global_zero)
    began = saved = said = time.monotonic()
    while step < plan.last_step:
        epoch = step // plan.steps_per_epoch
        lr = learning_rate(step, config.base_lr, plan.horizon, config.warmup_period * config.warmup, config.lr_exp)
        for group in optimizer.param_groups:
            group["lr"] = lr
        samples = [next(loader) for _ in range(plan.batches_of(step))]
        losses = optimizer_step(fabric, wrapped, optimizer, samples, spec.image_size, config.dice_param)
        row = dict(zip(("loss", "loss_ce", "loss_dice"), losses), step=step, epoch=epoch, lr=lr)
        step += 1
        bar.update()
        bar.set_postfix(epoch=epoch + 1, loss=f"{losses[0]:.4f}", lr=f"{lr:.1e}")

        ended = step == plan.last_step
        if step % plan.steps_per_epoch == 0 or ended:
            # Only the first process validates and writes; the others wait for it in the next step.
            if data.val and run.writes and ((epoch + 1) % config.val_interval == 0 or ended):
                row["val_dice"] = validate(model, data, fabric.device, DTYPES[precision], run)
                if np.isnan(best) or row["val_dice"] > best:
                    best = row["val_dice"]
                    save(run, model, "adapter_best")
            if (epoch + 1) % config.save_interval == 0 or ended:
                save(run, model, f"epoch_{epoch}")
                preview(run, config, model, data, fabric.device, DTYPES[precision], step)
        run.record(**row)
        if "val_dice" in row or time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            dice = f", validation Dice {row['val_dice']:.4f}" if "val_dice" in row else ""
            run.say(f"step {step}/{plan.last_step}, epoch {epoch + 1}: loss {losses[0]:.4f}{dice}")
        if time.monotonic() - saved > SECONDS_BETWEEN_STATES or ended:
            saved = time.monotonic()
            save(run, model, "adapter_last")
            run.save_state(
                {
                    "step": step,
                    "best": best,
                    "elapsed": elapsed + saved - began,
                    "model": adapter_tensors(model),
                    "optimizer": optimizer.state_dict(),
                }
            )
    bar.close()
    elapsed += time.monotonic() - began
    run.describe(facts | {"steps": step, "seconds": round(elapsed, 1), "peak_memory_bytes": peak_memory(fabric.device)})
    if run.writes:
        curves(run.folder / "metrics.csv", run.folder / "curves.png")
    best_or_last = run.folder / f"{'adapter_last' if np.isnan(best) else 'adapter_best'}.safetensors"
    run.say(f"{step} steps in {elapsed:.0f} s" + ("" if np.isnan(best) else f", best validation Dice {best:.4f}"))
    run.say(f"adapter: {best_or_last}")
    base = "" if config.ckpt in (None, "random") else f" --ckpt {config.ckpt}"
    volumes = data_folder(config.root_path, "train_npz", "--root_path").parent / "test_vol_h5"
    where = volumes if volumes.is_dir() else "FOLDER_OF_TEST_VOLUMES"
    run.say(f"next: python test.py --volume_path {where} --lora_ckpt {best_or_last}{base} --is_savenii")
    run.close()
    return run.folder


def optimizer_step(
    fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sequence[Sample]],
    image_size: int,
    dice_weight: float,
) -> list[float]:
    """One step of the optimizer over one or more batches; returns (loss, cross-entropy, Dice loss).

    Every batch counts by its number of samples. The Dice loss is taken per batch, so accumulation is not
    exactly one large batch. Raises InputError naming the samples when a loss is not finite.
    """
    count = sum(map(len, samples))
    sums = torch.zeros(3, device=fabric.device)
    for position, batch in enumerate(samples):
        images, labels = make_batch(
            [torch.from_numpy(s.image) for s in batch], [torch.from_numpy(s.label) for s in batch],
            [s.transform for s in batch], image_size, fabric.device,
        )  # fmt: skip
        with fabric.no_backward_sync(model, enabled=position < len(samples) - 1):
            losses = dice_ce(model(images), labels, dice_weight)
            if not torch.isfinite(losses[0]):
                names = ", ".join(s.name for s in batch)
                raise InputError(
                    f"the loss is {losses[0].item()} on the samples {names}; look at them, or lower "
                    f"--base_lr or use --warmup"
                )
            fabric.backward(losses[0] * (len(batch) / count))
        sums += torch.stack([loss.detach() for loss in losses]) * (len(batch) / count)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums.tolist()


def announce(
    run: Run, config: TrainConfig, data: Data, model: nn.Module, plan: Plan, step: int, device, precision: str
) -> dict:
    """Says what is about to happen; returns the facts for run.json."""
    spec: Spec = model.spec
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    cases, val_cases = ({s.case for s in part} for part in (data.train, data.val))
    run.say(
        f"{spec.system} on {spec.variant}, base {spec.base}, {spec.image_size} px, "
        f"{spec.num_classes} classes: {', '.join(spec.class_names)}"
    )
    run.say(f"trains {trained:,} of {total:,} parameters")
    run.say(
        f"{len(data.train)} slices of {len(cases)} cases, {len(data.val)} slices of "
        f"{len(val_cases)} for validation"
        + ("" if data.val else " (none: no best adapter is chosen; see --val_fraction)")
    )
    run.say(
        f"effective batch {plan.effective_batch}, {plan.steps_per_epoch} steps per epoch, "
        f"{plan.last_step} steps, "
        f"device {device_name(device)}, {precision}"
    )
    run.say(f"run folder {run.folder}" + (f", continued at step {step}" if step else ""))
    for index in np.flatnonzero(data.contents.pixels == 0):
        name = "background" if index == 0 else spec.class_names[index - 1]
        run.say(f"warning: {name} (label {index}) occurs in no training slice and cannot be learned")
    low, high = data.contents.low, data.contents.high
    if low < -3 or high > 3:
        run.say(
            f"warning: image values go from {low:g} to {high:g}, but SAMed's are about 0 to 1; prepare the data again"
        )
    return {
        "effective_batch": plan.effective_batch,
        "seed": config.seed,
        "device": device_name(device),
        "precision": precision,
        "data_sha256": fingerprint([*data.train, *data.val]),
        "train_slices": len(data.train),
        "val_cases": sorted(val_cases),
        "trained_parameters": trained,
        "total_parameters": total,
        "model": asdict(spec),
    }


def progress_bar(total: int, done: int, visible: bool):
    from tqdm import tqdm

    hidden = None if visible else True  # None: shown on terminals only
    return tqdm(total=total, initial=done, desc="training", unit="step", dynamic_ncols=True, disable=hidden)


def validate(model: nn.Module, data: Data, device: torch.device, dtype: torch.dtype, run: Run) -> float:
    """Mean Dice over the classes and cases of the validation slices, in their own pixels."""
    spec: Spec = model.spec
    labels = range(1, spec.num_classes + 1)
    found, cases = set(), {}
    for case, items in groupby(sorted(data.val, key=lambda s: s.name), key=lambda s: s.case):
        images, truths = zip(*(read_slice(item.path) for item in items))
        truth = np.stack(truths)
        prediction = predict_slices(model, np.stack(images), spec.image_size, device=device, precision=dtype)
        found.update(np.unique(prediction).tolist())
        cases[case] = evaluate(prediction, truth, (1, 1, 1), labels, distances=False)
    summary = summarise(cases)
    for label in labels:
        if label not in found and summary["classes"][label]["dice"]["n"]:
            run.say(
                f"warning: {spec.class_names[label - 1]} (label {label}) is in the validation cases "
                f"but not predicted anywhere"
            )
    return summary["overall"]["dice"]["mean"]


def save(run: Run, model: nn.Module, name: str) -> None:
    if run.writes:
        save_adapter(model, run.folder / f"{name}.safetensors")


def preview(
    run: Run,
    config: TrainConfig,
    model: nn.Module,
    data: Data,
    device: torch.device,
    dtype: torch.dtype,
    step: int,
) -> None:
    """Draws predictions on a validation case, else on a training case, as preview.png and for TensorBoard."""
    if not run.writes:
        return
    slices = data.val or data.train
    first = [s for s in slices if s.case == slices[0].case]
    images, truths = (np.stack(arrays) for arrays in zip(*(read_slice(item.path) for item in first)))
    prediction = predict_slices(model, images, model.spec.image_size, device=device, precision=dtype)
    path, names = run.folder / "preview.png", dict(enumerate(model.spec.class_names, start=1))
    case = Case(images, truths, read_geometry(config.root_path, slices[0].case))
    contact_sheet(to_show(images), truths, prediction, path, names, **case.display)
    run.add_image(path, step)
