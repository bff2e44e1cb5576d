"""Tables, files and pictures show the figures, the class names and the class colours, NaN included."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from samlora.errors import InputError, MissingFileError
from samlora.evaluation import report
from samlora.evaluation.metrics import METRICS, evaluate, summarise

NAMES = {1: "spleen", 2: "left adrenal gland and more than fits", 3: "gallbladder"}
SPACING = (2.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def volume():
    """(image, truth, prediction), each (12, 40, 50); class 3 occurs nowhere."""
    truth = np.zeros((12, 40, 50), dtype=np.uint8)
    truth[2:9, 5:20, 5:20], truth[6:11, 22:36, 28:45] = 1, 2
    return np.linspace(0, 1, truth.size).reshape(truth.shape), truth, np.roll(truth, 2, axis=2)


@pytest.fixture(scope="module")
def results(volume):
    """(policy -> cases, policy -> summary)."""
    _, truth, prediction = volume
    cases = {
        policy: {
            name: evaluate(pred, truth, SPACING, labels=[1, 2, 3], policy=policy)
            for name, pred in (("case0001", prediction), ("case0002", truth))
        }
        for policy in ("strict", "samed")
    }
    return cases, {policy: summarise(of_policy) for policy, of_policy in cases.items()}


def test_table_names_every_class_and_fits_the_screen(results):
    _, summaries = results
    lines = report.table(summaries, NAMES).splitlines()
    assert max(map(len, lines)) <= 100
    assert len({len(line) for line in lines[1:]}) == 1, "columns are aligned"
    spleen, adrenal, gallbladder = lines[3:6]
    assert spleen.startswith("spleen") and adrenal.startswith("left adrenal gland")
    dice = 100 * summaries["strict"]["classes"][1]["dice"]["mean"]
    assert spleen.count(f"{dice:.2f}") == 2, "the same Dice under both policies"
    strict = gallbladder.split("|")[1].split()
    assert strict == ["-", "-", "-", "0", "2"], "absent from both maps: undefined, excluded, counted"
    assert gallbladder.split("|")[2].split()[:1] == ["0.00"], "the published convention counts it as 0"
    assert lines[-1].startswith("all classes")
    assert report.table({"samed": summaries["samed"]}, {}).count("class 3") == 1


def test_metrics_csv_reads_back(results, tmp_path):
    cases, _ = results
    report.write_metrics_csv(tmp_path / "metrics.csv", cases, NAMES)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["label"]) for row in rows] == [
        (case, str(label)) for case in ("case0001", "case0002") for label in (1, 2, 3)
    ]
    assert list(rows[0]) == ["case", "label", "class", *METRICS, "samed_dice", "samed_hd95"]
    for row in rows:
        assert row["class"] == NAMES[int(row["label"])]
        for prefix, policy in (("", "strict"), ("samed_", "samed")):
            for name, value in cases[policy][row["case"]][int(row["label"])].items():
                assert float(row[prefix + name]) == pytest.approx(value, nan_ok=True)
    assert rows[2]["dice"] == "nan"


def test_summary_json_reads_back(results, tmp_path):
    _, summaries = results
    report.write_summary_json(tmp_path / "summary.json", summaries, NAMES, {"adapter": "a.safetensors"})
    text = (tmp_path / "summary.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["about"] == {"adapter": "a.safetensors"}
    strict = content["policies"]["strict"]
    assert strict["n_cases"] == 2
    assert strict["classes"]["spleen"]["label"] == 1
    assert strict["classes"]["spleen"]["dice"] == pytest.approx(summaries["strict"]["classes"][1]["dice"])
    nothing = dict.fromkeys(("mean", "sd", "median", "ci_low", "ci_high"))
    assert strict["classes"]["gallbladder"]["dice"] == {**nothing, "n": 0, "n_excluded": 2}
    assert content["policies"]["samed"]["classes"]["gallbladder"]["dice"]["mean"] == 0


def has_colour(pixels: np.ndarray, label: int) -> bool:
    """Whether some pixels have the colour of a class, as its patch in the legend has."""
    colour = 255 * np.array(report.class_colour(label))
    return np.count_nonzero(np.abs(pixels - colour).max(axis=-1) <= 1) > 20


def test_contact_sheet_shows_the_classes_that_occur(volume, tmp_path):
    path = tmp_path / "preview.png"
    pixels = report.contact_sheet(*volume, path, NAMES, columns=3, rows=2, flip_ud=True)
    with Image.open(path) as image:
        assert image.size == (pixels.shape[1], pixels.shape[0]) and image.width > 600
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)
    assert has_colour(pixels, 1) and has_colour(pixels, 2) and not has_colour(pixels, 3)
    assert list(tmp_path.iterdir()) == [path]


def test_overlay_fills_the_prediction_and_flips_as_told():
    image, prediction = np.zeros((30, 30)), np.zeros((30, 30), dtype=np.uint8)
    prediction[:10, :10] = 1
    quarters = {}
    for flips in ((False, False), (True, False), (False, True), (True, True)):
        pixels = report.overlay(image, None, prediction, NAMES, flip_ud=flips[0], flip_lr=flips[1])
        black = np.argwhere(pixels.max(axis=-1) == 0)
        filled = np.argwhere(np.abs(pixels - 0.45 * 255 * np.array(report.class_colour(1))).max(axis=-1) <= 2)
        quarters[flips] = tuple(bool(side) for side in filled.mean(axis=0) > black.mean(axis=0))
    assert quarters == {flips: flips for flips in quarters}, "a corner at the start is at the top left"


def test_overlay_draws_the_reference_as_a_line():
    truth = np.zeros((30, 30), dtype=np.uint8)
    truth[:, :10] = 2
    pixels = report.overlay(np.full((30, 30), np.nan), truth)
    assert has_colour(pixels, 2)
    plain = report.overlay(np.zeros((30, 30)), np.zeros_like(truth), np.zeros_like(truth))
    assert np.ptp(plain, axis=-1).max() == 0, "nothing labelled: a gray picture without a legend"


def test_pictures_refuse_labels_of_another_shape(volume, tmp_path):
    image, truth, _ = volume
    with pytest.raises(InputError, match="shape"):
        report.contact_sheet(image, truth[:, 1:], None, tmp_path / "preview.png")
    assert not list(tmp_path.iterdir())


def test_informative_slices_are_spread_over_the_labelled_ones(volume):
    _, truth, _ = volume
    assert report.informative_slices(truth, 3, 12) == [2, 6, 8]
    assert report.informative_slices(truth, 99, 12) == list(range(2, 11))
    assert report.informative_slices(None, 2, 12) == [3, 9]
    assert report.informative_slices(np.zeros_like(truth), 2, 12) == [3, 9]


COLUMNS = "step,epoch,lr,loss,loss_ce,loss_dice,val_dice\n"


def test_curves_are_drawn_with_gaps(tmp_path):
    rows = [f"{i},{i // 10},{1e-3 / (i + 1)},{1 / (i + 1)},0.1,," for i in range(40)]
    rows[5] = "5,0,0.001,nan,nan,,0.25"
    rows[39] += "0.5"
    (tmp_path / "metrics.csv").write_text(COLUMNS + "\n".join(rows) + "\n40,4")  # the last line is cut off
    report.curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] > 1000
    blue = 255 * np.array(report.class_colour(5))
    assert np.count_nonzero(np.abs(pixels - blue).max(axis=-1) <= 2) > 20, "the loss is drawn"


def test_curves_of_one_step_without_validation(tmp_path):
    (tmp_path / "metrics.csv").write_text(COLUMNS + "0,0,0.001,0.9,,,\n")
    report.curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("text", [COLUMNS, "", "a,b\n1,2\n", "step,loss\n1,low\n", "\x89PNG\0"])
def test_curves_refuse_what_is_no_table(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="metrics.csv"):
        report.curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    with pytest.raises(MissingFileError, match="no such file"):
        report.curves(tmp_path / "other.csv", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* as Pillow's colour management has it, of (N, 3) uint8."""
    from PIL import ImageCms

    way = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    stored = np.asarray(ImageCms.applyTransform(Image.fromarray(rgb[None]), way))[0]
    return np.column_stack([stored[:, 0] * (100 / 255), stored[:, 1:].view(np.int8)])


def test_colours_of_all_labels_differ_those_of_the_first_clearly():
    colours = [report.class_colour(label) for label in range(1, 256)]
    assert len(set(colours)) == 255 and report.class_colour(256) == colours[0]
    assert 0 <= np.min(colours) and np.max(colours) <= 1
    places = to_lab(np.round(255 * np.array(colours)).astype(np.uint8))
    apart = np.linalg.norm(places[:, None] - places, axis=-1) + 1000 * np.eye(255)
    assert apart.min() > 7
    assert apart[:24, :24].min() > 18  # two that one takes for each other are nearer than 10
    assert places[:, 0].min() > 40, "none is so dark that its outline is lost in dark tissue"
