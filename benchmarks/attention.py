"""Both forms of the image encoder's attention, with and without a graph: which one `Attention.forward` should take.

ViT-B's heads at 512 px, a batch of two images: 1024 tokens of a global block, and 18 windows of 196. Times are of
forward, and of forward and backward, from q, k, v on; both forms must agree. Freed memory is kept, as by samlora's
commands (samlora.allocator).

    python benchmarks/attention.py      (half a minute)

Writes benchmarks/results/attention.json.
"""

from collections.abc import Callable, Sequence

import torch
from timing import heading, interleave, options, write_record
from torch import Tensor

from samlora.allocator import keep_freed_memory
from samlora.model.sam import Attention, _attend_matmul, _attend_widened

FORMS = {"matrix products": _attend_matmul, "widened": _attend_widened}
WIDTH, HEADS = 768, 12
PLACES = {"global block": (32, 2), "windows": (14, 18)}  # side of the grid of tokens, how many grids


def make_call(form: Callable, side: int, count: int, dtype: torch.dtype, graph: bool) -> Callable[[], Tensor]:
    """A function that attends once, and with `graph` goes back to q, k and v; always on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    attention = Attention(WIDTH, HEADS, side).requires_grad_(False)
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        table.copy_(torch.randn(table.shape, generator=generator) * 0.02)
    shape = (count, side**2, 3, HEADS, WIDTH // HEADS)
    qkv = torch.randn(shape, generator=generator).to(dtype).permute(2, 0, 3, 1, 4).requires_grad_(graph)

    def call() -> Tensor:
        qkv.grad = None
        with torch.set_grad_enabled(graph):
            q, k, v = qkv.unbind(0)
            out = form(q, k, v, *attention._relative(q, side, side))
        if graph:
            out.backward(torch.ones_like(out))
        return out.detach()

    return call


def measure(side: int, count: int, dtype: torch.dtype, graph: bool, repeats: int) -> dict:
    """Seconds of both forms in turn; raises AssertionError unless they agree within the rounding of `dtype`."""
    calls = {name: make_call(form, side, count, dtype, graph) for name, form in FORMS.items()}
    one, other = (call() for call in calls.values())
    torch.testing.assert_close(one, other, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)
    return interleave(calls, repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "attention")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args(arguments)
    keep_freed_memory()
    config = {"width": WIDTH, "heads": HEADS, "repeats": args.repeats, "threads": torch.get_num_threads()}
    what = "seconds of one attention, both forms in turn in one process; equal outputs asserted"
    record = heading(what, torch.device("cpu"), config, ("samlora", "torch"), kept=True)
    record["places"] = {
        f"{place}, {str(dtype).removeprefix('torch.')}, {'forward and backward' if graph else 'forward'}": measure(
            *grids, dtype, graph, args.repeats
        )
        for place, grids in PLACES.items()
        for dtype in (torch.float32, torch.bfloat16)
        for graph in (False, True)
    }
    write_record(record, args.output)
    for place, seconds in record["places"].items():
        print(place, {name: round(times["median"], 4) for name, times in seconds.items()})


if __name__ == "__main__":
    main()
