"""Pictures keep their pixels and, as labels, their numbers; what cannot be a label map says why in one line."""

import numpy as np
import pytest
from PIL import Image

from samlora.data.grid import Volume, match_grid
from samlora.data.volume import read_volume, write_volume
from samlora.errors import InputError

RNG = np.random.default_rng(0)
GRAY, COLOUR = RNG.integers(0, 255, (7, 9), np.uint8), RNG.integers(0, 255, (7, 9, 3), np.uint8)
DEEP = RNG.integers(0, 65535, (7, 9), np.uint16)
MASK = np.arange(63, dtype=np.uint8).reshape(7, 9) % 5
PALETTE = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def seen(path, **kwargs) -> np.ndarray:
    """The picture (rows, columns, ...) that was read as a volume of one slice."""
    volume = read_volume(path, **kwargs)
    assert volume.array.shape[2] == 1 and np.array_equal(volume.affine, LPS) and not volume.has_spacing
    return volume.array[:, :, 0].swapaxes(0, 1)


def palette_picture(colours=PALETTE) -> Image.Image:
    picture = Image.frombytes("P", (9, 7), MASK.tobytes())
    picture.putpalette([0, 0, 0, *np.ravel(colours)])
    return picture


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.PNG", "a.tiff"])
@pytest.mark.parametrize("pixels", [GRAY, COLOUR, DEEP], ids=["gray", "colour", "16 bit"])
def test_pictures_come_back_as_written(name, pixels, tmp_path):
    volume = Volume(pixels.swapaxes(0, 1)[:, :, None], LPS)
    if name == "a.bmp" and pixels is DEEP:
        with pytest.raises(InputError, match="a picture cannot hold uint16"):
            write_volume(volume, tmp_path / name)
        return
    write_volume(volume, tmp_path / name)
    assert np.array_equal(seen(tmp_path / name), pixels) and seen(tmp_path / name).dtype == pixels.dtype
    assert np.array_equal(np.array(Image.open(tmp_path / name)), pixels)  # rows are rows for others too


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_label_maps_are_palette_pictures(name, tmp_path):
    volume = Volume(MASK.T[:, :, None].astype(np.int64), LPS)
    write_volume(volume, tmp_path / name, palette=PALETTE)
    assert Image.open(tmp_path / name).mode == "P"
    assert np.array_equal(seen(tmp_path / name, labels=True), MASK)
    colours = np.array([(0, 0, 0), *PALETTE], np.uint8)
    assert np.array_equal(seen(tmp_path / name), colours[MASK])  # as an image it is what people see
    with pytest.raises(InputError, match="label 4, but 3 colours"):
        write_volume(volume, tmp_path / "b.png", palette=PALETTE[:3])
    assert not (tmp_path / "b.png").exists()
    many = Volume(np.arange(256).reshape(16, 16, 1), LPS)
    write_volume(many, tmp_path / name, palette=[(n, 0, 255 - n) for n in range(255)])
    assert np.array_equal(read_volume(tmp_path / name, labels=True).array, many.array)


def test_pages_of_a_tiff_are_slices(tmp_path):
    array = RNG.integers(0, 5, (9, 7, 4), np.uint8)
    write_volume(Volume(array, LPS), tmp_path / "a.tif", palette=PALETTE)
    assert np.array_equal(read_volume(tmp_path / "a.tif", labels=True).array, array)
    pages = [Image.fromarray(GRAY), Image.fromarray(GRAY[:3])]
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match="pages differ"):
        read_volume(tmp_path / "b.tif")


def test_every_kind_of_picture_becomes_gray_or_rgb(tmp_path):
    alpha = np.dstack([COLOUR, GRAY])
    gray_alpha, bits, real = np.dstack([GRAY, 255 - GRAY]), GRAY > 99, GRAY.astype(np.float32) / 7
    for name, picture, pixels in (
        ("rgba.png", Image.fromarray(alpha), COLOUR),
        ("la.png", Image.fromarray(gray_alpha, "LA"), GRAY),
        ("bits.png", Image.fromarray(bits), bits * np.uint8(255)),
        ("bits.tif", Image.fromarray(bits), bits * np.uint8(255)),
        ("cmyk.tif", Image.fromarray(COLOUR).convert("CMYK"), COLOUR),
        ("colours.png", palette_picture(), np.array([(0, 0, 0), *PALETTE], np.uint8)[MASK]),
        ("grays.png", palette_picture([(n, n, n) for n in (10, 20, 30, 40)]), MASK * 10),
        ("float.tif", Image.fromarray(real), real),
        ("int.tif", Image.fromarray(GRAY.astype(np.int32) * 1000), GRAY.astype(np.int32) * 1000),
    ):
        picture.save(tmp_path / name)
        found = seen(tmp_path / name)
        assert np.array_equal(found, pixels) and found.dtype == pixels.dtype, name
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(tmp_path / "a.jpg")
    assert not seen(tmp_path / "a.jpg").any()


def test_labels_are_numbers_never_colours(tmp_path):
    three = np.dstack([MASK] * 3)
    transparent = palette_picture()
    transparent.info["transparency"] = 0
    for name, picture, labels in (
        ("p.png", palette_picture(), MASK),
        ("t.png", transparent, MASK),
        ("rgb.png", Image.fromarray(three), MASK),
        ("rgba.png", Image.fromarray(np.dstack([three, GRAY])), MASK),
        ("la.png", Image.fromarray(np.dstack([MASK, GRAY]), "LA"), MASK),
        ("deep.png", Image.fromarray(MASK.astype(np.uint16) * 300), MASK * 300.0),
        ("bits.png", Image.fromarray(MASK > 2), MASK > 2),
    ):
        picture.save(tmp_path / name)
        assert np.array_equal(seen(tmp_path / name, labels=True), labels), name


def test_a_threshold_makes_masks_of_gray(tmp_path):
    soft = np.where(MASK > 2, 254, 0).astype(np.uint8)
    soft[0, 3] = 255
    Image.fromarray(soft).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([soft] * 3)).save(tmp_path / "b.png")
    Image.fromarray(MASK > 2).save(tmp_path / "c.png")  # the same mask, saved with one bit
    block = np.zeros((64, 64), np.uint8)
    block[16:40, 8:32] = 255
    Image.fromarray(np.dstack([block] * 3)).save(tmp_path / "d.jpg", quality=60)
    for name in "abc":
        assert np.array_equal(seen(tmp_path / f"{name}.png", labels=True, threshold=127), MASK > 2)
    assert np.array_equal(seen(tmp_path / "d.jpg", labels=True, threshold=127), block > 0)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_the_turn_that_a_camera_notes_is_carried_out(name, tmp_path):
    smooth = np.add.outer(np.arange(24), np.arange(16)).astype(np.uint8) * 6
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    Image.fromarray(smooth).save(tmp_path / name, exif=exif, quality=100)
    assert np.abs(seen(tmp_path / name).astype(int) - np.rot90(smooth, -1)).max() <= 2
    assert seen(tmp_path / name, labels=True, threshold=99).shape == (16, 24)


def _sixteen_bit_colours(path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes([0, 1] * 27) for _ in range(7))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 7, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def _save(pixels):
    return lambda path: Image.fromarray(pixels).save(path)


def _shortened(path):
    _save(RNG.integers(0, 255, (64, 64), np.uint8))(path)
    path.write_bytes(path.read_bytes()[:-900])


BROKEN = {
    "text": ("a.png", False, lambda p: p.write_text("no picture"), "cannot be read as picture"),
    "empty": ("a.jpg", False, lambda p: p.write_bytes(b""), "cannot be read as picture"),
    "another kind": (
        "a.png",
        False,
        lambda p: _save(GRAY)(p.with_suffix(".ppm")) or p.with_suffix(".ppm").rename(p),
        "cannot",
    ),
    "truncated png": ("a.png", False, _shortened, "truncated"),
    "truncated jpeg": ("a.jpg", False, _shortened, "truncated"),
    "truncated tiff": ("a.tif", False, _shortened, "cannot be read as picture"),
    "colours": ("a.png", True, _save(COLOUR), "of 63 colours"),
    "two colours": (
        "a.png",
        True,
        _save(np.eye(9, dtype=np.uint8)[..., None] * np.uint8([255, 0, 0])),
        "(0, 0, 0) (255, 0, 0); save",
    ),
    "colour in jpeg": ("a.jpg", 127, _save(np.full((9, 9, 3), (255, 0, 0), np.uint8)), "one number per class"),
    "jpeg": ("a.jpg", True, _save(GRAY), "mask_threshold: 127"),
    "jpeg named png": ("a.png", True, lambda p: Image.fromarray(GRAY).save(p, "jpeg"), "JPEG changes label values"),
    "float": ("a.tif", True, _save(GRAY / np.float32(7)), "not whole"),
    "16-bit colours": ("a.png", True, _sixteen_bit_colours, "16 bits per colour"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures_are_named_in_one_line(kind, tmp_path):
    name, labels, write, said = BROKEN[kind]
    write(tmp_path / name)
    with pytest.raises(InputError) as error:
        read_volume(tmp_path / name, labels=bool(labels), threshold=labels if labels == 127 else None)
    message = str(error.value)
    assert str(tmp_path / name) in message and said in message and "\n" not in message, message


def test_pictures_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 25)
    _save(GRAY)(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.png: cannot be read as picture \(Image size \(63 pixels\) exceeds limit"):
        read_volume(tmp_path / "a.png")


@pytest.mark.real
def test_real_palette_bit_and_mixed_masks(real_data):
    ultrasound = real_data / "ultrasound" / "nerves_vessels" / "test"
    counts = np.zeros(3, int)
    for mask in sorted((ultrasound / "masks").iterdir()):
        labels = read_volume(mask, labels=True)
        counts += np.bincount(labels.array.ravel(), minlength=3)
        image = read_volume(ultrasound / "images" / mask.name)
        assert match_grid(labels, to=image).array.shape == image.array.shape[:3]
    assert counts[1:].tolist() == [67999, 164143]
    lesion = read_volume(real_data / "ultrasound" / "busi" / "label" / "benign0001.png", labels=True)
    assert lesion.array.max() == 1 and lesion.array.sum() == 246
    prostate = real_data / "mr" / "prostate_png" / "masks" / "BMC26_16.png"
    assert set(np.unique(read_volume(prostate, labels=True).array)) == {0, 254, 255}
    assert read_volume(prostate, labels=True, threshold=127).array.sum() == 10827
    liver = read_volume(real_data / "ct_png" / "masks" / "amos_0006_90_liver_000.png", labels=True, threshold=127)
    assert liver.array.sum() == 20023 and read_volume(real_data / "ct_png/images/s0619_32.png").array.shape == (
        225,
        155,
        1,
        3,
    )


@pytest.mark.real
def test_real_jpeg_and_soft_masks(real_data):
    rings = real_data / "photos" / "rings" / "train"
    for mask in sorted((rings / "masks").iterdir()):
        ring = read_volume(mask, labels=True, threshold=127)
        photo = read_volume(next((rings / "images").glob(f"{mask.stem}.*")))
        assert ring.array.shape == photo.array.shape[:3] and 0 < ring.array.mean() < 0.5
        with pytest.raises(InputError, match="mask_threshold"):
            read_volume(mask, labels=True)
    hip = real_data / "xray" / "hip"
    counts = {
        path.parent.name: int(read_volume(path, labels=True, threshold=0.5).array.sum())
        for path in hip.rglob("seg.npy")
    }
    assert counts == {"image_054": 15589, "image_081": 13760, "image_102": 12054}
    assert read_volume(next(hip.rglob("img.npy"))).array.shape == (256, 256, 1)
