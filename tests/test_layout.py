"""The house rules, read off the source."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "samlora"
FILES = sorted(PACKAGE.rglob("*.py"))
# What each part may import of the others. `cli`, `demo` and `info` wire everything.
ALLOWED = {
    "data": set(),
    "model": set(),
    "evaluation": {"data"},
    "inference": {"data", "model", "evaluation"},
    "training": {"data", "model", "evaluation", "inference"},
    "app": {"data", "model", "evaluation", "inference"},
    "compare": {"data", "model", "evaluation", "inference", "training"},
}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).parts[0]
    if part not in ALLOWED:
        return
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("samlora.")}
    assert ours & (ALLOWED.keys() | {"cli", "demo", "info"}) <= ALLOWED[part] | {part}


def test_data_and_evaluation_know_no_torch_at_import():
    for part in ("data", "evaluation"):
        for path in (PACKAGE / part).glob("*.py"):
            top = {
                n.name
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.Import)
                for n in node.names
            }
            assert "torch" not in top, path


@pytest.mark.parametrize("code", ["import samlora", "from samlora.cli import main; main(['--help'])"])
def test_light_imports(code):
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint(sorted({{'torch', 'monai', 'matplotlib', 'nibabel'}} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert answer.stdout.strip().endswith("[]"), answer.stdout + answer.stderr


def test_names_of_data_sets_stand_in_yaml_only():
    names = {path.stem for path in (ROOT / "preprocess" / "datasets").glob("*.yaml")} - {"generic_ct"}
    assert "synapse" in names
    for path in FILES:
        words = set(re.findall(r"[\"'](\w+)[\"']", path.read_text()))
        assert not words & names or path.name == "demo.py", path


def test_nothing_is_unpickled():
    for path in FILES:
        text = path.read_text()
        assert "pickle.load" not in text and "allow_pickle=True" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert text.count("np.load(") == text.count("allow_pickle=False"), path


def test_devices_are_chosen_never_assumed():
    for path in FILES:
        assert ".cuda()" not in path.read_text(), path


def test_every_shipped_yaml_is_packed():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["samlora.configs"] == "*.yaml"
    for path in (ROOT / "configs").glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
    packages = setup["options"]["packages"].split()
    for folder in {p.parent for p in FILES}:
        assert ".".join(folder.relative_to(ROOT).parts) in packages


@pytest.mark.parametrize("part", sorted({p.parent.name for p in PACKAGE.rglob("*") if p.suffix in (".html", ".css", ".js")}))
def test_files_of_pages_are_packed(part):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    files = {p.name for p in (PACKAGE / part).iterdir() if p.suffix in (".html", ".css", ".js")}
    assert set(setup["options.package_data"][f"samlora.{part}"].split()) == files
