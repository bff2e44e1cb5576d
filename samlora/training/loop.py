"""Training: `files -> dataset -> batch -> model -> loss -> optimizer -> adapter file`."""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn

from samlora.data.cache import SliceCache
from samlora.data.chunks import ChunkDataset
from samlora.data.dataset import Batches, Sample, SliceDataset, data_folder
from samlora.data.patches import PatchDataset
from samlora.device import DTYPES, device_name, peak_memory
from samlora.engine import gathered, shared_on_disk, together
from samlora.errors import InputError
from samlora.evaluation.report import curves
from samlora.model.checkpoint import Spec
from samlora.model.methods import system_row
from samlora.training.average import Average
from samlora.training.config import TrainConfig
from samlora.training.embeddings import EmbeddingCache
from samlora.training.objectives import Objective, make_objective
from samlora.training.reading import BadSamples, Slices, read_batches, worker_died
from samlora.training.run import Run
from samlora.training.schedule import Plateau, learning_rate
from samlora.training.setup import (
    Data,
    Plan,
    continued,
    load_data,
    load_system,
    make_fabric,
    make_optimizer,
    open_run,
    origin,
    resume,
    worker_count,
)
from samlora.training.state import Origin, State
from samlora.training.stop import Stop
from samlora.training.validation import preview, validate

SECONDS_BETWEEN_LINES = 60  # for those who read a log, where no bar moves


def train(config: TrainConfig) -> Path:
    """Trains an adapter and returns its run folder.

    Raises InputError, before anything is written, for data, base weights or options that do not fit
    together; and later when the loss is not finite, a slice cannot be read or a file not be written.
    Raises SystemExit (130 or 143) after SIGINT or SIGTERM, when the step in progress is done and saved.
    """
    if isinstance(config.resume, str):
        given = {field.name: getattr(config, field.name) for field in fields(config)}
        config = continued({f.name: given[f.name] for f in fields(config) if given[f.name] != f.default})
    fabric, precision = make_fabric(config)
    torch.manual_seed(config.seed)
    data = load_data(config)
    model = load_system(config, data)
    objective = make_objective(config, model)
    if objective.row.promptable and config.n_gpu > 1 and fabric.world_size == 1:
        raise InputError(f"--n_gpu {config.n_gpu}: prompts cannot be shared by GPUs of one process; add --strategy ddp")
    if config.cache_embeddings and config.n_gpu > 1 and fabric.world_size == 1:
        raise InputError(
            f"--cache_embeddings {config.cache_embeddings}: cannot be shared by GPUs of one process; add --strategy ddp"
        )
    run = open_run(config, model.spec, fabric)
    try:
        train_in(run, config, fabric, precision, data, model, objective)
    except RuntimeError as error:
        if died := worker_died(error, worker_count(config, fabric.device)):
            raise died from None
        raise
    finally:
        run.close()
    return run.folder


def train_in(
    run: Run, config: TrainConfig, fabric, precision: str, data: Data, model: nn.Module, objective: Objective
) -> None:
    """Trains `model` on `data` until the plan, --patience or a signal ends it; `run` keeps what comes of it."""
    spec: Spec = model.spec
    optimizer = make_optimizer(config, model, fabric.device)
    wrapped, optimizer = fabric.setup(torch.compile(model, dynamic=False) if config.compile else model, optimizer)
    bad = BadSamples(config.on_bad_sample == "skip", run.say)
    average = Average(model, config.ema)
    plateau = Plateau(config.schedule_patience, config.schedule_gamma)
    state, made_from = State(fabric, model, optimizer, average, bad, plateau), origin(data, spec)
    with together(fabric):
        if config.resume:
            resume(run, state, made_from)
            run.keep_options(config)
        run.open_metrics(state.step, objective.parts)
    slices, embeddings = read_slices(config, data, model, fabric), None
    if config.cache_embeddings is not None:
        given = config.cache_embeddings, model, slices, DTYPES[precision], config.batch_size
        embeddings = shared_on_disk(fabric, lambda: EmbeddingCache(*given))
    plan = Plan.of(config, fabric, len(slices))
    batches = Batches(
        plan.count,
        plan.batch_size,
        config.max_epochs,
        config.seed,
        plan.batches_before(state.step),
        plan.rank,
        plan.ranks,
    )
    loader = read_batches(slices, batches, worker_count(config, fabric.device), bad, spec)
    with together(fabric):
        facts = announce(run, config, data, model, plan, state.step, fabric.device, precision)
        run.describe(facts)
    bar = progress_bar(plan.last_step, state.step, visible=fabric.is_global_zero)
    began, saved, said = time.monotonic() - state.seconds, time.monotonic(), time.monotonic()
    over = 0 < config.max_seconds <= state.seconds
    ended, stopped = state.step >= plan.last_step or has_stalled(config, state) or over, 0
    with Stop() as stop, contextlib.closing(loader):  # on every way out its processes end
        while not (ended or stopped):
            epoch = state.step // plan.steps_per_epoch
            row = {"step": state.step, "epoch": epoch, "lr": rate(config, plan, state.step) * state.plateau.scale}
            for group in optimizer.param_groups:
                group["lr"] = row["lr"] * group.get("lr_ratio", 1.0)
            try:
                with together(fabric):
                    samples = [next(loader) for _ in range(plan.batches_of(state.step))]
            except InputError:
                keep(run, state, made_from)  # the steps up to here are sound, as they may not be when a loss is NaN
                raise
            # Dropout draws the same numbers wherever the run was interrupted, and others in each process.
            torch.manual_seed(int(np.random.default_rng([config.seed, 4, state.step, plan.rank]).integers(2**63)))
            row |= optimizer_step(
                fabric,
                wrapped,
                optimizer,
                samples,
                objective,
                config.clip_norm,
                plan.sizes_of(state.step),
                embeddings,
            )
            state.step += 1
            average.update(state.step)
            if config.schedule == "plateau":
                state.plateau.update(row["loss"], state.step % plan.steps_per_epoch == 0)
            bar.update()
            bar.set_postfix(epoch=epoch + 1, loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.1e}")

            better, ended = False, state.step == plan.last_step or out_of_time(config, fabric, began)
            if state.step % plan.steps_per_epoch == 0 or ended:
                validates = bool(data.val) and ((epoch + 1) % config.val_interval == 0 or ended)
                if validates:
                    with average.in_place():
                        row |= validate(model, data, fabric, DTYPES[precision], run, bad, objective.prompting)
                    better = state.validated(row["val_dice"])
                ended = ended or (validates and has_stalled(config, state))
                if (epoch + 1) % config.save_interval == 0 or ended:
                    with together(fabric), average.in_place():
                        run.save_adapter(model, f"epoch_{epoch}")
                        preview(
                            run, config, model, data, fabric, DTYPES[precision], state.step, bad, objective.prompting
                        )
            bad.share(fabric)
            stopped = stop.agreed(fabric)
            with together(fabric):  # only the first process writes
                run.record(**row)
                if "val_dice" in row or time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    dice = f", validation Dice {row['val_dice']:.4f}" if "val_dice" in row else ""
                    run.say(f"step {state.step}/{plan.last_step}, epoch {epoch + 1}: loss {row['loss']:.4f}{dice}")
                by_clock = 0 < config.save_seconds < time.monotonic() - saved
                by_count = config.save_steps and state.step % config.save_steps == 0
                if better or by_clock or by_count or ended or stopped:
                    saved = time.monotonic()
                    state.seconds = saved - began
                    keep(run, state, made_from, better)
    bar.close()
    finish(run, config, facts, state, plan, stopped, objective.row.automatic)


def read_slices(config: TrainConfig, data: Data, model: nn.Module, fabric) -> Slices:
    """The data set that a model trains on: slices, chunks of neighbouring ones, or patches of volumes."""
    decoded, augment = None, config.augment
    if config.cache_samples is not None:
        decoded = shared_on_disk(fabric, lambda: SliceCache(config.cache_samples, data.train))
    with together(fabric):
        if system_row(model.spec.system).volumetric:
            return PatchDataset(data.train, config.seed, model.roi, augment, decoded, recipe=data.recipe)
        if model.chunk > 1:
            return ChunkDataset(data.train, data.shown, config.seed, model.chunk, augment, decoded)
        return SliceDataset(data.train, config.seed, augment, decoded)


def keep(run: Run, state: State, made_from: dict[str, Origin], better: bool = False) -> None:
    """Saves the adapter and, after it, the state: what a kill in between leaves behind, a continuation makes again."""
    with state.average.in_place():
        for name in ("adapter_best", "adapter_last") if better else ("adapter_last",):
            run.save_adapter(state.model, name)
    run.save_state(state.saved(made_from))


def rate(config: TrainConfig, plan: Plan, step: int) -> float:
    """The learning rate of optimizer step `step`."""
    warmup = config.warmup_period * config.warmup
    milestones, gamma = config.schedule_steps, config.schedule_gamma
    return learning_rate(step, config.base_lr, plan.horizon, warmup, config.lr_exp, config.schedule, milestones, gamma)


def has_stalled(config: TrainConfig, state: State) -> bool:
    """Whether --patience is exhausted; the same in every process, since all know every validation."""
    return bool(config.patience) and state.stale >= config.patience


def out_of_time(config: TrainConfig, fabric, began: float) -> bool:
    """Whether --max_seconds have passed since `began`; the same in every process: the first clock ends all."""
    over = 0 < config.max_seconds <= time.monotonic() - began
    if fabric.world_size == 1 or not config.max_seconds:
        return over
    return bool(fabric.all_reduce(torch.tensor(float(over), device=fabric.device), reduce_op="max"))


def finish(run: Run, config: TrainConfig, facts: dict, state: State, plan: Plan, stopped: int, automatic: bool) -> None:
    """Writes the last facts and says what to do next; raises SystemExit where a signal ended the run."""
    counted = {"steps": state.step, "seconds": round(state.seconds, 1), "bad_samples": state.bad.counts}
    run.describe(facts | counted | {"peak_memory_bytes": peak_memory(state.fabric.device)})
    over = 0 < config.max_seconds <= state.seconds
    if stopped and state.step < plan.last_step and not over:
        run.say(f"stopped at step {state.step} of {plan.last_step}; continue with: {run.resume_command}")
        raise SystemExit(128 + stopped)
    if run.writes:
        with run.writing():
            curves(run.folder / "metrics.csv", run.folder / "curves.png")
    if has_stalled(config, state):
        run.say(f"stopped early: {state.stale} validations without a better Dice (--patience {config.patience})")
    if over and state.step < plan.last_step:
        run.say(f"stopped by the clock at step {state.step} of {plan.last_step} (--max_seconds {config.max_seconds:g})")
    best = "" if math.isnan(state.best) else f", best validation Dice {state.best:.4f}"
    adapter = run.folder / f"adapter_{'best' if best else 'last'}.safetensors"
    run.say(f"{state.step} steps in {state.seconds:.0f} s{best}")
    run.say(f"adapter: {adapter}")
    base = "" if config.ckpt in (None, "random") else f" --ckpt {config.ckpt}"
    volumes = data_folder(config.root_path, "train_npz", "--root_path").parent / "test_vol_h5"
    where = volumes if volumes.is_dir() else "FOLDER_OF_TEST_VOLUMES"
    if automatic:
        run.say(f"next: python test.py --volume_path {where} --lora_ckpt {adapter}{base} --is_savenii")
    else:
        run.say(f"next: samlora evaluate-prompts {where} --adapter {adapter}{base} -o OUT; or: samlora app")


def optimizer_step(
    fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sequence[Sample]],
    objective: Objective,
    clip_norm: float = 0.0,
    sizes: Sequence[int] | None = None,
    embeddings: EmbeddingCache | None = None,
) -> dict[str, float]:
    """One step of the optimizer over one or more batches; returns loss, its parts and, if clipped, grad_norm.

    samples: this process's part of each batch, as `Batches` deals them. sizes: items of each batch in all processes
    (`Plan.sizes_of`); needed where there are several. Every batch counts by its number of samples, and its loss is
    taken over all processes: how many there are changes nothing. The Dice loss is taken per batch, so accumulation is
    not exactly one large batch. Raises InputError, in all processes, naming the samples when a loss is not finite.
    """
    sizes, alone = sizes or [len(batch) for batch in samples], fabric.world_size == 1
    sums = torch.zeros(1 + len(objective.parts), device=fabric.device)
    for position, (batch, size) in enumerate(zip(samples, sizes)):
        known = None if embeddings is None else embeddings.batch([s.key[1] for s in batch], fabric.device)
        with fabric.no_backward_sync(model, enabled=position < len(samples) - 1):
            # A process without a sample of its own was dealt one to keep in step: it counts nothing.
            own = len(range(fabric.global_rank, size, fabric.world_size)) * objective.chunk
            losses = objective(model, batch, own, None if alone else size, known)
            if not torch.isfinite(losses.total):
                raise InputError(
                    f"the loss is {losses.total.item()} on the samples {culprits(fabric, batch, losses.finite)}; look "
                    f"at them, or lower --base_lr or use --warmup"
                )
            fabric.backward(losses.total * (size / sum(sizes)))
        parts = [losses.total, *(losses.parts[name] for name in objective.parts)]
        sums += torch.stack([part.detach() for part in parts]) * (size / sum(sizes))
    row = {}
    if clip_norm:
        # An overflow of fp16 is not the user's: the loss scaler skips that step and halves its scale.
        norm = fabric.clip_gradients(model, optimizer, max_norm=clip_norm, error_if_nonfinite=False)
        row["grad_norm"] = norm.item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return dict(zip(("loss", *objective.parts), sums.tolist())) | row


def culprits(fabric, batch: Sequence[Sample], finite: torch.Tensor) -> str:
    """Names of the samples, of all processes, whose logits are not finite; of this process's where all are."""
    found = gathered(fabric, [sample.name for sample, is_finite in zip(batch, finite.tolist()) if not is_finite])
    return ", ".join(sum(found, []) or [sample.name for sample in batch])


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
    chunks = f" chunks of {model.chunk} slices" if model.chunk > 1 else ""
    run.say(
        f"effective batch {plan.effective_batch}{chunks}, {plan.steps_per_epoch} steps per epoch, "
        f"{plan.last_step} steps, device {device_name(device)}, {precision}"
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
        "data_sha256": data.sha256,
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
