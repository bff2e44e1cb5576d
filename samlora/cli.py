"""Every command; wiring only."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from samlora.allocator import keep_freed_memory
from samlora.errors import InputError


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong flag as any other wrong input: in one line."""

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    0; 1 where a check found something that will fail; 2 after one line about input that cannot be used.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _Parser(prog="samlora", description="Adapt Segment Anything to medical images.")
    parser.add_argument("--version", action="version", version=f"samlora {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, flags, _) in COMMANDS.items():
        # The options of training and testing live in modules that take seconds to import.
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if arguments[:1] == [name]:
            flags(command)
    keep_freed_memory()
    try:
        given = vars(parser.parse_args(arguments))
        return COMMANDS[given.pop("command")][2](given) or 0
    except InputError as error:
        print(f"samlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("samlora: stopped", file=sys.stderr)
        return 130


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("samlora")
    except metadata.PackageNotFoundError:
        return "from source, not installed"


def _config_flag(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=text)


def _train_flags(parser: argparse.ArgumentParser) -> None:
    from samlora.options import add_flags
    from samlora.training.config import TrainConfig

    _config_flag(parser, "YAML with any of these options, or the name of a shipped one; flags win over it")
    add_flags(parser, TrainConfig)
    parser.add_argument(
        "--AdamW",
        dest="optimizer",
        action="store_const",
        const="adamw",
        default=argparse.SUPPRESS,
        help="the same as --optimizer adamw, which is the default",
    )


def _train(given: dict) -> None:
    from samlora.options import make, read_yaml
    from samlora.training.config import TrainConfig

    source = given.pop("config", None)
    values = {} if source is None else read_yaml(source)
    make(TrainConfig, values, str(source))  # so that a wrong value is reported where it stands
    if isinstance(given.get("resume"), str):
        from samlora.training.setup import continued

        config = continued(values | given)
    else:
        config = make(TrainConfig, values | given)
    from samlora.training.loop import train

    train(config)


def _test_flags(parser: argparse.ArgumentParser) -> None:
    from samlora.inference.config import TestConfig
    from samlora.options import add_flags

    _config_flag(parser, "config.yaml of a training run, or YAML with any of these options; flags win over it")
    add_flags(parser, TestConfig)
    parser.add_argument(
        "--metric-policy",
        dest="metric_policy",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def _test(given: dict) -> None:
    from samlora.inference.config import TestConfig
    from samlora.options import make, read_yaml
    from samlora.training.config import TrainConfig

    source = given.pop("config", None)
    values = {} if source is None else read_yaml(source)
    if "max_epochs" in values:
        make(TrainConfig, values, str(source))
        values = _run_of(Path(source), values)
    make(TestConfig, values, str(source))
    config = make(TestConfig, values | given)
    from samlora.inference.testing import test

    test(config)


def _run_of(config: Path, values: dict) -> dict:
    """What the config.yaml of a training run means to a test: its adapter (best, else last) and its base."""
    adapters = [config.parent / f"adapter_{which}.safetensors" for which in ("best", "last")]
    found = next((str(adapter) for adapter in adapters if adapter.is_file()), None)
    if found is None:
        raise InputError(f"--config {config}: that run has saved no adapter yet; let it train, or give --lora_ckpt")
    known = {"lora_ckpt": found, "dataset": values["dataset"]}
    return known if values["ckpt"] in (None, "random") else known | {"ckpt": values["ckpt"]}


def _prepare_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder of images and labels: images/ + labels/ (or masks/), nnU-Net's, one folder per case, and others",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DST",
        help="folder for train_npz/, test_vol_h5/, lists/ and recipe.yaml",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="NAME|FILE.yaml",
        help=f"recipe: your own YAML (samlora plan writes one) or a shipped one: {', '.join(_recipes())}",
    )
    parser.add_argument(
        "--size",
        type=int,
        help="side of the training slices, by cubic spline (default: the recipe's, else as they are)",
    )
    parser.add_argument("--test_cases", nargs="+", metavar="CASE", help="cases for testing, instead of the recipe's")
    parser.add_argument("--test_fraction", type=float, help="share of the cases for testing, instead of the recipe's")
    parser.add_argument("--series", help="which series of the DICOM folders: its number in the list, or its UID")
    parser.add_argument(
        "--medsam", action="store_true", help="also write MedSAM's files: medsam_npz/{train,test}/CASE.npz"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core, 8 at most)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="prepare again what is there already, and remove cases that SRC has not",
    )


def _prepare(given: dict) -> None:
    from samlora.data.prepare import prepare
    from samlora.data.recipe import Recipe

    recipe = Recipe.load(given.pop("dataset"))
    summary = prepare(given.pop("source"), given.pop("output"), recipe, **given)
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks
        print(summary)


def _recipes() -> list[str]:
    from samlora.files import shipped

    return sorted(path.stem for path in shipped("datasets").glob("*.yaml"))


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder of images and labels, as for samlora prepare")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where the recipe goes (default: the name of SRC + .yaml, here)"
    )


def _plan(given: dict) -> None:
    from samlora.data.plan import plan, write_plan

    made = plan(given["source"])
    output = Path(given["output"] or f"{Path(given['source']).resolve().name}.yaml")
    write_plan(made, output)
    print(made)
    print(f"recipe: {output}; look at it, change it, then: samlora prepare {given['source']} -o DST --dataset {output}")


def _check_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DATA", help="prepared data, or a folder that samlora prepare reads")
    parser.add_argument("--num_classes", type=int, help="foreground classes (default: what the data's recipe says)")
    parser.add_argument("--dataset", metavar="NAME|FILE.yaml", help="recipe that DATA is to be prepared with")


def _check(given: dict) -> int:
    from samlora.data.check import check
    from samlora.data.recipe import Recipe

    recipe = None if given["dataset"] is None else Recipe.load(given["dataset"])
    report = check(given["path"], num_classes=given["num_classes"], recipe=recipe)
    print(report)
    return 1 if report.failed else 0


def _evaluate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prediction", metavar="PRED", help="a label map, or a folder of them")
    parser.add_argument("reference", metavar="GT", help="the reference: a label map, or a folder of them")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for the tables and report.html")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="values, names, NAME=VALUE (default: those found)")
    parser.add_argument("--names", metavar="FILE", help="JSON or YAML with the names of the labels, or an adapter")
    parser.add_argument("--recipe", metavar="NAME|FILE.yaml", help="GT has a data set's values, PRED its classes")
    parser.add_argument(
        "--policy",
        default="strict",
        choices=("strict", "samed"),
        help="whose figures lead: strict (mm; undefined is excluded and counted) or samed (as published)",
    )
    parser.add_argument(
        "--tolerance",
        dest="tolerances",
        nargs="+",
        type=float,
        default=(2.0, 1.0, 3.0),
        metavar="MM",
        help="tolerances of surface Dice, the main one first (default: 2 1 3)",
    )
    parser.add_argument("--images", metavar="FOLDER", help="images to show the worst cases on")
    parser.add_argument("--threshold", type=float, help="all files are soft masks; what is above is class 1")
    parser.add_argument("--cases_shown", type=int, default=12, help="worst cases to show slice by slice (default: 12)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core, 8 at most)")
    parser.add_argument("--allow_missing", action="store_true", help="count a missing prediction as an empty one")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds other things")


def _evaluate(given: dict) -> None:
    from samlora.evaluation.folders import evaluate_folders

    print(evaluate_folders(given.pop("prediction"), given.pop("reference"), given.pop("output"), **given))


def _evaluate_prompts_flags(parser: argparse.ArgumentParser) -> None:
    from samlora.inference.prompt_study import PromptStudyConfig
    from samlora.options import add_flags

    parser.add_argument("data", metavar="DATA", help="prepared data: holds test_vol_h5/, or the .npy.h5 volumes")
    parser.add_argument("-o", dest="output", metavar="OUT", default=argparse.SUPPRESS, help="the same as --output")
    add_flags(parser, PromptStudyConfig)


def _evaluate_prompts(given: dict) -> None:
    from samlora.inference.prompt_study import PromptStudyConfig, evaluate_prompts
    from samlora.options import make

    evaluate_prompts(given.pop("data"), make(PromptStudyConfig, given))


def _compare_flags(parser: argparse.ArgumentParser) -> None:
    from samlora.compare.config import CompareConfig
    from samlora.options import add_flags

    parser.add_argument(
        "configs", metavar="CONFIG", nargs="+", help="YAML of a system, or a shipped one's name; lists are ablations"
    )
    parser.add_argument("-o", dest="output", metavar="OUT", default=argparse.SUPPRESS, help="the same as --output")
    add_flags(parser, CompareConfig)


def _compare(given: dict) -> None:
    from samlora.compare.config import CompareConfig
    from samlora.options import make

    configs = given.pop("configs")
    config = make(CompareConfig, given)
    from samlora.compare.compare import compare

    compare(configs, config)


def _predict_flags(parser: argparse.ArgumentParser) -> None:
    from samlora.inference.config import PredictConfig
    from samlora.options import add_flags

    parser.add_argument("inputs", metavar="IN", nargs="+", help="images, folders of images, DICOM folders; no labels")
    parser.add_argument("-o", dest="output", metavar="OUT", default=argparse.SUPPRESS, help="the same as --output")
    add_flags(parser, PredictConfig)


def _predict(given: dict) -> None:
    from samlora.inference.config import PredictConfig
    from samlora.options import make

    inputs = given.pop("inputs")
    config = make(PredictConfig, given)
    from samlora.inference.predict import predict

    predict(inputs, config)


def _app_flags(parser: argparse.ArgumentParser) -> None:
    from samlora.app.config import AppConfig
    from samlora.options import add_flags

    parser.add_argument("path", metavar="IMAGE|FOLDER", nargs="?", help="an image, or a folder of them, to choose from")
    add_flags(parser, AppConfig)


def _app(given: dict) -> None:
    from samlora.app.config import AppConfig
    from samlora.options import make

    path = given.pop("path")
    config = make(AppConfig, given)
    from samlora.app.server import serve

    serve(path, config)


def _download_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a base; without it: list all, with size, licence and purpose")
    parser.add_argument(
        "-o",
        "--output",
        default="checkpoints",
        metavar="FOLDER",
        help="folder for the file (default: checkpoints)",
    )


def _download(given: dict) -> None:
    from samlora.model.bases import listed
    from samlora.model.download import download

    if given["name"] is None:
        print(listed())
    else:
        print(f"base weights: {download(given['name'], Path(given['output']))}")


def _info_flags(parser: argparse.ArgumentParser) -> None:
    from samlora.model.config import InfoConfig
    from samlora.options import add_flags

    parser.add_argument(
        "path", metavar="FILE|DIR", nargs="?", help="an adapter or base of any format, or the folder of a training run"
    )
    add_flags(parser, InfoConfig)


def _info(given: dict) -> None:
    from samlora.info import info
    from samlora.model.config import InfoConfig
    from samlora.options import make

    path = given.pop("path")
    print(info(path, make(InfoConfig, given)))


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    from samlora.model.config import ConvertConfig
    from samlora.options import add_flags

    formats = "a file of samlora, SAMed or Sam_LoRA, or a folder of peft"
    parser.add_argument("source", metavar="IN", help=f"the adapter: {formats}")
    parser.add_argument("target", metavar="OUT", help="the file to write; a folder with --to peft")
    add_flags(parser, ConvertConfig)


def _convert(given: dict) -> None:
    from samlora.model.config import ConvertConfig
    from samlora.options import make

    source, target = given.pop("source"), given.pop("target")
    config = make(ConvertConfig, given)
    from samlora.model.convert import convert

    print(convert(source, target, config))


def _merge_flags(parser: argparse.ArgumentParser) -> None:
    from samlora.model.config import MergeConfig
    from samlora.options import add_flags

    parser.add_argument("-o", dest="output", metavar="OUT", default=argparse.SUPPRESS, help="the same as --output")
    add_flags(parser, MergeConfig)


def _merge(given: dict) -> None:
    from samlora.model.config import MergeConfig
    from samlora.options import make

    config = make(MergeConfig, given)
    from samlora.model.merge_file import merge_file

    print(merge_file(config))


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        default="demo_output",
        metavar="FOLDER",
        help="folder for everything the demo makes (default: demo_output)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the phantoms and of training (default: 1234)")
    parser.add_argument(
        "--scan", metavar="PATH", help="a CT or MR of your own (file or DICOM folder): opens it in the browser instead"
    )


def _demo(given: dict) -> None:
    from samlora.demo import demo, show

    if given["scan"] is None:
        demo(Path(given["output"]), given["seed"])
    else:
        show(Path(given["scan"]))


COMMANDS = {
    "demo": ("segment synthetic patients by boxes and by a trained adapter; or open your own scan", _demo_flags, _demo),
    "plan": ("look at a folder of images and labels, and write a recipe to edit", _plan_flags, _plan),
    "prepare": ("turn volumes and labels into training slices and test volumes", _prepare_flags, _prepare),
    "check": ("look for what would fail or spoil a result, before training", _check_flags, _check),
    "train": ("train an adapter (train.py)", _train_flags, _train),
    "test": ("measure an adapter on labelled volumes (test.py)", _test_flags, _test),
    "predict": ("segment images and volumes that have no labels", _predict_flags, _predict),
    "app": ("open a page for clicks, boxes and corrections on images and volumes", _app_flags, _app),
    "evaluate": ("measure label maps against references, with a report page", _evaluate_flags, _evaluate),
    "evaluate-prompts": (
        "measure clicks and boxes against references: Dice by prompt, clicks to a Dice",
        _evaluate_prompts_flags,
        _evaluate_prompts,
    ),
    "compare": ("train several systems on the same splits and put them in one table", _compare_flags, _compare),
    "info": ("say what an adapter, a base or a run folder is, or list the systems", _info_flags, _info),
    "convert": ("write an adapter in another format: samlora, SAMed, Sam_LoRA, peft", _convert_flags, _convert),
    "merge": ("write an adapter and its base as one model without LoRA", _merge_flags, _merge),
    "download": ("list the known base weights, or fetch one of them", _download_flags, _download),
}
