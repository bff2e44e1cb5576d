"""The demo, cut short: every file it promises, nothing overwritten."""

from samlora import demo as module
from samlora.options import read_yaml


def test_the_demo_leaves_what_it_names(tmp_path, monkeypatch, capsys):
    def smaller(name):
        return read_yaml(name) | {"max_iterations": 1, "val_cases": ["case0003"], "img_size": 64}

    def fewer(folder, count, seed):
        write_cases(folder, 3, seed=seed, shape=(48, 48, 6), spacing=(7.0, 7.0, 30.0))

    write_cases = module.write_cases
    monkeypatch.setattr(module, "write_cases", fewer)
    monkeypatch.setattr(module, "read_yaml", smaller)
    monkeypatch.setattr(module, "TEST_CASES", ("case0001",))
    first = module.demo(tmp_path / "demo_output", seed=1)
    said = capsys.readouterr().out
    named = [line.split(":")[0].strip() for line in said.split("Look at:")[1].splitlines() if line.startswith("  ")]
    assert len(named) == 6
    for name in named:
        assert (first / name).exists(), name
    assert {p.name for p in (first / "result" / "predictions").iterdir()} == {
        f"case0001_{kind}.nii.gz" for kind in ("pred", "img", "gt")
    }
    assert module.demo(tmp_path / "demo_output", seed=1) == tmp_path / "demo_output-2"
