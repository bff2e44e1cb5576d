"""Loading and augmenting training samples: samlora.data on one CPU core against SAMed's way with scipy, per sample.

Slices of a drawn CT are written as `samlora prepare` writes them (compressed npz) and read back by both, turned by the
same transforms, brought to 512 px and put into batches. The batches must be equal: images to 2e-5 (values are about 0
to 1), labels exactly. One thread for both, so figures are samples per second per core.

    python benchmarks/loading.py       (about a minute)

Writes benchmarks/results/loading.json.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from plain import load_sample
from scipy.ndimage import gaussian_filter, zoom
from timing import heading, interleave, options, ratios, write_record
from torch import Tensor

from samlora.data.arrays import write_slice
from samlora.data.augment import sample_transform
from samlora.data.batch import make_batch
from samlora.data.cache import SliceCache
from samlora.data.dataset import SliceDataset, find_slices

BASELINE = "scipy per sample"
OURS, CACHED = "samlora", "samlora, slices decoded once"


def write_slices(folder: Path, count: int, side: int) -> None:
    """Slices with the texture of a CT (smooth shapes and fine noise, 12 bits) and eight classes."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = gaussian_filter(rng.standard_normal((16, 16)), 1)
        shapes = zoom(coarse / coarse.std(), side / 16, order=1)
        image = np.clip(shapes * 0.2 + 0.4 + rng.normal(0, 0.05, shapes.shape), 0, 1)
        label = np.digitize(shapes, np.linspace(-1.5, 1.5, 8)).astype(np.uint8)
        write_slice(folder / f"case_slice{index:03d}.npz", (image * 4095).round().astype(np.float32) / 4095, label)


def ours(dataset: SliceDataset, epoch: int, batch: int, side: int) -> list[tuple[Tensor, Tensor]]:
    """All samples of an epoch in batches, as training makes them on a CPU."""
    made = []
    for start in range(0, len(dataset), batch):
        samples = [dataset[epoch, index] for index in range(start, min(start + batch, len(dataset)))]
        images, labels = ([torch.from_numpy(getattr(s, kind)) for s in samples] for kind in ("image", "label"))
        made.append(make_batch(images, labels, [s.transform for s in samples], side, "cpu"))
    return made


def theirs(dataset: SliceDataset, epoch: int, batch: int, side: int) -> list[tuple[Tensor, Tensor]]:
    """The same batches: every sample by itself through scipy, then stacked as a DataLoader does."""
    generators = [np.random.default_rng([dataset.seed, 2, epoch, index]) for index in range(len(dataset))]
    transforms = [sample_transform(generator) for generator in generators]  # those of the dataset, so that all is equal
    samples = [load_sample(item.path, transform, side) for item, transform in zip(dataset.slices, transforms)]
    parts = [samples[start : start + batch] for start in range(0, len(samples), batch)]
    return [tuple(torch.stack(tensors) for tensors in zip(*part)) for part in parts]


def measure(source: int, side: int, count: int, batch: int, repeats: int) -> dict:
    """Seconds of an epoch of `count` samples; raises AssertionError unless both make the same batches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slices(folder, count, source)
        slices = find_slices(folder)
        files = SliceDataset(slices, seed=0)
        decoded = SliceDataset(slices, seed=0, decoded=SliceCache(folder / "cache", slices))
        for dataset in (files, decoded):
            for (a, b), (image, label) in zip(ours(dataset, 0, batch, side), theirs(files, 0, batch, side)):
                torch.testing.assert_close(a, image, atol=2e-5, rtol=0)
                assert torch.equal(b, label)
        seconds = interleave(
            {
                BASELINE: lambda: theirs(files, 0, batch, side),
                OURS: lambda: ours(files, 0, batch, side),
                CACHED: lambda: ours(decoded, 0, batch, side),
            },
            repeats,
            published=(BASELINE,),
        )
    return {
        "seconds_of_all_samples": seconds,
        "samples_per_second": {name: round(count / times["median"], 2) for name, times in seconds.items()},
        "times_as_fast_as_scipy": ratios(seconds, BASELINE),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "loading")
    parser.add_argument("--sources", type=int, nargs="+", default=[224, 512], help="sides of the stored slices")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--count", type=int, default=36)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = {name: getattr(args, name) for name in ("sources", "size", "count", "batch", "repeats")} | {"threads": 1}
    what = "samples per second of loading and augmenting, variants in turn in one process, one thread; equal batches"
    record = heading(what, torch.device("cpu"), config, kept=True)
    record["stored_side"] = {
        str(source): measure(source, args.size, args.count, args.batch, args.repeats) for source in args.sources
    }
    write_record(record, args.output)
    for source, result in record["stored_side"].items():
        for name, rate in result["samples_per_second"].items():
            ratio = result["times_as_fast_as_scipy"].get(name, {"median": 1.0})["median"]
            print(f"stored at {source}: {name}: {rate} samples/s, {ratio} times as fast as scipy")


if __name__ == "__main__":
    main()
