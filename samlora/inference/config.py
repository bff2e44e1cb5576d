"""The options of testing (SAMed's names and defaults, and what this project adds) and of prediction."""

from dataclasses import dataclass

from samlora.errors import InputError
from samlora.model.variants import VARIANTS
from samlora.options import option


@dataclass(frozen=True)
class ForwardOptions:
    """How slices go through a model, and what is done to the labels then."""

    batch_size: int = option(16, "slices per forward pass")
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda", "mps"))
    precision: str = option(
        "fp32",
        "number format of the forward pass; auto is bf16 where the device is fast at it",
        ("fp32", "bf16", "fp16", "auto"),
    )
    tta: bool = option(
        False, "test-time augmentation: average a slice and its three mirror images; four times the work"
    )
    postprocess: tuple[str, ...] = option(
        (),
        "done in this order: largest (keep the largest part of a class), drop=N (parts under N mm3), fill (holes), "
        "close=R (gaps, by a ball of R mm), smooth=S (contours, by S mm), labels=1,3 (these classes alone)",
    )


@dataclass(frozen=True)
class TestConfig(ForwardOptions):
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
    vit_name: str | None = option(None, f"SAM variant of the adapter: one of {', '.join(VARIANTS)}")
    rank: int | None = option(None, "LoRA rank of the adapter")
    system: str | None = option(None, "system of the adapter: samed, samed_s or samed_h")
    module: str | None = option(None, "SAMed's name for the system")
    is_savenii: bool = option(False, "write <case>_pred.nii.gz, _img.nii.gz and _gt.nii.gz")
    metric_policy: str = option(
        "strict",
        "whose figures lead: strict (mm; undefined is excluded and counted) or samed (as published)",
        ("strict", "samed"),
    )
    seed: int = option(1234, "seed of everything random")
    deterministic: int = option(1, "1: same result on the same machine; 0: let cuDNN choose")


@dataclass(frozen=True)
class PredictConfig(ForwardOptions):
    """All of a prediction but its inputs. What the adapter file knows need not be given."""

    output: str | None = option(None, "folder for the label maps")
    adapter: tuple[str, ...] = option((), "the adapter; several are averaged; none is needed with boxes")
    ckpt: str | None = option(
        None, "base weights (default: checkpoints/ file of the adapter's variant; without an adapter LiteMedSAM)"
    )
    recipe: str | None = option(
        None, "recipe, for adapters that hold none (SAMed's .pth): a shipped one or a YAML file"
    )
    boxes: str | None = option(
        None,
        "CSV or JSON file of boxes to segment by: image, slice (or z0 and z1), x0, y0, x1, y1, label; in pixels of the "
        "slices as the app shows them",
    )
    boxes_from: str | None = option(
        None, "label map, or folder of them, to take tight boxes from, one for each label and slice; for experiments"
    )
    box_jitter: int = option(
        0, "with --boxes_from: each side of a box is moved outwards by up to this many pixels of the slice"
    )
    propagate: bool = option(
        False,
        "carry what a box gives from slice to slice; with --boxes_from each label has one box, on its largest slice",
    )
    seed: int = option(1234, "seed of --box_jitter")
    series: str | None = option(None, "which series of a DICOM folder: its number in the list, or its UID")
    format: str = option(
        "same",
        "of the label maps; same: as the input is, DICOM as NIfTI and DICOM SEG",
        ("same", "nii.gz", "nii", "nrrd", "mha", "png", "npy", "dicom-seg"),
    )
    overlay: str = option(
        "none", "pictures of the result: a sheet of slices, or all slices moving", ("none", "png", "gif")
    )
    n_gpu: int = option(1, "processes on this machine, a GPU for each (or --device cpu); they share the inputs")
    num_nodes: int = option(1, "machines that share the inputs, each with this command, under torchrun")
    overwrite: bool = option(False, "replace label maps that are there from another adapter or other options")

    def __post_init__(self) -> None:
        if not self.output:
            raise InputError("--output is missing; give the folder for the label maps: -o FOLDER")
        self._check_boxes()
        for name in ("batch_size", "n_gpu", "num_nodes"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} is not possible; give 1 or more")

    @property
    def by_boxes(self) -> bool:
        """Whether boxes say what to segment; otherwise the system draws its classes by itself."""
        return self.boxes is not None or self.boxes_from is not None

    def _check_boxes(self) -> None:
        if self.boxes is not None and self.boxes_from is not None:
            raise InputError("--boxes and --boxes_from are both given; give one of them")
        if not self.by_boxes and not self.adapter:
            raise InputError(
                "--adapter is missing; give the adapter that train.py printed at its end, or boxes: --boxes FILE"
            )
        if not self.by_boxes and self.propagate:
            raise InputError("--propagate carries what boxes give; give them too: --boxes FILE")
        if self.by_boxes and len(self.adapter) > 1:
            count = len(self.adapter)
            raise InputError(f"--adapter: {count} adapters cannot be averaged with boxes; give one, or none")
        if self.by_boxes and self.tta:
            raise InputError("--tta averages what a system draws by itself; leave it out with boxes")
        if self.box_jitter < 0:
            raise InputError(f"--box_jitter {self.box_jitter} is not possible; give 0 or more pixels")
        if self.box_jitter and self.boxes_from is None:
            raise InputError(f"--box_jitter {self.box_jitter} is for the boxes of --boxes_from; leave it out")
