"""The options of testing: SAMed's names and defaults, and what this project adds."""

from dataclasses import dataclass

from samlora.options import option


@dataclass(frozen=True)
class TestConfig:
    """All of a test. What the adapter file knows need not be given; what contradicts it is an error."""

    __test__ = False  # for pytest: this is no test class

    volume_path: str | None = option(
        None, "folder of prepared data: holds test_vol_h5/, or the .npy.h5 volumes themselves"
    )
    lora_ckpt: str | None = option(None, "the adapter to test")
    ckpt: str | None = option(None, "base weights (default: checkpoints/ file of the adapter's variant)")
    output_dir: str = option("test_output", "folder for the table, the log and the NIfTI files")
    dataset: str = option("Synapse", "name of the data in the log and in summary.json")
    list_dir: str | None = option(None, "folder with test_vol.txt, the cases to test; without it all of them")
    num_classes: int | None = option(None, "foreground classes of the adapter")
    img_size: int | None = option(
        None, "side of the model's input; needed for SAMed's .pth adapters only (default 512)"
    )
    input_size: int | None = option(
        None,
        "side to which slices are shrunk first, as SAMed does with 224; 0 for never (default: as "
        "the training slices were made; 224 where that is not known)",
    )
    vit_name: str | None = option(None, "SAM variant of the adapter: vit_ti, vit_b, vit_l or vit_h")
    rank: int | None = option(None, "LoRA rank of the adapter")
    system: str | None = option(None, "system of the adapter: samed, samed_s or samed_h")
    module: str | None = option(None, "SAMed's name for the system")
    is_savenii: bool = option(False, "write <case>_pred.nii.gz, _img.nii.gz and _gt.nii.gz")
    metric_policy: str = option(
        "strict",
        "whose figures lead: strict (mm; undefined is excluded and counted) or samed (as published)",
        ("strict", "samed"),
    )
    batch_size: int = option(16, "slices per forward pass")
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda", "mps"))
    precision: str = option(
        "fp32",
        "number format of the forward pass; auto is bf16 where the device is fast at it",
        ("fp32", "bf16", "fp16", "auto"),
    )
    seed: int = option(1234, "seed of everything random")
    deterministic: int = option(1, "1: same result on the same machine; 0: let cuDNN choose")
