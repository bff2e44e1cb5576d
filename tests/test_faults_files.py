"""Files as people have them: what stands beside images, in their headers, and under wrong names. By kinds of faults."""

import gzip
import json
import os
import shutil
import unicodedata

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image
from test_dicom import write_series

from samlora.cli import main
from samlora.data.boxes import ReferenceBoxes
from samlora.data.check import check
from samlora.data.dataset import check_slices, find_slices
from samlora.data.folders import not_read
from samlora.data.grid import Volume
from samlora.data.ignored import IGNORE
from samlora.data.label_tables import Segment, merge_layers, read_table
from samlora.data.layouts import find_pairs
from samlora.data.plan import plan
from samlora.data.prepare import prepare
from samlora.data.recipe import Recipe
from samlora.data.sources import find_images, ignored_values, left_out, read_image
from samlora.data.volume import read_case, read_label_names, read_volume, stem, write_dicom_seg, write_volume
from samlora.errors import InputError
from samlora.evaluation.folders import evaluate_folders
from samlora.evaluation.names import ignored_labels
from samlora.files import find_file, read_text
from samlora.model.bases import find_base

SHAPE = (20, 18, 6)
LIVER, SPLEEN = (slice(4, 8), slice(5, 10), slice(1, 5)), (slice(12, 16), slice(5, 9), slice(1, 5))
LIVER_VOXELS, SPLEEN_VOXELS = 4 * 5 * 4, 4 * 4 * 4


def organs(liver=1, spleen=2, dtype=np.uint8):
    label = np.zeros(SHAPE, dtype)
    label[LIVER], label[SPLEEN] = liver, spleen
    return label


def scan(seed=0):
    rng = np.random.default_rng(seed)
    image = np.full(SHAPE, -1000, np.int16)
    image[2:18, 2:16] = 0
    image[LIVER], image[SPLEEN] = 120, 40
    return image + rng.integers(0, 5, SHAPE).astype(np.int16)


def nifti(path, array, image=nibabel.Nifti1Image, extension=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = image(array, np.diag([1.0, 1.0, 3.0, 1.0]))
    if extension is not None:
        file.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, extension.encode()))
    nibabel.save(file, path)
    return path


def nrrd(path, array, segments=(), fields=None):
    """An NRRD as 3D Slicer writes it; of four axes the first is that of the layers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = array.ndim == 4
    lines = [
        "NRRD0005",
        f"type: {'short' if array.dtype == np.int16 else 'uchar'}",
        f"dimension: {array.ndim}",
        "space: left-posterior-superior",
        "sizes: " + " ".join(map(str, array.shape)),
        f"space directions: {'none ' * layers}(-1,0,0) (0,-1,0) (0,0,3)",
        f"kinds: {'list ' * layers}domain domain domain",
        "endian: little",
        "encoding: raw",
        "space origin: (0,0,0)",
    ]
    for n, (name, value, layer) in enumerate(segments):
        lines += [f"Segment{n}_ID:=S{n}", f"Segment{n}_Name:={name}"]
        lines += [f"Segment{n}_LabelValue:={value}", f"Segment{n}_Layer:={layer}"]
    lines += [f"{key}:={value}" for key, value in (fields or {}).items()]
    path.write_bytes(("\n".join(lines) + "\n\n").encode() + array.tobytes(order="F"))
    return path


def pairs_of(tmp_path, ending=".nii.gz", count=3, label=organs):
    for n in range(count):
        nifti(tmp_path / f"images/p{n}{ending}", scan(n))
        nifti(tmp_path / f"labels/p{n}{ending}", label())
    return tmp_path


def recipe(classes, **more):
    return Recipe.from_dict({"name": "r", "modality": "ct", "window": [-160, 240], "classes": classes, **more})


def voxels(source, destination, classes):
    """Voxels of each class and case after `prepare`."""
    summary = prepare(source, destination, recipe(classes), workers=1)
    return [record["voxels"][1:] for record in summary.records], summary.warnings


# --- kind 6: tables of names inside and beside label files ----------------------------------------------------------


@pytest.fixture
def named(tmp_path):
    """Three patients; in the second one the segments were made in the other order (A6)."""
    for n in range(3):
        names = ["liver", "spleen"] if n != 1 else ["spleen", "liver"]
        nrrd(tmp_path / f"named/images/p{n}.nrrd", scan(n))
        label = organs(names.index("liver") + 1, names.index("spleen") + 1)
        nrrd(tmp_path / f"named/labels/p{n}.seg.nrrd", label, [(name, k + 1, 0) for k, name in enumerate(names)])
    return tmp_path / "named"


def test_segments_go_by_their_names_file_by_file(named, tmp_path):
    """A6. What belongs to it: .seg.nrrd (names, terminology, layers), MITK's NRRD, label tables in NIfTI extensions
    (Connectome Workbench, TotalSegmentator), DICOM SEG, tables beside a file (ITK-SNAP, FreeSurfer, 3D Slicer, BIDS,
    JSON, CSV), a table or dataset.json for a folder, palettes; used alike by plan, check, prepare and evaluate."""
    made = plan(named)
    assert {found.name: (found.value, found.cases) for found in made.classes} == {
        "liver": ("liver", 3),
        "spleen": ("spleen", 3),
    }
    assert any("1 is liver in p0, spleen in p1" in note for note in made.notes)
    counts = [[LIVER_VOXELS, SPLEEN_VOXELS]] * 3
    assert voxels(named, tmp_path / "a", made.recipe.to_dict()["classes"]) == (counts, [])
    assert voxels(named, tmp_path / "b", {"Liver": "LIVER", "spleen": "spleen"})[0] == counts
    assert voxels(named, tmp_path / "c", {})[0] == counts  # none: those of the data


def test_check_finds_what_contradicts_where_numbers_are_used(named):
    """A6: with numbers a problem, by names a warning."""
    by_number, by_name = (check(named, recipe=recipe(c)) for c in ({"liver": 1, "spleen": 2}, ["liver", "spleen"]))
    assert by_number.failed and "label value 1 is liver in p0, spleen in p1" in str(by_number)
    assert not by_name.failed and not check(named).failed
    assert "label value 1 is liver in p0, spleen in p1" in str(check(named))


def test_prepare_by_numbers_says_that_they_mean_other_structures(named, tmp_path):
    _, warnings = voxels(named, tmp_path / "d", {"liver": 1, "spleen": 2})
    assert any("1 is liver in p0, spleen in p1" in line for line in warnings)
    assert any("class liver takes value 1, which the label file calls spleen" in line for line in warnings)


def test_evaluate_measures_by_the_names_of_both_sides(named, tmp_path):
    """Predictions that number their segments otherwise agree with their references; plain ones need --names."""
    shutil.copytree(named / "labels", tmp_path / "pred")
    nrrd(tmp_path / "pred/p0.seg.nrrd", organs(2, 1), [("spleen", 1, 0), ("liver", 2, 0)])
    made = evaluate_folders(tmp_path / "pred", named / "labels", tmp_path / "e", workers=1)
    assert {name for name in made.names.values()} == {"liver", "spleen"}
    assert all(m["dice"] == 1 for case in made.results["strict"].values() for m in case.values())
    for n in range(3):
        nifti(tmp_path / f"plain/p{n}.nii.gz", organs())
    with pytest.raises(InputError, match="does not name its values, and the other files number theirs differently"):
        evaluate_folders(tmp_path / "plain", named / "labels", tmp_path / "f", workers=1)
    given = {1: "liver", 2: "spleen"}
    made = evaluate_folders(tmp_path / "plain", named / "labels", tmp_path / "f", workers=1, names=given)
    assert all(m["dice"] == 1 for case in made.results["strict"].values() for m in case.values())
    by_recipe = evaluate_folders(
        tmp_path / "plain", named / "labels", tmp_path / "g", workers=1, recipe=recipe(["liver", "spleen"])
    )
    assert all(m["dice"] == 1 for case in by_recipe.results["strict"].values() for m in case.values())


def test_segments_nobody_named_have_the_name_of_their_type(tmp_path):
    """A member of the kind that is not A6: terminology, where the name is 3D Slicer's Segment_1; latin letters."""
    entry = "TerminologyEntry:General Anatomy~SCT^123037004^Anatomical Structure~SCT^10200004^Liver~^^~Anatomic~^^~^^|"
    path = nrrd(tmp_path / "a.seg.nrrd", organs(), [("Segment_1", 1, 0), ("Milz (groß)", 2, 0)], {"Segment0_Tags": entry})
    assert read_volume(path, labels=True).names == {1: ("Liver",), 2: ("Milz (groß)",)} == read_label_names(path)


def test_mitk_names_its_labels_in_the_header(tmp_path):
    groups = [{"labels": [{"name": "liver", "value": 1}, {"name": "spleen", "value": 2}]}]
    fields = {"org.mitk.multilabel.segmentation.labelgroups": json.dumps(groups)}
    assert read_label_names(nrrd(tmp_path / "a.nrrd", organs(), fields=fields)) == {1: ("liver",), 2: ("spleen",)}


TABLE = '<CaretExtension><VolumeInformation><LabelTable><Label Key="0"><![CDATA[???]]></Label>{}</LabelTable></VolumeInformation></CaretExtension>'


def test_label_tables_in_nifti_extensions(tmp_path):
    """As Connectome Workbench and TotalSegmentator write them; per file too."""
    for n, (one, other) in enumerate((("liver", "spleen"), ("spleen", "liver"))):
        rows = f'<Label Key="1" Red="1"><![CDATA[{one}]]></Label><Label Key="2"><![CDATA[{other}]]></Label>'
        nifti(tmp_path / f"labels/p{n}.nii.gz", organs(n + 1, 2 - n), extension=TABLE.format(rows))
        nifti(tmp_path / f"images/p{n}.nii.gz", scan(n))
    counts = [[LIVER_VOXELS, SPLEEN_VOXELS]] * 2
    assert voxels(tmp_path, tmp_path / "d", ["liver", "spleen"])[0] == counts


TABLES = {
    "p0.txt": '################\n# ITK-SnAP\n    0     0    0    0        0  0  0    "Clear Label"\n'
    '    1   255    0    0        1  1  1    "liver"\n    2     0  255    0        1  1  1    "spleen"\n',
    "p0.ctbl": "# Color table\n0 background 0 0 0 0\n1 liver 221 130 101 255\n2 spleen 157 108 162 255\n",
    "p0.label": '1 255 0 0 1 1 1 "liver"\n2 0 255 0 1 1 1 "spleen"\n',
    "p0.json": '{"liver": 1, "spleen": 2}',
    "p0.tsv": "index\tname\tcolor\n1\tliver\t#ff0000\n2\tspleen\t#00ff00\n",
    "p0.csv": "value;structure\n1;liver\n2;spleen\n",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_table_beside_a_label_map_names_its_values(tmp_path, name, encoding):
    path = nifti(tmp_path / "p0.nii.gz", organs())
    (tmp_path / name).write_text(TABLES[name], encoding=encoding)
    assert read_label_names(path) == {1: ("liver",), 2: ("spleen",)}


def test_what_is_no_table_is_none(tmp_path):
    """Notes beside a label map do not become names."""
    path = nifti(tmp_path / "p0.nii.gz", organs())
    (tmp_path / "p0.txt").write_text("Patient lay still.\n2 cases were left out.\nSee also p1.\n1. Open\n")
    assert read_label_names(path) == {}
    (tmp_path / "p0.json").write_text('{"EchoTime": 0.03, "Manufacturer": "X"}')
    assert read_table(tmp_path / "p0.json") == {}


@pytest.mark.parametrize("place", ["", "labels"])
@pytest.mark.parametrize("name", ["FreeSurferColorLUT.txt", "dataset.json", "labels.ctbl"])
def test_a_table_for_a_folder_names_the_values(tmp_path, place, name):
    """FreeSurfer's table names more than occur; dataset.json counts wherever it lies."""
    pairs_of(tmp_path, count=2)
    text = "#No. Label Name: R G B A\n0 Unknown 0 0 0 0\n1 liver 25 5 25 0\n2 spleen 70 130 180 0\n17 Left-Hippocampus 1 2 3 0\n"
    if name == "dataset.json":
        text = '{"labels": {"background": 0, "liver": 1, "spleen": 2}}'
    (tmp_path / place / name).write_text(text)
    made = plan(tmp_path)
    assert [(found.name, found.value) for found in made.classes] == [("liver", 1), ("spleen", 2)]
    assert voxels(tmp_path, tmp_path / "d", ["spleen", "liver"])[0] == [[SPLEEN_VOXELS, LIVER_VOXELS]] * 2


def test_label_files_without_names_among_others_are_named(named):
    (named / "labels/p2.seg.nrrd").unlink()
    nifti(named / "labels/p2_seg.nii.gz", organs())
    shutil.move(named / "images/p2.nrrd", named / "p2.nrrd")
    write_volume(read_volume(named / "p2.nrrd"), named / "images/p2.nii.gz")
    assert any("without names" in note and "p2" in note for note in plan(named).notes)
    assert "do not name their values" in str(check(named, recipe=recipe(["liver", "spleen"])))
    with pytest.raises(InputError, match="p2_seg.nii.gz: .*the value of 'liver' is not known"):
        prepare(named, named.parent / "d", recipe(["liver", "spleen"]), workers=1)


def test_a_dataset_json_serves_label_maps_without_names(named, tmp_path):
    """A set of both kinds: its own names go before those of the folder, which serve the rest."""
    (named / "labels/p2.seg.nrrd").unlink()
    nrrd(named / "labels/p2.nrrd", organs(7, 8))
    (named / "dataset.json").write_text('{"labels": {"background": 0, "liver": 7, "spleen": 8}}')
    assert {(found.name, found.value, found.cases) for found in plan(named).classes} == {
        ("liver", "liver", 3),
        ("spleen", "spleen", 3),
    }
    for n, classes in enumerate(({}, ["liver", "spleen"])):
        assert voxels(named, tmp_path / f"d{n}", classes)[0] == [[LIVER_VOXELS, SPLEEN_VOXELS]] * 3


def test_a_folder_per_case_as_3d_slicer_saves_it(tmp_path):
    for n in range(2):
        nrrd(tmp_path / f"s/p{n}/2 CT Abdomen.nrrd", scan(n))
        nrrd(tmp_path / f"s/p{n}/Segmentation.seg.nrrd", organs(n + 1, 2 - n), [("liver", n + 1, 0), ("spleen", 2 - n, 0)])
    assert voxels(tmp_path / "s", tmp_path / "d", ["liver", "spleen"])[0] == [[LIVER_VOXELS, SPLEEN_VOXELS]] * 2


def test_segments_of_dicom_go_by_their_names(tmp_path):
    """Another member: DICOM segmentations whose segments are numbered otherwise from patient to patient."""
    pytest.importorskip("highdicom")
    for n in range(2):
        series = tmp_path / f"s/images/p{n}"
        series.parent.mkdir(parents=True, exist_ok=True)
        write_series(series, np.ascontiguousarray(scan(n).transpose(2, 1, 0)), RescaleSlope=1, RescaleIntercept=0)
        image = read_volume(series)
        label = np.zeros(image.array.shape, np.uint8)
        label[LIVER], label[SPLEEN] = n + 1, 2 - n
        labels = Volume(label, image.affine)
        (tmp_path / "s/labels").mkdir(exist_ok=True)
        names = ["liver", "spleen"] if n == 0 else ["spleen", "liver"]
        write_dicom_seg(labels, series, tmp_path / f"s/labels/p{n}.dcm", names)
    assert [found.name for found in plan(tmp_path / "s").classes] == ["liver", "spleen"]
    assert "1 is liver in p0, spleen in p1" in str(check(tmp_path / "s"))
    assert voxels(tmp_path / "s", tmp_path / "d", ["liver", "spleen"])[0] == [[LIVER_VOXELS, SPLEEN_VOXELS]] * 2


def test_palettes_that_differ_are_found_by_check(tmp_path):
    """Colours are a table too: Pillow numbers the colours of a picture by how often they occur."""
    for n, colours in enumerate(((255, 0, 0, 0, 255, 0), (0, 255, 0, 255, 0, 0))):
        for side in ("images", "labels"):
            (tmp_path / side).mkdir(exist_ok=True)
        Image.fromarray(np.full((12, 10), 9 + n, np.uint8)).save(tmp_path / f"images/p{n}.png")
        mask = np.zeros((12, 10), np.uint8)
        mask[2:4], mask[6:8] = 1, 2
        picture = Image.frombytes("P", (10, 12), mask.tobytes())
        picture.putpalette([0, 0, 0, *colours])
        picture.save(tmp_path / f"labels/p{n}.png")
    assert "palettes differ: label value 1 is #ff0000 in p0, #00ff00 in p1" in str(check(tmp_path))


def boxes_of(source, labels):
    """Case -> {name of a label: its number and its box on slice 2}, of `--boxes_from`."""
    pairs = find_images(source)
    reference = ReferenceBoxes(labels, pairs, 0, 0, largest=False)
    found = {}
    for pair in pairs:
        case = recipe(["any"], slice_axis=2).to_case(read_image(pair))
        boxes, names = reference.boxes(pair, case)
        found[pair.name] = {names[b.label]: (b.label, b.corners) for b in boxes if b.first == 2}
    return found


def test_boxes_from_labels_go_by_the_names_of_each_file(named):
    """A6, of `samlora predict --boxes_from`. What belongs to it: every table of names that
    `prepare` uses, structures that overlap, values to be ignored, files without names."""
    found = boxes_of(named / "images", named / "labels")
    assert found["p0"].keys() == {"liver", "spleen"}
    assert found["p0"]["liver"][1] == (4, 5, 7, 9)
    assert found["p0"] == found["p1"] == found["p2"]
    assert boxes_of(named / "images/p1.nrrd", named / "labels/p1.seg.nrrd")["p1"] == {
        "spleen": (1, found["p0"]["spleen"][1]),
        "liver": (2, found["p0"]["liver"][1]),
    }  # files that agree, as one does with itself, keep their numbers


def test_label_maps_by_boxes_number_structures_alike(named, tmp_path):
    base = str(find_base("vit_ti"))
    words = [str(named / "images"), "--boxes_from", str(named / "labels"), "-o", str(tmp_path / "o")]
    assert main(["predict", *words, "--ckpt", base, "--device", "cpu"]) == 0
    records = [json.loads((tmp_path / f"o/cases/p{n}.json").read_text()) for n in range(3)]
    assert [record["labels"] for record in records] == [{"1": "liver", "2": "spleen"}] * 3


def test_boxes_from_labels_with_tables_beside_them(tmp_path):
    """Other members: a table beside each file, an extension of NIfTI, a dataset.json."""
    pairs_of(tmp_path, count=1)
    rows = '<Label Key="1"><![CDATA[spleen]]></Label><Label Key="2"><![CDATA[liver]]></Label>'
    nifti(tmp_path / "images/p1.nii.gz", scan())
    nifti(tmp_path / "labels/p1.nii.gz", organs(2, 1), extension=TABLE.format(rows))
    (tmp_path / "labels/p0.ctbl").write_text(TABLES["p0.ctbl"])
    found = boxes_of(tmp_path / "images", tmp_path / "labels")
    assert found["p0"].keys() == {"liver", "spleen"} and found["p0"] == found["p1"]
    (tmp_path / "labels/p0.ctbl").unlink()
    nifti(tmp_path / "labels/p0.nii.gz", organs(7, 9))
    described = '{"labels": {"background": 0, "liver": 7, "spleen": 8, "ignore": 9}}'
    (tmp_path / "dataset.json").write_text(described)
    found = boxes_of(tmp_path / "images", tmp_path / "labels")
    assert {name: of[0] for name, of in found["p1"].items()} == {"liver": 7, "spleen": 8}
    assert {name: of[0] for name, of in found["p0"].items()} == {"liver": 7}


def a_tumour_in_the_liver(folder):
    """An image and its .seg.nrrd, in two layers."""
    layers = np.zeros((2, *SHAPE), np.uint8)
    layers[0][LIVER] = 1
    layers[1][4:6, 5:10, 1:5] = 1
    nrrd(folder / "images/p0.nrrd", scan())
    nrrd(folder / "labels/p0.seg.nrrd", layers, [("liver", 1, 0), ("tumour", 1, 1)])


def test_boxes_of_structures_that_overlap_are_whole(tmp_path):
    a_tumour_in_the_liver(tmp_path)
    found = boxes_of(tmp_path / "images", tmp_path / "labels")
    assert found["p0"] == {"liver": (1, (4, 5, 7, 9)), "tumour": (2, (4, 5, 5, 9))}


def test_boxes_from_labels_of_which_one_names_nothing(named, tmp_path):
    (named / "labels/p2.seg.nrrd").unlink()
    nrrd(named / "labels/p2.nrrd", organs())
    with pytest.raises(InputError, match="p2.nrrd: does not name its values.* table of names"):
        boxes_of(named / "images", named / "labels")
    (named / "labels/p2.nrrd").write_bytes(b"NRRD0005\n")  # broken: named when its turn comes
    with pytest.raises(InputError, match="p2.nrrd: "):
        boxes_of(named / "images", named / "labels")


def test_names_of_masks_that_are_matched_by_size_are_kept(tmp_path):
    """Pictures say nothing about millimetres, and so take the place of their image."""
    for n, (one, other) in enumerate((("liver", "spleen"), ("spleen", "liver"))):
        for side, array in (("images", scan(n)), ("labels", organs(n + 1, 2 - n))):
            (tmp_path / side).mkdir(exist_ok=True)
            picture = np.clip(array[:, :, 2], 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / f"{side}/p{n}.png")
        (tmp_path / f"labels/p{n}.txt").write_text(f"1: {one}\n2: {other}\n")
    classes = Recipe("pictures", "image", classes=("liver", "spleen"), label_values=(("liver",), ("spleen",)))
    made = prepare(tmp_path, tmp_path / "d", classes, workers=1)
    assert [record["voxels"][1:] for record in made.records] == [[20, 16]] * 2


# --- kind 7: several masks in one file ------------------------------------------------------------------------------


def test_overlapping_segments_are_painted_and_remarked(tmp_path):
    """A7, of .seg.nrrd. What belongs to it: layers with the same values, empty layers, one list axis, DICOM SEG."""
    a_tumour_in_the_liver(tmp_path)
    both, warnings = voxels(tmp_path, tmp_path / "d", ["liver", "tumour"])
    assert both == [[LIVER_VOXELS // 2, LIVER_VOXELS // 2]]
    assert any("liver and tumour overlap; the voxels became tumour" in line for line in warnings)
    assert voxels(tmp_path, tmp_path / "e", ["tumour", "liver"])[0] == [[0, LIVER_VOXELS]]
    assert {found.name: found.voxels for found in plan(tmp_path).classes} == {
        "liver": LIVER_VOXELS,
        "tumour": LIVER_VOXELS // 2,
    }


def test_layers_become_one_map_of_all_combinations():
    layers = np.zeros((4, 1, 1, 3), np.uint8)
    layers[1:3, 0, 0, 0] = 1
    layers[2:4, 0, 0, 2] = 7
    merged, names = merge_layers(layers, [Segment("a", 1, 0), Segment("b", 7, 2), Segment("none", 3, 1)])
    assert merged.ravel().tolist() == [0, 1, 4, 2]
    assert names == {1: ("a",), 2: ("b",), 3: ("none",), 4: ("a", "b")}


# --- kind 8: files of kinds that are not read -----------------------------------------------------------------------


def test_pairs_of_header_and_voxels_are_read(tmp_path):
    """A9. What belongs to it: .hdr + .img (NIfTI, Analyze), .mgz, .gif, .jp2, .webp are read; .part files, files without
    ending, voxels without a header, folders of something else are named once, by plan, check, prepare and predict."""
    pairs_of(tmp_path, count=2)
    for n in (2, 3):
        nifti(tmp_path / f"images/p{n}.hdr", scan(n), nibabel.Nifti1Pair)
        nifti(tmp_path / f"labels/p{n}.hdr", organs(), nibabel.Nifti1Pair)
    nifti(tmp_path / "images/p4.mgz", scan(4), nibabel.MGHImage)
    nifti(tmp_path / "labels/p4.mgz", organs(), nibabel.MGHImage)
    layout = find_pairs(tmp_path)
    assert [pair.name for pair in layout.pairs] == ["p0", "p1", "p2", "p3", "p4"] and not layout.notes
    assert voxels(tmp_path, tmp_path / "d", {"liver": 1, "spleen": 2})[0] == [[LIVER_VOXELS, SPLEEN_VOXELS]] * 5
    assert [pair.name for pair in find_images(tmp_path / "images")] == ["p0", "p1", "p2", "p3", "p4"]
    assert tmp_path / "images/p2.img" in layout.pairs[2].files  # a change of the voxels is a change of the case


def test_what_is_not_read_is_named(tmp_path):
    """A9, of other kinds: downloads that were not finished, files without ending, archives, voxels without a header."""
    pairs_of(tmp_path, count=2)
    for name in ("p2.nii.gz.part", "p3", "p4.zip", "p5.img"):
        (tmp_path / "images" / name).write_bytes(b"\1\2\3")
    (tmp_path / "images/more").mkdir()
    nifti(tmp_path / "images/more/p6.nii.gz", scan())
    for name in ("README", "notes.txt", "Thumbs.db"):
        (tmp_path / "images" / name).write_text("hello")
    expected = "5 entries are not understood and left out: more/, p2.nii.gz.part, p3, p4.zip, p5.img"
    assert any(expected in note for note in find_pairs(tmp_path).notes)
    assert expected in str(check(tmp_path)) and expected in str(plan(tmp_path))
    assert [path.name for path in left_out([tmp_path / "images"])] == ["p2.nii.gz.part", "p3", "p4.zip", "p5.img"]
    assert not_read(tmp_path / "labels") == []


@pytest.mark.parametrize("ending", [".gif", ".jp2", ".webp"])
def test_pictures_of_other_kinds_are_read(tmp_path, ending):
    page = np.random.default_rng(0).integers(0, 255, (20, 16)).astype(np.uint8)
    options = {"lossless": True} if ending == ".webp" else {}
    Image.fromarray(page).save(tmp_path / f"a{ending}", **options)
    array = read_volume(tmp_path / f"a{ending}").array
    array = array[..., 0] if array.ndim == 4 else array
    assert np.array_equal(array[:, :, 0], page.T)


def test_a_moving_picture_is_no_mask(tmp_path):
    pages = [Image.fromarray(np.full((8, 9), n, np.uint8)) for n in (1, 2)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:])
    assert read_volume(tmp_path / "a.gif").array.shape[:3] == (9, 8, 2)
    with pytest.raises(InputError, match="holds 2 pictures"):
        read_volume(tmp_path / "a.gif", labels=True)


def test_analyze_has_the_directions_that_nibabel_gives_it(tmp_path):
    path = nifti(tmp_path / "a.hdr", scan(), nibabel.AnalyzeImage)
    volume = read_volume(path)
    assert volume.axes == nibabel.aff2axcodes(nibabel.load(path).affine)[0] + "AS"
    assert np.array_equal(volume.array, scan())
    (tmp_path / "a.img").unlink()
    with pytest.raises(InputError, match="a.img that belongs to it is missing"):
        read_volume(path)


# --- kind 9 of the list, A10 and A11: plans that leave nothing, labels with a meaning of their own ------------------


def scaled(path, array):
    """As nibabel stores labels of float64 in a file of uint8: with a slope."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0]), header), path)


def test_labels_that_a_header_scales_are_the_whole_numbers(tmp_path):
    """A10. What belongs to it: slopes of NIfTI and Analyze; soft masks up to 1, 100 and 255; ranges that differ from file
    to file; steps above 1, which have merged values."""
    label = organs(1, 13, np.float64)
    label[0, 0, 0] = 5
    scaled(tmp_path / "labels/p0.nii.gz", label)
    nifti(tmp_path / "images/p0.nii.gz", scan())
    stored = nibabel.load(tmp_path / "labels/p0.nii.gz").get_fdata()
    assert not np.array_equal(stored, np.rint(stored))  # the file is of the kind
    assert np.array_equal(read_volume(tmp_path / "labels/p0.nii.gz", labels=True).array, label)
    made = plan(tmp_path)
    assert "mask_threshold" not in made.choices and [found.value for found in made.classes] == [1, 5, 13]
    assert voxels(tmp_path, tmp_path / "d", {"liver": 1, "spleen": 13})[0] == [[LIVER_VOXELS, SPLEEN_VOXELS]]


def test_a_scale_that_merged_labels_is_named(tmp_path):
    scaled(tmp_path / "a.nii.gz", organs(1, 900, np.float64))
    with pytest.raises(InputError, match=r"scales the labels by 3.529 \(scl_slope\)"):
        read_volume(tmp_path / "a.nii.gz", labels=True)


@pytest.mark.parametrize(("highest", "threshold"), [(1.0, 0.5), (100.0, 50.0), (255.0, 127.0)])
def test_the_threshold_of_a_soft_mask_is_the_middle_of_its_range(tmp_path, highest, threshold):
    mask = np.zeros(SHAPE, np.float32)
    mask[LIVER] = highest
    mask[3, 5:10, 1:5] = 0.333 * highest
    nifti(tmp_path / "images/p0.nii.gz", scan())
    nifti(tmp_path / "labels/p0.nii.gz", mask)
    made = plan(tmp_path)
    assert made.choices["mask_threshold"] == threshold
    assert [found.voxels for found in made.classes] == [LIVER_VOXELS]


def test_fractions_that_are_no_soft_mask_are_not_taken_for_one(tmp_path):
    """Resampled labels: 1, 13, and what lies between them."""
    label = organs(1, 13, np.float32)
    label[3, 5:10, 1:5] = 6.5
    nifti(tmp_path / "images/p0.nii.gz", scan())
    nifti(tmp_path / "labels/p0.nii.gz", label)
    with pytest.raises(InputError, match="label values 6.5 are not whole"):
        plan(tmp_path)


def test_masks_of_other_ranges_are_named(tmp_path):
    """A threshold of 127 leaves nothing of masks that go up to 1."""
    for n, highest in enumerate((255.0, 1.0)):
        mask = np.zeros(SHAPE, np.float32)
        mask[LIVER], mask[3, 5:10, 1:5] = highest, 0.3 * highest
        nifti(tmp_path / f"images/p{n}.nii.gz", scan(n))
        nifti(tmp_path / f"labels/p{n}.nii.gz", mask)
    assert any("p1: its masks go up to 1, those of other cases above 127" in line for line in plan(tmp_path).broken)


def nnunet(tmp_path, names, cases=1):
    label = organs()
    label[:, :, ::2] = 3
    for n in range(cases):
        nifti(tmp_path / f"imagesTr/p{n}_0000.nii.gz", scan(n))
        nifti(tmp_path / f"labelsTr/p{n}.nii.gz", label)
    values = {"labels": names, "channel_names": {"0": "CT"}, "numTraining": 1, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize("word", ["ignore", "Ignore", "void"])
def test_the_ignore_label_is_no_class(tmp_path, word):
    """A11. What belongs to it: nnU-Net's ignore, PASCAL VOC's 255, -1; in plan, check, prepare and evaluate."""
    source = nnunet(tmp_path, {"background": 0, "right": 1, "left": 2, word: 3})
    made = plan(source)
    assert [found.name for found in made.classes] == ["right", "left"]
    said = "label value 3 is to be ignored (dataset.json): such voxels are in no loss and in no measure"
    assert said in str(made) and "does not name" not in str(made)
    assert made.recipe.ignore == (3,)
    summary = prepare(source, tmp_path / "d", "generic_ct", workers=1)
    assert summary.recipe.ignore == (3,)
    assert summary.recipe.classes == ("right", "left") and said in str(summary) and said in str(check(source))


def test_ignored_voxels_are_not_measured(tmp_path):
    source = nnunet(tmp_path, {"background": 0, "right": 1, "left": 2, "ignore": 3})
    nifti(tmp_path / "pred/p0.nii.gz", organs())
    assert ignored_labels(source / "dataset.json") == (3,)
    made = evaluate_folders(tmp_path / "pred", source / "labelsTr", tmp_path / "e", workers=1)
    assert set(made.names) == {1, 2} and all(m["dice"] == 1 for m in made.results["strict"]["p0"].values())
    assert any("value 3" in note for note in made.notes)


def test_255_is_not_measured_where_the_classes_are_known(tmp_path):
    """PASCAL VOC's void in a reference, with names and with a recipe; beside no classes it counts."""
    reference, predicted = organs(), organs()
    reference[0:3], predicted[0:3] = 255, 1
    nifti(tmp_path / "truth/p0.nii.gz", reference)
    nifti(tmp_path / "pred/p0.nii.gz", predicted)
    sides = tmp_path / "pred", tmp_path / "truth"
    two = recipe({"liver": 1, "spleen": 2})
    ignoring = recipe({"liver": 1, "spleen": 2}, ignore=255)
    for n, how in enumerate(({"names": {1: "liver", 2: "spleen"}}, {"recipe": two}, {"recipe": ignoring})):
        made = evaluate_folders(*sides, tmp_path / f"e{n}", workers=1, **how)
        assert {k: m["dice"] for k, m in made.results["strict"]["p0"].items()} == {1: 1, 2: 1}
        assert any("255" in note for note in made.notes)
    named = {1: "liver", 2: "spleen", 255: "skin"}
    made = evaluate_folders(*sides, tmp_path / "f", workers=1, names=named)
    assert made.results["strict"]["p0"][255]["dice"] == 0


def test_ignored_voxels_are_kept_apart_in_prepared_data(tmp_path):
    """Stored as 255, which a slice of published data may hold as a class, so that the recipe says it."""
    source = nnunet(tmp_path, {"background": 0, "right": 1, "left": 2, "ignore": 3}, cases=2)
    raw = read_volume(source / "labelsTr/p0.nii.gz", labels=True).array
    assert (raw == 3).any()
    made = prepare(source, tmp_path / "d", recipe({}, keep="all"), workers=1, test_cases=["p1"])
    (train,) = {item.case for item in find_slices(tmp_path / "d")}
    stored = [item.read()[1] for item in find_slices(tmp_path / "d")]
    assert train == "p0" and sum((label == IGNORE).sum() for label in stored) == (raw == 3).sum()
    assert made.records[0]["voxels"][1:] == [(raw == 1).sum(), (raw == 2).sum()]
    case = read_case(tmp_path / "d/test_vol_h5/p1.npy.h5")
    assert case.label.max() == 2 and case.ignored.sum() == (raw == 3).sum()
    assert not check(tmp_path / "d").failed
    stored_recipe = made.recipe.to_dict()
    check_slices(find_slices(tmp_path / "d"), 2, recipe=stored_recipe)
    with pytest.raises(InputError, match="255"):
        check_slices(find_slices(tmp_path / "d"), 2)
    assert made.recipe == Recipe.from_dict(stored_recipe)
    assert "ignore" not in recipe({"a": 1}).to_dict()  # records and adapters are as they were
    again = prepare(source, tmp_path / "d", recipe({}, keep="all"), workers=1, test_cases=["p1"])
    assert again.skipped == 2
    with pytest.raises(InputError, match="ignore 1: is a value of class a"):
        recipe({"a": 1}, ignore=1)


def test_255_beside_small_values_is_no_class(tmp_path):
    """A member that is not A11: PASCAL VOC. 255 alone, or among levels of gray, is a class."""
    label = organs()
    label[0] = 255
    nifti(tmp_path / "images/p0.nii.gz", scan())
    nifti(tmp_path / "labels/p0.nii.gz", label)
    made = plan(tmp_path)
    assert [found.value for found in made.classes] == [1, 2] and any("255" in note for note in made.notes)
    assert prepare(tmp_path, tmp_path / "d", "generic_ct", workers=1).recipe.classes == ("label_1", "label_2")
    assert made.recipe.ignore == (255,)
    assert ignored_values([255]) == ignored_values([1, 255]) == ignored_values([128, 255]) == ignored_values([85, 170, 255]) == set()
    assert ignored_values([1, 2, 65535]) == {65535}


def test_minus_one_is_no_class(tmp_path):
    """Another member: -1, which a recipe may ignore too."""
    label = organs(dtype=np.int16)
    label[0] = -1
    nifti(tmp_path / "images/p0.nii.gz", scan())
    nifti(tmp_path / "labels/p0.nii.gz", label)
    assert [found.value for found in plan(tmp_path).classes] == [1, 2]
    assert voxels(tmp_path, tmp_path / "d", {})[0] == [[LIVER_VOXELS, SPLEEN_VOXELS]]
    mapped = recipe({"liver": 1}, ignore=-1).map_labels(label)
    assert ((mapped == IGNORE) == (label == -1)).all() and (mapped[LIVER] == 1).all()


# --- kind 11: the same file is read in the same way wherever it is read ---------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "uint32", "int64", "uint64", "float16", "float64"])
def test_tiff_of_every_type_keeps_its_values(tmp_path, kind):
    """A13. What belongs to it: 64 bits, and int8 and uint32, which Pillow reads as uint8 and int32 without a word; colours
    of 32 bits; big-endian BigTIFF; compression that nothing here reads."""
    ends = (0, 1) if kind.startswith("f") else (np.iinfo(kind).min, np.iinfo(kind).max)
    array = np.array([[ends[0], ends[1], 1], [0, 1, 2]], dtype=kind)
    tifffile.imwrite(tmp_path / "a.tif", array)
    read = read_volume(tmp_path / "a.tif").array
    assert read.dtype == kind and np.array_equal(read[:, :, 0], array.T)


def test_tiff_labels_of_64_bits(tmp_path):
    label = np.arange(12).reshape(3, 4)
    tifffile.imwrite(tmp_path / "a.tif", np.stack([label, label + 1]), photometric="minisblack")
    assert np.array_equal(read_volume(tmp_path / "a.tif", labels=True).array[:, :, 1], label.T + 1)


def test_big_endian_bigtiff_is_read(tmp_path):
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    tifffile.imwrite(tmp_path / "a.tif", array, bigtiff=True, byteorder=">")
    assert np.array_equal(read_volume(tmp_path / "a.tif").array[:, :, 0], array.T)


def renamed(path, name):
    shutil.copy(path, path.with_name(name))
    return path.with_name(name)


NAMES = ["a.nii", "b.Nii.gz", "c.NII.GZ", "d.Nii", "e", "f.mha", "g.nrrd", "h.png"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [".nii.gz", ".nii", ".nrrd", ".mha", ".mgz", ".npy"])
def test_a_file_is_what_it_holds(tmp_path, name, kind):
    """A16. What belongs to it: content under another ending, endings in mixed case, none at all; of every format."""
    array = scan()
    if kind == ".mgz":
        path = nifti(tmp_path / "scan.mgz", array, nibabel.MGHImage)
    else:
        path = tmp_path / f"scan{kind}"
        write_volume(Volume(array, np.diag([1.0, 1.0, 3.0, 1.0])), path)
    assert np.array_equal(read_volume(renamed(path, name)).array, array)


@pytest.mark.parametrize("name", ["w.Nii.gz", "w.NII", "w.Nrrd", "w.MHA", "w.Npy", "w.Tif"])
def test_endings_in_any_case_are_written(tmp_path, name):
    array = scan()[:, :, :1].astype(np.uint8) if name == "w.Tif" else scan()
    write_volume(Volume(array, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert np.array_equal(read_volume(tmp_path / name).array, array)


FOREIGN = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
    "annex": (b"/annex/objects/MD5E-s1--d.nii.gz\n", "is a git-annex pointer"),
    "page": (b"\n<!DOCTYPE html>\n<html><head><title>Login", "is a web page"),
    "denied": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "is the message of a web server"),
    "empty": (b"", "is empty"),
    "zeros": (bytes(5000), "begins with zeros only"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.png", "a.npz"])
def test_what_stands_for_a_file_is_named(tmp_path, kind, name):
    """A17 for images: one advice, whatever the ending."""
    content, words = FOREIGN[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        read_volume(tmp_path / name)
    assert "\n" not in str(refused.value)


CODECS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("codec", CODECS)
def test_text_is_read_in_every_encoding(tmp_path, codec, ends):
    """A19. What belongs to it: lists, recipes, options, JSON, tables; byte order marks, UTF-16, western code pages, ends of
    lines; Unicode forms and upper case of the names in them."""
    text = "Müller_1\ncase0002\n"
    (tmp_path / "a.txt").write_bytes(text.replace("\n", ends).encode(codec))
    assert read_text(tmp_path / "a.txt") == text


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(gzip.compress(b"name: x") + bytes(9))
    with pytest.raises(InputError, match="is no text"):
        Recipe.load(tmp_path / "a.yaml")


def test_lists_recipes_options_and_json_in_utf_16(tmp_path):
    """A19: every place where people's text is read."""
    source = pairs_of(tmp_path / "s")
    (tmp_path / "r.yaml").write_text("name: r\nmodality: ct\nwindow: [-160, 240]\nclasses: {Leber: 1}\n", "utf-16")
    (source / "dataset.json").write_text('{"labels": {"Lüber": 1, "Milz": 2}}', encoding="utf-16")
    prepare(source, tmp_path / "d", tmp_path / "r.yaml", workers=1, test_cases=["p2"])
    assert find_pairs(source).classes == {"Lüber": [1], "Milz": [2]}
    lists = tmp_path / "l"
    lists.mkdir()
    names = (tmp_path / "d/lists/train.txt").read_text()
    (lists / "train.txt").write_bytes(names.replace("\n", "\r\n").encode("utf-16"))
    assert [item.name for item in find_slices(tmp_path / "d", lists)] == names.split()
    (tmp_path / "d/lists/train.txt").write_bytes(names.encode("utf-16"))
    assert not check(tmp_path / "d").failed
    (lists / "train.txt").write_bytes(b"\x00\x01\x02\xff" * 4)
    with pytest.raises(InputError, match="train.txt: is no text"):
        find_slices(tmp_path / "d", lists)


def test_options_in_utf_16(tmp_path):
    from samlora.options import read_yaml

    (tmp_path / "c.yaml").write_text("max_epochs: 3\n", encoding="utf-16")
    assert read_yaml(tmp_path / "c.yaml") == {"max_epochs": 3}


def test_names_are_compared_whatever_their_unicode_form(tmp_path):
    """Images composed, labels decomposed, as macOS and network disks leave them; and in flags and lists."""
    composed, apart = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    for n in (1, 2):
        nifti(tmp_path / f"s/images/{composed}{n}.nii.gz", scan(n))
        nifti(tmp_path / f"s/labels/{apart}{n}.nii.gz", organs())
    layout = find_pairs(tmp_path / "s")
    assert [pair.name for pair in layout.pairs] == [f"{composed}1", f"{composed}2"]
    prepare(tmp_path / "s", tmp_path / "d", recipe({"liver": 1}), workers=1, test_cases=[f"{apart}2"])
    (tmp_path / "l").mkdir()
    names = (tmp_path / "d/lists/train.txt").read_text(encoding="utf-8")
    (tmp_path / "l/train.txt").write_text(unicodedata.normalize("NFD", names), encoding="utf-8")
    assert len(find_slices(tmp_path / "d", tmp_path / "l")) == SHAPE[2]
    assert find_file(tmp_path / f"s/images/{apart}1.nii.gz").is_file() and stem(f"{apart}.nii.gz") == composed


def test_names_that_differ_in_upper_case_are_matched(tmp_path):
    """P1.nii.gz and p1.nii.gz belong together; where both cases occur, each keeps its own."""
    for image, label in (("P1", "p1"), ("p2", "P2_seg"), ("a3", "a3")):
        nifti(tmp_path / f"s/images/{image}.nii.gz", scan())
        nifti(tmp_path / f"s/labels/{label}.nii.gz", organs())
    found = {pair.name: pair.label.name for pair in find_pairs(tmp_path / "s").pairs}
    assert found == {"P1": "p1.nii.gz", "p2": "P2_seg.nii.gz", "a3": "a3.nii.gz"}
    for name in ("x", "X"):
        nifti(tmp_path / f"t/images/{name}.nii.gz", scan())
        nifti(tmp_path / f"t/labels/{name}.nii.gz", organs())
    pairs = find_pairs(tmp_path / "t").pairs
    assert len({path.name for path in (tmp_path / "t/images").iterdir()}) == len(pairs)
    assert all(stem(pair.images[0]) == stem(pair.label) for pair in pairs)


def test_a_dataset_json_from_windows_names_its_files(tmp_path):
    nifti(tmp_path / "Scans/P0.nii.gz", scan())
    nifti(tmp_path / "truth/p0.nii.gz", organs())
    listed = {"training": [{"image": "scans\\p0.nii.gz", "label": "truth\\P0.nii.gz"}], "labels": {"0": "bg", "1": "liver"}}
    (tmp_path / "dataset.json").write_text(json.dumps(listed), encoding="utf-8-sig")
    (pair,) = find_pairs(tmp_path).pairs
    assert all(path.is_file() for path in pair.files)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    source = pairs_of(tmp_path / "s", count=1)
    (source / "labels/p0.nii.gz").write_bytes(FOREIGN["lfs"][0])
    assert main(["prepare", str(source), "-o", str(tmp_path / "d"), "--dataset", "generic_ct", "--workers", "1"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "git lfs pull" in said and "p0.nii.gz" in said


# --- kind 12, for images: values that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_found(tmp_path, value):
    """A18, of images: files, and volumes that somebody has put together."""
    array = scan().astype(np.float32)
    array[1, 2, 3] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        recipe({"liver": 1}).to_case(Volume(array, np.eye(4)))
    nifti(tmp_path / "a.nii.gz", array)
    with pytest.raises(InputError, match="NaN or infinite"):
        read_volume(tmp_path / "a.nii.gz")


def test_prepared_cases_name_their_tables(named, tmp_path):
    """What each label file calls its values stays with the prepared case."""
    prepare(named, tmp_path / "d", recipe(["liver", "spleen"]), workers=1, test_cases=["p1"])
    record = json.loads((tmp_path / "d/cases/p1.json").read_text())
    assert record["names"] == {"1": ["spleen"], "2": ["liver"]}
    case = read_case(tmp_path / "d/test_vol_h5/p1.npy.h5")
    assert np.count_nonzero(case.label == 1) == LIVER_VOXELS


def test_a_changed_table_makes_a_case_anew(tmp_path):
    path = nifti(tmp_path / "s/labels/p0.nii.gz", organs())
    nifti(tmp_path / "s/images/p0.nii.gz", scan())
    table = path.with_name("p0.txt")
    table.write_text("1: liver\n2: spleen\n")
    assert voxels(tmp_path / "s", tmp_path / "d", ["liver"])[0] == [[LIVER_VOXELS]]
    table.write_text("2: liver\n1: spleen\n\n")
    os.utime(table, (1, 1))
    assert voxels(tmp_path / "s", tmp_path / "d", ["liver"])[0] == [[SPLEEN_VOXELS]]
