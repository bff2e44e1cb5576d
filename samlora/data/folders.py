"""What a folder of images holds, and which label belongs to which image, by their names alone."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from samlora.data.dicom_header import holds_image, is_dicom
from samlora.data.label_tables import table_beside
from samlora.data.volume import VOLUMES, stem
from samlora.errors import InputError
from samlora.files import find_file, same_name

IMAGE_WORDS = (
    *("img", "imgs", "image", "images", "imaging", "scan", "volume", "vol", "input"),
    *("dicom", "ct", "mri", "mr"),
)
LABEL_WORDS = (
    *("seg", "segs", "segmentation", "segmentations", "label", "labels", "labelmap", "mask", "masks", "msk"),
    *("gt", "gts", "groundtruth", "ground_truth", "annotation", "annotations"),
)
# Weightings and modalities that data sets put into file names, one file for each.
_MODALITIES = (
    *("t1", "t1w", "t1n", "t1c", "t1ce", "t1gd", "t1post", "t2", "t2w", "t2f", "t2flair", "flair", "pd", "pdw"),
    *("dwi", "adc", "swi", "dce", "ct", "cbct", "pet", "pt", "suv"),
)
_GAP = "[ _.-]"


def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_LABEL_AFTER = re.compile(rf"(.+?){_GAP}({_any(LABEL_WORDS)})(?:{_GAP}?\d{{1,3}})?", re.I)
_LABEL_BEFORE = re.compile(rf"{_any(LABEL_WORDS)}(?:{_GAP}+(.+)|(\d.*))", re.I)
_LABEL_ALONE = re.compile(rf"{_any(LABEL_WORDS)}(?:\.seg)?", re.I)  # 3D Slicer: Segmentation.seg.nrrd
_IMAGE_AFTER = re.compile(rf"(.+?){_GAP}{_any(set(IMAGE_WORDS) - set(_MODALITIES))}", re.I)
_IMAGE_BEFORE = re.compile(rf"{_any(IMAGE_WORDS)}(?:{_GAP}+(.+)|(\d.*))", re.I)
_NUMBERED = re.compile(r"(.+)_(\d{4})")  # nnU-Net numbers the channels of a case
_WEIGHTED = re.compile(rf"(.+?){_GAP}+({_any(_MODALITIES)})", re.I)
# What lies beside images and is none: notes, tables, lists, programs.
_NOTES = (
    *(".txt", ".md", ".rst", ".pdf", ".doc", ".docx", ".rtf", ".html", ".htm", ".xml", ".log", ".url", ".bib"),
    *(".csv", ".tsv", ".xls", ".xlsx", ".ods", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg"),
    *(".label", ".ctbl", ".lut", ".bval", ".bvec", ".py", ".sh", ".ipynb", ".m", ".r"),
    *(".md5", ".sha256", ".db", ".mrml", ".itksnap", ".lnk"),
)
_PAPERS = re.compile(r"(readme|licen[cs]e|copying|notice|changes|changelog|authors|dicomdir|dirfile|version)\b.*")
_STUDY_DEPTH = 2
_PART = re.compile(r"(?:^|_)\d{3}$")  # several parts of one structure, each in a file

Masks = dict[str, tuple[Path, ...]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One case. images: one file or DICOM folder, or one for each channel, in order.

    label: a label map; or for each structure the files of its masks, which are united; None where it is not known.
    names: what the folder calls the values of its label maps; a map that names its values itself goes by its own names.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | Masks | None
    test: bool = False  # the layout keeps it apart for testing
    names: Mapping[int, str] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def files(self) -> list[Path]:
        """All files and DICOM folders that the case is read from."""
        masks = self.label.values() if isinstance(self.label, dict) else [() if self.label is None else (self.label,)]
        files = [*self.images, *(path for paths in masks for path in paths)]
        beside = [companion for path in files for companion in companions(path)]
        if isinstance(self.label, Path):
            table = table_beside(self.label, stem(self.label))
            beside += [] if table is None else [table]
        return list(dict.fromkeys([*files, *beside]))


@dataclasses.dataclass
class Layout:
    """What a folder holds. kind: for people. classes: name -> values in the label files, where the folder says so.

    channels: the names of the modalities, where the folder or its files say so. ignored: values that the folder sets
    apart, as nnU-Net's ignore label: they are no class. names: of values, by a table that may name more than occur.
    """

    kind: str
    pairs: list[Pair]
    classes: dict[str, list[int]]
    channels: tuple[str, ...]
    notes: list[str]
    ignored: tuple[int, ...] = ()
    names: Mapping[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Matched:
    """What `match` found. alone, lonely: images without a label, labels without an image. tags: of the channels.

    unread: what lies beside them and is of no kind that is read.
    """

    pairs: list[Pair] = dataclasses.field(default_factory=list)
    alone: list[Path] = dataclasses.field(default_factory=list)
    lonely: list[Path] = dataclasses.field(default_factory=list)
    tags: tuple[str, ...] = ()
    unread: list[Path] = dataclasses.field(default_factory=list)

    def add(self, other: "Matched") -> None:
        """Takes over what `other` found."""
        self.pairs += other.pairs
        self.alone += other.alone
        self.lonely += other.lonely
        self.unread += other.unread
        self.tags = self.tags or other.tags


def visible(folder: Path) -> list[Path]:
    """What lies in `folder`, sorted, without hidden files such as the ._ files that macOS leaves in archives."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")))


def is_dicom_folder(folder: Path) -> bool:
    """Whether `folder` holds DICOM images or segmentations itself, and no other images.

    DICOM files of other kinds (DICOMDIR, reports, plans, presentation states, raw data) make no folder of images, as
    long as there are folders in it that may hold some.
    """
    inside = visible(folder)
    files = [path for path in inside if path.is_file()]
    named = [path for path in files if path.name.lower().endswith(VOLUMES)]
    if not all(path.name.lower().endswith(".dcm") for path in named):
        return False
    if any(path.is_dir() for path in inside):
        return any(holds_image(path) or _broken(path) for path in files)
    return bool(named) or any(is_dicom(path) for path in files)


def _broken(path: Path) -> bool:
    """Whether a file is called DICOM, but does not say so itself: its reader says what is wrong with it."""
    return path.name.lower().endswith(".dcm") and not is_dicom(path)


def companions(path: Path) -> list[Path]:
    """The files beside `path` that are a part of it: voxels whose header it is."""
    endings = {".hdr": (".img", ".mat"), ".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz")}
    beside = endings.get(path.suffix.lower(), ())
    found = (find_file(path.with_name(path.name[: -len(path.suffix)] + ending)) for ending in beside)
    return [file for file in found if file.is_file()]


def not_read(folder: Path, taken: Iterable[Path] = ()) -> list[Path]:
    """What lies in `folder` beside the files that are read, notes and tables, and so would vanish in silence.

    taken: folders in it that are used.
    """
    used = {path for path in taken}
    parts = {part for path in visible(folder) if path.is_file() for part in companions(path)}
    found = []
    for path in visible(folder):
        name = path.name.lower()
        if path in used or path in parts:
            continue
        if path.is_dir():
            known = is_dicom_folder(path) or not any(visible(path))
        else:
            known = name.endswith((*VOLUMES, *_NOTES)) or _PAPERS.fullmatch(name) is not None
        if not known:
            found.append(path)
    return found


def not_read_note(paths: Iterable[Path]) -> list[str]:
    """One line that names what `not_read` found, or none."""
    paths = list(dict.fromkeys(paths))
    if not paths:
        return []
    names = few([f"{path.name}/" if path.is_dir() else path.name for path in paths])
    are = "1 entry is" if len(paths) == 1 else f"{len(paths)} entries are"
    return [f"{are} not understood and left out: {names}; {' '.join(VOLUMES)} and DICOM folders are read"]


def entries(folder: Path) -> dict[str, Path]:
    """Stem -> image file or DICOM folder in `folder`, sorted. Raises InputError if two have the same stem."""
    found: dict[str, Path] = {}
    for path in visible(folder):
        inner = path
        if path.is_dir() and not path.name.lower().endswith(VOLUMES):
            inner = _only_series(path, _STUDY_DEPTH)
        if inner is not None and (path.name.lower().endswith(VOLUMES) or path.is_dir()):
            name = same_name(path.name) if path.is_dir() else stem(path)
            if name in found:
                raise InputError(f"{path}: {found[name].name} has the same name; keep one of them")
            found[name] = inner
    return found


def _only_series(folder: Path, depth: int) -> Path | None:
    """`folder` if it holds DICOM slices, or that below it, as in CASE/STUDY/SERIES, which alone does; else None."""
    if is_dicom_folder(folder):
        return folder
    inside = visible(folder)
    others = [path for path in inside if path.is_file() and path.name.lower().endswith(VOLUMES)]
    if not depth or any(not _no_image(path) for path in others):
        return None
    found = [series for path in inside if path.is_dir() and (series := _only_series(path, depth - 1))]
    return found[0] if len(found) == 1 and not _has_images(inside, found[0]) else None


def _has_images(paths: Iterable[Path], series: Path) -> bool:
    """Whether a folder beside that of the series holds images too."""
    beside = [path for path in paths if path.is_dir() and not series.is_relative_to(path)]
    return any(file.name.lower().endswith(VOLUMES) for path in beside for file in visible(path))


def image_entries(folder: Path) -> dict[str, Path]:
    """`entries` without DICOM files that are no images: reports, presentation states, contours, raw data."""
    return {name: path for name, path in entries(folder).items() if not _no_image(path)}


def _no_image(path: Path) -> bool:
    return path.name.lower().endswith(".dcm") and is_dicom(path) and not holds_image(path)


def label_entries(folder: Path) -> dict[str, Path | Masks]:
    """Stem -> label file in `folder`, or sub-folder name -> its masks, a file for each structure.

    Raises InputError if two have the same name.
    """
    found: dict[str, Path | Masks] = dict(entries(folder))
    for path in visible(folder):
        name = same_name(path.name)
        if path.is_dir() and name not in found and (masks := masks_in(path)):
            files = [file for files in masks.values() for file in files]
            whole = len(files) == 1 and _LABEL_ALONE.fullmatch(stem(files[0]))
            found[name] = files[0] if whole else masks
    return found


def masks_in(folder: Path) -> Masks:
    """Structure -> its mask files in `folder`; NAME_000 and NAME_001 are parts of one."""
    masks: Masks = {}
    for name, path in entries(folder).items():
        name = _PART.sub("", name) or "mask"
        masks[name] = (*masks.get(name, ()), path)
    return masks


def is_label(name: str) -> bool:
    """Whether a stem says that the file is a label: X_seg, X_mask_1, label0001, seg."""
    return any(pattern.fullmatch(name) for pattern in (_LABEL_AFTER, _LABEL_BEFORE, _LABEL_ALONE))


def may_be_label(name: str) -> bool:
    """Whether a stem has a word for labels anywhere in it: X_seg_fast. Where images are listed, these are left out."""
    words = set(LABEL_WORDS) - {"label", "labels"}  # BIDS tells images of body parts apart by them
    return is_label(name) or not words.isdisjoint(re.split(_GAP, name.lower()))


def case_of_label(name: str) -> str:
    """The case of a label's stem: X of X_seg and X_mask_1, else the stem itself."""
    found = _LABEL_AFTER.fullmatch(name)
    return found[1] if found else name


def channel_of(name: str) -> tuple[str, str] | None:
    """The case and the channel of a stem such as X_0001 or X_t2, or None."""
    found = _NUMBERED.fullmatch(name) or _WEIGHTED.fullmatch(name)
    return (found[1], found[2].lower()) if found else None


def match(images: Mapping[str, Path], labels: Mapping[str, Path | Masks], apart: bool) -> Matched:
    """Finds the label of each image. Both are given by their stems; apart: they lie in folders of their own.

    A label is found by the image's own name (only if `apart`), by that name with an ending or a beginning (X_seg,
    X_mask, label0001), or its channels' names without theirs (X_0000 and X_0001, X_t1 and X_t2). Or several masks
    have the image's name and that of a structure (only if `apart`): X_liver, X_kidney_000, X_kidney_001.
    Raises InputError where two images claim a label, or two labels an image.
    """
    by_key = _label_keys(labels, apart)
    if apart:
        by_key |= _other_spelling(images, by_key)
    taken: dict[str, list[Path]] = {}  # key of a label -> its images
    names: dict[str, str] = {}
    channels: dict[str, dict[str, str]] = {}  # key of a label -> channel -> stem of the image
    rest = dict(images)
    for name in images:
        key = next((key for key in _image_keys(name) if key in by_key and key not in taken), None)
        tagged = channel_of(name)
        if key is not None:
            taken[key], names[key] = [rest.pop(name)], _case_name(name, key)
        elif tagged and tagged[0] in by_key:
            channels.setdefault(tagged[0], {})[tagged[1]] = name
    # How many images are named KEY and something more.
    beginnings = Counter(name[: gap.start()] for name in rest for gap in re.finditer(_GAP, name))
    tags = set()
    for key, stems in channels.items():
        if key in taken and apart:
            label = folder_or_file(labels[by_key[key][0]])
            both = " and ".join(path.name for path in (*taken[key], *(images[name] for name in stems.values())))
            raise InputError(f"{label}: {both} belong to it; keep one of them, or number all of them _0000, _0001, ...")
        # With more files of that beginning it is a guess which of them the label is of.
        if key not in taken and (apart or beginnings[key] == len(stems)):
            taken[key], names[key] = [rest.pop(stems[tag]) for tag in sorted(stems)], key
            tags.add(tuple(sorted(stems)))
    found = Matched([Pair(names[key], tuple(taken[key]), _one_label(by_key[key], labels)) for key in taken])
    used = {name for key in taken for name in by_key[key]}
    free = {name: label for name, label in labels.items() if name not in used}
    for name, masks in _named_masks(images, free).items() if apart else ():
        if name in rest:
            label = {structure: tuple(free.pop(stem) for stem in stems) for structure, stems in masks.items()}
            found.pairs.append(Pair(name, (rest.pop(name),), label))
    found.tags = tags.pop() if len(tags) == 1 else ()
    found.alone = list(rest.values())
    found.lonely = [folder_or_file(label) for label in free.values()]
    return found


def match_by_words(folder: Path, files: Mapping[str, Path]) -> Matched:
    """The pair of a folder whose files say what they are but not of whom: img + seg, ct + mask, t1 + t2 + label.

    The case has the folder's name. Nothing is found if it is not clear which the image is.
    """
    labels = [name for name in files if _LABEL_ALONE.fullmatch(name)]
    if len(labels) != 1:
        return Matched()
    names = files.keys() - labels
    words = [name for name in names if name.lower() in IMAGE_WORDS and name.lower() not in _MODALITIES]
    weightings = sorted(name for name in names if name.lower() in _MODALITIES)
    chosen = next((c for c in (words, weightings, [folder.name], list(names)) if len(c) == 1 and c[0] in files), None)
    chosen = chosen or weightings
    if not chosen:
        return Matched()
    pair = Pair(folder.name, tuple(files[name] for name in chosen), files[labels[0]])
    alone = [files[name] for name in sorted(names - set(chosen))]
    return Matched([pair], alone, tags=tuple(chosen) if len(chosen) > 1 else ())


def match_last(folder: Path, files: Mapping[str, Path]) -> Matched:
    """The pair of a folder with two files, one of which has a word for labels in its name."""
    labels = [name for name in files if may_be_label(name)]
    if len(files) != 2 or len(labels) != 1:
        return Matched()
    (image,) = files.keys() - labels
    name = folder.name if image.lower() in (*IMAGE_WORDS, *_MODALITIES) else image
    return Matched([Pair(name, (files[image],), files[labels[0]])])


def uniform(pairs: list[Pair], where: str | os.PathLike) -> list[Pair]:
    """The pairs, all with a label map or all with masks, and all with as many channels.

    Where some cases have one mask (X_mask) and others several (X_mask, X_mask_1), all become masks. Raises InputError
    for other mixtures, naming two cases.
    """
    counts = sorted({len(pair.images) for pair in pairs})
    if len(counts) > 1:
        one, many = (next(pair for pair in pairs if len(pair.images) == n) for n in (counts[0], counts[-1]))
        text = f"case {one.name} has {counts[0]} channels, case {many.name} {counts[-1]}"
        raise InputError(f"{where}: {text}; every case needs the same ones")
    masks = [pair for pair in pairs if isinstance(pair.label, dict)]
    maps = [pair for pair in pairs if isinstance(pair.label, Path)]
    if not masks or not maps:
        return pairs
    structures = {name for pair in masks for name in pair.label}
    ends = {(found[2].lower() if (found := _LABEL_AFTER.fullmatch(stem(pair.label))) else "") for pair in maps}
    if structures != ends:
        text = f"case {maps[0].name} has one label file, case {masks[0].name} one for each structure"
        raise InputError(f"{where}: {text}; prepare them apart")
    name = structures.pop()
    return [p if isinstance(p.label, dict) else dataclasses.replace(p, label={name: (p.label,)}) for p in pairs]


def folder_or_file(label: Path | Masks) -> Path:
    """What to call a label in messages: its file, or the folder of its masks."""
    return label if isinstance(label, Path) else next(iter(label.values()))[0].parent


def few(names: Iterable[str], most: int = 5) -> str:
    """The first of many names."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _label_keys(labels: Mapping[str, Path | Masks], apart: bool) -> dict[str, list[str]]:
    """What images a label may belong to -> the stems of the labels; a label's own name goes before what it ends in."""
    by_key: dict[str, list[str]] = {name: [name] for name in labels} if apart else {}
    after: dict[str, list[str]] = {}
    for name in labels:
        if found := _LABEL_AFTER.fullmatch(name):
            after.setdefault(found[1], []).append(name)
    before = {(found[1] or found[2]): [name] for name in labels if (found := _LABEL_BEFORE.fullmatch(name))}
    return before | after | by_key


def _other_spelling(images: Mapping[str, Path], by_key: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Keys of labels that only upper and lower case keep from those of images, as the images spell them."""
    spelled: dict[str, list[str]] = {}
    for key in by_key:
        spelled.setdefault(key.casefold(), []).append(key)
    wanted = {key for name in images for key in _image_keys(name)}
    wanted |= {tagged[0] for name in images if (tagged := channel_of(name))}
    folded: dict[str, set[str]] = {}
    for key in wanted:
        folded.setdefault(key.casefold(), set()).add(key)
    found = {}
    for fold, keys in folded.items():
        ours = spelled.get(fold, [])
        if len(ours) == 1 and len(keys) == 1 and not keys & by_key.keys():
            found[next(iter(keys))] = by_key[ours[0]]
    return found


def _image_keys(name: str) -> Iterator[str]:
    yield name
    if found := _IMAGE_AFTER.fullmatch(name):
        yield found[1]
    if found := _IMAGE_BEFORE.fullmatch(name):
        yield found[1] or found[2]


def _case_name(name: str, key: str) -> str:
    numbered = re.fullmatch(r"img(\d{4,})", name)
    if numbered:  # as SAMed and TransUNet name them
        return f"case{numbered[1]}"
    return key if name.startswith(key) else name


def _one_label(names: list[str], labels: Mapping[str, Path | Masks]) -> Path | Masks:
    if len(names) == 1:
        return labels[names[0]]
    words = {_LABEL_AFTER.fullmatch(name)[2].lower() for name in names}
    if len(words) > 1:
        raise InputError(f"{labels[names[0]]}: {names[1]} is a label of the same image; keep one of them")
    return {words.pop(): tuple(labels[name] for name in names)}


def _named_masks(images: Mapping[str, Path], labels: Mapping[str, Path | Masks]) -> dict[str, dict[str, list[str]]]:
    """Image -> structure -> stems of its masks IMAGE_STRUCTURE and IMAGE_STRUCTURE_000; the longest image counts."""
    owned: dict[str, dict[str, list[str]]] = {}
    for label, path in labels.items():
        ends = [gap.start() for gap in re.finditer(_GAP, label) if label[: gap.start()] in images]
        if isinstance(path, Path) and ends:
            structure = _PART.sub("", label[ends[-1] + 1 :])
            ended = _LABEL_AFTER.fullmatch(structure)
            structure = (ended[1] if ended else structure) or "mask"
            owned.setdefault(label[: ends[-1]], {}).setdefault(structure, []).append(label)
    return owned
