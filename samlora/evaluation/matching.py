"""Which prediction belongs to which reference, by the names of files."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samlora.data.findings import few
from samlora.data.folders import Masks, folder_or_file, is_dicom_folder, label_entries, masks_in
from samlora.data.volume import VOLUMES, stem
from samlora.errors import InputError, MissingFileError

_PREDICTION = re.compile(r"(.+)[_.](?:pred|prediction|predicted|output)", re.IGNORECASE)
_REFERENCE = re.compile(r"(.+)[_.](?:gt|seg|segmentation|label|labels|mask|truth|reference|ref)", re.IGNORECASE)
_IMAGE = re.compile(r"(.+)_(?:img|image)", re.IGNORECASE)
_NUMBERED = re.compile(r"(?:img|label|seg|mask)(\d{4,})", re.IGNORECASE)
_CHANNEL = re.compile(r"(.+)_\d{4}")  # nnU-Net numbers the channels of an image


@dataclass(frozen=True)
class Trio:
    """The files of one case: label maps, or for each structure its masks.

    prediction: None where there is none. image: None where it is not known.
    """

    name: str
    prediction: Path | Masks | None
    reference: Path | Masks
    image: Path | None = None

    @property
    def path(self) -> Path:
        """The reference, or the folder of its masks, for messages."""
        return folder_or_file(self.reference)

    @property
    def structures(self) -> list[str]:
        """The names of its masks."""
        return [name for side in (self.prediction, self.reference) if isinstance(side, dict) for name in side]


@dataclass
class Matched:
    """The cases, in order of their names, and predictions without a reference."""

    trios: list[Trio]
    extra: list[Path | Masks] = field(default_factory=list)

    @property
    def missing(self) -> list[Trio]:
        """Cases without a prediction."""
        return [trio for trio in self.trios if trio.prediction is None]


def match_files(
    prediction: str | os.PathLike, reference: str | os.PathLike, images: str | os.PathLike | None = None
) -> Matched:
    """The cases of two files, or of two folders, matched by name.

    Names are the same, or the same without an ending such as _pred, _gt, _seg, _label or _mask; imgNNNN and labelNNNN
    are caseNNNN; a prediction may end in a channel (_0000). In a folder that has both, files that end in _pred are
    predictions and files that end in _img are images. In a folder without files its sub-folders are the cases, each
    with one mask per structure; of a file and a folder, the folder may be such a case itself. images: a folder of them,
    or one; else CASE_img beside the prediction.
    Raises MissingFileError or InputError: no such file, nothing in a folder, two files for one case, nothing matches.
    """
    prediction, reference = Path(prediction), Path(reference)
    images = None if images is None else Path(images)
    sources = [p for p in (prediction, reference, images) if p is not None]
    for path in sources:
        if not path.exists():
            raise MissingFileError(f"{path}: no such file or folder")
    found, truths = _entries(prediction), _entries(reference)
    if not prediction.is_dir() and not reference.is_dir():
        return _pair(prediction, reference, reference, images)
    chosen = {n: p for n, p in found.items() if _PREDICTION.fullmatch(n)} or _without(found, _IMAGE)
    wanted = _without(truths, _PREDICTION, _IMAGE) or _without(truths, _IMAGE)
    if not chosen or not wanted:
        raise InputError(f"{reference if chosen else prediction}: no label maps in it; {' '.join(VOLUMES)} are read")
    matched = _match(dict(chosen), wanted, _images(prediction, images))
    if len(matched.missing) < len(matched.trios):
        return matched
    if prediction.is_dir() != reference.is_dir():  # one case, whose masks lie in the folder
        sides = (masks_in(path) if path.is_dir() else path for path in (prediction, reference))
        return _pair(*sides, prediction if reference.is_dir() else reference, images)
    raise InputError(
        f"{prediction}: none of its files ({few(_called(p) for p in chosen.values())}) has the name of a reference "
        f"({few(_called(p) for p in wanted.values())}); rename them, or give two files"
    )


def case_name(name: str) -> str:
    """The name of a case from that of one of its files: "case01_gt" and "case01_pred" are "case01"."""
    for pattern in (_PREDICTION, _REFERENCE):
        if found := pattern.fullmatch(name):
            name = found[1]
            break
    numbered = _NUMBERED.fullmatch(name)
    return f"case{numbered[1]}" if numbered else name


def _pair(prediction: Path | Masks, reference: Path | Masks, named: Path, images: Path | None) -> Matched:
    """The one case of two files; `named` is the one that names it."""
    name = case_name(stem(named))
    if images is not None and (not images.is_dir() or is_dicom_folder(images)):
        return Matched([Trio(name, prediction, reference, images)])
    beside = folder_or_file(prediction).parent
    return Matched([Trio(name, prediction, reference, _image_of(name, _images(beside, images)))])


def _match(found: dict[str, Path | Masks], truths: dict[str, Path | Masks], images: Mapping[str, Path]) -> Matched:
    pairs = {name: (side, found.pop(name, None)) for name, side in truths.items()}
    # What is not called the same is matched by the name of its case, and that must be unambiguous.
    keys: dict[str, str] = {}
    for name in found:
        key = case_name(name)
        if key in keys:
            one, other = (_called(found[n]) for n in (name, keys[key]))
            raise InputError(f"{one}: {other} belongs to the case {key} too; keep one of them")
        keys[key] = name
    channels = {m[1]: name for key, name in keys.items() if (m := _CHANNEL.fullmatch(key)) and m[1] not in keys}
    names: dict[str, str] = {}
    for name, (side, partner) in pairs.items():
        key = case_name(name)
        if key in names and partner is None:
            one, other = (_called(truths[n]) for n in (name, names[key]))
            raise InputError(f"{one}: {other} belongs to the case {key} too; keep one of them")
        names.setdefault(key, name)
        if partner is None and (other := keys.get(key, channels.get(key))) in found:
            pairs[name] = side, found.pop(other)
    short = [case_name(name) for name in pairs]
    trios = [
        Trio(key if short.count(key) == 1 else name, partner, side, _image_of(key, images))
        for key, (name, (side, partner)) in zip(short, pairs.items())
    ]
    return Matched(sorted(trios, key=lambda trio: trio.name), [found[name] for name in sorted(found)])


def _entries(path: Path) -> dict[str, Path | Masks]:
    """Stem -> label map. In a folder its files, or where there are none its sub-folders; a file is itself.

    Of one label map in two formats (NIfTI and DICOM SEG) the first of VOLUMES is taken.
    """
    if not path.is_dir():
        return {stem(path): path}
    files = [p for p in path.iterdir() if p.is_file() and p.name.lower().endswith(VOLUMES) and p.name[0] != "."]
    found: dict[str, Path | Masks] = {}
    for file in sorted(files, key=lambda p: next(n for n, e in enumerate(VOLUMES) if p.name.lower().endswith(e))):
        found.setdefault(stem(file), file)
    return dict(sorted(found.items())) or label_entries(path)


def _without(entries: Mapping[str, Path | Masks], *patterns: re.Pattern) -> dict[str, Path | Masks]:
    return {name: side for name, side in entries.items() if not any(p.fullmatch(name) for p in patterns)}


def _called(side: Path | Masks) -> str:
    return folder_or_file(side).name


def _images(predictions: Path, images: Path | None) -> dict[str, Path]:
    """Case -> image."""
    found = _entries(predictions if images is None else images)
    named: dict[str, Path] = {}
    for name, path in found.items():
        marked = _IMAGE.fullmatch(name)
        if isinstance(path, Path) and (marked or images is not None):
            named.setdefault(case_name(marked[1] if marked else name), path)
    # The first channel of a case stands for it, unless a file has its very name.
    channels = {m[1]: named[name] for name in sorted(named, reverse=True) if (m := _CHANNEL.fullmatch(name))}
    return channels | named


def _image_of(case: str, images: Mapping[str, Path]) -> Path | None:
    channel = _CHANNEL.fullmatch(case)
    return images.get(case) or (images.get(channel[1]) if channel else None)
