"""No work is lost: killed, stopped, out of disk, out of readable files; a run goes on to the same bytes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import samlora
from samlora.cli import main
from samlora.data.volume import write_slice
from samlora.errors import InputError
from samlora.model.sam import build_sam
from samlora.training import loop
from samlora.training.average import Average
from samlora.training.config import TrainConfig
from samlora.training.loop import train
from samlora.training.reading import BadSamples
from samlora.training.run import Run, read_state
from samlora.training.schedule import Plateau
from samlora.training.state import State

STEPS = 6


@pytest.fixture(scope="module")
def place(shared_path):
    """Slices of three cases, one for validation, and a base."""
    place = shared_path / "place"
    rng = np.random.default_rng(0)
    for number in range(9):
        label = np.zeros((32, 32), np.uint8)
        y, x = rng.integers(2, 20, 2)
        label[y : y + 10, x : x + 10], label[y : y + 4, x : x + 4] = 1, 2
        image = (label * 0.4 + rng.normal(0.1, 0.02, label.shape)).astype(np.float32)
        write_slice(place / "data" / f"case{number // 3}_slice{number % 3:03d}.npz", image, label)
    torch.manual_seed(0)
    torch.save(build_sam("vit_ti", 64).state_dict(), place / "tiny.pth")
    return place


@pytest.fixture
def config(place, tmp_path):
    """Six slices, three batches, two steps per epoch: accumulation, validation, clipping and an average."""
    return TrainConfig(
        root_path=str(place / "data"), ckpt=str(place / "tiny.pth"), output=str(tmp_path / "runs"), num_classes=2,
        img_size=64, batch_size=2, accumulate=2, max_epochs=4, stop_epoch=3, base_lr=0.001, warmup_period=2,
        device="cpu", val_cases=("case2",), ema=0.9, clip_norm=1.0, save_steps=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(place, shared_path):
    """The run of `config` with nothing in between."""
    return train(config.__wrapped__(place, shared_path / "whole"))


def command(config, *more):
    """The command line of a configuration."""
    words = [sys.executable, "-m", "samlora", "train"]
    for name in TrainConfig.__dataclass_fields__:
        value = getattr(config, name)
        if value != getattr(TrainConfig(), name):
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return [*words, *more]


def start(config, *more):
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        command(config, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def rows(config):
    folder = config.run_folder("samed", "vit_ti", 64)
    path = folder / "metrics.csv"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.01)


def assert_same_run(run, other):
    assert {path.name for path in run.glob("*.safetensors")} == {path.name for path in other.glob("*.safetensors")}
    for name in ("adapter_last.safetensors", "adapter_best.safetensors", "epoch_2.safetensors", "metrics.csv"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    a, b = (read_state(folder / "state.pt") | {"seconds": 0} for folder in (run, other))
    assert flat(a) == flat(b)


def flat(value):
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else value


def saved(config):
    """Which state file is there: another one after every save."""
    path = config.run_folder("samed", "vit_ti", 64) / "state.pt"
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def anew():
    """Random numbers of a seed that is shown where the test fails."""
    seed = time.time_ns()
    print("seed", seed)
    return random.Random(seed)


def killed_often(config, times, rng):
    """Kills a run at random moments after a save, some in the middle of the next; lets it end; returns its folder."""
    for _ in range(times):
        before, process = saved(config), start(config, "--resume")
        wait_for(lambda: saved(config) not in (None, before), process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
    run = train(replace(config, resume=True))
    assert (run / "log.txt").read_text().count("continued at step") >= times - 1  # the last may find the end
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    return run


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(config, uninterrupted):
    assert_same_run(killed_often(config, 3, anew()), uninterrupted)


@pytest.mark.soak
def test_a_run_killed_twenty_times_ends_in_the_same_bytes(config, tmp_path):
    longer = replace(config, max_epochs=48, stop_epoch=40, save_interval=3)
    whole = train(replace(longer, output=str(tmp_path / "whole")))
    assert_same_run(killed_often(longer, 20, anew()), whole)


@pytest.mark.parametrize("steps", range(1, STEPS))
def test_a_run_saved_after_any_step_goes_on_to_the_same_bytes(config, uninterrupted, steps, monkeypatch):
    """The machine dies right after a state was saved: every step of an epoch, before and after a validation."""

    class Died(Exception):
        pass

    def save_then_die(run, state):
        kept(run, state)
        if state["step"] == steps:
            raise Died

    kept = Run.save_state
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", save_then_die)
        with pytest.raises(Died):
            train(config)
    assert_same_run(train(replace(config, resume=True)), uninterrupted)


@pytest.mark.parametrize("damage", ["cut short", "missing", "a bit turned"])
def test_a_damaged_state_falls_back_to_the_one_before(config, uninterrupted, damage, capsys):
    run = train(replace(config, max_iterations=3))
    path, content = run / "state.pt", (run / "state.pt").read_bytes()
    if damage == "missing":  # killed between the two renames of a save
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert train(replace(config, resume=True, max_iterations=None)) == run
    said = capsys.readouterr().out
    assert "continuing from state_previous.pt" in said and "continued at step 2" in said
    assert (run / "epoch_2.safetensors").read_bytes() == (uninterrupted / "epoch_2.safetensors").read_bytes()


@pytest.mark.parametrize("last", ["damaged", "missing"])
def test_a_save_after_a_damaged_state_keeps_a_sound_one_at_every_moment(config, uninterrupted, last, monkeypatch):
    """The machine dies again between the renames of the first save after the fall-back."""
    run = train(replace(config, max_iterations=3))
    (run / "state.pt").unlink() if last == "missing" else (run / "state.pt").write_bytes(b"PK")

    class Died(Exception):
        pass

    rename = type(run).replace

    def die(path, target):
        if path.name == "state_next.pt" and target.name == "state.pt":
            raise Died
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(run), "replace", die)
        with pytest.raises(Died):
            train(replace(config, resume=True))
    assert read_state(run / "state_previous.pt")["step"] == 2 and read_state(run / "state_next.pt")["step"] == 3
    assert train(replace(config, resume=True)) == run
    assert "continuing from state_next.pt" in (run / "log.txt").read_text()
    assert (run / "epoch_2.safetensors").read_bytes() == (uninterrupted / "epoch_2.safetensors").read_bytes()


def test_a_run_that_ended_and_lost_its_state_is_not_made_again(config):
    run = train(replace(config, max_iterations=2))
    before = (run / "adapter_last.safetensors").read_bytes(), (run / "metrics.csv").read_bytes()
    for path in run.glob("state*.pt"):
        path.unlink()
    with pytest.raises(InputError, match="ended at step 2.*state.pt is gone.*--lora_ckpt") as caught:
        train(replace(config, resume=True, max_iterations=None))
    assert "\n" not in str(caught.value)
    assert ((run / "adapter_last.safetensors").read_bytes(), (run / "metrics.csv").read_bytes()) == before


def test_a_refused_continuation_changes_nothing(config, place, tmp_path):
    run = train(replace(config, max_iterations=1))
    before = (run / "config.yaml").read_bytes()
    shutil.copytree(place / "data", tmp_path / "data")
    write_slice(tmp_path / "data" / "case0_slice001.npz", np.zeros((32, 32)), np.zeros((32, 32), np.uint8))
    with pytest.raises(InputError, match="other slices"):
        train(TrainConfig(resume=str(run), root_path=str(tmp_path / "data")))
    assert (run / "config.yaml").read_bytes() == before
    assert train(TrainConfig(resume=str(run), max_iterations=2)) == run
    assert b"max_iterations: 2" in (run / "config.yaml").read_bytes()


def test_other_processes_are_refused(config, monkeypatch):
    """The batches of a step are shared by them: another number is another run."""
    run = train(replace(config, max_iterations=1))
    state = read_state(run / "state.pt")
    torch.save(state | {"processes": 2}, run / "state.pt")
    with pytest.raises(InputError, match="trained by 2 processes, now there are 1"):
        train(replace(config, resume=True))
    several = Run(run, replace(config, resume=True), processes=4)
    several.close()
    assert several.resume_command == f"samlora train --resume {run}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert several.resume_command == f"torchrun --nnodes 2 --nproc_per_node 2 -m samlora train --resume {run}"


@pytest.mark.parametrize("first", ["stop", "skip"])
def test_skipping_slices_does_not_take_other_slices(config, place, tmp_path, first):
    """A slice may break and be mended; another slice in its place is another run."""
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data" / "case0_slice001.npz"
    content = path.read_bytes()
    ours = replace(config, root_path=str(tmp_path / "data"))
    train(replace(ours, on_bad_sample=first, max_iterations=1))
    skip = replace(ours, resume=True, on_bad_sample="skip")
    for step, broken in ((2, b"garbage"), (3, content)):
        path.write_bytes(broken)
        train(replace(skip, max_iterations=step))
    write_slice(path, np.zeros((32, 32)), np.zeros((32, 32), np.uint8))
    with pytest.raises(InputError, match="other slices"):
        train(replace(skip, max_iterations=4))


def test_what_a_run_began_from_may_go(config, tmp_path):
    first = train(replace(config, max_iterations=1))
    adapter = tmp_path / "begun.safetensors"
    shutil.copy(first / "adapter_last.safetensors", adapter)
    ours = replace(config, output=str(tmp_path / "second"), lora_ckpt=str(adapter))
    run = train(replace(ours, max_iterations=2))
    adapter.unlink()
    assert train(TrainConfig(resume=str(run), max_iterations=3)) == run
    with pytest.raises(InputError, match="begun.safetensors"):
        train(replace(ours, output=str(tmp_path / "third")))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [("run.json", b"", "run.json: is damaged; delete it"), ("metrics.csv", b"st\0ep,loss\n\0\0,1\n", None)],
)
def test_damaged_records_are_one_line(config, name, content, told, capsys):
    run = train(replace(config, max_iterations=2))
    (run / name).write_bytes(content)
    if told is None:
        assert main(["train", "--resume", str(run), "--max_iterations", "3"]) == 0
        assert "metrics.csv: 1 rows are damaged" in capsys.readouterr().out
    else:
        assert main(["train", "--resume", str(run), "--max_iterations", "3"]) == 2
        assert told in capsys.readouterr().err


def test_two_new_runs_do_not_share_a_folder(config, monkeypatch):
    """Both looked before either wrote: the second finds out when the first lets go of the folder."""
    run = train(replace(config, max_iterations=1))
    before = (run / "adapter_last.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("samlora.training.setup._run_problem", lambda *_: None)
    with pytest.raises(InputError, match="holds a run already"):
        train(config)
    assert (run / "adapter_last.safetensors").stat().st_mtime_ns == before


def test_two_damaged_states_are_one_line(config):
    run = train(replace(config, max_iterations=2))
    for name in ("state.pt", "state_previous.pt"):
        (run / name).write_bytes(b"PK")
    with pytest.raises(InputError, match="state.pt: cannot be read.*delete"):
        train(replace(config, resume=True))


def test_resume_by_folder_takes_the_run_s_own_options(config, uninterrupted, tmp_path):
    run = train(replace(config, max_iterations=3, val_interval=2))
    moved = tmp_path / "elsewhere" / run.name
    shutil.copytree(run, moved)
    assert train(TrainConfig(resume=str(moved), max_iterations=STEPS, val_interval=1)) == moved
    assert (moved / "epoch_2.safetensors").read_bytes() == (uninterrupted / "epoch_2.safetensors").read_bytes()
    for wrong, words in (
        ({"base_lr": 0.1}, "--base_lr 0.1.*0.001"),
        ({"lora_ckpt": "other.safetensors"}, "--lora_ckpt other"),
        ({"resume": str(tmp_path / "none")}, "--resume .*none: holds no run"),
    ):
        with pytest.raises(InputError, match=words):
            train(TrainConfig(**{"resume": str(moved)} | wrong))
    renamed = moved.rename(moved.parent / "mine")
    with pytest.raises(InputError, match="renamed"):
        train(TrainConfig(resume=str(renamed)))


def test_a_run_goes_on_only_with_its_own_data_and_base(config, place, tmp_path):
    train(replace(config, max_iterations=1))
    other = tmp_path / "data"
    shutil.copytree(place / "data", other)
    again = replace(config, resume=True, max_iterations=2, root_path=str(other))
    assert train(again)
    write_slice(other / "case0_slice001.npz", np.zeros((32, 32)), np.zeros((32, 32), np.uint8))
    with pytest.raises(InputError, match="other slices"):
        train(again)
    tensors = torch.load(place / "tiny.pth", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other base weights"):
        train(replace(config, resume=True, ckpt=str(tmp_path / "other.pth")))


def test_a_folder_that_lost_its_options_is_not_overwritten(config):
    run = train(replace(config, max_iterations=1))
    (run / "config.yaml").unlink()
    for resume in (False, True):
        with pytest.raises(InputError, match="config.yaml.*--output"):
            train(replace(config, resume=resume))


def test_two_processes_do_not_train_in_one_folder(config, monkeypatch):
    run = train(replace(config, max_iterations=1))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "log.txt"}
    monkeypatch.setattr("samlora.training.run.SECONDS_TO_END", 0)
    first = Run(run, replace(config, max_iterations=1, resume=True))
    with pytest.raises(InputError, match="another process"):
        train(replace(config, resume=True))
    first.close()
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != "log.txt"} == before
    assert train(replace(config, resume=True, max_iterations=2))


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(config, uninterrupted, number, code):
    process = start(config, "--num_workers", "1")
    wait_for(lambda: rows(config) > 2, process)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == code and "Traceback" not in said, said
    run = config.run_folder("samed", "vit_ti", 64)
    assert f"continue with: samlora train --resume {run}" in said
    step = read_state(run / "state.pt")["step"]
    assert 2 <= step < STEPS and rows(config) == step + 1
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_run(run, uninterrupted)


@pytest.fixture
def interruptible():
    """A process that was started in the background ignores SIGINT; for the test it is as in a terminal."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_a_second_signal_stops_at_once(interruptible):
    with loop.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_full_disk_in_the_middle_is_one_line_and_leaves_the_last_state(
    config, uninterrupted, reason, monkeypatch, capsys
):
    run = config.run_folder("samed", "vit_ti", 64)

    def full(descriptor):
        if (run / "state.pt").exists():
            raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert main(command(config)[3:]) == 2
    line = capsys.readouterr().err.split("samlora: ")[-1]
    assert os.strerror(reason) in line and f"--resume {run}" in line and line.count("\n") == 1, line
    assert read_state(run / "state.pt")["step"] == 1 and not list(run.glob(".part-*"))
    assert_same_run(train(replace(config, resume=True)), uninterrupted)


def test_a_disk_that_is_really_full_is_one_line_and_leaves_the_last_state(config, uninterrupted, capsys, files_end_at):
    run = train(replace(config, max_iterations=2))
    files = {path.name for path in run.iterdir()}
    with files_end_at(2**25):  # room for an adapter, not for a state
        assert main(["train", "--resume", str(run), "--max_iterations", str(STEPS)]) == 2
    line = capsys.readouterr().err.split("samlora: ")[-1]
    assert "state_next.pt" in line and os.strerror(errno.EFBIG) in line and f"--resume {run}" in line, line
    assert line.count("\n") == 1 and read_state(run / "state.pt")["step"] == 2
    assert {path.name for path in run.iterdir() if "tfevents" not in path.name} <= files
    assert train(replace(config, resume=True)) == run
    assert (run / "epoch_2.safetensors").read_bytes() == (uninterrupted / "epoch_2.safetensors").read_bytes()


def test_a_folder_that_goes_is_one_line_and_does_not_come_back(config, monkeypatch):
    run = config.run_folder("samed", "vit_ti", 64)
    step = loop.optimizer_step

    def remove(*arguments):
        shutil.rmtree(run)
        return step(*arguments)

    monkeypatch.setattr(loop, "optimizer_step", remove)
    with pytest.raises(InputError, match="it is gone"):
        train(config)
    assert not run.exists()


def spoil_after(step, path, monkeypatch):
    """Replaces a slice by garbage once `step` steps are done."""
    kept = Run.record

    def record(run, **row):
        kept(run, **row)
        if row["step"] == step - 1:
            path.write_bytes(b"garbage")

    monkeypatch.setattr(Run, "record", record)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slice_that_breaks_stops_the_run_and_is_named(config, place, tmp_path, uninterrupted, workers, monkeypatch):
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data" / "case0_slice001.npz"
    ours = replace(config, root_path=str(tmp_path / "data"), num_workers=workers, save_steps=0)
    with monkeypatch.context() as patch:
        spoil_after(2, path, patch)
        with pytest.raises(InputError, match="case0_slice001.npz.*--on_bad_sample skip") as caught:
            train(ours)
    assert "\n" not in str(caught.value)
    shutil.copy(place / "data" / path.name, path)
    assert_same_run(train(replace(ours, resume=True)), uninterrupted)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slice_that_breaks_is_skipped_counted_and_the_same_after_a_stop(
    config, place, tmp_path, workers, monkeypatch, capsys
):
    ends = []
    for name, stopped in (("whole", None), ("parts", 4)):
        shutil.copytree(place / "data", tmp_path / name)
        path = tmp_path / name / "case0_slice001.npz"
        ours = replace(config, root_path=str(tmp_path / name), output=str(tmp_path / f"{name}_runs"))
        ours = replace(ours, num_workers=0 if stopped else workers, on_bad_sample="skip")
        with monkeypatch.context() as patch:
            if workers:  # these read ahead of the step that breaks the file: it is broken from the start
                path.write_bytes(b"garbage")
            else:
                spoil_after(2, path, patch)
            run = train(replace(ours, max_iterations=stopped))
        if stopped:
            run = train(replace(ours, resume=True))
        assert capsys.readouterr().out.count("left out") == (2 if stopped else 1)
        counts = json.loads((run / "run.json").read_text())["bad_samples"]
        ends.append([(run / "epoch_2.safetensors").read_bytes(), {os.path.basename(p): n for p, n in counts.items()}])
    assert ends[0] == ends[1] and ends[0][1] == {"case0_slice001.npz": 3 if workers else 2}


def test_a_worker_that_dies_is_one_line(config, monkeypatch):
    def die(dataset, key):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("samlora.training.reading.SliceDataset.__getitem__", die)
    with pytest.raises(InputError, match="--num_workers 1.*died.*--num_workers 0") as caught:
        train(replace(config, num_workers=1))
    assert "\n" not in str(caught.value)


def test_the_loss_scale_of_fp16_is_part_of_the_state(place):
    """What the scaler has learned about overflows; on a CPU, where training itself has no fp16."""
    from lightning_fabric.plugins.precision import MixedPrecision

    def fresh():
        model = samlora.build_model("samed", base=place / "tiny.pth", image_size=64, num_classes=2)
        precision = MixedPrecision("16-mixed", "cpu")
        engine = SimpleNamespace(precision=precision)
        fabric = SimpleNamespace(device=torch.device("cpu"), world_size=1, strategy=engine)
        return State(fabric, model, torch.optim.SGD(model.parameters()), Average(model, 0), BadSamples(False, print), Plateau(5, 0.1))

    first, second = fresh(), fresh()
    scaler = first.fabric.strategy.precision.scaler
    scaler.scale(torch.ones(1))
    scaler.update(new_scale=1024.0)
    second.restore(first.saved({}), place / "state.pt")
    assert second.fabric.strategy.precision.scaler.state_dict() == scaler.state_dict()
    assert scaler.get_scale() == 1024.0
