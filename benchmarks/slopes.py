"""Log-probs and entropies of a micro-batch's tokens with and without entropy slopes, which `polarity.enable` adds.

Random hidden states go through an output layer, in chunks, as in the pass of the old log-probs; on a GPU in bfloat16.
"""

import time
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.report import parser_of, table, write_json
from recipe.skpo.engine.log_probs import log_probs


def seconds(
    head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, slopes: bool, repeats: int
) -> list[float]:
    """Return the seconds of each pass; one before them is not counted."""
    found = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        with torch.no_grad():
            values = log_probs(head, hidden, labels, with_slopes=slopes)
        assert all(bool(column.isfinite().all()) for column in values)  # waits for the device, too
        found.append(time.perf_counter() - begun)
    return found[1:]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    gpu = torch.cuda.is_available()
    parser = parser_of("slopes", __doc__ or "")
    parser.add_argument("--vocabulary", type=int, default=151_936 if gpu else 49_152)
    parser.add_argument("--width", type=int, default=3_584 if gpu else 576)
    parser.add_argument("--tokens", type=int, default=16_384 if gpu else 2_048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    head = torch.nn.Linear(options.width, options.vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(options.tokens, options.width, device=device, dtype=dtype)
    labels = torch.randint(options.vocabulary, (options.tokens,), device=device)
    found = {}
    for name, slopes in (("log-probs and entropies", False), ("with entropy slopes", True)):
        found[name] = seconds(head, hidden, labels, slopes, options.repeats)
    print(table(["pass", "seconds"], [[name, f"{median(values):.3f}"] for name, values in found.items()]))
    shape = {"vocabulary": options.vocabulary, "width": options.width, "tokens": options.tokens}
    write_json(options.out, {**shape, "device": device, "seconds": found})
    return 0
