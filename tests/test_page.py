"""The report page: whole in itself, safe against any name, small; and in a browser it does what it shows."""

import base64
import hashlib
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlora.evaluation import frames as frames_module
from samlora.evaluation import page as page_module
from samlora.evaluation.frames import MOST_SLICES, Worst, badness, draw_frames
from samlora.evaluation.metrics import evaluate_case, summarise
from samlora.evaluation.page import write_page
from samlora.evaluation.plots import Strip, box_plot, whiskers
from samlora.evaluation.tables import page_classes

EVIL = {1: '<img src=x onerror="alert(1)">', 2: "</script><script>alert(2)</script>", 3: "gall & 'bladder' {{data}}"}
SPACING = (2.5, 0.8, 0.8)


def case(seed: int, depth: int = 12, side: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image, reference, prediction), each (depth, side, side); class 3 occurs in every second case only."""
    rng = np.random.default_rng(seed)
    reference = np.zeros((depth, side, side), np.uint8)
    reference[2:-2, 8:30, 10:25] = 1
    reference[3:-3, 30:50, 20:45] = 2
    if seed % 2:
        reference[4, 5:8, 40:44] = 3
    prediction = np.roll(reference, seed % 5, axis=2)
    if seed == 3:
        prediction[prediction == 2] = 0
    return np.clip(reference / 4 + rng.normal(0.2, 0.05, reference.shape), 0, 1), reference, prediction


def write(path: Path, cases: dict, names=EVIL, **options) -> tuple[str, dict]:
    """Writes a page about cases (image, reference, prediction), all of them shown; returns it and the results."""
    results = {"strict": {}, "samed": {}}
    worst = Worst(12)
    for name, (image, reference, prediction) in cases.items():
        measured = evaluate_case(prediction, reference, SPACING, [1, 2, 3])
        for policy, values in measured.items():
            results[policy][name] = values
        worst.offer(name, measured["strict"], lambda i=image, r=reference, p=prediction: draw_frames(i, r, p))
    summaries = {policy: summarise(of) for policy, of in results.items()}
    options = {"facts": {"Prediction": "<b>x</b>"}, "frames": worst.frames} | options
    size = write_page(path, results, summaries, names, **options)
    page = path.read_text(encoding="utf-8")
    assert size == path.stat().st_size == len(page.encode())
    return page, results


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(path, content, results) of a page of five cases, one of which has a name that is a script."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    names = ["case01", "case02", "<script>alert(0)</script>", "case04", "case05"]
    page, results = write(path, {name: case(seed) for seed, name in enumerate(names)}, notes=["<i>note</i>"])
    return path, page, results


def without_pictures(page: str) -> str:
    return re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", page)


def test_names_are_text_and_nothing_else(written):
    _, page, _ = written
    text = without_pictures(page)
    for name in (*EVIL.values(), "<script>alert(0)</script>", "<i>note</i>", "<b>x</b>"):
        assert name not in text
    assert "&lt;script&gt;alert(0)&lt;/script&gt;" in text and "gall &amp; &#x27;bladder&#x27; {{data}}" in text
    assert text.count("<script") == text.count("</script>") == 2, "the data and the page's own script"
    assert text.count("onerror") == text.count("onerror=&quot;alert(1)&quot;"), "never as an attribute"


def test_data_cannot_end_their_script():
    assert "<" not in page_module._json({"a": "</script><script>"})


def test_page_needs_nothing_else_and_may_run_one_script(written):
    _, page, _ = written
    assert not re.search(r"https?:|//\w|@import|url\(|<link|<iframe", without_pictures(page).replace("// ", ""))
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data["frames"]) == 5 and "hd95" in data["measures"]


def test_data_for_the_table_are_the_measures(written):
    _, page, results = written
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    order = sorted(results["strict"], key=lambda name: badness(name, results["strict"][name]))
    for measure, entry in data["measures"].items():
        for row, name in zip(entry["values"], order):
            values = [results["strict"][name][label][measure] for label in (1, 2, 3)]
            shown = [math.nan if value is None else value for value in row[1:]]
            assert shown == pytest.approx(values, rel=1e-5, nan_ok=True), (measure, name)
            assert row[0] is None or row[0] == pytest.approx(np.nanmean(values), rel=1e-5)


def test_worst_cases_are_drawn_and_no_others():
    worst, drawn = Worst(2), []
    cases = {"a": 0.9, "b": 0.5, "c": 0.7, "d": math.nan, "e": 0.8, "f": 0.1}
    for name, dice in cases.items():
        worst.offer(name, {1: {"dice": dice, "hd95": 1.0}}, lambda name=name: drawn.append(name))
    assert list(worst.frames) == ["f", "b"] and drawn == ["a", "b", "c", "f"]
    keys = [badness("x", {1: {"dice": 0.5, "hd95": hd95}}) for hd95 in (9.0, 2.0)]
    assert keys[0] < keys[1] < badness("x", {1: {"dice": 0.6, "hd95": 99.0}})
    nobody = Worst(0)
    nobody.offer("a", {1: {"dice": 0.1}}, lambda: pytest.fail("nothing is to be drawn"))
    assert nobody.frames == {}


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGBA"))


def test_frames_show_the_labelled_slices():
    image, reference, prediction = case(1)
    shown = draw_frames(image, reference, prediction, aspect=1.0)
    assert shown.slices == tuple(range(1, 11)) and shown.depth == 12 and shown.size[0] <= 320
    layers = shown.background, shown.prediction, shown.reference, shown.difference
    assert {len(layer) for layer in layers} == {10} and shown.background[0] != shown.background[1]
    found, empty = pixels(shown.prediction[5]), pixels(shown.prediction[0])
    assert set(np.unique(found[..., 3])) == {0, 255} and not empty.any(), "a transparent ground"
    none = np.zeros_like(reference)
    nothing = draw_frames(None, none, none)
    assert nothing.slices == (6,) and nothing.background == ()
    flat = draw_frames(image[5:6], reference[5:6], prediction[5:6])
    assert flat.slices == (0,) and flat.start == 0
    colours = draw_frames(np.repeat(image[..., None], 3, axis=-1), reference, prediction)
    assert pixels(colours.background[3]).shape[2] == 4


def test_frames_start_where_prediction_and_reference_differ_most():
    _, reference, _ = case(1)
    prediction = reference.copy()
    prediction[7] = 0
    shown = draw_frames(None, reference, prediction)
    assert shown.slices[shown.start] == 7


def test_frames_turn_and_stretch_as_they_are_told():
    labels = np.zeros((1, 40, 40), np.uint8)
    labels[0, :4, :9] = 1
    for flip_ud, flip_lr in ((False, False), (True, False), (False, True), (True, True)):
        shown = draw_frames(None, labels, labels, flip_ud, flip_lr)
        found = np.argwhere(pixels(shown.prediction[0])[..., 3])
        middle = np.array(pixels(shown.prediction[0]).shape[:2]) / 2
        assert tuple(found.mean(axis=0) > middle) == (flip_ud, flip_lr)
    labels[:] = 1
    width, height = draw_frames(None, labels, labels, aspect=2.0).size
    assert (width, height) == (160, 320)


def test_large_slices_keep_their_smallest_labels():
    labels = np.zeros((1, 1024, 1024), np.uint8)
    labels[0, 100:900, 100:900] = 1
    labels[0, 517, 333], labels[0, 61, 62] = 2, 3
    layers = draw_frames(None, labels, labels)
    colours = {tuple(colour) for colour in pixels(layers.prediction[0]).reshape(-1, 4)}
    assert len(colours) == 4, "background and three classes"


def test_difference_tells_four_kinds():
    reference, prediction = np.zeros((2, 1, 30, 30), np.uint8)
    reference[0, 10:14, 10:20], prediction[0, 12:16, 10:20] = 1, 1
    prediction[0, 12, 10:20] = 2
    colours, counts = np.unique(
        pixels(draw_frames(None, reference, prediction).difference[0]).reshape(-1, 4), axis=0, return_counts=True
    )
    assert len(colours) == 5
    share = dict(zip(map(tuple, colours[:, :3].tolist()), counts / counts.sum() * 900))
    codes = {kind: tuple(bytes.fromhex(code[1:])) for kind, code in frames_module.DIFFERENCES.items()}
    pixel = counts.sum() / 900
    rows = {"only in the reference": 2, "only in the prediction": 2, "another class": 1, "agreement": 1}
    ratio = share[codes["another class"]]
    for kind, expected in rows.items():
        assert share[codes[kind]] / ratio == pytest.approx(expected, rel=0.25), (kind, pixel)


def test_outlines_are_closed_and_inside():
    labels = np.zeros((20, 20), np.uint8)
    labels[5:15, 5:15], labels[0:3, 0:3] = 1, 2
    outline = frames_module._outline(labels)
    twice = labels.repeat(2, 0).repeat(2, 1)
    assert (outline[outline > 0] == twice[outline > 0]).all()
    assert (outline[10:12, 10:30] == 1).all() and (outline[12:28, 12:28] == 0).all()
    assert (outline[0:6, 0:2] == 2).all(), "also where a structure leaves the picture"


def test_twelve_cases_of_sixty_slices_stay_small(tmp_path, monkeypatch):
    """As many slices as are ever shown, at CT's 512 pixels with noise, in all twelve viewers."""
    image, reference, prediction = case(1, depth=80, side=60)
    image, reference, prediction = (np.kron(a[::8], np.ones((1, 8, 8))) for a in (image, reference, prediction))
    noise = np.random.default_rng(0).normal(0, 0.04, image.shape)
    shown = draw_frames(np.clip(image + noise, 0, 1), reference.astype(np.uint8), prediction.astype(np.uint8))
    layers = {name: getattr(shown, name) for name in ("background", "prediction", "reference", "difference")}
    per_slice = sum(len(uri) for uris in layers.values() for uri in uris) / len(shown.slices)
    assert per_slice * MOST_SLICES * 12 < 15e6
    many = draw_frames(None, *np.ones((2, 148, 20, 20), np.uint8))
    assert len(many.slices) == 50 and many.slices[1] == 3
    monkeypatch.setattr(frames_module, "_MOST_BYTES", 40_000)
    small = draw_frames(np.random.default_rng(0).random((20, 90, 90)), *np.ones((2, 20, 90, 90), np.uint8))
    layers = small.background, small.prediction, small.reference, small.difference
    assert 1 < len(small.slices) < 20 and sum(len(uri) for uris in layers for uri in uris) <= 40_000


def test_pages_without_pictures_without_values_and_of_one_case(tmp_path):
    nothing = np.zeros((4, 30, 30), np.uint8)
    page, _ = write(tmp_path / "nothing.html", {"a": (None, nothing, nothing)}, frames={})
    assert "Spread over cases" in page and 'class="viewer"' not in page and "NaN" not in page
    page, _ = write(tmp_path / "samed.html", {"a": case(1)}, policy="samed", notes=[])
    assert "HD95 [voxels]" in page and 'class="notes"' not in page and "All measures" not in page


def test_box_plots_survive_what_comes():
    def plot(*values, fraction=False):
        return box_plot("HD95", [Strip("a", "#fff", [(f"c{n}", v) for n, v in enumerate(values)])], 1, "mm", fraction)

    for values in ((), (0.0,), (0.0, 0.0, 0.0, 0.0, 0.0, 0.0), (5.0,) * 9, (1e-9, 1e9), (0.95, 1.0)):
        for fraction in (False, True):
            if not fraction or all(value <= 1 for value in values):
                text = plot(*values, fraction=fraction)
                assert "nan" not in text and "inf" not in text
                assert text.count("<title>") == len(values)
    outlier = plot(1, 2, 3, 4, 5, 400.0)
    assert outlier.count("beyond") == 2 and "1 beyond" in outlier and "c5: 400 mm" in outlier
    assert 'class="box"' in outlier and 'class="box"' not in plot(1, 2, 3)
    assert whiskers(np.array([1.0, 2, 3, 4, 5, 400])) == (1, 5)


def test_classes_take_colours_in_turn():
    """52 and 4 would share a colour by their values."""
    first, second = page_classes([52, 4], {52: "aorta"})
    assert (first.name, second.name) == ("class 4", "aorta") and first.colour != second.colour


@pytest.fixture
def opened(browser, written):
    """The page in the browser; at the end: nothing was complained about, nothing was fetched, nothing popped up."""
    path, _, results = written
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    troubles = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else troubles.append(r.url))
    page.goto(path.as_uri())
    yield page, results
    page.close()
    assert troubles == []


def column(page, number: int) -> list[str]:
    return page.locator(f"#cases tbody tr > :nth-child({number})").all_inner_texts()


@pytest.mark.browser
def test_slider_changes_every_layer(opened):
    page, _ = opened
    viewer = page.locator(".viewer").first
    slider, output = viewer.locator("input[type=range]"), viewer.locator("output")
    layers = ("background", "prediction", "reference", "difference")

    def sources() -> list[str]:
        return [viewer.locator(f"img.{layer}").get_attribute("src") for layer in layers]

    slider.fill("0")
    assert output.inner_text() == "slice 2 of 12"
    first = sources()
    picture = viewer.locator(".stack").screenshot()
    slider.fill("5")
    assert output.inner_text() == "slice 7 of 12" and slider.get_attribute("aria-valuetext") == "slice 7 of 12"
    assert all(now != before for now, before in zip(sources(), first))
    page.wait_for_function("[...document.querySelectorAll('.viewer img')].every(i => i.complete && i.naturalWidth)")
    assert viewer.locator(".stack").screenshot() != picture
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert output.inner_text() == "slice 8 of 12"


@pytest.mark.browser
def test_layers_can_be_chosen(opened):
    page, _ = opened
    viewer = page.locator(".viewer").first
    shown = {"overlay": (True, True, False), "difference": (False, False, True), "image": (False, False, False)}
    for mode, expected in shown.items():
        viewer.locator(f"input[value={mode}]").check()
        visible = tuple(
            viewer.locator(f"img.{layer}").is_visible() for layer in ("prediction", "reference", "difference")
        )
        assert visible == expected, mode
        assert viewer.locator("img.background").is_visible()
        assert viewer.locator(".kinds").is_visible() == (mode == "difference")


@pytest.mark.browser
def test_table_sorts_and_changes_its_measure(opened):
    page, results = opened
    worst_first = column(page, 1)
    dice = [float(text.rstrip("†")) for text in column(page, 2)]
    assert dice == sorted(dice) and "<script>alert(0)</script>" in worst_first
    head = page.locator("#cases thead th").nth(1)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending" and column(page, 1) == worst_first[::-1]
    page.locator("#cases thead button").first.click()
    assert column(page, 1) == sorted(worst_first, key=str.casefold)
    rare = page.locator("#cases thead th").nth(4)
    for _ in range(2):
        rare.locator("button").click()
        texts = column(page, 5)
        assert texts.count("–") == 3 and texts[-3:] == ["–"] * 3, "undefined stays at the end, either way"

    page.locator("#measure").select_option("hd95")
    expected = sorted((values[2]["hd95"] for values in results["strict"].values()), reverse=True)
    assert max(float(text.rstrip("†")) for text in column(page, 4)) == pytest.approx(expected[0], abs=0.01)
    means = [float(text) for text in column(page, 2)]
    assert means == sorted(means, reverse=True), "the worst stay first"
    assert any(text.endswith("†") for text in column(page, 4)), "the missed class is marked"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_window(opened, width, scheme):
    page, _ = opened
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")
    page.locator("#cases a").first.click()
    assert page.locator(".viewer").first.bounding_box()["y"] < 800
