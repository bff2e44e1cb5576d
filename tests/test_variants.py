"""What a comparison is made of: options as the command gives them, and errors before anything is trained."""

import pytest

from samlora.compare.config import CompareConfig
from samlora.compare.variants import find_variants
from samlora.errors import InputError
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
