"""The options of training: SAMed's names and defaults, and what this project adds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samlora.errors import InputError
from samlora.model.variants import VARIANTS
from samlora.options import option
from samlora.prompting import PROMPTS


@dataclass(frozen=True)
class TrainConfig:
    """All of a training run. Lengths in pixels, times in epochs or optimizer steps, as the help texts say."""

    root_path: str | None = option(None, "folder of prepared data: holds train_npz/, or the .npz slices themselves")
    output: str = option("runs", "folder for run folders")
    dataset: str = option("Synapse", "name of the data in the run folder's name")
    list_dir: str | None = option(None, "folder with train.txt, the slices to use; without it all of them")
    num_classes: int | None = option(None, "foreground classes (default: what the data's recipe says, else 8)")
    max_iterations: int | None = option(None, "stop after this many optimizer steps, whatever the epochs say")
    max_seconds: float = option(
        0.0, "stop after so many seconds of training, validation included, whatever the epochs say; 0: no limit"
    )
    max_epochs: int = option(200, "epochs over which the learning rate decays")
    stop_epoch: int = option(160, "epoch after which training stops")
    batch_size: int = option(12, "slices per device and forward pass")
    accumulate: int = option(1, "batches per optimizer step; 2 on one GPU gives SAMed's effective batch of 24")
    n_gpu: int = option(1, "GPUs (or, with --strategy ddp --device cpu, processes) on this machine")
    num_nodes: int = option(1, "machines, with --strategy ddp")
    strategy: str = option(
        "auto",
        "how devices share the work: dp in one process, ddp in one process each; auto is dp for n_gpu > 1",
        ("auto", "dp", "ddp"),
    )
    deterministic: int = option(1, "1: same seed, same result on the same machine; 0: let cuDNN choose")
    base_lr: float = option(0.005, "highest learning rate")
    img_size: int | None = option(None, "side of the model's input (default 512; vit_ti, lite_medsam 256)")
    seed: int = option(1234, "seed of everything random")
    system: str | None = option(
        None,
        "what is trained (default samed). Without prompts: samed, samed_decoder, samed_s, samed_h, mobile_sam; with "
        "prompts: sam_lora, medsam, medsam_decoder, sam_prompt, lite_medsam, msa, samus; both: samlora_joint; "
        "networks: unet, "
        "attention_unet, segresnet, unetr, swin_unetr, vnet (docs/systems.md)",
    )
    module: str | None = option(
        None, "SAMed's name for the system: sam_lora_image_encoder or sam_lora_image_encoder_mask_decoder"
    )
    vit_name: str | None = option(
        None, f"one of {', '.join(VARIANTS)} (default: what --ckpt holds, else the system's)"
    )
    ckpt: str | None = option(
        None, "base weights (default: those of vit_name; samlora download lists them), or random for none"
    )
    lora_ckpt: str | None = option(None, "adapter whose weights a new run starts from")
    rank: int = option(4, "rank of the LoRA pairs")
    lora_layers: tuple[int, ...] = option((), "encoder blocks that get LoRA, counted from 0 (default: all)")
    options: dict[str, Any] = option(
        {},
        "what the system offers beyond these: of LoRA alpha, rslora, dropout, dora, targets, ranks; of sam_prompt "
        "freeze; of msa ratio, scale, depth; of samus cnn, adapters (docs/systems.md)",
    )
    lora_plus: float = option(1.0, "learning rate of LoRA's B by that of A (LoRA+ uses 16)")
    prompt: str | None = option(
        None, "prompts drawn from the reference in training and validation (default: the system's)", PROMPTS
    )
    box_jitter: int | None = option(
        None, "most pixels, of the model's input, by which the sides of a box are moved in training"
    )
    sample_num: int | None = option(None, "points on the object")
    negative_num: int | None = option(None, "points beside the object")
    point_strategy: str | None = option(
        None,
        "points after the first: random, where the prediction is least sure, farthest from the others; centre: "
        "the middle-most first, then as distance",
        ("random", "entropy", "distance", "centre"),
    )
    max_objects: int | None = option(None, "objects of an image that are asked for in one step")
    prompt_ratio: float = option(0.5, "for samlora_joint: weight of the masks by prompts; the classes get the rest")
    optimizer: str = option(
        "adamw",
        "adamw (betas 0.9, 0.999), adam or sgd (momentum 0.9)",
        ("adamw", "adam", "sgd"),
    )
    weight_decay: float | None = option(None, "of the optimizer (default: 0.1 with adamw, 1e-4 with sgd, 0 with adam)")
    warmup: bool = option(True, "raise the learning rate linearly at the start; without it masks easily stay empty")
    warmup_period: int = option(250, "optimizer steps of warm-up")
    lr_exp: float = option(0.9, "exponent of the decay; SAMed_h uses 7")
    dice_param: float = option(0.8, "weight of the Dice loss; cross-entropy gets the rest")
    precision: str = option(
        "fp32",
        "number format of the forward pass; auto is bf16 where the device is fast at it",
        ("fp32", "bf16", "fp16", "auto"),
    )
    use_amp: bool = option(False, "SAMed_h's name for half precision: fp16 on a GPU, bf16 elsewhere")
    tf32: bool = option(False, "let a GPU multiply float32 in TF32")
    compile: bool = option(False, "torch.compile the model")
    checkpointing: bool = option(
        False, "keep less for the backward pass and compute it again: less memory, a third more time, same gradients"
    )
    augment: str = option(
        "samed",
        "samed: turns, flips and rotations; flips: along each axis by chance, as LiteMedSAM; or none",
        ("samed", "flips", "none"),
    )
    cache_embeddings: str | None = option(
        None,
        "folder for what the frozen part of the image encoder makes of the slices, up to its first block that "
        "trains: computed once, read in every epoch; needs --augment none",
    )
    cache_samples: str | None = option(
        None, "folder to keep all slices in, decoded once: takes disk (1.3 MB a slice of 512 px), saves time"
    )
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda", "mps"))
    val_cases: tuple[str, ...] = option((), "cases kept for validation")
    val_fraction: float = option(0.0, "share of the cases kept for validation, if no --val_cases")
    val_interval: int = option(1, "epochs between validations")
    save_interval: int = option(20, "epochs between the adapters that are kept as epoch_N.safetensors")
    num_workers: int | None = option(None, "processes that read slices (default: 0 on the CPU, up to 8 for a GPU)")
    schedule: str = option(
        "poly",
        "how the learning rate falls after the warm-up; poly is SAMed's",
        ("poly", "cosine", "step", "constant", "plateau"),
    )
    schedule_steps: tuple[int, ...] = option((), "optimizer steps at which --schedule step multiplies the rate")
    schedule_gamma: float = option(
        0.1, "by what --schedule step multiplies the rate at each of --schedule_steps, and --schedule plateau"
    )
    schedule_patience: int = option(
        5, "epochs without a better training loss after which --schedule plateau lowers the rate"
    )
    clip_norm: float = option(0.0, "largest norm of a step's gradient; longer ones are shortened to it; 0: any")
    ema: float = option(0.0, "decay of a running average of the weights, which becomes the adapter; 0: no average")
    patience: int = option(0, "stop after this many validations in a row without a better Dice; 0: never")
    on_bad_sample: str = option(
        "stop",
        "a slice that cannot be read: stop names it and ends; skip trains on the next readable one and counts",
        ("stop", "skip"),
    )
    save_seconds: float = option(120.0, "seconds between the saved states that --resume continues from; 0: no clock")
    save_steps: int = option(0, "optimizer steps between saved states, besides --save_seconds; 0: not counted")
    resume: bool | str = option(
        False, "continue, from its last saved state, the run that these options name, or the one in FOLDER"
    )

    def __post_init__(self) -> None:
        for name in (
            "max_epochs",
            "stop_epoch",
            "batch_size",
            "accumulate",
            "n_gpu",
            "num_nodes",
            "rank",
            "val_interval",
            "save_interval",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} is not possible; give 1 or more")
        for name in ("max_iterations", "num_classes", "max_objects"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} is not possible; give 1 or more")
        for name in ("base_lr", "lr_exp", "schedule_gamma", "lora_plus"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"--{name} {getattr(self, name)} is not possible; give a number above 0")
        if not 0 <= self.dice_param <= 1:
            raise InputError(f"--dice_param {self.dice_param} is not possible; give a weight from 0 to 1")
        if self.warmup_period < 0:
            raise InputError(f"--warmup_period {self.warmup_period} is not possible; give 0 or more steps")
        for name in ("max_seconds", "clip_norm", "patience", "save_seconds", "save_steps", "schedule_patience"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"--{name} {getattr(self, name)} is not possible; give 0 (off) or more")
        for name in ("box_jitter", "sample_num", "negative_num", "weight_decay"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"--{name} {getattr(self, name)} is not possible; give 0 or more")
        if not 0 < self.prompt_ratio < 1:
            raise InputError(f"--prompt_ratio {self.prompt_ratio} is not possible; give a weight between 0 and 1")
        if self.cache_embeddings and self.augment != "none":
            raise InputError(
                f"--cache_embeddings {self.cache_embeddings}: what is kept is of one picture, and --augment "
                f"{self.augment} shows another in every epoch; add --augment none"
            )
        if not 0 <= self.ema < 1:
            raise InputError(f"--ema {self.ema} is not possible; give 0 (off) or a decay below 1, such as 0.999")
        if (self.schedule == "step") != bool(self.schedule_steps):
            steps = " ".join(map(str, self.schedule_steps)) or "missing"
            raise InputError(
                f"--schedule {self.schedule}, --schedule_steps {steps}: only --schedule step takes and needs them"
            )
        if self.patience and not (self.val_cases or self.val_fraction):
            raise InputError(f"--patience {self.patience} needs validation; give --val_cases or --val_fraction")

    def run_folder(self, system: str, variant: str, image_size: int) -> Path:
        """Where the run goes: named as SAMed names it, from the options that tell runs apart."""
        batch = self.batch_size * self.accumulate
        name = f"{self.dataset}_{image_size}_{system}_{variant}_epo{self.max_epochs}_bs{batch}"
        name += f"_lr{self.base_lr:g}" + (f"_s{self.seed}" if self.seed != 1234 else "")
        return Path(self.output) / name
