"""Several systems on the same splits: who trains on what, what is not done twice, what the table says."""

import csv
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from samlora.cli import main
from samlora.compare import compare as module
from samlora.compare.compare import compare
from samlora.compare.config import CompareConfig
from samlora.compare.drawing import Axis, Line, plot
from samlora.compare.folds import make_folds
from samlora.compare.job import Job, prompts_told, read_held, run_job
from samlora.compare.results import Entry, Run, grouped, of_task
from samlora.compare.running import run_all
from samlora.compare.variants import find_variants
from samlora.data.dataset import find_slices
from samlora.data.grid import Volume
from samlora.data.prepare import prepare
from samlora.data.volume import write_volume
from samlora.errors import InputError
from samlora.evaluation.metrics import evaluate_case
from samlora.evaluation.statistics import holm, paired, smallest_p, too_few
from samlora.prompting import Prompting
from samlora.training.config import TrainConfig
from samlora.training.loop import train

STEPS = 4
SMALL = {
    "vit_name": "vit_ti",
    "img_size": 64,
    "batch_size": 2,
    "accumulate": 1,
    "max_iterations": STEPS,
    "device": "cpu",
    "warmup_period": 1,
}


@pytest.fixture(scope="module")
def data(shared_path):
    """Four patients, one of them with two scans: bright boxes of two classes, slices 3 mm apart, pixels of 0.5 mm."""
    folder = shared_path / "compare"
    rng = np.random.default_rng(0)
    for name in ("a_1", "a_2", "b_1", "c_1", "d_1"):
        label = np.zeros((48, 48, 5), np.uint8)
        left, top = rng.integers(4, 12, 2)
        label[left : left + 16, top : top + 20, 1:4] = 1
        label[left + 18 : left + 30, top : top + 16, 1:3] = 2
        image = (100 * label + rng.normal(0, 10, label.shape)).astype(np.int16)
        affine = np.diag([-0.5, -0.5, 3.0, 1.0])
        write_volume(Volume(image, affine, 1, 1), folder / "source/images" / f"{name}.nii.gz")
        write_volume(Volume(label, affine, 1, 1), folder / "source/labels" / f"{name}.nii.gz")
    recipe = folder / "boxes.yaml"
    recipe.write_text(
        "name: boxes\nmodality: ct\nwindow: [-100, 300]\norientation: LPS\nsize: 32\nkeep: foreground\n"
        "patient: '([a-z])_.*'\nclasses: {near: 1, far: 2}\n"
    )
    prepare(folder / "source", folder / "data", str(recipe), test_fraction=0.0, workers=1)
    return folder / "data"


@pytest.fixture(scope="module")
def systems(shared_path):
    """An automatic system and a prompted one."""
    (shared_path / "mine.yaml").write_text("system: samed\nrank: 2\nwarmup_period: 1\n")
    (shared_path / "asked.yaml").write_text("system: medsam_decoder\nprompt: box\naugment: none\n")
    return [str(shared_path / "mine.yaml"), str(shared_path / "asked.yaml")]


@pytest.fixture(scope="module")
def finished(data, systems, shared_path):
    """A whole comparison in this process: two systems, two folds, one seed."""
    config = CompareConfig(data=str(data), output=str(shared_path / "out"), folds=2, jobs=0, set=SMALL)
    return config, compare(systems, config)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_case_is_measured_once_by_a_training_that_has_not_seen_its_patient(finished):
    config, groups = finished
    for group in groups:
        for entry in group.entries:
            held = [case for run in entry.runs for case in run.job.held]
            assert sorted(held) == ["a_1", "a_2", "b_1", "c_1", "d_1"]
            for run in entry.runs:
                seen = {name[0] for name in run.job.train}
                listed = (run.job.folder / "train.txt").read_text().split()
                assert {name[0] for name in listed} == seen and not seen & {name[0] for name in run.job.held}
                assert set(entry.cases(run)) == set(run.job.held)
                facts = json.loads((run.job.folder / run.result["run"] / "run.json").read_text())
                assert facts["train_slices"] == len(listed) and facts["steps"] == STEPS
    first, second = (group.entries[0] for group in groups)
    assert [run.job.held for run in first.runs] == [run.job.held for run in second.runs]


def test_automatic_and_prompted_systems_stand_apart_and_are_marked(finished):
    config, groups = finished
    assert [(group.task, [e.name for e in group.entries]) for group in groups] == [
        ("automatic", ["mine"]), ("prompted", ["asked"]),
    ]  # fmt: skip
    page, text = ((module.Path(config.output) / name).read_text() for name in ("report.html", "comparison.md"))
    assert text.count("never compare these figures") == 1 and "two tasks, tables apart" in text
    asked, mine = (
        page.count(f'title="{name}">{name}</span><span class="mark">prompted</span>') for name in ("asked", "mine")
    )
    assert asked >= 3 and mine == 0
    assert "asked (prompted: box)" in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page


def test_names_of_an_ablation_are_shown_whole(finished, browser, tmp_path):
    config, _ = finished
    text = (module.Path(config.output) / "report.html").read_text()
    name = "some_lora_of_the_whole_decoder rank=16 lora_layers=0,1,2,3,4,5,6,7,8,9,10,11"
    (tmp_path / "report.html").write_text(text.replace(">mine<", f">{name}<"))
    page = browser.new_page()
    for width in (700, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(f"file://{tmp_path}/report.html")
        names = page.locator("th .name", has_text=name)
        assert names.count() > 3
        assert names.evaluate_all("all => all.every(e => !e.clientWidth || e.scrollWidth <= e.clientWidth)")
    page.close()


def test_systems_are_ranked_and_tested_only_with_those_that_got_equal_prompts(finished):
    config, groups = finished
    assert [group.prompts for group in groups] == ["", "box"]
    out = module.Path(config.output)
    assert "(box)" in (out / "comparison.md").read_text() and "| Prompts |" in (out / "comparison.md").read_text()
    page = (out / "report.html").read_text()
    assert '<th scope="col">Prompts</th>' in page and "<td>box</td>" in page
    assert {(row["system"], row["prompts"]) for row in rows_of(out / "summary.csv")} == {("mine", ""), ("asked", "box")}
    stored = json.loads((groups[1].entries[0].runs[0].job.folder / "result.json").read_text())
    assert (
        stored["ways"]["prompted"]["prompts"] == "box" and "prompts" not in groups[0].entries[0].runs[0].result["ways"]
    )
    boxes, points = "box", prompts_told(Prompting("pt"))
    asked = [drawn("a", [0.9] * 12, boxes), drawn("b", [0.1] * 12, points), drawn("c", [0.8] * 12, boxes)]
    found = grouped(asked, str)
    assert [[entry.name for entry in group.entries] for group in found] == [["b"], ["a", "c"]]
    assert [set(group.tests) for group in found] == [set(), {"c"}] and points in found[0].title
    assert any("given different ones" in note for note in module._remarks(found))


def test_equal_words_are_equal_prompts():
    told = [
        Prompting(), Prompting("pt"), Prompting("pt", sample_num=2), Prompting("pt", negative_num=1), Prompting("any"),
        Prompting("pt_box"), Prompting("full_box"), Prompting("pt", point_strategy="centre"), Prompting(parts=True),
    ]  # fmt: skip
    assert len(set(map(prompts_told, told))) == len(told)
    assert prompts_told(Prompting("box", box_jitter=20, max_objects=4, sample_num=3)) == "box"
    assert prompts_told(Prompting("pt", point_strategy="entropy")) == prompts_told(Prompting("pt")) == "1 point, random"
    assert prompts_told(Prompting("pt", sample_num=2, point_strategy="entropy")) == "2 points, entropy"


def test_common_prompts_are_measured_anew_without_training(data, systems, tmp_path):
    config = CompareConfig(data=str(data), output=str(tmp_path), folds=2, jobs=0, set=SMALL, pictures=0)
    (own,) = compare(systems[1:], config)
    for run in own.entries[0].runs:  # as a process of its own would have told it
        path = run.job.folder / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"peak_memory_bytes": 7}))
    (common,) = compare(systems[1:], replace(config, prompts="point"))
    assert (own.prompts, common.prompts) == ("box", "1 point, random")
    (before,), (after,) = own.entries, common.entries
    assert [run.result["seconds"] for run in before.runs] == [run.result["seconds"] for run in after.runs]
    assert after.fact("peak_memory_bytes") == 7  # what training took, not what measuring again did
    assert [before.cases(run) for run in before.runs] != [after.cases(run) for run in after.runs]
    assert "with the same: 1 point, random" in (tmp_path / "comparison.md").read_text()
    with pytest.raises(InputError, match="--prompts box: none of the systems takes prompts"):
        compare(systems[:1], replace(config, prompts="box"))


def test_the_files_hold_every_case_class_and_run(finished):
    config, groups = finished
    rows = rows_of(module.Path(config.output) / "results.csv")
    assert len(rows) == 2 * 5 * 2  # systems, cases, classes
    for group in groups:
        entry = group.entries[0]
        of = [row for row in rows if row["system"] == entry.name]
        for run, mean in zip(entry.runs, entry.means("dice")):
            classes = [
                np.nanmean([float(r["dice"]) for r in of if int(r["fold"]) == run.job.fold and r["class"] == name])
                for name in ("near", "far")
            ]
            assert mean == pytest.approx(np.mean(classes))
        assert {row["in_reference"] for row in of} == {"1"}
    summary = rows_of(module.Path(config.output) / "summary.csv")
    assert {(row["false_alarms"], row["absent_in_reference"]) for row in summary} == {("0", "0")}
    assert '<th scope="col">False alarms</th>' in (module.Path(config.output) / "report.html").read_text()
    assert [row["class"] for row in summary] == ["all classes", "near", "far"] * 2
    for row in summary:
        assert float(row["trained_parameters"]) < float(row["total_parameters"]) and float(row["adapter_bytes"]) > 1e4
        assert math.isnan(float(row["peak_memory_bytes"]))  # in this process it would be that of all runs


def test_distances_are_in_millimetres_of_the_volume_the_slices_came_from(data):
    slices = [item for item in find_slices(data) if item.case == "b_1"]
    held = read_held(data, "b_1", slices)
    assert held.spacing == pytest.approx((3.0, 0.75, 0.75))  # 48 pixels of 0.5 mm became 32
    assert len(held.truth) == 3 and held.placed(held.truth).shape == (5, 32, 32)
    assert held.placed(held.truth)[[1, 2, 3]].any(axis=(1, 2)).all() and not held.placed(held.truth)[[0, 4]].any()


def test_a_second_call_trains_nothing_and_a_lost_result_is_made_again_alone(finished, systems, monkeypatch):
    config, groups = finished
    trained = []

    def counted(made):
        trained.append(made.output)
        return train(made)

    monkeypatch.setattr("samlora.training.loop.train", counted)
    before = (module.Path(config.output) / "results.csv").read_bytes()
    compare(systems, config)
    assert not trained and (module.Path(config.output) / "results.csv").read_bytes() == before
    lost = groups[0].entries[0].runs[1].job
    (lost.folder / "result.json").unlink()
    compare(systems, config)
    assert trained == [str(lost.folder)]
    assert (module.Path(config.output) / "results.csv").read_bytes() == before


def test_results_of_other_options_are_refused_not_mixed(finished, systems):
    config, _ = finished
    with pytest.raises(InputError, match=f"max_iterations {STEPS}, not 7; choose another --output, or --overwrite"):
        compare(systems, replace(config, set=SMALL | {"max_iterations": 7}))
    with pytest.raises(InputError, match="other held"):
        compare(systems, replace(config, folds=3))


def test_a_run_that_fails_is_named_and_the_others_are_in_the_table(data, systems, tmp_path, monkeypatch):
    def fails(job, own_process=True):
        raise InputError(f"no luck with {job.name}")

    monkeypatch.setattr("samlora.compare.running.run_job", fails)
    config = CompareConfig(data=str(data), output=str(tmp_path / "out"), folds=2, jobs=0, set=SMALL)
    with pytest.raises(InputError, match="no run succeeded; the first: mine, fold 0, seed 1234: no luck with mine"):
        compare(systems, config)


def test_what_nobody_foresaw_fails_one_run_and_leaves_its_traceback(data, systems, tmp_path, monkeypatch):
    def fails(job, own_process=True):
        if job.name == "mine":
            raise TypeError("no such\nthing")
        run_job(job, own_process)

    monkeypatch.setattr("samlora.compare.running.run_job", fails)
    given = SMALL | {"max_iterations": 1}
    config = CompareConfig(data=str(data), output=str(tmp_path / "out"), folds=2, jobs=0, set=given, pictures=0)
    with pytest.raises(InputError, match="2 of 4 runs failed.*: TypeError: no such thing; see .*output.txt") as error:
        compare(systems, config)
    assert "\n" not in str(error.value)
    assert "Traceback" in (tmp_path / "out/runs/mine/fold0_seed1234/output.txt").read_text()
    assert {row["system"] for row in rows_of(tmp_path / "out/summary.csv")} == {"asked"}


def test_a_run_that_another_process_finished_has_not_failed(data, systems, tmp_path, monkeypatch):
    def late(job, own_process=True):
        run_job(job, own_process)
        raise InputError("the folder is in use")

    monkeypatch.setattr("samlora.compare.running.run_job", late)
    given = SMALL | {"max_iterations": 1}
    config = CompareConfig(data=str(data), output=str(tmp_path / "out"), folds=2, jobs=0, set=given, pictures=0)
    (group,) = compare(systems[:1], config)
    assert len(group.entries[0].runs) == 2


SLEEPS = "import sys, time; print('ready', flush=True); time.sleep(60)"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_closed_terminal_ends_the_runs_as_sigterm_does(tmp_path, monkeypatch):
    started = []

    def start(job, slots, gpu):
        started.append(subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE))
        started[-1].stdout.readline()
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr("samlora.compare.running._start", lambda *given: start(*given) or started[-1])
    job = Job("one", tmp_path, 0, 1, None, {}, (), (), (), False, "", None)
    former = signal.getsignal(signal.SIGHUP)
    try:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            run_all([job], 1, (), lambda *_: None)
    finally:
        started[0].kill()
        started[0].communicate()
    assert signal.getsignal(signal.SIGHUP) == former


def test_a_run_ends_when_the_command_is_killed():
    child = f"import sys; from samlora.compare.job import end_with; end_with(int(sys.argv[1])); {SLEEPS}"
    command = f"import subprocess, sys, os; subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
        began = time.monotonic()
        process.stdout.read()  # ends with the last process that could write there
        assert time.monotonic() - began < 30


@pytest.mark.soak
def test_an_own_process_is_stopped_with_its_step_saved_and_goes_on(data, systems, tmp_path, capsys):
    """By the command, as a user has it: SIGTERM to samlora, then the same command again."""
    settings = [f"{name}={value}" for name, value in (SMALL | {"max_iterations": 12}).items()]
    arguments = [
        "compare",
        systems[0],
        "--data",
        str(data),
        "--folds",
        "2",
        "-o",
        str(tmp_path / "out"),
        "--pictures",
        "0",
    ]
    command = [sys.executable, "-m", "samlora", *arguments, "--set", *settings, "save_steps=1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("out/runs/mine/fold0_seed1234/*/state.pt")) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    state = next(tmp_path.glob("out/runs/mine/fold0_seed1234/*/state.pt"))
    assert state.is_file() and not list(tmp_path.glob("out/runs/mine/*/result.json"))
    assert main([*arguments, "--set", *settings, "--jobs", "0"]) == 0
    assert "continued at step" in capsys.readouterr().out


def test_processes_are_dealt_to_devices_and_one_that_fails_stops_no_other(tmp_path, monkeypatch):
    started, told = [], {}

    def start(job, slots, gpu):
        """Stands in for a training: a process that ends as its job says."""
        code = {"wrong": "print('samlora: --ckpt x: no'); sys.exit(2)", "dead": "sys.exit(9)"}.get(job.name, "")
        started.append((job.name, slots, gpu))
        with open(job.folder / "output.txt", "w") as output:
            return subprocess.Popen([sys.executable, "-c", f"import sys; {code}"], stdout=output)

    monkeypatch.setattr("samlora.compare.running._start", start)
    jobs = []
    for name in ("one", "wrong", "dead", "two", "three"):
        (tmp_path / name).mkdir()
        jobs.append(Job(name, tmp_path / name, 0, 1, None, {}, (), (), (), False, "", None))
    run_all(jobs, 2, [0, 3], lambda job, problem: told.update({job.name: problem}))
    assert [name for name, *_ in started] == [job.name for job in jobs]
    assert {gpu for *_, gpu in started[:2]} == {0, 3} and {slots for _, slots, _ in started} == {2}
    assert told["wrong"] == "--ckpt x: no" and told["dead"].startswith("its process ended with code 9")
    assert told["one"] == told["two"] == told["three"] == ""


@pytest.mark.parametrize("seed", range(5))
def test_folds_part_the_patients_and_shots_are_nested(seed):
    patients = {f"{patient}{scan}": patient for patient in "abcdefg" for scan in range(1 + (patient in "cf"))}
    folds = make_folds(patients, 3, seed)
    assert sorted(case for fold in folds for case in fold.held) == sorted(patients)
    for fold in folds:
        assert sorted((*fold.train, *fold.held)) == sorted(patients)
        assert not {patients[c] for c in fold.train} & {patients[c] for c in fold.held}
        sets = [set(fold.shots(count)) for count in range(1, len(fold.train) + 1)]
        assert all(len(s) == n for n, s in enumerate(sets, 1)) and all(a < b for a, b in zip(sets, sets[1:]))
        assert set(fold.shots(None)) == sets[-1]
        among = {patients[c] for c in fold.train}
        assert {patients[c] for c in sets[len(among) - 1]} == among  # every patient once before any twice
    assert make_folds(dict(reversed(patients.items())), 3, seed) == folds
    with pytest.raises(InputError, match="has 7 patients"):
        make_folds(patients, 8, seed)


def test_few_shot_runs_give_a_table_for_each_number_of_cases(data, systems, tmp_path):
    asked = CompareConfig(
        data=str(data), output=str(tmp_path / "out"), folds=2, shots=("1,50", "all"), jobs=0, set=SMALL
    )
    assert asked.wanted_shots == [1, 50, None]
    groups = compare(systems[:1], replace(asked, set=SMALL | {"max_iterations": 1}))
    assert [group.shots for group in groups] == [None, 1]
    every, one = ([run.job.train for run in group.entries[0].runs] for group in groups)
    assert all(len(small) == 1 and set(small) < set(large) for small, large in zip(one, every))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Dice against training cases" in page and "--shots 50 left out" in page


def test_lists_of_a_yaml_become_named_variants(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "system: samed\nvit_name: vit_ti\nrank: [1, 4]\nlora_layers: [[0, 1], []]\nwarmup: false\n"
    )
    (tmp_path / "steps.yaml").write_text("system: unet\nschedule: step\nschedule_steps: [10, 20]\n")
    variants, notes = find_variants(
        [str(tmp_path / "mine.yaml"), str(tmp_path / "steps.yaml")], {"base_lr": [0.1, 0.2]}
    )
    assert [v.name for v in variants if v.system == "unet"] == ["steps base_lr=0.1", "steps base_lr=0.2"]
    mine = [v for v in variants if v.system == "samed" and v.values["base_lr"] == 0.1]
    assert [v.name for v in mine] == [
        f"mine rank={rank} lora_layers={layers} base_lr=0.1" for rank in (1, 4) for layers in ("0,1", "all")
    ]
    assert [(v.values["rank"], v.values["lora_layers"]) for v in mine] == [(1, [0, 1]), (1, []), (4, [0, 1]), (4, [])]
    assert len({v.slug for v in variants}) == 10 and not notes


def test_overrides_go_where_they_fit_and_it_is_said():
    given = {"vit_name": "vit_ti", "rank": 2, "sample_num": 3, "img_size": 64}
    variants, notes = find_variants(["unet", "samed", "msa"], given)
    unet, samed, msa = (v.values for v in variants)
    assert not unet.keys() & {"vit_name", "rank", "sample_num"} and unet["img_size"] == 64
    assert samed["rank"] == 2 and samed["vit_name"] == "vit_ti" and "sample_num" not in samed
    assert msa["sample_num"] == 3 and "rank" not in msa and msa["options"] == {"ratio": 0.25, "scale": 0.5}
    assert [note.split(":")[0] for note in notes] == ["unet", "samed", "msa"]
    assert "--set vit_name, --set rank, --set sample_num left out" in notes[0]
    (samed, msa), notes = find_variants(["samed", "msa"], {"options": {"dora": True}, "vit_name": "vit_ti"})
    assert samed.values["options"] == {"dora": True} and msa.values["options"] == {"ratio": 0.25, "scale": 0.5}
    assert notes == ["msa: --set options dora left out: msa has no such option"]


@pytest.mark.parametrize(
    ("sources", "given", "message"),
    [
        (["unet"], {"seed": 3}, "--set seed=3: is for samlora compare to decide .--seed and --seeds"),
        (
            ["samed"],
            {"lora_ckpt": "a.safetensors"},
            "--set lora_ckpt=a.safetensors: .* trained on the cases .* held out",
        ),
        (["samed"], {"resume": True}, "--set resume=True: .* go on by themselves.; leave it out"),
        (["samed"], {"output": "there"}, "--set output=there: is for samlora compare to decide"),
        (["unet"], {"system": "samed"}, "name the systems as configurations"),
        (["unet", "unet"], {}, "two systems are called unet"),
        (["unet"], {"base_lrr": 3}, "unet: --base_lrr is no option; did you mean base_lr"),
        (["samed"], {"ckpt": "nowhere.pth"}, "samed: there are no base weights at nowhere.pth"),
        (["nothing"], {}, "there is no such file"),
        (["unet"], {"n_gpu": 2}, "every run trains on one device"),
    ],
)
def test_what_cannot_be_compared_is_known_before_anything_trains(sources, given, message):
    with pytest.raises(InputError, match=message):
        find_variants(sources, given)


@pytest.mark.parametrize(
    "line",
    ["lora_ckpt: a.safetensors", "lora_ckpt: [a, b]", "root_path: there", "output: there", "resume: true", "seed: [1, 2]",
     "val_cases: [b_1]", "list_dir: lists"],
)  # fmt: skip
def test_what_the_comparison_decides_is_refused_in_a_yaml(tmp_path, line):
    (tmp_path / "mine.yaml").write_text(f"system: samed\nvit_name: vit_ti\n{line}\n")
    with pytest.raises(
        InputError, match=f"mine.yaml: {line.split(':')[0]} .* is for samlora compare to decide"
    ) as error:
        find_variants([str(tmp_path / "mine.yaml")], {})
    assert "\n" not in str(error.value)
    (tmp_path / "mine.yaml").write_text("vit_name: vit_ti\nlora_ckpt: null\nval_cases: []\nseed: 1234\nresume: false\n")
    assert not find_variants([str(tmp_path / "mine.yaml")], {})[0][0].values.keys() & {"lora_ckpt", "val_cases", "seed"}


def test_options_of_the_command_are_checked():
    for given, message in (
        ({"folds": 1}, "--folds 1"), ({"shots": ("0",)}, "--shots 0"), ({"shots": ("some",)}, "--shots some"),
        ({"devices": ("cpu",)}, "--devices cpu"), ({"jobs": -1}, "--jobs -1"), ({"jobs": 0, "devices": ("0",)}, "--jobs 0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            CompareConfig(data="d", output="o", **given)
    assert CompareConfig(data="d", output="o", devices=("cuda:1", "0")).gpus == [1, 0]


def test_training_stops_by_the_clock_and_stays_stopped(data, tmp_path, capsys):
    config = TrainConfig(
        root_path=str(data), output=str(tmp_path), system="samed", vit_name="vit_ti", img_size=64, batch_size=2,
        max_iterations=10_000, max_epochs=10_000, stop_epoch=10_000, max_seconds=0.5, device="cpu",
    )  # fmt: skip
    run = train(config)
    facts = json.loads((run / "run.json").read_text())
    assert 1 <= facts["steps"] < 10_000 and facts["seconds"] >= 0.5
    assert (run / "adapter_last.safetensors").is_file() and (run / "curves.png").is_file()
    assert "stopped by the clock" in capsys.readouterr().out
    again = train(replace(config, resume=True))
    assert json.loads((again / "run.json").read_text())["steps"] == facts["steps"]
    longer = train(replace(config, resume=True, max_seconds=0.0, max_iterations=facts["steps"] + 2))
    assert json.loads((longer / "run.json").read_text())["steps"] == facts["steps"] + 2


def test_holm_by_hand():
    """0.01 x 4; 0.02 x 3; 0.03 x 2 is the same as before; 0.04 would fall and is held up."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    kept = holm([math.nan, 0.02, 0.01])
    assert math.isnan(kept[0]) and kept[1:] == pytest.approx([0.02, 0.02])
    assert holm([]) == []


def test_paired_is_the_signed_rank_test_of_what_both_have():
    first = {f"p{n}": v for n, v in enumerate([0.9, 0.8, 0.85, 0.7, 0.95, 0.6, 0.5])} | {"alone": 0.1}
    second = {f"p{n}": v for n, v in enumerate([0.8, 0.75, 0.87, 0.5, 0.65, 0.55, 0.5])} | {"p9": 0.3}
    test = paired(first, second)
    differences = [first[f"p{n}"] - second[f"p{n}"] for n in range(6)]  # the seventh pair is equal
    assert test.count == 6 and test.p == pytest.approx(scipy.stats.wilcoxon(differences).pvalue)
    assert test.difference == pytest.approx(sum(differences) / 7)
    assert paired(first, first).p == 1.0 and math.isnan(paired(first, {}).p)
    one_sided = paired({str(n): n + 1.0 for n in range(6)}, {str(n): 0.0 for n in range(6)})
    assert one_sided.p == pytest.approx(smallest_p(6)) == 0.03125
    assert too_few(5, 1) and not too_few(6, 1) and too_few(6, 2)


def drawn(name, values, prompts=""):
    """An entry of one run whose cases have one class with these Dice values; with prompts, if they are named."""
    cases = {f"c{n}": {1: {"dice": v, "hd95": 1.0, "volume_error_percent": 0.0}} for n, v in enumerate(values)}
    way, told = ("prompted", {"prompts": prompts}) if prompts else ("automatic", {})
    job = Job(name, None, 0, 1, None, {}, (way,), (), tuple(cases), False, "", None)
    result = {"ways": {way: {"cases": cases, **told}}, "class_names": ["x"], "device": "cpu"}
    return Entry(name, way, None, (Run(job, result),))


def test_figures_are_over_what_the_reference_shows_and_false_alarms_stand_apart():
    """Two cases of two classes, the second without the far one: who draws it there loses nothing but says so."""
    truth = np.zeros((2, 1, 8, 8), np.uint8)
    truth[:, :, :4, :4] = 1
    truth[0, :, 5:, 5:] = 2
    quiet, loud, blind = truth.copy(), truth.copy(), truth.copy()
    loud[1, 0, 7, 7] = 2
    blind[0][blind[0] == 2] = 0

    def entry(name, maps):
        cases = {f"c{n}": evaluate_case(*pair, None, (1, 2))["strict"] for n, pair in enumerate(zip(maps, truth))}
        job = Job(name, None, 0, 1, None, {}, ("automatic",), (), tuple(cases), False, "", None)
        result = {"ways": {"automatic": {"cases": cases}}, "class_names": ["near", "far"]}
        return Entry(name, "automatic", None, (Run(job, result),))

    still, drew, missed = entry("quiet", quiet), entry("loud", loud), entry("blind", blind)
    for one in (still, drew):
        assert one.means("dice") == [1.0] and one.means("dice", 2) == [1.0] and one.means("hd95", 2) == [0.0]
        assert one.per_patient(str) == {"c0": 1.0, "c1": 1.0} and one.per_case(2, "dice")["c0"] == 1.0
        assert math.isnan(one.per_case(2, "dice")["c1"])
    assert missed.means("dice", 2) == [0.0] and missed.means("dice") == [0.5]
    assert missed.per_patient(str) == {"c0": 0.5, "c1": 1.0}
    assert [one.false_alarms() for one in (still, drew, missed)] == [(0, 1), (1, 1), (0, 1)]
    assert drew.false_alarms(1) == (0, 0) and of_task(drew) == {"False alarms": "1 of 1"}


def test_the_table_says_when_it_can_say_nothing():
    rng = np.random.default_rng(0)
    values = rng.uniform(0.4, 0.6, 12)
    alike = values + rng.choice([-0.001, 0.001], 12) * rng.uniform(0.5, 1.5, 12)
    (group,) = grouped([drawn("low", values - 0.2), drawn("high", values), drawn("alike", alike)], str)
    verdicts = {entry.name: group.verdict(entry) for entry in group.entries}
    assert sorted(verdicts.values())[0] == "best over patients" and verdicts["low"] in ("p < 0.001", "p = 0.001")
    assert "not told apart" in (verdicts["alike"] + verdicts["high"]) and group.entries[-1].name == "low"
    (few,) = grouped([drawn("low", [0.1, 0.2, 0.3]), drawn("high", [0.8, 0.9, 0.95])], str)
    assert few.verdict(few.entries[1]) == "too few patients" and "p below 0.25" in few.too_few
    scans = grouped([drawn("low", values - 0.2), drawn("high", values)], lambda case: "one patient")[0]
    assert scans.too_few  # twelve scans of one patient are one patient


def test_the_best_is_best_by_what_is_tested():
    """Folds of unequal size and a patient with two cases: means of runs order the two otherwise than patients do."""

    def entry(name, folds):
        runs = [drawn(name, values).runs[0] for values in folds]
        for fold, run in enumerate(runs):
            cases = {f"{fold}{case}": of for case, of in run.result["ways"]["automatic"]["cases"].items()}
            run.result["ways"]["automatic"]["cases"] = cases
        return Entry(name, "automatic", None, tuple(runs))

    by_runs, by_patients = entry("runs", [[1.0], [0.4] * 9]), entry("patients", [[0.4], [0.5] * 9])
    assert by_runs.means("dice").mean() > by_patients.means("dice").mean()
    (group,) = grouped([by_runs, by_patients], str)
    assert group.entries[0] is by_patients and group.tests["runs"].difference < 0
    partly = entry("partly", [[1.0]])
    (group,) = grouped([by_patients, partly], str)  # only the first fold can be compared
    assert group.entries[0] is partly and group.tests["patients"].difference < 0 and "1 patient is" in group.too_few


def test_plots_escape_names_and_keep_points_inside():
    lines = [
        Line("<b>", "#123456", [(1.0, 0.5, 0.1), (10.0, 0.9, math.nan)]),
        Line("one", "#654321", [(5.0, 0.2, 0.0)], True),
    ]
    figure = plot("a & b", "", lines, Axis("cases", True), Axis("Dice [%]", scale=100), joined=True, marks=True)
    assert "<b>" not in figure and "&lt;b&gt;" in figure and "a &amp; b" in figure and "stroke-dasharray" not in figure
    import re

    places = [(float(x), float(y)) for x, y in re.findall(r'circle cx="([\d.]+)" cy="([\d.]+)"', figure)]
    assert len(places) == 3 and all(56 <= x <= 604 and 12 <= y <= 284 for x, y in places)
    assert places[1][1] < places[0][1] < places[2][1]  # higher values stand higher


def test_a_single_point_of_a_curve_is_drawn():
    lines = [Line("short", "#123456", [(1.0, 0.5, math.nan)]), Line("long", "#654321", [(1.0, 0.4, 0), (2.0, 0.3, 0)])]
    figure = plot("loss", "", lines, Axis("steps", whole=True), Axis("loss", True), joined=True, marks=False)
    assert figure.count("<circle") == 1 and figure.count("<polyline") == 1


def test_a_system_that_gets_another_name_keeps_its_runs(data, tmp_path, monkeypatch):
    trained = []

    def counted(made):
        trained.append(made.rank)
        return train(made)

    monkeypatch.setattr("samlora.training.loop.train", counted)
    given = SMALL | {"max_iterations": 1}
    config = CompareConfig(data=str(data), output=str(tmp_path / "out"), folds=2, jobs=0, set=given, pictures=0)
    for ranks in ("[2]", "[2, 1]"):
        (tmp_path / "mine.yaml").write_text(f"system: samed\nrank: {ranks}\n")
        (group,) = compare([str(tmp_path / "mine.yaml")], config)
    assert trained == [2, 2, 1, 1] and {entry.name for entry in group.entries} == {"mine rank=2", "mine rank=1"}
    assert "mine rank=2: takes over the runs in mine" in (tmp_path / "out/comparison.md").read_text()


def test_a_result_depends_on_what_is_not_usual_and_on_nothing_that_only_says_where():
    job = Job(
        "a", None, 0, 1, None, {"base_lr": 0.1, "device": "cpu"}, ("automatic",), ("x",), ("y",), False, "sha", None
    )
    usual = {"rank": TrainConfig().rank, "lora_layers": []}
    assert replace(job, values={**job.values, **usual, "device": "cuda", "root_path": "there"}).inputs == job.inputs
    for other in (
        {"values": {"base_lr": 0.2}},
        {"train": ("z",)},
        {"held": ("z",)},
        {"data": "other"},
        {"base": ["b", 1, 2]},
    ):
        assert replace(job, **other).inputs != job.inputs
