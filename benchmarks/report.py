"""docs/benchmarks.md from the records in benchmarks/results: measured beside target, nothing else.

python benchmarks/report.py
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from timing import RESULTS, ROOT

from samlora.files import whole

HEAD = """# Speed and memory

Made by `benchmarks/report.py` from `benchmarks/results/*.json`; `make bench` measures everything again and makes this
page. The baseline is stock `segment_anything` with textbook LoRA and every step as SAMed published it
(`benchmarks/plain.py`). Variants run in turn in one process, their outputs are compared first, and ratios are those of
medians, with those of the shortest times in brackets. The machine was shared while these were taken; its load at the
start stands below each table. Nothing on this page was measured on a GPU.
"""
NOT_MEASURED = "not measured"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def times(ratio: Mapping[str, float] | None) -> str:
    """A ratio as it is shown; None for the baseline itself."""
    return "1" if ratio is None else f"{ratio['median']}x ({ratio['min']}x)"


def source(record: Mapping) -> str:
    config = ", ".join(f"{name} {value}" for name, value in record["config"].items())
    known, commit = record["versions"], str(record["commit"])
    versions = ", ".join(f"{name} {known[name]}" for name in ("torch", "numpy", "scipy") if name in known)
    return (
        f"{record['device']}, load {record['load_at_start']:.1f}; {config}; {versions}; "
        f"commit `{commit[:12]}`{' and changes on top' if commit.endswith('+') else ''}.\n"
    )


def speeds(record: Mapping, targets: Mapping[str, str], gpu: str) -> str:
    """Variants of a record with seconds, ratio and target."""
    rows = [
        (
            name,
            f"{seconds['median']:.3f}",
            f"{seconds['min']:.3f}",
            times(record["times_as_fast_as_stock_fp32"].get(name)),
            targets.get(name, ""),
            f"{NOT_MEASURED} (target {gpu})" if name in targets else NOT_MEASURED,
        )
        for name, seconds in record["seconds"].items()
    ]
    return table(("variant", "median s", "min s", "times as fast", "target", "GPU"), rows)


def encoder(record: Mapping) -> str:
    equal = record["equality"]
    return (
        speeds(record, {"samlora fp32": ">= 1.15x", "samlora bf16": ">= 3x"}, ">= 10x")
        + f"\nLargest difference of fp32 embeddings {equal['largest_difference_fp32']:.1e}; bf16 moves them by "
        f"{100 * equal['relative_error_bf16']:.2f} % (norm of the difference by norm).\n"
    )


def step(record: Mapping) -> str:
    batch, losses = record["config"]["batch"], record["losses_of_two_steps"]
    memory = [
        (
            name,
            f"{peak['bytes'] / 2**30:.2f}",
            f"{peak['by_stock']}x",
            "" if "stock" in name else "<= 0.6x",
            NOT_MEASURED,
        )
        for name, peak in record["peak_memory"].items()
    ]
    shown = "; ".join(f"{name} {', '.join(f'{loss:.6f}' for loss in values)}" for name, values in losses.items())
    return (
        speeds(record, {"samlora fp32": ">= 1.15x", "samlora bf16": ">= 3x"}, ">= 10x")
        + f"\nBatch {batch}; the target names 12. Losses of two steps: {shown}.\n\n"
        + table(("peak of a process", "GiB", "by stock", "target", "GPU"), memory)
        + f"\nAt batch {batch} a larger share of the peak is Python, libraries and weights than at the target's 12.\n"
    )


def loading(record: Mapping) -> str:
    rows = [
        (side, name, rate, times(result["times_as_fast_as_scipy"].get(name)), "" if "scipy" in name else ">= 5x")
        for side, result in record["stored_side"].items()
        for name, rate in result["samples_per_second"].items()
    ]
    return table(("stored at", "variant", "samples/s, one core", "times as fast", "target"), rows)


def metrics(record: Mapping) -> str:
    rows = []
    for name, figures in record["whole_volume"].items():
        if "seconds_of_all" in figures:
            seconds = figures["seconds_of_all"]
            rows.append((name, len(figures["organs"]), *(f"{seconds[who]:.2f}" for who in ("samlora", "medpy"))))
            rows[-1] += (f"{figures['ratio_of_all']}x",)
    small = [
        (
            name,
            *(f"{1e3 * figures[who]['median']:.2f}" for who in ("samlora", "medpy")),
            f"{figures['ratio_of_medians']}x",
        )
        for name, figures in record["small_inputs"].items()
    ]
    return (
        table(("measure", "organs", "samlora s", "MedPy s", "times as fast"), rows)
        + "\n"
        + table(("HD95 of small inputs", "samlora ms", "MedPy ms", "times as fast"), small)
    )


SECTIONS = (
    ("encoder", "Image encoder, forward pass", encoder),
    ("step", "Training step and its peak memory", step),
    ("loading", "Loading and augmenting, samples at 512 px", loading),
    ("metrics", "Measuring a volume", metrics),
)


def page(results: Path) -> str:
    """The page; a section whose record is missing says so."""
    parts = [HEAD]
    for name, title, show in SECTIONS:
        path = results / f"{name}.json"
        body = f"{NOT_MEASURED}; run `python benchmarks/{name}.py`.\n"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            body = f"{show(record)}\n{source(record)}"
        parts.append(f"## {title}\n\n{body}")
    parts.append(
        "## Not measured\n\nA whole volume predicted, measured and written; decoder-only training with cached "
        "embeddings; ViT-H; anything on a GPU.\n"
    )
    return "\n".join(parts)


def main() -> None:
    with whole(ROOT / "docs" / "benchmarks.md") as part:
        part.write_text(page(RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
