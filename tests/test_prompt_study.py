"""samlora evaluate-prompts: what is asked, what is counted, what is written."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import samlora
from samlora.cli import main
from samlora.data.grid import Case
from samlora.data.prompts import next_click
from samlora.evaluation.prompt_figures import AUTOMATIC, BOX, CLICKS, Asked, summarise, table
from samlora.inference.predictor import Masks, Predictor
from samlora.inference.prompt_study import PromptStudyConfig, click_through, dice_of, measure_case
from samlora.model.build import build_model
from samlora.model.methods import system_row

SIDE = 48
CONFIG = PromptStudyConfig(output="unused", clicks=(1, 2, 4), boxes=(0, 6), min_pixels=5, device="cpu")


def two_objects() -> np.ndarray:
    label = np.zeros((3, SIDE, SIDE), np.uint8)
    label[0, 5:20, 6:22], label[0, 25:44, 20:40] = 1, 2
    label[2, 10:40, 10:30], label[2, 45:47, 45:47] = 1, 2  # the second too small to be asked for
    return label


class Person:
    """Stands in for a Predictor: answers with the true object under the first click, less `spoil` of its rows.

    Every further click gives one row back. What it was asked is kept in `calls`.
    """

    knows_three, takes_masks = False, True

    def __init__(self, label: np.ndarray, spoil: int = 2):
        self.label, self.spoil, self.calls, self.index = label, spoil, [], 0
        self.model = build_model("medsam_decoder", "random:1", "vit_ti", 64, num_classes=2)  # its decoder trains
        self.row = system_row("medsam_decoder")

    def set_image(self, case, index):
        self.index = index

    def select(self, index):
        self.index = index

    def whole_pixels(self, boxes):
        return boxes

    def predict(self, points=None, labels=None, box=None, mask=None, multimask=False):
        self.calls.append((points, labels, box, mask, multimask))
        asked = points if points is not None else box
        answers = np.zeros((len(asked), 1, SIDE, SIDE), bool)
        for n, one in enumerate(asked):
            col, row = one[0] if points is not None else (one[:2] + one[2:]) / 2
            answers[n, 0] = self.label[self.index] == self.label[self.index][int(row), int(col)]
            rows = np.flatnonzero(answers[n, 0].any(axis=1))
            left = self.spoil - (points.shape[1] - 1) if points is not None else 0
            answers[n, 0, rows[: max(0, left)]] = False
        side = self.model.logit_side
        return Masks(answers, np.ones(len(asked), np.float32)[:, None], np.full((len(asked), 1, side, side), 3.0, np.float32))


def test_clicks_go_where_the_error_is_and_end_with_it():
    person = Person(two_objects(), spoil=2)
    truths = np.stack([person.label[0] == 1, person.label[0] == 2])
    masks, clicks = click_through(person, truths, 5, goes_on=True)
    assert clicks.tolist() == [3, 3] and len(person.calls) == 3  # perfect after the third: nothing is left to ask
    assert (masks[2:] == truths).all() and not (masks[1] == truths).all()
    for turn, (points, labels, box, mask, _) in enumerate(person.calls):
        assert points.shape == (2, turn + 1, 2) and box is None and (labels == 1).all()
        assert (mask is None) == (turn == 0)
        for n, (col, row) in enumerate(points[:, -1].astype(int)):
            before = masks[turn - 1, n] if turn else np.zeros_like(truths[n])
            assert truths[n, row, col] != before[row, col]
    rising = dice_of(masks, truths)
    assert (np.diff(rising, axis=0) >= 0).all() and (rising[-1] == 1).all()


def test_the_answer_before_goes_in_only_if_it_shall():
    person = Person(two_objects())
    click_through(person, (person.label[0] == 1)[None], 3, goes_on=False)
    assert len(person.calls) == 3 and all(mask is None for *_, mask, _ in person.calls)


@pytest.mark.parametrize("system, three", [("sam", True), ("sam_lora", True), ("medsam_decoder", False), ("samlora_joint", False)])
def test_three_masks_are_asked_for_where_they_are_the_bases_own(system, three, monkeypatch):
    predictor = Predictor(build_model(system, "random:1", "vit_ti", 64, num_classes=2))
    predictor.set_image(np.random.default_rng(0).random((SIDE, SIDE)).astype(np.float32))
    asked, predict = [], predictor.predict
    monkeypatch.setattr(predictor, "predict", lambda *given, **named: asked.append(named["multimask"]) or predict(*given, **named))
    masks, _ = click_through(predictor, (two_objects()[0] == 1)[None], 3, goes_on=False)
    assert asked == [three, False, False]
    truth = two_objects()[0] == 1
    first, _ = next_click(truth, np.zeros_like(truth))
    assert np.array_equal(predictor.click(*first), masks[0, 0])  # as a person's click
    assert asked[-1] is three


def test_every_object_is_asked_in_every_way():
    case = Case(np.zeros((3, SIDE, SIDE), np.float32), two_objects(), name="c")
    asked = measure_case(Person(case.label), case, CONFIG)
    objects = {(one.slice, one.label) for one in asked}
    assert objects == {(0, 1), (0, 2), (2, 1)}
    ways = [(CLICKS, 1), (CLICKS, 2), (CLICKS, 3), (CLICKS, 4), (BOX, 0), (BOX, 6)]
    assert [(one.kind, one.amount) for one in asked if (one.slice, one.label) == (2, 1)] == ways
    assert all(one.dice == 1 for one in asked if one.kind == BOX or one.amount >= 3)
    assert {one.slice for one in measure_case(Person(case.label), case, replace(CONFIG, max_slices=1))} == {0}
    assert measure_case(Person(case.label), case, replace(CONFIG, min_pixels=10**6)) == []


def test_answers_where_nobody_has_labelled_do_not_count():
    """The whole object is answered; a part of it is ignored and so is no error."""
    raw = two_objects()
    ignored = np.zeros(raw.shape, bool)
    ignored[0, 5:9], ignored[2, 10:20] = True, True
    label = np.where(ignored, 0, raw)
    for left_out, right in ((ignored, True), (None, False)):
        case = Case(np.zeros(raw.shape, np.float32), label, name="a", ignored=left_out)
        asked = measure_case(Person(raw, spoil=0), case, CONFIG)
        first = [one for one in asked if one.label == 1 and one.kind in (CLICKS, BOX)]
        assert first and all((one.dice == 1) == right for one in first)


def test_boxes_are_wider_by_no_more_than_they_say():
    label = two_objects()
    person = Person(label)
    measure_case(person, Case(np.zeros((3, SIDE, SIDE), np.float32), label, name="c"), CONFIG)
    boxes = next(box for *_, box, _, _ in person.calls if box is not None)
    tight, wide = boxes[:2], boxes[2:]
    assert tight.tolist() == [[6, 5, 21, 19], [20, 25, 39, 43]]
    out = (wide - tight) * (-1, -1, 1, 1)
    assert out.min() >= 0 and 0 < out.max() <= 6


def asked(case, slice, label, dices):
    return [Asked(case, slice, label, 9, CLICKS, turn, dice) for turn, dice in enumerate(dices, start=1)]


def test_a_case_counts_once_and_what_never_arrives_counts_as_the_most():
    rows = asked("a", 0, 1, (0.5, 0.9, 0.9)) + asked("a", 1, 1, (0.9, 0.9, 0.9)) + asked("b", 0, 1, (0.2, 0.3, 0.4))
    rows += asked("b", 0, 2, (1.0, 1.0, 1.0)) + [Asked("b", 0, 2, 9, AUTOMATIC, 0, 0.25)]
    summary = summarise(rows, {1: "one", 2: "two"}, (1, 3), (0.85, 0.95))
    first, last, automatic = summary["dice"]
    assert (first["amount"], last["amount"], automatic["prompt"]) == (1, 3, AUTOMATIC)
    assert first["classes"]["one"]["mean"] == pytest.approx((0.7 + 0.2) / 2)  # not (0.5 + 0.9 + 0.2) / 3
    assert first["overall"]["mean"] == pytest.approx((0.45 + 1) / 2)
    assert first["classes"]["one"]["low"] <= 0.45 <= first["classes"]["one"]["high"]
    assert first["classes"]["one"]["n"] == 2 and np.isnan(first["classes"]["two"]["low"])
    assert np.isnan(automatic["classes"]["one"]["mean"]) and automatic["overall"]["mean"] == 0.25
    near, far = summary["clicks_to"]
    assert near["classes"]["one"]["mean"] == pytest.approx((1.5 + 3) / 2) and near["classes"]["one"]["never"] == 1
    assert far["classes"]["one"] | {"never": 3, "mean": 3.0} == far["classes"]["one"]
    assert near["overall"]["never"] == 1 and near["classes"]["two"] | {"mean": 1.0, "never": 0} == near["classes"]["two"]
    text = table(summary)
    assert "the cases (2)" in text and "1 of 4 objects never" in text and max(map(len, text.splitlines())) <= 100


@pytest.fixture(scope="module")
def prepared(shared_path):
    """A drawn patient of two classes in SAMed's layout, and a joint adapter that has seen none of it."""
    from samlora.data.grid import Volume
    from samlora.data.prepare import prepare
    from samlora.data.recipe import Recipe
    from samlora.data.volume import write_volume

    root = shared_path
    for case in ("p1", "p2"):
        label = two_objects().transpose(2, 1, 0)
        hu = label.astype(np.int16) * 500 - 1000
        write_volume(Volume(hu, np.eye(4), 1, 1), root / "src" / "images" / f"{case}.nii.gz")
        write_volume(Volume(label, np.eye(4), 1, 1), root / "src" / "labels" / f"{case}.nii.gz")
    recipe = Recipe("drawn", "ct", window=(-1000, 0), classes=("one", "two"), label_values=((1,), (2,)))
    prepare(root / "src", root / "data", recipe, test_fraction=1.0, workers=1)
    torch.manual_seed(0)
    for system in ("samlora_joint", "samed", "unet"):
        base = None if system == "unet" else "default"
        model = build_model(
            system, base, None if system == "unet" else "vit_ti", 64, 2, class_names=recipe.classes, recipe=recipe.to_dict()
        )
        samlora.save_adapter(model, root / f"{system}.safetensors")
    return root


def study(prepared, out, *more):
    return main(["evaluate-prompts", str(prepared / "data"), "-o", str(out), "--device", "cpu", "--min_pixels", "20", *more])


def test_the_command_writes_every_answer_and_the_summary(prepared, tmp_path, capsys):
    assert study(prepared, tmp_path / "o", "--adapter", str(prepared / "samlora_joint.safetensors"), "--clicks", "1", "3") == 0
    with open(tmp_path / "o" / "prompts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * (1 + 3 + 4)  # cases, objects, and automatic, clicks and boxes
    assert {row["class"] for row in rows} == {"one", "two"}
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    of_class = [float(r["dice"]) for r in rows if (r["class"], r["prompt"], r["amount"]) == ("one", "box", "5")]
    entry = next(e for e in summary["dice"] if (e["prompt"], e["amount"]) == ("box", 5))
    assert entry["classes"]["one"]["mean"] == pytest.approx(np.mean(of_class), abs=1e-6)
    assert summary["n_objects"] == 6 and summary["about"]["mask_prompt"] is False
    assert (tmp_path / "o" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "all classes" in capsys.readouterr().out
    # The same again, bit by bit; and a slice's figures do not depend on which others are measured.
    assert study(prepared, tmp_path / "again", "--adapter", str(prepared / "samlora_joint.safetensors"), "--clicks", "1", "3") == 0
    assert (tmp_path / "again" / "prompts.csv").read_bytes() == (tmp_path / "o" / "prompts.csv").read_bytes()
    assert study(prepared, tmp_path / "one", "--adapter", str(prepared / "samlora_joint.safetensors"), "--clicks", "1", "3", "--max_slices", "1") == 0
    fewer = (tmp_path / "one" / "prompts.csv").read_text().splitlines()
    assert len(fewer) > 1 and set(fewer) < set((tmp_path / "o" / "prompts.csv").read_text().splitlines())


def test_without_an_adapter_the_base_answers(prepared, tmp_path):
    from samlora.model.bases import find_base

    assert study(prepared, tmp_path / "o", "--ckpt", str(find_base("vit_ti")), "--image_size", "64", "--clicks", "1") == 0
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["about"]["system"] == "sam" and set(summary["dice"][0]["classes"]) == {"one", "two"}
    assert {entry["prompt"] for entry in summary["dice"]} == {CLICKS, BOX}


def test_without_lite_medsam_the_log_names_the_command_that_brings_it(prepared, tmp_path, without_lite_medsam):
    assert study(prepared, tmp_path / "o", "--clicks", "1", "--boxes", "0", "--max_slices", "1") == 0
    log = (tmp_path / "o" / "log.txt").read_text()
    assert "sam_vit_ti_demo.safetensors" in log and "pip install 'samlora[lite]'" in log


def test_a_system_without_prompts_is_measured_without_them(prepared, tmp_path):
    assert study(prepared, tmp_path / "o", "--adapter", str(prepared / "samed.safetensors")) == 0
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert [entry["prompt"] for entry in summary["dice"]] == [AUTOMATIC] and summary["clicks_to"] == []
    assert not (tmp_path / "o" / "curve.png").exists()


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--adapter", "{unet}"], "takes no prompts"),
        (["--adapter", "{samlora_joint}", "--min_pixels", "100000"], "--min_pixels"),
        (["--adapter", "{samlora_joint}", "--clicks", "2", "2"], "--clicks 2 2"),
        (["--adapter", "{samlora_joint}", "--clicks", "0", "1"], "--clicks 0"),
        (["--adapter", "{samlora_joint}", "--boxes", "-1"], "--boxes -1"),
        (["--adapter", "{samlora_joint}", "--targets", "1.5"], "--targets 1.5"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(prepared, tmp_path, capsys, flags, word):
    flags = [flag.format(**{s: prepared / f"{s}.safetensors" for s in ("unet", "samlora_joint")}) for flag in flags]
    assert study(prepared, tmp_path / "o", *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("samlora: ")]) == 1 and word in lines[-1]


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["evaluate-prompts", str(tmp_path / "none"), "-o", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err.strip()
    assert str(tmp_path / "none") in error and "\n" not in error and not (tmp_path / "o").exists()
