"""Checks for a machine with a GPU before it is trusted: ``bash scripts/gpu_check.sh``.

One function per part; the script bounds each in time and prints the table at the end.

    attention     losses and gradients of every attention against float32, then seconds and memory of an update
    default       the default job, killed with SIGKILL after its first checkpoint if ``resume`` follows
    resume        the same command again: it resumes from that checkpoint and ends
    compare       SKPO, GRPO and GRPO with separate rows at 128 prompts of 8 responses
    determinism   two runs side by side with full_determinism: whether their metrics are equal

``--device cpu --tiny`` runs the same code with the model of tests/e2e/tiny.py.
"""

import argparse
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import psutil

from benchmarks.report import table
from recipe.skpo.output.metrics import json_lines, read_lines, training_steps
from recipe.skpo.output.summary import held_out

ROOT = Path(__file__).resolve().parents[1]
MACHINE = ("timing", "perf/", "seconds")
"""Parts of names of metrics that measure the machine."""
METRICS = "out/metrics.jsonl"
GAP = "skpo/rollout_actor_logprob_gap/mean"
MOST_GAP = 0.04
"""Nats per token between rollout and actor that bfloat16 explains: SmolLM2 had 0.013 to 0.027 per step on an H200."""


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        part: of the check.
        what: was measured.
        values: name to number or text.
        passed: None if there is nothing to pass.
    """

    part: str
    what: str
    values: dict[str, Any]
    passed: bool | None = None


class Check:
    """The options, and where results go: printed and appended to ``results.jsonl`` at once."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read the options and make the folder."""
        self.cpu, self.tiny = options.device == "cpu", bool(options.tiny)
        self.parts, self.data = options.parts, options.data
        self.out: Path = options.out.resolve()
        self.overrides: list[str] = options.overrides
        self.out.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, what: str, values: dict[str, Any], passed: bool | None = None) -> None:
        """Note a result."""
        line = json.dumps(asdict(Result(part, what, values, passed)))
        print(line, flush=True)
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class Sizes:
    """A model and its rows of SKPO; ``response`` is the longest, ``repeats`` is of the timing."""

    model: dict[str, Any]
    prompts: int
    group: int
    problem: int
    segment: int
    response: int
    repeats: int

    def __str__(self) -> str:
        """Describe the sizes in one line."""
        rows = f"{self.prompts} prompts x {self.group}, q {self.problem}, s {self.segment}, up to {self.response}"
        return f"{self.model['num_hidden_layers']} layers of {self.model['hidden_size']}, {rows}"


SMALL = Sizes(
    model=dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    | dict(num_key_value_heads=2),
    prompts=2, group=3, problem=20, segment=9, response=35, repeats=1,
)  # fmt: skip
LARGE = Sizes(  # eight layers of Qwen2.5-1.5B; responses of 830 tokens on average
    model=dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=8)
    | dict(num_attention_heads=12, num_key_value_heads=2),
    prompts=4, group=8, problem=160, segment=270, response=1106, repeats=3,
)  # fmt: skip


def attention(check: Check) -> None:
    """Compare losses and gradients with float32 padded rows, then time an update."""
    import torch

    import recipe.skpo.engine.backends  # noqa: F401
    from benchmarks.update import Shape
    from recipe.skpo.engine import attention as attentions

    device = torch.device("cpu" if check.cpu else "cuda")
    dtype = torch.float32 if check.cpu else torch.bfloat16
    if check.cpu:
        torch.set_num_threads(1)  # for so small a model more of them only wait for each other
    name = "cpu" if check.cpu else torch.cuda.get_device_name()
    check.add("attention", "device", {"name": name, "torch": torch.__version__, "dtype": str(dtype)})
    check.add(
        "attention", "cuDNN sdpa off", {"enabled": torch.backends.cuda.cudnn_sdp_enabled()},
        not torch.backends.cuda.cudnn_sdp_enabled(),
    )  # fmt: skip
    small, large = SMALL, SMALL if check.tiny else LARGE
    rows = at_64(Shape(small.prompts, small.group, small.problem, small.segment, small.response))
    exact = Update(small, None, True, device, torch.float32).run(rows)
    noise = Update(small, None, True, device, dtype).run(rows).distance(exact)
    kinds: list[str] = [attentions.VARLEN, *([] if check.cpu else [attentions.BLOCKS])]
    for kind in kinds:
        for share in (True, False):
            with guarded_part(check, "attention", f"{kind}, {'shared' if share else 'separate'}"):
                correct(check, kind, share, Update(small, kind, share, device, dtype).run(rows), exact, noise)
    if check.cpu:
        check.add("attention", "skpo_blocks", {"not run": "FlexAttention has no backward on a CPU"})
    shape = Shape(large.prompts, large.group, large.problem, large.segment, large.response)
    measured = shape.rows(torch.Generator().manual_seed(1))
    check.add("attention", "an update is of", {"shape": str(large), "checkpointed": True})
    every: list[tuple[str | None, bool]] = [(kind, share) for kind in kinds for share in (True, False)]
    for used, share in [*every, (None, False)]:
        with guarded_part(check, "attention", f"update, {used or 'padded rows'}, {'shared' if share else 'separate'}"):
            timed(check, Update(large, used, share, device, dtype, checkpointed=True), measured, large.repeats)


@dataclass(frozen=True)
class Gradients:
    """Results of an update: response log-probs and gradient, both float32 on the CPU, and counts of kernels."""

    log_probs: Any
    gradient: Any
    positions: list[int]
    kernels: int
    sdpa: int
    documents: bool

    def distance(self, other: "Gradients") -> tuple[float, float]:
        """Return the log-probs' mean distance in nats, and the gradients' relative to the other's norm."""
        gap = (self.log_probs - other.log_probs).abs().mean()
        relative = (self.gradient - other.gradient).norm() / other.gradient.norm()
        return float(gap), float(relative)


class Counter:
    """Counts a function's calls. ``function`` is a plain one, since torch.compile stops at a mock."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Wrap ``function``."""
        self.calls = 0

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        self.function = counted


class Update:
    """A random Qwen2 in one dtype behind the engine that computes the actor's rows, without FSDP and Ray."""

    def __init__(
        self, sizes: Sizes, kind: str | None, share: bool, device: Any, dtype: Any, checkpointed: bool = False
    ) -> None:
        """Make the model and the engine."""
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        from recipe.skpo.engine.fsdp import PackedEngine, use_packed

        torch.manual_seed(0)
        config = Qwen2Config(**sizes.model, max_position_embeddings=4096, use_sliding_window=False)
        self.device = device
        self.model: Any = Qwen2ForCausalLM(config).to(device, dtype).train()
        self.model.set_attn_implementation("sdpa")
        if checkpointed:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        engine: Any = object.__new__(cast(Any, PackedEngine))
        engine.kind, engine.share = kind, share
        engine.pad_to_length, engine.pad_to_length_bucket = False, 1
        engine.use_ulysses_sp, engine.rank = False, 0
        engine.engine_config = SimpleNamespace(entropy_checkpointing=False)
        self.engine = engine
        if kind is not None:
            use_packed(self.model, kind)

    def run(self, rows: Sequence[Any], keep: bool = True) -> Gradients:
        """Forward and backward, a micro-batch per prompt; ``keep`` copies log-probs and gradient to the CPU."""
        import torch

        from benchmarks.update import micro_batch
        from recipe.skpo.engine import attention as attentions
        from recipe.skpo.engine.packing import PackedSequence

        self.model.zero_grad()
        scored, positions, documents = [], [], True
        of_sdpa, of_kernels = Counter(torch.nn.functional.scaled_dot_product_attention), Counter(attentions._forward)
        with (
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", of_sdpa.function),
            mock.patch.object(attentions, "_forward", of_kernels.function),
        ):
            for row in rows:
                data = micro_batch([row]).to(self.device)
                inputs, arguments = self.engine.prepare_model_inputs(data)
                positions.append(inputs["input_ids"].numel())
                packed = inputs.get("packed")
                if isinstance(packed, PackedSequence):
                    documents &= whole(packed)
                output = self.engine.prepare_model_outputs(self.model(**inputs), arguments, data, None)
                # verl's padded rows have log-probs on the prompt, too.
                values = of_responses(output["log_probs"].values().float(), data)
                (values * torch.linspace(-1, 2, len(values), device=values.device)).mean().backward()
                scored.append(values.detach())
        gradients = [p.grad.flatten().float().cpu() for p in self.model.parameters() if keep and p.grad is not None]
        kept: tuple[Any, Any] = (torch.cat(scored).cpu(), torch.cat(gradients)) if keep else (None, None)
        return Gradients(*kept, positions, of_kernels.calls, of_sdpa.calls, documents)


def of_responses(values: Any, data: Any) -> Any:
    """Take the response tokens' log-probs from verl's rows of prompt and response."""
    import torch

    ends, lengths = data["input_ids"].offsets()[1:].tolist(), data["responses"].offsets().diff().tolist()
    return torch.cat([values[end - length - 1 : end - 1] for end, length in zip(ends, lengths, strict=True)])


def whole(packed: Any) -> bool:
    """Tell whether the documents are as the kernels need them: int32, none empty, up to the last position."""
    import torch

    pieces = packed.pieces.cu_seqlens
    return bool(pieces.dtype == torch.int32 and (pieces.diff() > 0).all() and pieces[-1] == packed.positions)


def at_64(shape: Any) -> list[Any]:
    """Make rows whose padded length is 64 modulo 128, and whose packed one is as well.

    With such lengths cuDNN's attention has returned NaN gradients (pytorch issue 196678).
    """
    import torch

    rows = shape.rows(torch.Generator().manual_seed(0))
    for prompts, responses in rows:
        longest = len(prompts[-1])
        responses[1] = torch.randint(1, 1000, (64 + 128 * (longest // 64 + 1) - longest,))
        distinct = {tuple(prompt.tolist()): len(prompt) for prompt in prompts}
        shared = sum(distinct.values()) + sum(map(len, responses[:-1]))
        responses[-1] = torch.randint(1, 1000, (1 + (63 - shared) % 128,))
    return rows


def correct(
    check: Check, kind: str, share: bool, found: Gradients, exact: Gradients, noise: tuple[float, float]
) -> None:
    """Check that an attention's results are those of float32 within the noise of padded rows of its dtype."""
    import torch

    gap, relative = found.distance(exact)
    layers = SMALL.model["num_hidden_layers"] * len(found.positions)
    finite = bool(torch.isfinite(found.log_probs).all() and torch.isfinite(found.gradient).all())
    values: dict[str, Any] = {
        "log-prob gap": gap,
        "padded rows": noise[0],
        "gradient": relative,
        "padded rows' gradient": noise[1],
    }
    values |= {"positions": found.positions, "kernels": found.kernels, "sdpa": found.sdpa, "finite": finite}
    close = gap <= max(2 * noise[0], 1e-5) and relative <= max(2 * noise[1], 1e-4)
    calls = layers * (2 if share else 1) if kind == "skpo_varlen" else 0
    at = not share or kind != "skpo_varlen" or all(count % 128 == 64 for count in found.positions)
    passed = close and finite and at and found.documents and found.sdpa == 0 and found.kernels == calls
    check.add("attention", f"{kind}, {'shared' if share else 'separate'}", values, passed)


def timed(check: Check, update: Update, rows: Sequence[Any], repeats: int) -> None:
    """Measure seconds and peak memory of an update."""
    import torch

    seconds = []
    for _ in range(repeats + 1):
        if not check.cpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        found = update.run(rows, keep=False)
        if not check.cpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    values: dict[str, Any] = {"seconds": statistics.median(seconds[1:]), "first": seconds[0]}
    values["positions"] = sum(found.positions)
    if not check.cpu:
        values["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    name = f"update, {update.engine.kind or 'padded rows'}, {'shared' if update.engine.share else 'separate'}"
    check.add("attention", name, values)


@contextmanager
def guarded_part(check: Check, part: str, what: str) -> Iterator[None]:
    """Note an error, out of memory for example, as a result; the next measurements still run."""
    try:
        yield
    except Exception as error:  # one attention of several
        check.add(part, what, {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}, False)


# ---------------------------------------------------------------- runs


def job(check: Check, folder: Path, *more: str, fast: bool = True) -> list[str]:
    """Return the command of a run in ``folder``: the embedded model's, or the tiny model's.

    ``fast`` leaves out vLLM's CUDA graphs, which take about a minute to make.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if check.tiny:
        sys.path.insert(0, str(ROOT))
        from tests.e2e.tiny import overrides

        settings = [*overrides(folder), "actor_rollout_ref.model.use_remove_padding=true", "packed_attention=varlen"]
        settings += ["share_prefixes=true", f"platform={'cpu' if check.cpu else 'gpu'}"]
    else:
        settings = [f"platform={'cpu' if check.cpu else 'gpu'}", f"output_dir={folder / 'out'}"]
    if not check.cpu:
        settings += ["++ray_kwargs.ray_init.include_dashboard=false"]
        settings += ["actor_rollout_ref.rollout.enforce_eager=true"] if fast else []
    # Of equal keys the last one counts; Hydra refuses a choice of a group that is given twice.
    last = {item.split("=", 1)[0].lstrip("+"): item for item in [*settings, *more, *check.overrides]}
    return [sys.executable, "-m", "recipe.skpo.main", *last.values()]


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a run; its output goes to ``run.log``."""
    log = (folder / "run.log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for a run.

    Raises:
        RuntimeError: it failed; with the last lines that it printed.
    """
    if process.wait():
        said = (folder / "run.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RuntimeError(f"exit status {process.returncode}: {' | '.join(said[-2:])}"[:400])


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a run with SIGKILL and wait until the processes below it are gone, for 60 s at most."""
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(below, timeout=60)
    for left in alive:
        left.kill()


def per_step(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Take median seconds of a step and of its phases, without the first step, which compiles."""
    later = lines[1:] or lines
    names = [name for name in later[-1] if name.startswith("timing_s/") and name.count("/") == 1]
    return {
        name.removeprefix("timing_s/"): round(statistics.median(line.get(name, 0.0) for line in later), 3)
        for name in names
    }


def mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    """Average a metric over the steps that have it, NaN without any."""
    values = [line[name] for line in lines if name in line]
    return sum(values) / len(values) if values else float("nan")


def default_command(check: Check) -> tuple[Path, list[str]]:
    """Return folder and command of the default job; of the tiny model four steps."""
    folder = check.out / "default"
    more = ["trainer.total_training_steps=4", "trainer.test_freq=1000"] if check.tiny else []
    return folder, job(check, folder, *more, fast=False)


def default(check: Check) -> None:
    """Run the default job, up to a SIGKILL after its first checkpoint if ``resume`` is to follow."""
    folder, command = default_command(check)
    process = start(command, folder)
    if "resume" in check.parts:
        marker = folder / "out/checkpoints/latest_checkpointed_iteration.txt"
        while not marker.is_file() and process.poll() is None:
            time.sleep(0.2)
        if process.poll() is None:
            kill(process)
            saved = marker.read_text(encoding="utf-8").strip()
            check.add("default", "killed with SIGKILL after the checkpoint of step", {"step": int(saved or 0)})
        else:
            finish(process, folder)
    else:
        finish(process, folder)
    describe(check, "default", folder)


def describe(check: Check, part: str, folder: Path) -> None:
    """Note a run's held-out numbers, seconds, and the gap between rollout and actor."""
    lines = training_steps(folder / METRICS)
    for line in read_lines(folder / METRICS):
        for source, numbers in held_out(line).items():
            check.add(part, f"held-out {source}, step {line['step']}", numbers)
    check.add(part, "median seconds of a step", per_step(lines))
    gap = mean(lines, GAP)
    check.add(part, "log-prob gap of rollout and actor", {"mean": gap, "at most": MOST_GAP}, gap < MOST_GAP)


def resume(check: Check) -> None:
    """Run the command of ``default`` again: it resumes from the checkpoint and ends."""
    folder, command = default_command(check)
    before = [line["step"] for line in training_steps(folder / METRICS)]
    finish(start(command, folder), folder)
    lines = training_steps(folder / METRICS)
    steps = [line["step"] for line in lines]
    check.add(
        "resume", "steps before and after", {"before": len(before), "after": len(steps)},
        steps == list(range(1, len(steps) + 1)) and len(steps) > len(before) > 0,
    )  # fmt: skip
    describe(check, "resume", folder)


def compare(check: Check) -> None:
    """Train SKPO, verl's GRPO (separate rows) and GRPO with shared prompts on the same prompts."""
    more = ["trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=-1"]
    more += ["trainer.total_training_steps=3"]
    if not check.tiny:
        more += ["data.train_batch_size=128", "actor_rollout_ref.actor.ppo_mini_batch_size=32", "skpo.group_size=8"]
        more += [f"data={'gsm8k' if check.data else 'arithmetic'}"]
        more += [f"data.source={Path(check.data).resolve()}"] if check.data else []
        if not check.cpu:
            budget = 65536
            more += [f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={budget}"]
            more += [f"actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu={budget}"]
            more += ["actor_rollout_ref.rollout.max_num_seqs=1024"]
    found: dict[str, dict[str, float]] = {}
    for name, options in {
        "SKPO": ["method=skpo", "share_prefixes=true"],
        "GRPO, separate rows": ["method=grpo", "share_prefixes=false"],
        "GRPO, shared": ["method=grpo", "share_prefixes=true"],
    }.items():
        with guarded_part(check, "compare", name):
            folder = check.out / "compare" / name.replace(", ", "-").replace(" ", "-").lower()
            finish(start(job(check, folder, *more, *options), folder), folder)
            lines = training_steps(folder / METRICS)
            tokens = sum(line.get("actor/packing/tokens_sum", 0) for line in lines)
            positions = sum(line.get("actor/packing/positions_sum", 0) for line in lines)
            found[name] = {
                **per_step(lines),
                "generated": mean(lines, "skpo/tokens/generated"),
                "positions per token": round(positions / tokens, 3) if tokens else float("nan"),
                "log-prob gap": mean(lines, GAP),
            }
            check.add("compare", name, found[name])
            if name != "SKPO" and "SKPO" in found:
                ratios = {key: found["SKPO"][key] / found[name][key] for key in ("step", "update_actor", "generated")}
                ratios["step per token"] = ratios["step"] / ratios["generated"]
                check.add("compare", f"SKPO / {name}", {key: round(ratio, 3) for key, ratio in ratios.items()})


def determinism(check: Check) -> None:
    """Train two steps twice, side by side, with ``full_determinism``, and compare the metrics."""
    more = ["full_determinism=true", "trainer.total_training_steps=2", "trainer.val_before_train=false"]
    more += ["trainer.test_freq=-1", "trainer.save_freq=-1"]
    if not check.cpu:
        more += ["actor_rollout_ref.rollout.gpu_memory_utilization=0.3"]
        more += ["actor_rollout_ref.actor.fsdp_config.full_determinism=true"]
        # One request at a time and nothing cached; otherwise two runs on an H200 differed from the first samples on.
        more += ["actor_rollout_ref.rollout.max_num_seqs=1", "actor_rollout_ref.rollout.enable_prefix_caching=false"]
        more += ["data.train_batch_size=4"]
    folders = [check.out / "determinism" / name for name in ("first", "second")]
    processes = [start(job(check, folder, *more), folder) for folder in folders]
    for process, folder in zip(processes, folders, strict=True):
        finish(process, folder)
    runs = [
        [
            {k: v for k, v in line.items() if not any(part in k for part in MACHINE)}
            for line in training_steps(folder / METRICS)
        ]
        for folder in folders
    ]
    differing = sorted(
        {name for a, b in zip(*runs, strict=True) for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    )
    values = {"steps": len(runs[0]), "metrics": len(runs[0][0]), "differing": len(differing), "first": differing[:3]}
    check.add("determinism", "two runs are equal" if not differing else "two runs differ", values, not differing)


PARTS: dict[str, Callable[[Check], None]] = {
    "attention": attention,
    "default": default,
    "resume": resume,
    "compare": compare,
    "determinism": determinism,
}


# ---------------------------------------------------------------- command


def shown(value: Any) -> str:
    """Format a value of the table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(out: Path) -> int:
    """Print the table; returns 1 if something failed."""
    results = [Result(**line) for line in json_lines(out / "results.jsonl")]
    words = {True: "ok", False: "FAILED", None: ""}
    rows = [
        [r.part, r.what, ", ".join(f"{name} {shown(value)}" for name, value in r.values.items()), words[r.passed]]
        for r in results
    ]
    print(table(["part", "what", "measured", ""], rows))
    return int(any(result.passed is False for result in results))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part, or print the ``table``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bash scripts/gpu_check.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the model and task of tests/e2e/tiny.py")
    parser.add_argument("--data", help="folder with GSM8K's train.* and test.*; without it compare takes the sums")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_check"))
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of every run")
    options = parser.parse_intermixed_args(argv)
    if options.part == "table":
        return show(options.out)
    os.environ["SKPO_PLATFORM"] = "cpu" if options.device == "cpu" else "gpu"
    check = Check(options)
    try:
        PARTS[options.part](check)
    except Exception as error:  # process border: the script runs the next part
        traceback.print_exc()
        check.add(options.part, "failed", {"error": f"{type(error).__name__}: {error}"[:400]}, False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
