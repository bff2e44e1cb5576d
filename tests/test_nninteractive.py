"""nnInteractive's protocol, spoken by its own client over a loopback socket, unmodified."""

import contextlib
import json
import socket
import struct
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("nnInteractive.inference.remote", reason="pip install 'samlora[app,test]'")
pytest.importorskip("fastapi", reason="pip install 'samlora[app,test]'")
import blosc2
import httpx
import uvicorn
from fastapi import FastAPI
from nnInteractive.inference.remote import (
    ServerAtCapacityError,
    SessionExpiredError,
    nnInteractiveRemoteInferenceSession,
    serialization,
)

from samlora.app import protocol_object
from samlora.app.guard import Guard
from samlora.app.library import TooLargeError
from samlora.app.models import Models
from samlora.app.nninteractive import router, volume_of
from samlora.app.protocol import box, pack, unpack, voxel
from samlora.app.protocol_object import GrownObject
from samlora.data.grid import reorient
from samlora.errors import InputError
from samlora.inference.predictor import Masks
from samlora.inference.propagate import Carried
from samlora.model.bases import find_base

MOST = 4 << 20
ORGAN = (6, 34, 40)  # k, j, i: the middle of one drawn organ, and of another
OTHER = (5, 36, 78)
NOTHING = (6, 2, 2)  # air beside the body
SPACING = [5.0, 3.0, 3.0]


def drawn_ct() -> np.ndarray:
    """(k, j, i) int16 HU: air, a body of fat, two bright organs in it."""
    k, j, i = np.mgrid[:12, :72, :112]
    hu = np.full(k.shape, -1000, np.int16)
    hu[((j - 36) / 30) ** 2 + ((i - 56) / 48) ** 2 < 1] = -90
    for (z, y, x), (c, b, a) in ((ORGAN, (5, 12, 16)), (OTHER, (4, 9, 9))):
        hu[((k - z) / c) ** 2 + ((j - y) / b) ** 2 + ((i - x) / a) ** 2 < 1] = 110
    return hu + np.random.default_rng(0).integers(-8, 9, hu.shape).astype(np.int16)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(ckpt=find_base("vit_ti"), device="cpu")


@contextlib.contextmanager
def served(models: Models, token: str | None = None, sessions: int = 4):
    """The address of a server on a free port of this machine."""
    app = FastAPI()
    app.include_router(router(models, MOST, sessions=sessions))
    app.add_middleware(Guard, host="127.0.0.1", token=token)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    listening.close()


@pytest.fixture(scope="module")
def address(models):
    with served(models) as address:
        yield address


def connected(address: str, image: np.ndarray | None = None, key: str | None = None):
    """A client with an image and an empty buffer; its prompts change their own slice only, which is quick."""
    client = nnInteractiveRemoteInferenceSession(address, api_key=key)
    if image is not None:
        client.set_image(image[None], {"spacing": np.array(SPACING)})
        client.set_target_buffer(np.zeros(image.shape, np.uint8))
        client.set_do_autozoom(False)
    return client


@pytest.fixture
def client(address):
    with connected(address, drawn_ct()) as client:
        yield client


def slice_box(middle, half=(12, 16)) -> list[list[int]]:
    """A box one slice thick around a voxel."""
    k, j, i = middle
    return [[k, k + 1], [j - half[0], j + half[0] + 1], [i - half[1], i + half[1] + 1]]


def refusal(call, *arguments, **named) -> tuple[int, str]:
    """Status and text with which a server refuses."""
    with pytest.raises(httpx.HTTPStatusError) as caught:
        call(*arguments, **named)
    return caught.value.response.status_code, caught.value.response.json()["detail"]


# --- arrays on the wire --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["bool", "uint8", "int16", "uint16", "int32", "float16", "float32", "float64", "int64"]
)
def test_arrays_are_those_of_the_client(kind):
    array = (np.random.default_rng(0).normal(0, 99, (3, 5, 1, 7)) > 0 if kind == "bool" else np.arange(105.0)).astype(
        kind
    )
    array = array.reshape(3, 5, 1, 7)
    for codec in (blosc2.Codec.ZSTD, blosc2.Codec.LZ4):
        for filters in (None, [blosc2.Filter.NOFILTER], [blosc2.Filter.SHUFFLE], [blosc2.Filter.BITSHUFFLE]):
            got = unpack(serialization.pack_array(array, codec, filters=filters), 1 << 20)
            assert got.dtype == array.dtype and np.array_equal(got, array)
    back = serialization.unpack_array(pack(array.transpose(1, 0, 3, 2)))
    assert back.dtype == array.dtype and np.array_equal(back, array.transpose(1, 0, 3, 2))


def test_arrays_may_come_in_chunks(monkeypatch):
    monkeypatch.setattr(serialization, "_CHUNK_SIZE", 1 << 12)
    monkeypatch.setattr("samlora.app.protocol._CHUNK_BYTES", 1 << 12)
    array = np.random.default_rng(0).integers(0, 9, (7, 33, 21)).astype(np.int32)
    assert np.array_equal(unpack(serialization.pack_array(array), 1 << 20), array)
    assert np.array_equal(serialization.unpack_array(pack(array)), array)


def test_nothing_but_an_array_is_unpacked():
    body = pack(np.arange(600, dtype=np.int16).reshape(2, 3, 100))
    for length in range(len(body)):
        with pytest.raises(InputError):
            unpack(body[:length], 1 << 20)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        broken = bytearray(body)
        broken[rng.integers(0, min(80, len(body)))] = rng.integers(256)
        try:
            unpack(broken, 1 << 20)
        except InputError:
            refused += 1
    assert refused > 300
    with pytest.raises(TooLargeError, match="max_upload_mb"):  # sizes are believed only where they are allowed
        unpack(b"NNIA\x01\x01\x03\x05uint8" + struct.pack("<3q", 1 << 20, 1 << 20, 1 << 20) + bytes(99), MOST)
    with pytest.raises(InputError):
        unpack(b"NNIA\x01\x01\x01\x06object" + struct.pack("<q", 1) + bytes(99), MOST)


def test_foreign_codecs_and_filters_are_not_loaded():
    body = bytearray(pack(np.zeros(64, np.uint8)))
    frame = len(body) - struct.unpack_from("<Q", body, len(body) - 32 - 8)[0]
    for at, value in ((2, 6 << 5), (16, 40), (21, 200)):
        broken = bytearray(body)
        broken[frame + at] = value
        with pytest.raises(InputError):
            unpack(broken, 1 << 20)


def test_coordinates_are_rounded_to_voxels_and_boxes_cut_to_the_image():
    assert voxel([1.4, 2.5, -0.4], (4, 4, 4)) == (1, 3, 0)
    assert box([[3, 4], [8, 2], [-3, 90]], (5, 9, 7)) == (slice(3, 4), slice(2, 8), slice(0, 7))
    for wrong in ([4, 0, 0], [-1, 0, 0], [0, 0], [0, 0, float("nan")], None, ["a", "b", "c"], [[0, 0, 0]]):
        with pytest.raises(InputError):
            voxel(wrong, (4, 4, 4))
    for wrong in (
        [[5, 6], [0, 1], [0, 1]],
        [[1, 1], [0, 1], [0, 1]],
        [[0, 1], [0, 1]],
        {},
        [[0, 1], [0, 1], [0, None]],
    ):
        with pytest.raises(InputError):
            box(wrong, (5, 9, 7))


# --- what a session does -------------------------------------------------------------------------------------------


def test_the_client_connects_and_learns_its_tools(address):
    with connected(address) as client:
        assert client.ping() and client.heartbeat() > 0
        assert 0 < client.lease_status()["remaining_seconds"] <= client.idle_timeout_seconds
        tools = ("points", "bbox2d", "bbox3d", "scribble", "lasso")
        assert all(client.supported_interactions[tool] for tool in tools)
        assert client.supports_undo and client.supports_initial_label
        assert not client.supports_zero_shot_label_refinement
        assert len(client.preferred_scribble_thickness) == 3
        client.set_image(drawn_ct()[None])
        assert client.original_image_shape == (1, *drawn_ct().shape)


@pytest.mark.parametrize("middle", [ORGAN, OTHER])
def test_a_point_gives_the_object_that_it_lies_on(client, middle):
    client.set_do_autozoom(True)
    part = client.add_point_interaction(list(middle), True)
    found, organ = client.target_buffer > 0, drawn_ct() > 60
    assert found[middle]
    on_slice = found[middle[0]]
    assert (on_slice & organ[middle[0]]).sum() > 0.7 * on_slice.sum()
    outside = client.target_buffer.copy()
    outside[tuple(slice(a, b) for a, b in part)] = 0
    assert not outside.any()


def test_a_negative_point_takes_away(client):
    k, j, i = OTHER
    client.add_point_interaction([k, *ORGAN[1:]], True)
    client.add_point_interaction(list(OTHER), True)
    both = client.target_buffer.copy()
    assert both[k, :, i - 9 : i + 10].any() and both[(k, *ORGAN[1:])]
    client.add_point_interaction(list(OTHER), False)
    assert client.target_buffer[k, :, i - 9 : i + 10].sum() < both[k, :, i - 9 : i + 10].sum()
    assert client.target_buffer[(k, *ORGAN[1:])]


def test_a_negative_point_on_nothing_stays_nothing(client):
    client.add_point_interaction(list(NOTHING[:1] + ORGAN[1:]), False)
    assert not client.target_buffer.any()


def test_a_box_of_one_slice(client):
    client.add_bbox_interaction(slice_box(ORGAN), True)
    (_, (j0, j1), (i0, i1)) = slice_box(ORGAN)
    on_slice = client.target_buffer[ORGAN[0]] > 0
    assert on_slice[ORGAN[1:]] and on_slice[j0 - 3 : j1 + 3, i0 - 3 : i1 + 3].sum() > 0.9 * on_slice.sum()


def test_a_box_of_several_slices_holds_the_object(client):
    client.set_do_autozoom(True)
    client.add_bbox_interaction([[5, 8], *slice_box(ORGAN)[1:]], True)
    slices = np.flatnonzero(client.target_buffer.any(axis=(1, 2)))
    assert ORGAN[0] in slices and set(slices) <= {5, 6, 7}


def test_a_box_across_the_slices_marks_its_middle(client):
    k, j, i = ORGAN
    client.add_bbox_interaction([[k - 2, k + 3], [j, j + 1], [i - 10, i + 11]], True)
    assert client.target_buffer[ORGAN]


def test_strokes_and_outlines_may_come_whole_or_cropped(client):
    k, j, i = ORGAN
    part = [[k, k + 1], [j - 4, j + 5], [i - 6, i + 7]]
    for draw in (client.add_scribble_interaction, client.add_lasso_interaction):
        crop, whole = np.zeros((1, 9, 13), np.uint8), np.zeros(drawn_ct().shape, np.uint8)
        crop[0, 3:6] = 1
        whole[tuple(slice(a, b) for a, b in part)] = crop
        draw(crop, True, interaction_bbox=part)
        first = client.target_buffer.copy()
        client.reset_interactions()
        draw(whole, True)
        assert first[ORGAN] and np.array_equal(first, client.target_buffer)
        client.reset_interactions()


def test_a_stroke_in_another_plane_prompts_the_slices_it_crosses(client):
    k, j, i = ORGAN
    stroke = np.zeros(drawn_ct().shape, np.uint8)
    stroke[k - 1 : k + 2, j, i - 3 : i + 4] = 1
    client.add_scribble_interaction(stroke, True)
    assert set(np.flatnonzero(client.target_buffer.any(axis=(1, 2)))) == {k - 1, k, k + 1}


def test_undo_restores_every_voxel(client):
    client.set_do_autozoom(True)
    states, calls = (
        [client.target_buffer.copy()],
        [
            lambda: client.add_point_interaction(list(ORGAN), True),
            lambda: client.add_point_interaction([6, 34, 50], False),
            lambda: client.add_bbox_interaction(slice_box(OTHER, (9, 9)), True),
        ],
    )
    for call in calls:
        call()
        states.append(client.target_buffer.copy())
    assert len({state.tobytes() for state in states}) == len(states)
    for state in states[-2::-1]:
        assert client.undo() and np.array_equal(client.target_buffer, state)
    assert not client.undo()
    calls[0]()
    assert np.array_equal(client.target_buffer, states[1])  # undone prompts are forgotten


def test_another_object_knows_nothing_of_the_one_before(client):
    client.add_point_interaction(list(OTHER), True)
    alone = client.target_buffer.copy()
    client.reset_interactions()
    assert not client.target_buffer.any() and not client.undo()
    client.add_point_interaction(list(ORGAN), True)
    client.reset_interactions()
    client.add_point_interaction(list(OTHER), True)
    assert np.array_equal(client.target_buffer, alone)


def test_a_given_segment_stays_but_where_it_is_prompted(client):
    client.set_do_autozoom(True)
    segment = (drawn_ct() > 60).astype(np.uint8)
    client.add_initial_seg_interaction(segment)
    assert np.array_equal(client.target_buffer, segment) and not client.undo()
    client.add_point_interaction([6, 34, 78], False)
    changed = set(np.flatnonzero((client.target_buffer != segment).any(axis=(1, 2))))
    assert changed == {6}
    assert client.undo() and np.array_equal(client.target_buffer, segment)


def test_prompts_wait_until_they_are_run(client):
    client.set_do_autozoom(True)
    client.add_bbox_interaction(slice_box(ORGAN), True)
    at_once = client.target_buffer.copy()
    client.reset_interactions()
    assert client.add_bbox_interaction(slice_box(ORGAN), True, run_prediction=False) is None
    assert not client.target_buffer.any()
    assert client._predict() is not None and np.array_equal(client.target_buffer, at_once)
    assert client._predict() is None  # nothing waits
    assert client.undo() and not client.target_buffer.any() and not client.undo()


def test_autozoom_carries_the_mask_to_other_slices(client):
    client.add_bbox_interaction(slice_box(ORGAN), True)
    alone = client.target_buffer.copy()
    assert np.flatnonzero(alone.any(axis=(1, 2))).tolist() == [ORGAN[0]]
    client.reset_interactions()
    client.set_do_autozoom(True)
    client.add_bbox_interaction(slice_box(ORGAN), True)
    found, organ = client.target_buffer > 0, drawn_ct() > 60
    assert np.array_equal(client.target_buffer[ORGAN[0]], alone[ORGAN[0]])
    assert len(np.flatnonzero(found.any(axis=(1, 2)))) > 3 and (found & organ).sum() > 0.7 * found.sum()


def test_axes_that_are_named_turn_the_image(address):
    with connected(address, drawn_ct()) as client:
        client.add_point_interaction(list(ORGAN), True)
        mask = client.target_buffer
    turned = np.ascontiguousarray(drawn_ct()[:, ::-1, ::-1])
    with connected(f"{address}/axes/RAS", turned) as client:
        k, j, i = ORGAN
        client.add_point_interaction([k, turned.shape[1] - 1 - j, turned.shape[2] - 1 - i], True)
        assert np.array_equal(client.target_buffer[:, ::-1, ::-1], mask)
    with pytest.raises(httpx.HTTPStatusError):
        connected(f"{address}/axes/RAR")


def test_a_model_is_chosen_by_its_name(address, models):
    with connected(f"{address}/model/{models.entries[0].name}/axes/LPS/", drawn_ct()) as client:
        client.add_point_interaction(list(ORGAN), True)
        assert client.target_buffer[ORGAN]
    answer = httpx.post(f"{address}/model/liver/claim")
    assert answer.status_code == 400 and models.entries[0].name in answer.json()["detail"]


def test_a_picture_is_one_slice(address):
    picture = np.clip(drawn_ct()[6:7] // 2 + 100, 0, 255).astype(np.uint8)
    with connected(address, picture) as client:
        client.add_bbox_interaction([[0, 1], *slice_box(ORGAN)[1:]], True)
        assert client.target_buffer[0][ORGAN[1:]] and client.target_buffer.shape == picture.shape


def test_clients_do_not_disturb_each_other(address):
    """What several get at once is what each gets alone."""
    prompts = [ORGAN, OTHER]

    def work(prompt, into):
        with connected(address, drawn_ct()) as client:
            client.add_point_interaction(list(prompt), True)
            client.add_point_interaction([prompt[0], prompt[1] + 3, prompt[2]], True)
            client.undo()
            into.append(client.target_buffer)

    alone, together = [], [[] for _ in prompts]
    for prompt in prompts:
        work(prompt, alone)
    threads = [threading.Thread(target=work, args=job) for job in zip(prompts, together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(np.array_equal(mask, *got) for mask, got in zip(alone, together, strict=True))


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_and_compared(models):
    with served(models, token="right") as address:
        for key in (None, "wrong", "righ"):
            with pytest.raises(httpx.HTTPStatusError) as caught:
                connected(address, key=key)
            assert caught.value.response.status_code == 401  # "Invalid API key" in napari
            assert not client_without_lease(address, key).is_success
        with connected(address, drawn_ct(), key="right") as client:
            assert client.ping()
            client.add_point_interaction(list(ORGAN), True)
            assert client.target_buffer[ORGAN]


def client_without_lease(address: str, key: str | None) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{address}/undo", content=b"{}", headers=headers)


def test_other_names_of_the_machine_are_refused(address):
    assert httpx.post(f"{address}/claim", headers={"Host": "evil.example"}).status_code == 400
    assert httpx.post(f"{address}/claim", headers={"Origin": "http://evil.example"}).status_code == 403


def test_sessions_end_and_are_counted(models):
    with served(models, sessions=2) as address:
        first, second = connected(address), connected(address)
        with pytest.raises(ServerAtCapacityError, match="2 sessions"):
            connected(address)
        second.close()
        with connected(address, drawn_ct()) as third:
            assert third.ping()
        first._http.headers["X-Lease-Token"] = "another"
        with pytest.raises(SessionExpiredError, match="connect again"):
            first.undo()


def test_sessions_that_nobody_uses_are_let_go(models, monkeypatch):
    with served(models, sessions=1) as address:
        gone = connected(address)
        gone._stop_heartbeat.set()
        monkeypatch.setattr("samlora.app.nninteractive._SILENT_SECONDS", 0.0)
        with connected(address) as client:
            monkeypatch.setattr("samlora.app.nninteractive._SILENT_SECONDS", 99.0)
            assert client.heartbeat() > 0
            with pytest.raises(SessionExpiredError):
                gone.heartbeat()


def test_too_large_images_are_refused(address):
    with connected(address) as client:
        noise = np.random.default_rng(0).integers(0, 255, (1, 40, 400, 400), np.uint8)
        status, detail = refusal(client.set_image, noise)
        assert status == 413 and "4 MB" in detail and "--max_upload_mb" in detail
        status, detail = refusal(client.set_image, np.zeros((1, 400, 400, 400), np.uint8))  # small until it is unpacked
        assert status == 413 and "--max_upload_mb" in detail
        client.set_image(drawn_ct()[None])  # and the session goes on


def test_what_cannot_be_is_said(client, address):
    for call, arguments, word in (
        (client.add_point_interaction, ([99, 0, 0], True), "outside"),
        (client.add_bbox_interaction, ([[3, 3], [0, 5], [0, 5]], True), "no voxel"),
        (client.add_scribble_interaction, (np.zeros((3, 3, 3), np.uint8), True), "alike"),
        (client.add_lasso_interaction, (np.zeros(drawn_ct().shape, np.uint8), True), "nothing is marked"),
        (client.add_point_interaction, (list(NOTHING), True), "outside of the part"),
        (client.set_target_buffer, (np.zeros((2, 2, 2), np.uint8),), "target buffer"),
        (client.set_image, (np.full((1, 2, 8, 8), np.nan, np.float32),), "NaN"),
        (client.set_image, (drawn_ct()[None], {"spacing": [0, 1, 1]}), "spacing"),
        (client.set_image, (drawn_ct()[None], {"spacing": [1e300, 1e-300, 1]}), "from 1e-06 to 1e+06"),
        (client.set_image, (drawn_ct()[None], {"spacing": [1, 1e7, 1]}), "from 1e-06 to 1e+06"),
    ):
        status, detail = refusal(call, *arguments)
        assert status == 400 and word in detail and "\n" not in detail
    headers = {"X-Lease-Token": client._lease_token}
    for body in (b"[]", b"{", b'{"coordinates": [6, 34, 40], "include_interaction": 1}'):
        assert httpx.post(f"{address}/add_point_interaction", content=body, headers=headers).status_code == 400
    meta = headers | {"X-Meta": json.dumps({"include_interaction": True})}
    assert httpx.post(f"{address}/add_scribble_interaction", content=b"no array", headers=meta).status_code == 400
    with connected(address) as empty:
        assert refusal(empty.add_point_interaction, [0, 0, 0], True) == (
            400,
            "no image is there; send one with set_image first",
        )


def test_a_refused_prompt_changes_nothing(client):
    client.add_point_interaction(list(ORGAN), True)
    before = client.target_buffer.copy()
    refusal(client.add_point_interaction, list(NOTHING), True)
    assert client.undo() and not client.target_buffer.any() and not client.undo()
    client.add_point_interaction(list(ORGAN), True)
    assert np.array_equal(client.target_buffer, before)


@pytest.mark.parametrize("spacing", [[1e-6, 1, 1e6], [1e6] * 3, [1e-6] * 3])
def test_an_image_of_any_possible_spacing_is_taken(models, spacing):
    volume = volume_of(drawn_ct()[None], {"spacing": spacing})
    assert volume.spacing == pytest.approx(spacing[::-1])
    assert GrownObject(models, models.entries[0], volume, 20.0).mask.shape == volume.array.shape


@pytest.mark.parametrize("spacing", [[np.nan] * 3, [np.inf, 1, 1], [-1, 1, 1], [1, 1], "x", [10**400, 1, 1], [[1, 1, 1]], [1e-7, 1, 1]])
def test_spacings_that_cannot_be_are_refused(spacing):
    with pytest.raises(InputError, match="three sizes in mm"):
        volume_of(drawn_ct()[None], {"spacing": spacing})


def test_an_image_lies_as_its_axes_say():
    array = np.zeros((1, 2, 3, 4), np.int16)
    array[0, 1, 2, 3] = 7
    volume = volume_of(array, {"spacing": [5, 2, 1]}, "LPS")
    assert volume.array.shape == (4, 3, 2) and volume.axes == "LPS" and volume.spacing == (1, 2, 5)
    turned = reorient(volume_of(array, {"spacing": [5, 2, 1]}, "RAS"), "LPS")
    assert turned.array[0, 0, 1] == 7
    assert volume_of(np.zeros((3, 2, 3, 4), np.int16), {}).array.shape == (4, 3, 2, 3)


# --- how a mask goes through the slices ------------------------------------------------------------------------------


class Bright:
    """In the place of a Predictor: the mask is what is bright and connected with the prompt, in every slice."""

    knows_score = knows_three = False
    takes_masks = carries_masks = True

    def __init__(self, *_):
        self.asked = []

    def set_image(self, volume):
        self.stack = np.ascontiguousarray(volume.array.T > 0)
        self.case = self
        self.geometry = volume.geometry(None, 2)
        return self

    def __len__(self):
        return len(self.stack)

    def as_prompt(self, mask):
        return mask.astype(np.float32)

    def predict(self, points=None, labels=None, box=None, mask=None, multimask=False, index=None):
        from scipy.ndimage import label

        self.asked.append(index)
        parts, _ = label(self.stack[index])
        wanted = np.zeros(parts.shape, bool) if mask is None else np.asarray(mask) > 0
        if box is not None:
            x0, y0, x1, y1 = np.asarray(box).astype(int)
            wanted[y0 : y1 + 1, x0 : x1 + 1] = True
        for (x, y), positive in zip(() if points is None else points.astype(int), () if labels is None else labels):
            wanted[y, x] |= bool(positive)
        found = np.isin(parts, np.setdiff1d(parts[wanted], 0))
        for (x, y), positive in zip(() if points is None else points.astype(int), () if labels is None else labels):
            found &= bool(positive) | (parts != parts[y, x])
        return Masks(found[None], np.ones(1), found[None].astype(np.float32))

    def propagate(self, index, mask, label, steps, direction):
        way = {"up": 1, "down": -1}[direction]
        for there in range(index + way, len(self) if way > 0 else -1, way)[:steps]:
            mask = self.predict(mask=mask & self.stack[there], index=there).masks[0]
            if not mask.any():
                return
            yield Carried(there, mask, 1.0)


@pytest.fixture
def grown(models, monkeypatch):
    """Makes an object on a stack (k, j, i) whose bright parts are what prompts find; indices are (i, j, k)."""

    def make(stack: np.ndarray, seconds: float = 60.0) -> GrownObject:
        monkeypatch.setattr(protocol_object, "Predictor", Bright)
        return GrownObject(models, models.entries[0], volume_of(stack[None].astype(np.int16), {}), seconds)

    return make


def pillar(depth: int = 11, top: int = 9, twin: bool = False) -> np.ndarray:
    """(k, j, i): a pillar in slices 2 to `top`, and a second one beside it."""
    stack = np.zeros((depth, 20, 30), np.uint8)
    stack[2 : top + 1, 5:12, 4:11] = 1
    if twin:
        stack[2 : top + 1, 5:12, 18:26] = 1
    return stack


def test_a_mask_is_carried_as_far_as_the_object_goes(grown):
    drawn = grown(pillar(twin=True))
    part = drawn.point((7, 8, 5), True)
    assert np.array_equal(drawn.mask.T, pillar()) and part == (slice(4, 11), slice(5, 12), slice(2, 10))
    drawn.reset()
    drawn.through = False
    drawn.point((7, 8, 5), True)
    assert np.array_equal(drawn.mask.T[5], pillar()[5]) and drawn.mask.sum() == pillar()[5].sum()


def test_every_slice_follows_the_nearest_prompt(grown):
    both = pillar(twin=True)
    drawn = grown(both)
    drawn.point((7, 8, 2), True)  # the left pillar, from below
    drawn._predictor.asked.clear()
    drawn.point((21, 8, 8), True)  # the right one too, far above
    right = drawn.mask.T[:, :, 18:].any(axis=(1, 2))
    assert right.tolist() == [False] * 5 + [True] * 5 + [False]
    assert drawn.mask.T[2:10, :, :12].any(axis=(1, 2)).all()
    assert set(drawn._predictor.asked) == {5, 6, 7, 8, 9, 10}  # the others were not looked at
    before = drawn.mask.copy()
    drawn.point((7, 8, 8), False)  # not the left one up there: goes from the slices that follow this prompt
    assert not drawn.mask.T[6:, :, :12].any() and drawn.mask.T[2, :, :12].any()
    assert drawn.undo()[0] and np.array_equal(drawn.mask, before)


def test_what_time_does_not_allow_is_done_on_request(grown, monkeypatch):
    drawn = grown(pillar(depth=40, top=37), seconds=0.0)
    clock = iter(range(10_000))
    # Every look costs a second. The module's own name alone is replaced: other threads live by the real clock.
    monkeypatch.setattr(protocol_object, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    drawn.seconds = 5.5
    drawn.point((7, 8, 20), True)
    first = np.flatnonzero(drawn.mask.any(axis=(0, 1)))
    assert 1 < len(first) < 9 and abs(first.mean() - 20) <= 0.5  # both sides in turn
    rounds = 0
    while drawn.run() is not None:
        rounds += 1
    assert rounds > 3 and np.array_equal(drawn.mask.T, pillar(depth=40, top=37))
    whole = drawn.mask.copy()
    assert drawn.undo()[0] and not drawn.mask.any() and not drawn.undo()[0]
    drawn.point((7, 8, 20), True)
    drawn.point((7, 8, 33), True)  # what the first prompt left is not forgotten
    while drawn.run() is not None:
        pass
    assert np.array_equal(drawn.mask, whole)


def test_an_answer_that_reaches_less_far_takes_the_rest_away(grown):
    drawn = grown(pillar())
    drawn.point((7, 8, 5), True)
    drawn.point((7, 8, 5), False)
    assert not drawn.mask.any()


def test_a_given_mask_is_continued_beyond_its_end_only(grown):
    drawn = grown(pillar())
    given = np.zeros_like(drawn.mask)
    given[5:9, 6:10, 3:6] = 1
    drawn.give(given)
    drawn.point((7, 8, 6), True)  # the slice after the last
    assert np.array_equal(drawn.mask[..., :6], given[..., :6]) and np.array_equal(drawn.mask.T[6:], pillar()[6:])


def test_a_stroke_through_many_slices_asks_about_a_few(grown):
    drawn = grown(pillar(depth=60, top=57))
    marked = np.zeros(drawn.mask.shape, np.uint8)
    marked[7, 8, 5:55] = 1
    drawn.through = False
    drawn.stroke(tuple(slice(0, n) for n in marked.shape), marked, True)
    assert drawn.mask.any(axis=(0, 1)).sum() == 5
    drawn.reset()
    drawn.through = True
    drawn.stroke(tuple(slice(0, n) for n in marked.shape), marked, True)
    assert np.array_equal(drawn.mask.T, pillar(depth=60, top=57))


def test_a_box_of_several_slices_asks_about_no_others(grown):
    drawn = grown(pillar(twin=True))
    drawn._predictor.asked.clear()
    drawn.box((slice(3, 13), slice(3, 14), slice(4, 8)), True)
    assert set(drawn._predictor.asked) == {4, 5, 6, 7}
    assert np.flatnonzero(drawn.mask.any(axis=(0, 1))).tolist() == [4, 5, 6, 7]


def test_what_a_model_makes_of_its_earlier_answer_is_not_taken_against_the_points(grown, monkeypatch):
    drawn = grown(pillar())
    drawn.through = False
    drawn.point((7, 8, 5), True)
    answer = drawn._predictor.predict
    empty = Masks(np.zeros((1, 20, 30), bool), np.full(1, 9.0), np.zeros((1, 20, 30), np.float32))
    monkeypatch.setattr(drawn._predictor, "predict", lambda *given: answer(*given) if given[3] is None else empty)
    drawn.point((8, 9, 5), True)
    assert np.array_equal(drawn.mask.T[5], pillar()[5])


def test_a_model_that_fails_leaves_all_as_it_was(grown, monkeypatch):
    drawn = grown(pillar())
    drawn.point((7, 8, 5), True)
    before, state = drawn.mask.copy(), drawn._state

    def fail(*_):
        drawn.mask[:] = 1
        raise RuntimeError("out of memory")

    monkeypatch.setattr(drawn._predictor, "predict", fail)
    with pytest.raises(RuntimeError):
        drawn.point((7, 8, 7), True)
    assert np.array_equal(drawn.mask, before) and drawn._state is state
    assert drawn.undo()[0] and not drawn.mask.any() and not drawn.undo()[0]
