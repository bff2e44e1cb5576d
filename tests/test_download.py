"""Fetching base weights, from a server on the loopback."""

import dataclasses
import http.server
import threading

import pytest

from samlora.cli import main
from samlora.errors import InputError
from samlora.model.bases import BASES
from samlora.model.download import download

NAME = "sam_vit_b_01ec64.pth"
CONTENT = b"not SAM's weights, but a file with their check sum 5896048"  # its MD5 starts with 01ec64


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` with ranges; breaks the connection after `server.limit` bytes."""

    def do_GET(self):
        content, start = self.server.content, 0
        if self.path.rsplit("/", 1)[1] != NAME:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if wanted and self.server.resumes:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.limit, server.ranges, server.resumes = CONTENT, None, [], True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{server.server_port}/segment_anything/{NAME}"
    yield server
    server.shutdown()
    server.server_close()


def test_fetches_verifies_and_keeps(server, tmp_path):
    path = download("vit_b", tmp_path / "checkpoints", server.address)
    assert path.read_bytes() == CONTENT and path.name == NAME
    assert download("vit_b", tmp_path / "checkpoints", server.address) == path
    assert len(server.ranges) == 1 and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("resumes", [True, False])
def test_a_broken_download_is_continued(server, tmp_path, resumes):
    server.limit, server.resumes = 20, resumes
    with pytest.raises(InputError, match="again to continue"):
        download("vit_b", tmp_path, server.address)
    assert (tmp_path / f"{NAME}.part").stat().st_size == 20 and not (tmp_path / NAME).exists()
    server.limit = None
    assert download("vit_b", tmp_path, server.address).read_bytes() == CONTENT
    assert server.ranges[1] == "bytes=20-"


def test_a_complete_part_needs_only_its_check(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    assert download("vit_b", tmp_path, server.address).read_bytes() == CONTENT


def test_a_damaged_file_is_deleted_and_said(server, tmp_path):
    server.content = CONTENT.swapcase()
    with pytest.raises(InputError, match="01ec64.*run the command again"):
        download("vit_b", tmp_path, server.address)
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line(server, tmp_path, monkeypatch, capsys):
    closed = dataclasses.replace(BASES["vit_b"], address="http://127.0.0.1:9/sam_vit_b_01ec64.pth")
    monkeypatch.setitem(BASES, "vit_b", closed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["download", "vit_b"], "download stopped"),
        (["download", "vit_b"], f"by hand from {closed.page} and put it into checkpoints"),
        (["download", "vit_b", "-o", "file/checkpoints"], "choose another with -o"),
    ):
        assert main(arguments) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("samlora:")]
        assert words in line
    with pytest.raises(InputError, match="404"):
        download("vit_l", tmp_path, server.address.replace(NAME, BASES["vit_l"].file))
    with pytest.raises(InputError, match="medsam_vit_b, vit_b_medical_imaging, mobile_sam"):
        download("medsam", tmp_path, server.address)


def test_a_file_without_a_published_hash_is_kept_unless_it_is_a_web_page(server, tmp_path):
    server.content = b"\n <!DOCTYPE html>"
    with pytest.raises(InputError, match="a web page; deleted"):
        download("vit_b_medical_imaging", tmp_path, server.address)
    assert list(tmp_path.iterdir()) == []
    server.content = CONTENT
    path = download("vit_b_medical_imaging", tmp_path, server.address)
    assert path.name == "vit_b_medical_imaging.pt" and path.read_bytes() == CONTENT


def test_a_broken_file_without_a_published_hash_is_continued(server, tmp_path):
    server.limit = 20
    with pytest.raises(InputError, match="again to continue"):
        download("vit_b_medical_imaging", tmp_path, server.address)
    server.limit = None
    assert download("vit_b_medical_imaging", tmp_path, server.address).read_bytes() == CONTENT
