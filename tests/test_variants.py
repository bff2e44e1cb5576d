"""What a comparison is made of: options as the command gives them, and errors before anything is trained."""

import pytest

from samlora.compare.config import CompareConfig
from samlora.compare.variants import find_variants
from samlora.errors import InputError
from samlora.model.bases import find_base
from samlora.model.methods import SYSTEMS
from samlora.options import make

TINY = "vit_name=vit_ti"


def variants_of(systems: list[str], *settings: str):
    """As `samlora compare SYSTEMS --set SETTINGS` finds them."""
    return find_variants(systems, make(CompareConfig, {"data": "d", "output": "o", "set": [TINY, *settings]}).set)


@pytest.mark.parametrize(
    "setting, options",
    [
        ("options=dora=true,alpha=8", {"dora": True, "alpha": 8}),
        ("options=dora=true", {"dora": True}),
        ("options={dora: true, alpha: 8}", {"dora": True, "alpha": 8}),
        ("options=targets=q,v,ranks=[[0,8],[1,2]]", {"targets": ["q", "v"], "ranks": [[0, 8], [1, 2]]}),
        ("options=ranks={0: 8},targets=[q,k]", {"ranks": {0: 8}, "targets": ["q", "k"]}),
    ],
)
def test_options_of_a_system_are_one_mapping(setting, options):
    (variant,), notes = variants_of(["samed"], setting)
    assert variant.values["options"] == options and variant.name == "samed" and not notes


def test_a_list_in_brackets_is_one_value_where_the_option_is_a_list():
    (variant,), _ = variants_of(["samed"], "lora_layers=[0,1]")
    assert variant.values["lora_layers"] == [0, 1]
    several, _ = variants_of(["samed"], "lora_layers=[[0,1],[2]]", "rank=1,4")
    assert sorted((v.values["lora_layers"], v.values["rank"]) for v in several) == [
        ([0, 1], 1), ([0, 1], 4), ([2], 1), ([2], 4),
    ]  # fmt: skip


def test_options_go_to_the_systems_that_have_them():
    (samed, msa), notes = variants_of(["samed", "msa"], "options=dora=true")
    assert samed.values["options"] == {"dora": True} and msa.values["options"] == {"ratio": 0.25, "scale": 0.5}
    assert notes == ["msa: --set options dora left out: msa has no such option"]


def test_several_mappings_are_variants_of_the_systems_that_have_the_options():
    found, notes = variants_of(["samed", "msa"], "options={},{dora: true}")
    assert [v.name for v in found] == ["samed options=default", "samed options=dora=true", "msa"]
    assert notes == ["msa: --set options dora left out: msa has no such option"]


@pytest.mark.parametrize(
    "settings, words",
    [
        (["lora_layers=[0,1"], "--set lora_layers=[0,1: [0,1 is no value of YAML"),
        (["options=3"], "--set options 3: is not of the form NAME=VALUE"),
        (["options=ranks=[[0,8]"], "--set options ranks=[[0,8]: [[0,8] is no value of YAML"),
    ],
)
def test_what_is_no_value_is_one_line(settings, words):
    with pytest.raises(InputError) as error:
        variants_of(["samed"], *settings)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "lines, words",
    [
        ("system: samed\nlora_layers: [99]", "lora layers [99] do not exist in an encoder of 12 blocks"),
        ("system: samed\nvit_name: vit_h\nckpt: random\nlora_layers: [32]", "an encoder of 32 blocks"),
        ("system: samed\noptions: {ranks: {12: 8}}", "block 12"),
        ("system: samed\noptions: {alpha: abc}", "alpha='abc'"),
        ("system: samed\noptions: [{dora: true}, {dora: 'false'}]", "dora='false': give true or false"),
        ("system: samed\noptions: {rslora: true}", "give alpha"),
        ("system: msa\noptions: {depth: 2.5}", "depth=2.5"),
        ("system: msa\noptions: {ratio: 0.001}", "leaves none of 192 channels"),
        ("system: samed\nimg_size: 100", "100"),
        ("system: unet\nvit_name: null\nimg_size: 100", "try 96"),
        ("system: unet\nvit_name: null\nlora_layers: [1]", "unet has no such option"),
        ("system: medsam\nlora_plus: 16", "medsam has no such option"),
        ("system: samed\nvit_name: vit_x", "vit_x"),
        ("system: samed\nvit_name: null\nckpt: random", "needs vit_name"),
    ],
)
def test_what_training_would_refuse_is_known_before_it(tmp_path, lines, words):
    (tmp_path / "mine.yaml").write_text(("" if "vit_name" in lines else "vit_name: vit_ti\n") + lines + "\n")
    with pytest.raises(InputError) as error:
        find_variants([str(tmp_path / "mine.yaml")], {})
    assert words in str(error.value) and str(error.value).startswith("mine") and "\n" not in str(error.value)


def test_a_base_file_says_how_many_blocks_there_are(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"system: samed_h\nckpt: {find_base('vit_ti')}\nlora_layers: [12]\n")
    with pytest.raises(InputError, match="an encoder of 12 blocks"):
        find_variants([str(tmp_path / "mine.yaml")], {})


@pytest.mark.parametrize("system", [name for name, row in SYSTEMS.items() if row.trains])
def test_every_system_passes_the_check(tmp_path, system):
    values = "" if SYSTEMS[system].network else f"ckpt: random\nvit_name: {SYSTEMS[system].variant}\n"
    (tmp_path / "mine.yaml").write_text(f"system: {system}\n{values}")
    (variant,), notes = find_variants([str(tmp_path / "mine.yaml")], {})
    assert variant.system == system and not notes
