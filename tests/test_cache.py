"""Decoded slices: the same values, made once, never out of date."""

import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import samlora
from samlora.data import cache
from samlora.data.cache import SliceCache, building
from samlora.data.dataset import SliceDataset, find_slices
from samlora.data.volume import write_slice
from samlora.errors import InputError
from samlora.model.sam import build_sam
from samlora.model.tensors import read_tensors
from samlora.options import make
from samlora.training.config import TrainConfig
from samlora.training.embeddings import EmbeddingCache
from samlora.training.loop import train


@pytest.fixture
def slices(tmp_path):
    rng = np.random.default_rng(0)
    for n, shape in enumerate([(8, 9), (12, 5), (8, 9, 3)]):
        image, label = rng.standard_normal(shape).astype(np.float32), rng.integers(0, 4, shape[:2]).astype(np.uint8)
        write_slice(tmp_path / f"train_npz/case{n}_slice000.npz", image, label)
    return find_slices(tmp_path)


def test_samples_are_those_of_the_files(slices, tmp_path):
    decoded = SliceCache(tmp_path / "cache", slices)
    plain, cached = SliceDataset(slices, seed=3), SliceDataset(slices, seed=3, decoded=decoded)
    for key in [(epoch, index) for epoch in (0, 1) for index in range(3)]:
        one, other = plain[key], cached[key]
        assert np.array_equal(one.image, other.image) and np.array_equal(one.label, other.label)
        assert (one.name, one.transform) == (other.name, other.transform)
        other.image[:] = 0  # what was handed out may be changed
        assert np.array_equal(cached[key].image, one.image)


def test_it_is_made_once_and_survives_a_journey_to_another_process(slices, tmp_path):
    first = SliceCache(tmp_path / "cache", slices)
    first[0]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = pickle.loads(pickle.dumps(SliceCache(tmp_path / "cache", slices)))
    assert made == {path: path.stat().st_mtime_ns for path in made} and len(made) == 3
    assert all(np.array_equal(a, b) for n in range(3) for a, b in zip(first[n], again[n]))
    assert len(pickle.dumps(first)) < 2000  # no voxels travel


def test_other_data_and_damage_are_noticed(slices, tmp_path):
    SliceCache(tmp_path / "cache", slices)
    image, label = np.ones((4, 4), np.float32), np.ones((4, 4), np.uint8)
    write_slice(slices[0].path, image, label)
    assert np.array_equal(SliceCache(tmp_path / "cache", slices)[0][0], image)
    for path in (tmp_path / "cache").glob("*.labels"):
        path.write_bytes(path.read_bytes()[:-1])
    assert np.array_equal(SliceCache(tmp_path / "cache", slices)[0][1], label)


def embedded(folder, slices, batch=1):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="random weights"):
        model = samlora.build_model("medsam_decoder", base=None, variant="vit_ti", image_size=64, num_classes=3)
    return EmbeddingCache(folder, model, SliceDataset(slices, 0, augment="none"), torch.float32, batch)


def decoded(folder, slices):
    return SliceCache(folder, slices)


def contents(made, slices):
    if isinstance(made, SliceCache):
        return [array for index in range(len(slices)) for array in made[index]]
    return [made.batch([index], torch.device("cpu")).values.numpy() for index in range(len(slices))]


@pytest.mark.parametrize("make_one", [decoded, embedded])
@pytest.mark.parametrize("spoil", ["index", "no index", "keys", "facts", "data", "gone"])
def test_damage_is_said_and_made_good(slices, tmp_path, make_one, spoil, capsys):
    before = contents(make_one(tmp_path / "cache", slices[:2]), slices[:2])
    (index,) = (tmp_path / "cache").glob("*.json")
    (data,) = [path for path in (tmp_path / "cache").iterdir() if path.suffix in (".images", ".embeddings")]
    facts = json.loads(index.read_text())
    match spoil:
        case "index":
            index.write_bytes(b"")
        case "no index":
            index.write_text("[1]")
        case "keys":
            index.write_text("{}")
        case "facts":
            index.write_text(json.dumps(facts | {"holes": [0]}))
        case "data":
            data.write_bytes(bytes(data.stat().st_size))
        case "gone":
            data.unlink()
    capsys.readouterr()
    after = contents(make_one(tmp_path / "cache", slices[:2]), slices[:2])
    assert all(map(np.array_equal, before, after))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "damaged" in said and str(index.with_suffix("")) in said
    make_one(tmp_path / "cache", slices[:2])
    assert not capsys.readouterr().out


def test_of_large_files_parts_all_over_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK", 10)
    monkeypatch.setattr(cache, "_COMPARED", 5)
    path, index = tmp_path / "data", tmp_path / "index.json"
    path.write_bytes(bytes(range(165)))
    cache.write_index(index, [path], {"holes": []})
    assert cache.read_index(index, [path], []) is not None
    for place, seen in [(0, True), (9, True), (12, False), (42, True), (81, True), (95, False), (164, True)]:
        path.write_bytes(bytes(range(place)) + b"x" + bytes(range(place + 1, 165)))
        assert (cache.read_index(index, [path], []) is None) == seen, place


@pytest.mark.parametrize("make_one", [decoded, embedded])
def test_what_cannot_be_read_has_no_place_until_it_is_mended(slices, tmp_path, make_one):
    whole = contents(make_one(tmp_path / "whole", slices), slices)
    kept = slices[1].path.read_bytes()
    # No archive; an archive with its check sums, but other data.
    for folder, spoiled in (("none", b""), ("other", kept[:60] + bytes(9) + kept[69:])):
        slices[1].path.write_bytes(spoiled)
        with pytest.raises(InputError) as plain:
            slices[1].read()
        made = make_one(tmp_path / folder, slices)
        per_slice = len(whole) // 3
        with pytest.raises(InputError) as cached:
            contents(made, slices[:2])
        assert "case1_slice000.npz" in str(cached.value) and "\n" not in str(cached.value)
        if make_one is decoded:
            assert str(cached.value) == str(plain.value)
            found = [*made[0], *made[2]]
        else:
            found = [made.batch([index], torch.device("cpu")).values.numpy() for index in (0, 2)]
        for ours, theirs in zip(found, whole[:per_slice] + whole[2 * per_slice :]):
            assert np.array_equal(ours, theirs)
        slices[1].path.write_bytes(kept)
        assert all(map(np.array_equal, contents(make_one(tmp_path / folder, slices), slices), whole))


def test_batches_of_another_size_round_otherwise(slices, tmp_path):
    for batch in (1, 2, 2):
        embedded(tmp_path / "cache", slices[:2], batch)
    assert len(list((tmp_path / "cache").glob("*.embeddings"))) == 2


@pytest.mark.parametrize("flag", ["cache_samples", "cache_embeddings"])
def test_skipping_is_the_same_with_a_cache(tmp_path, flag, capsys):
    rng = np.random.default_rng(0)
    for number in range(6):
        label = np.zeros((32, 32), np.uint8)
        label[4 + number : 20, 6:24] = 1
        write_slice(tmp_path / f"data/case{number}_slice000.npz", 0.5 * label + rng.random((32, 32)) / 9, label)
    (tmp_path / "data/case2_slice000.npz").write_bytes(b"")
    torch.save(build_sam("vit_ti", 64).state_dict(), tmp_path / "tiny.pth")
    options = {
        "root_path": str(tmp_path / "data"), "ckpt": str(tmp_path / "tiny.pth"), "num_classes": 1, "img_size": 64,
        "system": "medsam_decoder", "augment": "none", "batch_size": 2, "device": "cpu", "max_iterations": 6,
        "on_bad_sample": "skip",
    }  # fmt: skip
    found = []
    for name, more in (("plain", {}), ("cached", {flag: str(tmp_path / "cache")})):
        run = train(make(TrainConfig, options | more | {"output": str(tmp_path / name)}))
        found.append((read_tensors(run / "adapter_last.safetensors")[0], json.loads((run / "run.json").read_text())["bad_samples"]))
        assert capsys.readouterr().out.count("left out") == 1
    (plain, missed), (cached, counts) = found
    assert counts == missed == {str(tmp_path / "data/case2_slice000.npz"): 2}
    for key in plain:
        torch.testing.assert_close(cached[key], plain[key], atol=1e-4 if "emb" in flag else 0, rtol=0)


def test_what_killed_processes_left_is_removed_but_not_what_is_written(tmp_path):
    path = tmp_path / "data"
    left, written, young, other = (tmp_path / f".part-{n}-{name}" for n, name in enumerate(["data", "data", "data", "more"]))
    for part in (left, written, young, other):
        part.write_bytes(b"x")
        if part != young:
            os.utime(part, (1, 1))
    with open(written, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with building(path) as ours:
            ours.write(b"all")
            assert [part.exists() for part in (left, written, young, other)] == [False, True, True, True]
            os.utime(next(p for p in tmp_path.glob(".part-*-data") if p not in (written, young)), (1, 1))
            with building(path) as second:
                second.write(b"all")
    assert path.read_bytes() == b"all" and written.exists() and young.exists() and other.exists()


@pytest.mark.parametrize("number, left", [(signal.SIGTERM, 0), (signal.SIGKILL, 1)])
def test_a_build_that_is_ended_removes_its_part_if_it_can(tmp_path, number, left):
    script = f"""
import time
from pathlib import Path
from samlora.data.cache import building
with building(Path({str(tmp_path)!r}) / "data") as file:
    print("begun", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert process.wait(30) == (-number if left else 128 + number)
    assert len(list(tmp_path.iterdir())) == left
    for part in tmp_path.iterdir():
        os.utime(part, (1, 1))
    with building(tmp_path / "data") as file:
        file.write(b"all")
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
