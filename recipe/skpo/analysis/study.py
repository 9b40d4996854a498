"""Train several methods with several seeds to an equal number of tokens, and compare them: one command that resumes.

A cell is a method with a learning rate and a seed, trained by the public command in a folder of its own.  First the
learning rate of each method is chosen, on seeds of their own; then the methods are compared.  Repeat the command after
a kill: finished cells are skipped, the others resume.  docs/evidence.md has what it found.

    python -m recipe.skpo.analysis.study [--arm tiny] [--parallel N] [--list | --report] [overrides of every run]
    python -m recipe.skpo.analysis.study --redraw docs/evidence
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.untrusted import read_json
from recipe.skpo.analysis.common import parser_of
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.engine import detected_platform
from recipe.skpo.evaluation.options import add_flags, check_options, option, read_flags, require
from recipe.skpo.evaluation.results import run_cli
from recipe.skpo.export.card import without_paths
from recipe.skpo.output.files import write_atomic

_POLL_S = 0.2
_GRACE_S = 90
"""Seconds that an interrupted run has to stop by itself."""

RECORDS, LOGS, RUNS = "cells", "logs", "runs"
"""Folders of a study."""


# ---------------------------------------------------------------- what is studied


@dataclass(frozen=True)
class Method:
    """A method of the study.

    Attributes:
        title: in tables and figures.
        overrides: what makes it.
        draws_by: the seeds that choose its prompts and samples.
        rate_of: the method that it is a variant of, whose learning rate it takes; empty if it has its own.
    """

    title: str
    overrides: tuple[str, ...]
    draws_by: tuple[str, ...] = ("skpo.seed",)
    rate_of: str = ""


METHODS = {
    "grpo": Method("GRPO", ("method=grpo",), ("skpo.seed", "data.seed")),
    "grpo_curriculum": Method("GRPO, SKPO's curriculum", ("method=grpo_curriculum",), rate_of="grpo"),
    "spo": Method("SPO", ("method=spo",)),
    "skpo": Method("SKPO", ("method=skpo",)),
    "weight_up": Method("SKPO, weight_up 0.05", ("method=skpo", "skpo.weight_up=0.05"), rate_of="skpo"),
    "shrinkage": Method("SKPO, shrinkage", ("method=skpo", "skpo.upstream.shrinkage=true"), rate_of="skpo"),
    "no_skip": Method("SKPO w/o skip", ("method=skpo", "skpo.skip=unconditional"), rate_of="skpo"),
    "no_mc": Method("SKPO w/o MC", ("method=skpo", "skpo.upstream_reward=own"), rate_of="skpo"),
}
REFERENCE = "grpo"
"""The method that the others are compared with."""


@dataclass(frozen=True)
class Arm:
    """A model and a task to study the methods on; its defaults are those of the command's flags.

    Attributes:
        overrides: of every run.
        methods, seeds, tokens, rates: see ``StudyConfig``.
        of_skpo, of_gpu: overrides of the runs of SKPO alone, and of those on a GPU.
        prepare: makes what the command itself does not make.
    """

    overrides: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    tokens: int
    rates: tuple[float, ...]
    of_skpo: tuple[str, ...] = ()
    of_gpu: tuple[str, ...] = ()
    prepare: Callable[[], None] = lambda: None


_VALIDATION = "actor_rollout_ref.rollout.val_kwargs"


def _cache() -> Path:
    return Path(os.environ.get("SKPO_CACHE", ".cache")).expanduser()


def _chains() -> Path:
    return _cache() / "chains"


def _make_chains() -> None:
    if all((_chains() / f"{split}.parquet").is_file() for split in ("train", "val")):
        return
    from data_prep import arithmetic  # loads reasoning-gym, a second

    template = arithmetic.TEMPLATE.with_name("chains.yaml")
    arithmetic.prepare(_chains(), train=2048, val=256, min_terms=2, max_terms=4, template=template)


def _arms() -> dict[str, Arm]:
    return {
        "tiny": Arm(
            overrides=(
                "model=tiny",
                "data=steps",
                # So few that some come back within a run: trackers need earlier visits
                "data.train_max_samples=128",
                "data.train_batch_size=8",
                "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                "trainer.val_before_train=true",
                "trainer.test_freq=1000",
                "trainer.logger=[console]",
                f"{_VALIDATION}.temperature=1.0",
                f"{_VALIDATION}.n=2",
            ),
            methods=tuple(METHODS),
            seeds=(1, 2, 3, 4, 5),
            tokens=50_000,
            rates=(3.75e-5, 7.5e-5, 1.5e-4),
        ),
        "smollm2": Arm(
            overrides=(
                "model=smollm2_135m",
                "data=files",
                f"data.train_files={_chains()}/train.parquet",
                f"data.val_files={_chains()}/val.parquet",
                "data.train_batch_size=32",
                "data.max_prompt_length=224",
                "data.max_response_length=96",
                "actor_rollout_ref.actor.ppo_mini_batch_size=16",
                "actor_rollout_ref.rollout.agent.num_workers=1",
                "actor_rollout_ref.rollout.max_num_seqs=256",
                "reward.num_workers=1",
                f"{_VALIDATION}.temperature=0.6",
                "trainer.n_gpus_per_node=1",
                "trainer.val_before_train=true",
                "trainer.save_freq=-1",
                "trainer.test_freq=10",
                "trainer.logger=[console]",
            ),
            methods=("grpo", "skpo"),
            seeds=(1, 2),
            tokens=2_000_000,
            rates=(1e-5,),
            of_gpu=(
                "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768",
                "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=65536",
            ),
            of_skpo=("skpo.initial_length=40",),
            prepare=_make_chains,
        ),
    }


ARMS = ("tiny", "smollm2")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The plan of a study.

    Attributes:
        arm: model and task.
        overrides: of every run, over those of the arm and the method.
        methods: names in ``METHODS``.
        seeds: of the comparison.
        tokens: that each run generates, discarded candidates included.
        rates: learning rates to choose from; of a single one nothing is chosen.
        rate_seeds: on which they are chosen.
        parallel: runs side by side.
        limit: seconds after which a run is stopped where it is; 0 for none.
        only: the names of the cells to run, whatever the plan; empty for the plan.
        out: folder of the study.
    """

    arm: str = option("tiny", "model and task", choices=ARMS)
    methods: tuple[str, ...] = option((), f"of {', '.join(METHODS)}; the arm's if none are given")
    seeds: tuple[int, ...] = option((), "of the comparison, such as 1,2,3")
    tokens: int = option(0, "that each run generates; 0 for the arm's", least=0)
    rates: tuple[float, ...] = option((), "learning rates to choose from; a single one is taken as it is")
    rate_seeds: tuple[int, ...] = option((101,), "on which learning rates are chosen")
    parallel: int = option(1, "runs side by side; they share the machine's cores, or its GPU", least=1)
    limit: float = option(0.0, "seconds after which a run is stopped where it is; 0 for none", least=0)
    only: tuple[str, ...] = option((), "cells to run, by name (--list)")
    out: Path = Path()
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Fill in the arm's defaults, and refuse a plan that cannot be."""
        check_options(self)
        defaults = _arms()[self.arm]
        for name in ("methods", "seeds", "tokens", "rates"):
            object.__setattr__(self, name, getattr(self, name) or getattr(defaults, name))
        for name in ("methods", "seeds", "rates", "rate_seeds", "only"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        unknown = [name for name in self.methods if name not in METHODS]
        require(not unknown, f"--methods {','.join(unknown)}: must be of {', '.join(METHODS)}")
        both = sorted({*self.seeds} & {*self.rate_seeds})
        require(not both, f"--rate-seeds {both[0] if both else ''}: is a seed of the comparison too; take others")

    @property
    def chooses(self) -> bool:
        """Whether there are learning rates to choose from."""
        return len(self.rates) > 1

    def rate_of(self, method: str) -> str:
        """Return the method whose learning rate a method takes: its own, unless it is a variant of a studied one."""
        return of if (of := METHODS[method].rate_of) in self.methods else method


@dataclass(frozen=True, order=True)
class Cell:
    """A run of the study.

    Attributes:
        method: in ``METHODS``.
        rate: learning rate.
        seed: of its draws.
    """

    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder, its log and its record."""
        return f"{self.method}-lr{self.rate:g}-seed{self.seed}"

    @classmethod
    def of(cls, name: str) -> "Cell":
        """Read a name.

        Raises:
            ConfigError: it is not one.
        """
        method, _, rest = name.partition("-lr")
        rate, _, seed = rest.rpartition("-seed")
        with suppress(ValueError):
            cell = cls(method, float(rate), int(seed))
            if method in METHODS and cell.name == name and 0 < cell.rate < 1 and cell.seed >= 0:
                return cell
        raise ConfigError(f"--only {name}: is not a cell; such a name is {cls('skpo', 1.5e-4, 1).name} (--list)")


def rate_cells(config: StudyConfig) -> list[Cell]:
    """List the cells on which learning rates are chosen; seed by seed, so that a study cut short has each method."""
    if not config.chooses:
        return []
    own = [name for name in config.methods if config.rate_of(name) == name]
    return [Cell(name, rate, seed) for seed in config.rate_seeds for name in own for rate in config.rates]


def main_cells(config: StudyConfig, rates: dict[str, float]) -> list[Cell]:
    """List the cells that are compared, of the methods with a learning rate."""
    return [Cell(name, rates[name], seed) for seed in config.seeds for name in config.methods if name in rates]


def overrides_of(config: StudyConfig, cell: Cell) -> list[str]:
    """Return the arguments of a cell's training, each key once: the later one of two counts."""
    method, arm = METHODS[cell.method], _arms()[config.arm]
    given = [
        *arm.overrides,
        *(arm.of_skpo if "method=skpo" in method.overrides else ()),
        *method.overrides,
        *(f"{name}={cell.seed}" for name in method.draws_by),
        f"actor_rollout_ref.actor.optim.lr={cell.rate:g}",
        "budget=tokens",
        f"budget.tokens={config.tokens}",
        *((*arm.of_gpu, *_on_a_gpu(config.parallel)) if _platform(config) == "gpu" else ()),
        *config.overrides,
        f"output_dir={config.out / RUNS / cell.name}",
    ]
    return [*{override.partition("=")[0].lstrip("+"): override for override in given}.values()]


def _platform(config: StudyConfig) -> str:
    chosen = [text.partition("=")[2] for text in config.overrides if text.startswith("platform=")]
    return chosen[-1] if chosen else detected_platform()


def _on_a_gpu(runs: int) -> tuple[str, ...]:
    """Return what lets runs start fast, and side by side: vLLM would take the whole GPU."""
    rollout = "actor_rollout_ref.rollout"
    vllm = f"+{rollout}.engine_kwargs.vllm"
    return (
        # CUDA graphs without the minute that torch.compile takes
        f'{vllm}.compilation_config=\'{{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}\'',
        f"{rollout}.gpu_memory_utilization={0.6 / runs:.3g}",
        # Given, it is not measured: a measurement fails where another run frees memory meanwhile
        f"{vllm}.kv_cache_memory_bytes={(24 // runs) << 30}",
        "+ray_kwargs.ray_init.include_dashboard=false",
        "skpo.poll_interval_s=0.1",
    )


def shown(overrides: Sequence[str]) -> str:
    """Return a training as it is typed."""
    return shlex.join(["bash", "run_skpo.sh", *overrides])


def elsewhere(texts: Sequence[str], arm: str, record: "Record") -> list[str]:
    """Return what is said of a run with the paths that it has by default: results are read on other machines."""
    run = next(text.partition("=")[2] for text in record.overrides if text.startswith("output_dir="))
    default = f"{_out_of(arm)}/{RUNS}/{record.cell.name}"
    return [without_paths(text.replace(run, default).replace(f"{_cache()}/", ".cache/")) for text in texts]


# ---------------------------------------------------------------- records


@dataclass(frozen=True)
class Record:
    """What is known of a cell that was started.

    Attributes:
        cell: which.
        overrides: of its last launch.
        code: exit code; None while it runs, or if the study was killed meanwhile.
        limit: seconds after which it was stopped; 0 if it was not.
        seconds: of its last launch.
        launches: number of them.
        error: its last line, if it failed.
    """

    cell: Cell
    overrides: tuple[str, ...]
    code: int | None = None
    limit: float = 0.0
    seconds: float = 0.0
    launches: int = 1
    error: str = ""

    @property
    def ended(self) -> bool:
        """Whether it reached its end, or its limit."""
        return self.code == 0 or self.limit > 0

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.code is None:
            return "not finished"
        return f"stopped after {self.limit:g} s" if self.limit else "finished" if self.code == 0 else "failed"

    def write(self, out: Path) -> None:
        """Keep it."""
        write_atomic(out / RECORDS / f"{self.cell.name}.json", json.dumps(asdict(self), indent=1) + "\n")


def read_records(out: Path) -> dict[Cell, Record]:
    """Read what a study has started."""
    records = {}
    for path in sorted((out / RECORDS).glob("*.json")):
        fields: dict[str, Any] = read_json(path)
        cell = Cell(**fields.pop("cell"))
        records[cell] = Record(cell, **fields | {"overrides": tuple(fields["overrides"])})
    return records


def missing(config: StudyConfig, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that have not ended.

    Raises:
        ConfigError: one was started with other arguments: its run would go on with those of this plan.
    """
    records, left = read_records(config.out), []
    for cell in cells:
        record = records.get(cell)
        if record is not None:
            now = _apart_from_the_machine(overrides_of(config, cell))
            other = sorted(_apart_from_the_machine(record.overrides) ^ now)
            require(
                not other, f"{config.out}: has {cell.name} with other settings ({', '.join(other)}); give another --out"
            )
        if record is None or not record.ended or record.limit not in (0, config.limit):
            left.append(cell)
    return left


def _apart_from_the_machine(overrides: Sequence[str]) -> set[str]:
    """Leave out what may differ between the launches of one study."""
    return {text for text in overrides if not text.lstrip("+").startswith(_OF_THE_MACHINE)}


_OF_THE_MACHINE = (
    *("output_dir=", "platform=", "ray_kwargs.", "skpo.poll_interval_s="),
    *("actor_rollout_ref.rollout.gpu_memory_utilization=", "actor_rollout_ref.rollout.engine_kwargs."),
)


# ---------------------------------------------------------------- running


COMMAND = (sys.executable, "-m", "recipe.skpo.main")
"""What trains a cell."""


@dataclass
class _Running:
    record: Record
    process: subprocess.Popen[bytes]
    started: float
    stopping: bool = False


def environment_of(config: StudyConfig) -> dict[str, str]:
    """Return the environment of a run, with its share of the cores."""
    share = max(1, len(os.sched_getaffinity(0)) // config.parallel)
    return {"SKPO_NUM_THREADS": str(share), "PYTHONUNBUFFERED": "1"} | dict(os.environ)


def run_cells(config: StudyConfig, cells: Sequence[Cell], later: int = 0) -> None:
    """Train the cells that have not ended, ``config.parallel`` at a time; a failed one leaves the others alone.

    Args:
        config: the plan.
        cells: in the order in which they are started.
        later: cells of the plan that follow these.
    """
    waiting, running = missing(config, cells), list[_Running]()
    (config.out / LOGS).mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < config.parallel:
                cell = waiting.pop(0)
                running.append(_start(config, cell))
                _say(config, f"started {cell.name}", len(waiting) + len(running) + later)
            for one in list(running):
                seconds = time.monotonic() - one.started
                if config.limit and seconds >= config.limit and not one.stopping:
                    one.stopping = True
                    one.process.send_signal(signal.SIGTERM)
                elif config.limit and seconds >= config.limit + _GRACE_S:
                    _kill(one.process)
                if one.process.poll() is not None:
                    running.remove(one)
                    record = _end(config, one)
                    error = f": {record.error}" if record.error else ""
                    text = f"{record.state} {record.cell.name}, {record.seconds:.0f} s{error}"
                    _say(config, text, len(waiting) + len(running) + later)
            time.sleep(_POLL_S)
    finally:
        _stop(running)


def _start(config: StudyConfig, cell: Cell) -> _Running:
    before = read_records(config.out).get(cell)
    record = Record(cell, tuple(overrides_of(config, cell)), launches=before.launches + 1 if before else 1)
    record.write(config.out)
    with (config.out / LOGS / f"{cell.name}.log").open("ab") as log:
        process = subprocess.Popen(
            [*COMMAND, *record.overrides],
            env=environment_of(config),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt reaches it once, from here
        )
    return _Running(record, process, time.monotonic())


def _end(config: StudyConfig, one: _Running) -> Record:
    code, error = one.process.wait(), ""
    if code and not one.stopping:
        log = (config.out / LOGS / f"{one.record.cell.name}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        error = next((line for line in reversed(lines) if line.startswith("error: ")), [*lines, ""][-1])
    seconds = round(time.monotonic() - one.started, 1)
    limit = config.limit if one.stopping and code else 0.0
    record = replace(one.record, code=code, seconds=seconds, error=error[:500], limit=limit)
    record.write(config.out)
    return record


def _stop(running: Sequence[_Running]) -> None:
    """Terminate the runs and wait: each shuts its Ray down, and its checkpoint says where it resumes."""
    for one in running:
        one.process.send_signal(signal.SIGTERM)  # a shell may have them ignore Ctrl-C
    deadline = time.monotonic() + _GRACE_S
    for one in running:
        with suppress(subprocess.TimeoutExpired):
            one.process.wait(max(0.1, deadline - time.monotonic()))
        _kill(one.process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _say(config: StudyConfig, text: str, left: int) -> None:
    records = read_records(config.out).values()
    counts = Counter("done" if record.ended else record.state for record in records)
    parts = [f"{counts['done']} done", *([f"{counts['failed']} failed"] if counts["failed"] else []), f"{left} left"]
    known = [record.seconds for record in records if record.ended]
    if known and left:
        seconds = sum(known) / len(known) * -(-left // config.parallel)
        end = time.strftime("%H:%M", time.localtime(time.time() + seconds))
        parts.append(f"about {seconds / 3600:.1f} h, until {end}")
    print(f"{time.strftime('%H:%M:%S')}  {text}  ({', '.join(parts)})", flush=True)


# ---------------------------------------------------------------- the study


def chosen_rates(config: StudyConfig) -> dict[str, float]:
    """Return each method's learning rate: the one with the highest held-out number on the seeds for that.

    A method is left out while one of these runs has not ended.
    """
    if not config.chooses:
        return dict.fromkeys(config.methods, config.rates[0])
    from recipe.skpo.analysis.study_results import best_rates, collect

    rates = best_rates(collect(config, {}))
    waiting = {cell.method for cell in missing(config, rate_cells(config))}
    ready = {name: config.rate_of(name) for name in config.methods}
    return {name: rates[of] for name, of in ready.items() if of in rates and of not in waiting}


def train(config: StudyConfig) -> None:
    """Run the plan, stage by stage."""
    _arms()[config.arm].prepare()
    if config.only:
        run_cells(config, [Cell.of(name) for name in config.only])
        return
    first = rate_cells(config)
    run_cells(config, first, later=len(config.seeds) * len(config.methods))
    rates = chosen_rates(config)
    if first:
        print("learning rates: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()), flush=True)
    run_cells(config, main_cells(config, rates))


def show(config: StudyConfig) -> None:
    """Print every cell of the plan with its state and its command, and what is left to do.

    A learning rate that is not chosen yet is the first one.
    """
    records, rates = read_records(config.out), dict.fromkeys(config.methods, config.rates[0])
    if records:
        rates |= chosen_rates(config)
    cells = [*rate_cells(config), *main_cells(config, rates)]
    for cell in cells:
        print(f"# {cell.name}: {records[cell].state if cell in records else 'not started'}")
        print(shown(overrides_of(config, cell)))
    _say(config, f"{len(cells)} cells", len(missing(config, cells)))


def report(config: StudyConfig) -> list[Path]:
    """Write results, tables and figures of what has been trained so far."""
    from recipe.skpo.analysis.study_results import collect, draw, page_of, write

    results = collect(config, chosen_rates(config))
    text = page_of(results)
    print(text)
    page = config.out / f"{config.arm}.md"
    write_atomic(page, text + "\n")
    return [write(results, config.out), page, *draw(results, config.out)]


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP unless it is ignored, end the study as Ctrl-C does, so that its runs are stopped too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in former.items():
        if number == signal.SIGTERM or handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _out_of(arm: str) -> Path:
    return Path(f"outputs/study-{arm}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 1 if a run of the study has failed, 130 after an interrupt."""
    parser = parser_of("study", __doc__)
    add_flags(parser, StudyConfig)
    parser.add_argument("--out", type=Path, help="folder of the study (default outputs/study-<arm>)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the cells, their states and commands, and run none")
    what.add_argument("--report", action="store_true", help="write tables and figures of what is there, and run none")
    what.add_argument("--redraw", type=Path, metavar="DIR", help="draw figures and tables again from DIR/<arm>.json")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of every run, such as platform=gpu")
    flags = parser.parse_args(argv)

    def command() -> list[Path]:
        if flags.redraw:
            from recipe.skpo.analysis.study_results import redraw

            return redraw(flags.redraw)
        config = read_flags(StudyConfig, flags, out=flags.out or _out_of(flags.arm), overrides=tuple(flags.overrides))
        if flags.list:
            show(config)
            return []
        if not flags.report:
            with _terminated_as_interrupted():
                train(config)
        return report(config)

    try:
        code = run_cli(command)
        if code == 0 and not flags.redraw and not flags.list:
            code = int(
                any(record.state == "failed" for record in read_records(flags.out or _out_of(flags.arm)).values())
            )
        return code
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
