"""nnInteractive's HTTP protocol: 3D Slicer and napari click with a tuned SAM through the clients that they have.

The server side of nninteractive-client 2 (Apache-2.0). A client claims a session, hands in an image, and gets after
every prompt the part of the object's mask that changed. `protocol` has the forms of what is sent, `protocol_object`
what prompts do. Who may ask at all is the business of `guard`: the client's API key is the page's token.

Arrays arrive as (k, j, i), the last axis running fastest, as SimpleITK and Slicer hold them; a `Volume` is indexed
(i, j, k). So what comes and goes is transposed, and indices are turned around.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from samlora.app.library import TooLargeError
from samlora.app.models import Entry, Models
from samlora.app.protocol import BINARY, CAPABILITIES, LEASE, META, box, flag, message, pack, unpack, voxel
from samlora.app.protocol_object import Box, GrownObject
from samlora.app.sessions import LostSessionError
from samlora.data.grid import Volume, body_axes
from samlora.errors import InputError

_IDLE_SECONDS = 1800.0  # without a prompt; an image is held in memory as long
_SILENT_SECONDS = 180.0  # without a sign of life; a client sends one at half of it, but not while it waits for a mask
_MESSAGE_BYTES = 1 << 20  # of a prompt without an array
_SIZES = (1e-6, 1e6)  # mm between voxels, from electron microscopes to a landscape: products stay finite
_TO_RAS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
_Drawn = tuple[bool, Box | None]  # whether a prompt was answered or taken back, and the part that changed
_log = logging.getLogger("uvicorn.error")


class FullError(InputError):
    """As many sessions as may be are there."""


_STATUS = {TooLargeError: 413, LostSessionError: 410, FullError: 503}  # clients know the last two by their number


class _Lease:
    """One client's session: its model and, once there is an image, its object. `lock`: one request at a time."""

    def __init__(self, entry: Entry, axes: str):
        self.entry, self.axes, self.lock = entry, axes, threading.Lock()
        self.seen = self.active = time.monotonic()
        self.through = True
        self.object: GrownObject | None = None

    @property
    def drawn(self) -> GrownObject:
        """Raises InputError without an image."""
        if self.object is None:
            raise InputError("no image is there; send one with set_image first")
        return self.object


class _Leases:
    """The sessions by their tokens, `most` of them; those that nobody uses are let go when another is asked for."""

    def __init__(self, most: int):
        self.most, self._lock = most, threading.Lock()
        self._by_token: dict[str, _Lease] = {}

    def claim(self, entry: Entry, axes: str) -> str:
        with self._lock:
            self._sweep()
            if len(self._by_token) >= self.most:
                raise FullError(
                    f"{self.most} sessions are in use; close one, or wait {_SILENT_SECONDS / 60:.0f} minutes"
                )
            token = secrets.token_urlsafe(24)
            self._by_token[token] = _Lease(entry, axes)
            return token

    def get(self, token: str | None, active: bool) -> _Lease:
        with self._lock:
            self._sweep()
            lease = self._by_token.get(token or "")
            if lease is None:
                raise LostSessionError("this session has ended, or the server was started anew; connect again")
            lease.seen = time.monotonic()
            lease.active = lease.seen if active else lease.active
            return lease

    def release(self, token: str | None) -> None:
        with self._lock:
            self._by_token.pop(token or "", None)

    def _sweep(self) -> None:
        now = time.monotonic()
        for token, lease in list(self._by_token.items()):
            unused = now - lease.seen > _SILENT_SECONDS or now - lease.active > _IDLE_SECONDS
            if unused and not lease.lock.locked():
                del self._by_token[token]


def router(models: Models, most: int, seconds: float = 20.0, sessions: int = 4) -> APIRouter:
    """The routes, at / for the first model that takes prompts, and below model/NAME, axes/CODES, model/NAME/axes/CODES.

    CODES say where i, j and k of an image run to, columns first, as in RAS: clients do not send it. Without it they are
    LPS, as of axial DICOM series. most: bytes of an image, packed and unpacked. seconds: for one prompt, below the 60
    that clients wait. sessions: clients at once; each holds its image, about 8 bytes a voxel.
    """
    leases, routes = _Leases(sessions), APIRouter(include_in_schema=False)
    entries = [entry for entry in models.entries if entry.promptable]

    async def body_of(request: Request, limit: int) -> bytearray:
        body, stated = bytearray(), request.headers.get("content-length", "")
        if not stated.isdigit() or int(stated) <= limit:
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    break
            else:
                return body
        raise TooLargeError(f"more than {limit >> 20} MB; crop the image, or start with a larger --max_upload_mb")

    def add(path: str, answer: Callable[[Request], Any], method: str = "POST") -> None:
        async def endpoint(request: Request) -> Response:
            try:
                return await answer(request)
            except InputError as error:
                # Slicer and napari show the number only: who looks at the terminal learns the reason.
                _log.warning("nnInteractive client, %s: %s", path, error)
                return JSONResponse({"detail": str(error)}, _STATUS.get(type(error), 400))
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it

        for prefix in ("/model/{model:path}/axes/{axes}", "/axes/{axes}", "/model/{model:path}", ""):
            routes.add_api_route(prefix + path, endpoint, methods=[method])

    def prompt(path: str, draw: Callable[[GrownObject, dict, np.ndarray | None], _Drawn], array: bool = False) -> None:
        """A route that draws as its message, and the array that comes with it, say."""

        async def answer(request: Request) -> Response:
            lease = leases.get(request.headers.get(LEASE), True)
            body = await body_of(request, most if array else _MESSAGE_BYTES)

            def work() -> Response:
                values = message(request.headers.get(META), META) if array else message(body, "the request")
                with lease.lock:
                    lease.drawn.through = lease.through
                    ran, part = draw(lease.drawn, values, unpack(body, most) if array else None)
                    return _patch(lease.drawn.mask, ran, part)

            return await run_in_threadpool(work)

        add(path, answer)

    async def healthz(request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def capabilities(request: Request) -> Response:
        return JSONResponse(CAPABILITIES)

    async def claim(request: Request) -> Response:
        name, axes = request.path_params.get("model"), request.path_params.get("axes", "LPS")
        body_axes(axes)
        entry = next((entry for entry in entries if name in (None, entry.name)), None)
        if entry is None:
            known = ", ".join(entry.name for entry in entries) or "none; start samlora app without --adapter"
            raise InputError(f"model {str(name)[:80]!r}: models that take prompts are {known}")
        token = leases.claim(entry, axes)
        return JSONResponse(
            {
                "lease_token": token,
                "idle_timeout_seconds": _IDLE_SECONDS,
                "liveness_timeout_seconds": _SILENT_SECONDS,
                "max_sessions": sessions,
            }
        )

    async def release(request: Request) -> Response:
        leases.release(request.headers.get(LEASE))
        return JSONResponse({"released": True})

    async def remaining(request: Request) -> Response:
        lease = leases.get(request.headers.get(LEASE), False)
        left = max(0.0, _IDLE_SECONDS - (time.monotonic() - lease.active))
        return JSONResponse({"remaining_seconds": left, "idle_timeout_seconds": _IDLE_SECONDS})

    async def set_image(request: Request) -> Response:
        lease = leases.get(request.headers.get(LEASE), True)
        body = await body_of(request, most)

        def work() -> Response:
            values = message(request.headers.get(META), META)
            array = unpack(body, most)
            volume = volume_of(array, values.get("image_properties"), lease.axes)
            with lease.lock:
                lease.object = None  # the image before goes first: two may not fit
                lease.object = GrownObject(models, lease.entry, volume, seconds)
            return JSONResponse({"original_image_shape": list(array.shape)})

        return await run_in_threadpool(work)

    async def set_target_buffer(request: Request) -> Response:
        lease = leases.get(request.headers.get(LEASE), True)
        shape = message(await body_of(request, _MESSAGE_BYTES), "the request").get("shape")

        def work() -> Response:
            with lease.lock:
                needed = list(lease.drawn.mask.T.shape)
                if shape != needed:
                    raise InputError(f"target buffer of shape {str(shape)[:80]} for an image of {needed} voxels")
                lease.drawn.reset()  # masks are sent as changes of an empty buffer
            return JSONResponse({})

        return await run_in_threadpool(work)

    async def reset(request: Request) -> Response:
        lease = leases.get(request.headers.get(LEASE), True)

        def work() -> Response:
            with lease.lock:
                if lease.object is not None:
                    lease.object.reset()
            return JSONResponse({})

        return await run_in_threadpool(work)

    async def set_do_autozoom(request: Request) -> Response:
        lease = leases.get(request.headers.get(LEASE), True)
        lease.through = flag(message(await body_of(request, _MESSAGE_BYTES), "the request"), "do_autozoom")
        return JSONResponse({})

    def point(drawn: GrownObject, said: dict, _: None) -> _Drawn:
        run, at = flag(said, "run_prediction", True), voxel(said.get("coordinates"), drawn.mask.T.shape)
        return run, drawn.point(at[::-1], flag(said, "include_interaction"), run)

    def bbox(drawn: GrownObject, said: dict, _: None) -> _Drawn:
        run, part = flag(said, "run_prediction", True), box(said.get("bbox_coords"), drawn.mask.T.shape)
        return run, drawn.box(part[::-1], flag(said, "include_interaction"), run)

    def marks(way: Callable) -> Callable[[GrownObject, dict, np.ndarray], _Drawn]:
        def draw(drawn: GrownObject, said: dict, array: np.ndarray) -> _Drawn:
            run, where, shape = flag(said, "run_prediction", True), said.get("interaction_bbox"), drawn.mask.T.shape
            part = tuple(slice(0, n) for n in shape) if where is None else box(where, shape)
            return run, way(drawn, part[::-1], array.T, flag(said, "include_interaction"), run)

        return draw

    def give(drawn: GrownObject, said: dict, array: np.ndarray) -> _Drawn:
        drawn.give(array.T)
        return False, None  # the client has drawn it already

    def run(drawn: GrownObject, said: dict, _: None) -> _Drawn:
        part = drawn.run()
        return part is not None, part

    add("/healthz", healthz, "GET")
    add("/capabilities", capabilities, "GET")
    add("/claim", claim)
    add("/release", release)
    add("/heartbeat", remaining)
    add("/lease_status", remaining, "GET")
    add("/set_image", set_image)
    add("/set_target_buffer", set_target_buffer)
    add("/reset_interactions", reset)
    add("/set_do_autozoom", set_do_autozoom)
    prompt("/undo", lambda drawn, *_: drawn.undo())
    prompt("/predict", run)
    prompt("/add_point_interaction", point)
    prompt("/add_bbox_interaction", bbox)
    prompt("/add_scribble_interaction", marks(GrownObject.stroke), array=True)
    prompt("/add_lasso_interaction", marks(GrownObject.outline), array=True)
    prompt("/add_initial_seg_interaction", give, array=True)
    return routes


def volume_of(array: np.ndarray, properties: Any, axes: str = "LPS") -> Volume:
    """An image as clients send it, (C, k, j, i), with `properties` {"spacing": mm along k, j, i}, as a volume.

    axes: where i, j and k run to. One slice of eight bits is a picture. Raises InputError for what is no such image.
    """
    if array.ndim != 4:
        raise InputError(f"an image of shape {array.shape}: channels and three axes, (C, k, j, i), are needed")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError("the image holds values that are no numbers (NaN or infinite); replace them first")
    spacing = properties.get("spacing") if isinstance(properties, dict) else None
    try:
        sizes = np.ones(3) if spacing is None else np.asarray(spacing, np.float64)
    except (TypeError, ValueError, OverflowError):
        sizes = np.empty(0)
    if sizes.shape != (3,) or not ((sizes >= _SIZES[0]) & (sizes <= _SIZES[1])).all():
        allowed = f"three sizes in mm, from {_SIZES[0]:g} to {_SIZES[1]:g}, are needed"
        raise InputError(f"spacing {str(spacing)[:80]}: {allowed}; set it in the image")
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(axes):
        row, sign = _TO_RAS[code]
        affine[row, axis] = sign * sizes[2 - axis]
    array = array.astype(np.uint8) if array.dtype == bool else array
    voxels = array.T[..., 0] if len(array) == 1 else array.T
    picture = array.dtype == np.uint8 and array.shape[1] == 1
    return Volume(voxels, affine, path="the image", has_spacing=not picture)


def _patch(mask: np.ndarray, ran: bool, part: Box | None) -> Response:
    """The changed part of a mask, and where it lies, as clients take it into their buffer."""
    said: dict[str, Any] = {"ran_prediction": ran, "bbox": None}
    content = b""
    if part is not None:
        said["bbox"] = [[side.start, side.stop] for side in part[::-1]]
        content = pack(mask[part].T)
    return Response(content, media_type=BINARY, headers={META: json.dumps(said)})
