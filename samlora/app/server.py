"""The page and what it asks for: FastAPI on 127.0.0.1. Wiring only; the work is done by `Session`."""

import contextlib
import importlib.resources
import json
import secrets
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from samlora.app.config import AppConfig
from samlora.errors import InputError

try:
    import uvicorn
    from fastapi import Body, Depends, FastAPI, Header, Request
    from fastapi.exceptions import RequestValidationError
    from starlette.background import BackgroundTask
    from starlette.exceptions import HTTPException
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.responses import FileResponse, JSONResponse, Response
except ImportError as error:
    raise InputError(f"samlora app needs {error.name}; install it with: pip install 'samlora[app]'") from None

from samlora.app.guard import Guard, is_loopback
from samlora.app.history import Edit
from samlora.app.library import Library, TooLargeError, Upload
from samlora.app.models import Models
from samlora.app.nninteractive import router
from samlora.app.session import Session
from samlora.app.sessions import LostSessionError, Sessions, StalePageError, Tab
from samlora.colours import class_colour
from samlora.data.recipe import Recipe
from samlora.data.volume import write_dicom_seg, write_volume

_SCRIPTS = ("core.js", "files.js", "mouse.js", "page.js", "panel.js", "view.js")
_PAGE = {"": "text/html", "page.css": "text/css"} | dict.fromkeys(_SCRIPTS, "text/javascript")
_FORMATS = ("nii.gz", "nrrd", "mha", "png", "tif", "dicom-seg", "names")
LOOPBACK = "127.0.0.1"


def create_app(
    models: Models,
    library: Library,
    host: str = LOOPBACK,
    token: str | None = None,
    max_upload: int = 2 << 30,
    sessions: Sessions | None = None,
) -> FastAPI:
    """The application. host, token: see `Guard`. max_upload: bytes. sessions: None for new ones."""
    sessions = Sessions(models) if sessions is None else sessions

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        sessions.close()

    # No pages about the interface: they would fetch scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GZipMiddleware, compresslevel=1)
    app.add_middleware(Guard, host=host, token=token)
    _add_errors(app)
    _add_page(app)

    def tab(x_session: Annotated[str, Header()], x_image: Annotated[int | None, Header()] = None) -> Tab:
        found = sessions.get(x_session)
        if x_image is not None and x_image != found.session.number:
            raise StalePageError("another image was opened from another tab of this session; reload the page")
        return found

    of_tab = Annotated[Tab, Depends(tab)]

    def session_of(tab: of_tab) -> Session:
        return tab.session

    of_session = Annotated[Session, Depends(session_of)]

    @app.post("/api/session")
    def begin() -> dict:
        return {"session": sessions.new()}

    @app.get("/api/about")
    def about(_: of_session) -> dict:
        told = ("name", "detail", "promptable", "automatic", "note", "boxes_first")
        return {
            "models": [{key: getattr(entry, key) for key in told} for entry in models.entries],
            "device": models.where,
            "images": library.names,
            "folder": None if library.root is None else library.root.name,
            "max_upload": max_upload,
        }

    @app.get("/api/state")
    def state(session: of_session) -> dict:
        return session.state()

    _add_opening(app, library, max_upload, of_tab)
    _add_voxels(app, of_session)
    _add_edits(app, of_session)
    app.include_router(router(models, max_upload))  # 3D Slicer and napari
    return app


def _add_opening(app: FastAPI, library: Library, max_upload: int, of_tab: Any) -> None:
    @app.post("/api/open")
    def open_listed(tab: of_tab, name: Annotated[str, Body()], series: Annotated[str | None, Body()] = None) -> dict:
        choices = library.series(name) if series is None else []
        if len(choices) > 1:
            return {"series": choices}
        tab.session.open(library.open(name, series))
        tab.begin(None)
        tab.settle()
        return tab.session.state()

    @app.post("/api/upload")
    def begin_upload(tab: of_tab) -> dict:
        tab.begin(Upload(max_upload))
        return {}

    def coming(tab: of_tab) -> Upload:
        if tab.coming is None:
            raise InputError("no upload has begun; choose files once more")
        return tab.coming

    of_upload = Annotated[Upload, Depends(coming)]

    @app.put("/api/upload/{name}")
    async def upload(coming: of_upload, name: str, request: Request) -> dict:
        path = coming.path(name)
        stated = request.headers.get("content-length", "")
        coming.check(int(stated) if stated.isdigit() else 0)  # before any byte of it is kept
        try:
            with open(path, "wb") as file:
                async for part in request.stream():
                    coming.take(len(part))
                    file.write(part)
        except BaseException as error:  # a part is not to be opened; `whole` would sync each slice
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                place = f"{tempfile.gettempdir()} ({error.strerror}); free some space there"
                raise InputError(f"{name}: cannot be kept in {place}") from None
            raise
        return {}

    @app.post("/api/upload/open")
    def open_uploaded(tab: of_tab, coming: of_upload, series: Annotated[str | None, Body(embed=True)] = None) -> dict:
        choices = coming.series() if series is None else []
        if len(choices) > 1:
            return {"series": choices}
        tab.session.open(coming.open(series))
        tab.settle()
        return tab.session.state()


def _add_voxels(app: FastAPI, of_session: Any) -> None:
    @app.get("/api/slice/{index}")
    def values(session: of_session, index: int, channel: int = 0) -> Response:
        return Response(session.values_on(index, channel).tobytes(), media_type="application/octet-stream")

    @app.get("/api/labels/{index}")
    def labels(session: of_session, index: int) -> Response:
        return Response(session.labels_on(index).tobytes(), media_type="application/octet-stream")

    @app.post("/api/warm")
    def warm(session: of_session, index: Annotated[int, Body(embed=True)]) -> dict:
        return {"encoded": session.warm(index)}

    @app.get("/api/export")
    def export(session: of_session, format: str) -> FileResponse:
        folder = Path(tempfile.mkdtemp(prefix="samlora-app-"))
        try:
            path = _export(session, format, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        gone = BackgroundTask(shutil.rmtree, folder, ignore_errors=True)
        kind = "application/gzip" if path.suffix == ".gz" else "application/octet-stream"  # not to be packed twice
        return FileResponse(path, media_type=kind, filename=path.name, background=gone)


def _export(session: Session, format: str, folder: Path) -> Path:
    """Writes the labels into `folder`, on the grid of the input, and returns the file."""
    image, names = session.opened, {label.value: label.name for label in session.labels}
    if format not in _FORMATS:
        raise InputError(f"format {format[:20]!r}: allowed is {', '.join(_FORMATS)}")
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in image.name)[:100] or "image"
    if format == "names":
        path = folder / f"{stem}_labels.json"
        path.write_text(json.dumps({str(value): name for value, name in names.items()}, indent=1), encoding="utf-8")
        return path
    revision, volume = session.revision, image.label_volume()
    if format == "dicom-seg":
        if not image.from_dicom:
            raise InputError(f"{image.name}: is no DICOM series, so no DICOM segmentation can refer to it; use nii.gz")
        path = folder / f"{stem}_labels.dcm"
        write_dicom_seg(
            volume, image.source, path, list(names.values()), series=image.series, algorithm_type="SEMIAUTOMATIC"
        )
        session.exported(revision)
        return path
    path = folder / f"{stem}_labels.{format}"
    palette = [tuple(round(255 * part) for part in class_colour(value)) for value in range(1, max(names) + 1)]
    write_volume(volume, path, palette=palette if format in ("png", "tif") else None)
    session.exported(revision)
    return path


def _add_edits(app: FastAPI, of_session: Any) -> None:
    """Every edit answers with the new state."""
    index_body = Annotated[int, Body()]

    @app.post("/api/click")
    def click(
        session: of_session,
        index: index_body,
        x: Annotated[int, Body()],
        y: Annotated[int, Body()],
        positive: Annotated[bool, Body()],
    ) -> dict:
        session.click(index, x, y, positive)
        return session.state()

    @app.post("/api/box")
    def box(session: of_session, index: index_body, box: Annotated[list[float], Body()]) -> dict:
        session.draw_box(index, box)
        return session.state()

    @app.post("/api/finish")
    def finish(session: of_session) -> dict:
        session.finish_object()
        return session.state()

    @app.post("/api/brush")
    def brush(
        session: of_session,
        index: index_body,
        path: Annotated[list[tuple[float, float]], Body(max_length=20000)],
        radius: Annotated[float, Body()],
        erase: Annotated[bool, Body()],
    ) -> dict:
        session.brush(index, path, radius, erase)
        return session.state()

    @app.post("/api/clear")
    def clear(session: of_session, index: Annotated[int | None, Body()], every: Annotated[bool, Body()]) -> dict:
        session.clear(index, every)
        return session.state()

    @app.post("/api/undo")
    def undo(session: of_session) -> dict:
        return {"moved": _told(session, session.undo()), **session.state()}

    @app.post("/api/redo")
    def redo(session: of_session) -> dict:
        return {"moved": _told(session, session.redo()), **session.state()}

    @app.post("/api/automatic")
    def automatic(session: of_session, index: Annotated[int | None, Body(embed=True)]) -> dict:
        if index is None:
            session.start_automatic()
        else:
            session.automatic(index)
        return session.state()

    @app.post("/api/propagate")
    def propagate(
        session: of_session, index: index_body, steps: Annotated[int | None, Body()], way: Annotated[str, Body()]
    ) -> dict:
        session.start_propagation(index, steps, way)
        return session.state()

    @app.post("/api/cancel")
    def cancel(session: of_session) -> dict:
        if session.job is not None:
            session.job.cancel()
        return session.state()

    @app.post("/api/model")
    def model(session: of_session, number: Annotated[int, Body(embed=True)]) -> dict:
        session.choose_model(number)
        return session.state()

    @app.post("/api/channel")
    def channel(session: of_session, channel: Annotated[int, Body(embed=True)]) -> dict:
        session.choose_channel(channel)
        return session.state()

    @app.post("/api/keep")
    def keep(session: of_session, keep: Annotated[bool, Body(embed=True)]) -> dict:
        session.keep = keep
        return session.state()

    @app.post("/api/labels")
    def add_label(session: of_session, name: Annotated[str, Body(embed=True)]) -> dict:
        session.add_label(name)
        return session.state()

    @app.post("/api/labels/{value}")
    def change_label(session: of_session, value: int, name: Annotated[str | None, Body(embed=True)] = None) -> dict:
        """Takes the label that is drawn from now on; with a name, renames it."""
        if name is None:
            session.choose_label(value)
        else:
            session.rename_label(value, name)
        return session.state()


def _told(session: Session, edit: Edit | None) -> dict | None:
    """What the page says of an edit that was undone or done again."""
    return None if edit is None else {"what": edit.what, "slices": session.slices_of(edit)}


def _add_page(app: FastAPI) -> None:
    folder = importlib.resources.files("samlora.app")
    for name, kind in _PAGE.items():
        content = (folder / (name or "page.html")).read_bytes()

        def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.get(f"/{name}")(page)


def _add_errors(app: FastAPI) -> None:
    """Whatever cannot be done is one line: {"error": ...}."""

    def told(text: str, status: int) -> JSONResponse:
        return JSONResponse({"error": text.encode("utf-8", "replace").decode()}, status)

    @app.exception_handler(InputError)
    def unusable(_: Request, error: InputError) -> JSONResponse:
        return told(str(error), {TooLargeError: 413, LostSessionError: 410, StalePageError: 409}.get(type(error), 400))

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return told(str(error.detail), error.status_code)

    @app.exception_handler(RequestValidationError)
    def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return told(f"{where}: {first['msg']}", 422)

    @app.exception_handler(Exception)
    def bug(_: Request, error: Exception) -> JSONResponse:
        return told(f"{type(error).__name__}: {error}; the terminal says more", 500)


def serve(path: str | None, config: AppConfig) -> None:
    """Loads the models, says where the page is, and answers until Ctrl-C.

    path: an image or folder to open, or None. Raises InputError where nothing can start: a port that is taken, an
    adapter or image that cannot be used.
    """
    library = Library(None if path is None else Path(path))
    host = config.host or LOOPBACK
    listening = _listen(host, config.port)
    recipe = None if config.recipe is None else Recipe.load(config.recipe)
    models = Models(config.adapter, config.ckpt, config.device, config.precision, config.image_size, recipe)
    token = secrets.token_urlsafe(24) if config.token or not is_loopback(host) else None
    app = create_app(models, library, host, token, config.max_upload_mb << 20)
    for entry in models.entries:
        print(f"model: {entry.name} ({entry.detail})" + (f"; {entry.note}" if entry.note else ""))
    port = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else socket.gethostname() if host in ("0.0.0.0", "") else host
    address = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
    print(f"device: {models.where}\npage: {address}\n3D Slicer and napari (nnInteractive): the same address")
    print("Ctrl-C ends it; what was not exported is gone then", flush=True)
    if config.open:
        import webbrowser

        webbrowser.open(address)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False))
    with listening, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to that address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(f"--host {host}: is no address of this machine; leave it out for this machine alone") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        advice = "choose another with --port, or --port 0 for any that is free"
        raise InputError(f"--port {port}: cannot listen on {host} ({error.strerror}); {advice}") from None
    return listening
