"""Break the method on purpose, one place at a time, and see that a golden test turns red each time.

    python scripts/mutations.py              # all, in a few minutes on one core
    python scripts/mutations.py loss state   # those of these modules alone

Each mutation is a textual change of one module in a temporary copy of the repository; the work tree is not touched.
The fast golden tests of that module run in a forked process, which has the heavy third-party packages loaded already.
Prints a table and exits with 1 if a mutation survives, breaks the import, or no longer applies.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TESTS = {
    "advantage": "advantage",
    "loss": "batch",
    "minibatch": "batch",
    "tracker": "trackers",
    "state": "trackers",
    "segments": "segments",
    "curriculum": "segments",
    "trainer": "step",
    "base_trainer": "step",
}
"""Per module, the golden test file that is to catch its mutations."""

FAST = "not gloo"
"""Pytest's -k: what the other tests of a file pin too, but slower."""

BROKEN = ("AttributeError", "ImportError", "NameError", "SyntaxError", "TypeError", "UnboundLocalError")
"""Errors of a mutation that is no program; a test that stops with one has compared nothing."""


@dataclass(frozen=True)
class Mutation:
    """A named change of a module of ``recipe/skpo``: every ``old`` occurs once and becomes its ``new``."""

    module: str
    name: str
    changes: tuple[tuple[str, str], ...]


def one(module: str, name: str, old: str, new: str) -> Mutation:
    """A mutation in one place."""
    return Mutation(module, name, ((old, new),))


DOWN_WEIGHT = "weight = _ratio(log_prob, old_log_prob).clamp(1 - clip_low, 1 + clip_high).detach()"
DOWN_SUM = "return -(weight * log_prob).sum(-1) * advantage"
UP_MEAN = "return -(surrogate * weight).sum(-1) / weight.sum(-1).clamp(min=1)"
UP_CLIP = "ratio.clamp(1 - clip_low, 1 + clip_high) * gain"
ESTIMATE = 'advantages = get_adv_estimator_fn("skpo")(rewards, baselines, phase, prompts, valid)'
READ_BASELINES = """        for row in segments:
            baselines[row] = self.state.baseline(ids[row])
"""

STORE_SEGMENTS = """        if self.settings.tracker.drift == "logratio":
"""

MUTATIONS = (
    # SPEC section 2
    one(
        "segments", "first split position rounded down", "math.ceil(low * mean_length)", "math.floor(low * mean_length)"
    ),
    one(
        "segments", "last split position rounded up", "math.floor(high * mean_length)", "math.ceil(high * mean_length)"
    ),
    one("segments", "upper end of the split range left out", "last, endpoint=True", "max(first + 1, last)"),
    one("segments", "fixed split begins with the upper end", "[0 if step % 2 else 1]", "[1 if step % 2 else 0]"),
    one("segments", "early finisher kept whole", "max(1, len(token_ids) // 2)", "len(token_ids)"),
    one("segments", "half of an early finisher rounded up", "len(token_ids) // 2)", "(len(token_ids) + 1) // 2)"),
    one(
        "segments",
        "an end exactly at t_q is not early",
        "len(token_ids) <= split_position",
        "len(token_ids) < split_position",
    ),
    one("segments", "deviation is a sum", "-math.fsum(kept) / keep", "-math.fsum(kept)"),
    one("segments", "deviation has the wrong sign", "-math.fsum(kept) / keep", "math.fsum(kept) / keep"),
    one("segments", "median tie goes to the last", "(values == middle[1]))[0])", "(values == middle[1]))[-1])"),
    one(
        "segments",
        "lower middle value in place of the median",
        "(values.size - 1) // 2, values.size // 2",
        "(values.size - 1) // 2, (values.size - 1) // 2",
    ),
    one(
        "segments",
        "extreme takes the largest first",
        "values.argmin() if step % 2 else values.argmax()",
        "values.argmax() if step % 2 else values.argmin()",
    ),
    one("segments", "boundary token is cut off", "(index + 1 for index in reversed", "(index for index in reversed"),
    one("segments", "problem before the segment", "return segment + problem", "return problem + segment"),
    one("segments", "BOS stays in the middle as well", "*segment, *problem[1:]]", "*segment, *problem]"),
    # SPEC section 4
    one("curriculum", "weight without the root", "np.sqrt(inside * (1.0 - inside))", "(inside * (1.0 - inside))"),
    one("curriculum", "weight without epsilon", "(1.0 - inside)) + epsilon", "(1.0 - inside))"),
    one("curriculum", "drawn with replacement", "replace=False", "replace=True"),
    one("curriculum", "drawn uniformly", ", p=weights / weights.sum()", ""),
    one(
        "tracker",
        "no upper bound of rho",
        "min(self.rho_max, max(self.rho_min, 2.0 ** (-drift / self.half_life)))",
        "max(self.rho_min, 2.0 ** (-drift / self.half_life))",
    ),
    one(
        "tracker",
        "no lower bound of rho",
        "max(self.rho_min, 2.0 ** (-drift / self.half_life))",
        "2.0 ** (-drift / self.half_life)",
    ),
    one("tracker", "half-life is a decay constant", "2.0 ** (-drift", "2.718281828459045 ** (-drift"),
    one("tracker", "eta without the count's 1", "/ (kept + 1.0)", "/ max(kept, 1.0)"),
    one("tracker", "eta from the count before it decays", "/ (kept + 1.0)", "/ (self._counts[row] + 1.0)"),
    one("tracker", "count does not decay", "self._counts[row] = kept + 1.0", "self._counts[row] += 1.0"),
    one("tracker", "kl_steps is not divided by the mean", "return kl * self.steps / self.total_kl if", "return kl if"),
    one("tracker", "estimates of KL below 0 count", "max(0.0, kl)", "kl"),
    one(
        "state",
        "baseline in [0, 1]",
        "return 2.0 * self.values.value(prompt_id) - 1.0",
        "return self.values.value(prompt_id)",
    ),
    one("state", "reward not mapped to [0, 1]", "(reward + 1.0) / 2.0, drift", "reward, drift"),
    one("state", "first baseline is not 0", "KLAdaptiveTracker(0.5, **constants", "KLAdaptiveTracker(0.0, **constants"),
    one("state", "visit is not noted", "        self.clock.visit(prompt_id)\n", ""),
    one(
        "state",
        "length tracker sees no drift",
        "self.lengths.update(prompt_id, mean_length, drift)",
        "self.lengths.update(prompt_id, mean_length, 0.0)",
    ),
    one(
        "state",
        "initial length not bounded by the budget",
        "min(settings.initial_length, response_budget)",
        "settings.initial_length",
    ),
    one(
        "state",
        "measured drift is ignored",
        "if log_ratio is None else log_ratio",
        "if log_ratio is None else self.clock.drift(prompt_id)",
    ),
    one(
        "advantage",
        "baseline added",
        "(rewards.double() - baselines.double())",
        "(rewards.double() + baselines.double())",
    ),
    one("advantage", "upstream not centred", "((raw - raw.mean())", "((raw)"),
    one(
        "advantage", "upstream sample deviation", "raw.std(correction=0)", "raw.std(correction=min(1, raw.numel() - 1))"
    ),
    one("advantage", "upstream not divided by the deviation", "/ (raw.std(correction=0) + EPSILON)", "/ 1.0"),
    one(
        "advantage",
        "padding in the batch statistics",
        "[mask]\n        advantage[mask] = (",
        "\n        advantage = (advantage + ",
    ),
    # SPEC section 5
    one("advantage", "downstream sample deviation", "centred**2) / size)", "centred**2) / (size - 1).clamp(min=1))"),
    one("advantage", "downstream not divided by the deviation", "centred / std.clamp(min=EPSILON)", "centred"),
    one("advantage", "downstream not centred", "(value - mean[member]) * weight", "value * weight"),
    one(
        "advantage",
        "failed siblings in the group's mean",
        "weight, value = mask.double(), rewards.double()",
        "weight, value = torch.ones_like(rewards).double(), rewards.double()",
    ),
    one("advantage", "phases swapped", "upstream = phase == UPSTREAM", "upstream = phase != UPSTREAM"),
    # SPEC section 6, losses
    one("loss", "ratio upside down", "torch.exp((log_prob - old_log_prob)", "torch.exp((old_log_prob - log_prob)"),
    one("loss", "upstream sign", UP_MEAN, UP_MEAN.replace("-(", "(")),
    one("loss", "upstream sum over tokens", UP_MEAN, "return -(surrogate * weight).sum(-1)"),
    one("loss", "upstream optimistic", "torch.minimum(ratio * gain", "torch.maximum(ratio * gain"),
    one("loss", "upstream clip bounds swapped", UP_CLIP, "ratio.clamp(1 - clip_high, 1 + clip_low) * gain"),
    one("loss", "upstream clip at the lower bound alone", UP_CLIP, "ratio.clamp(min=1 - clip_low) * gain"),
    one("loss", "upstream not clipped", f"torch.minimum(ratio * gain, {UP_CLIP})", "ratio * gain"),
    one("loss", "downstream sign", DOWN_SUM, DOWN_SUM.replace("-(", "(")),
    one("loss", "downstream mean per response", DOWN_SUM, f"{DOWN_SUM} / mask.sum(-1).clamp(min=1)"),
    one("loss", "downstream weight not detached", DOWN_WEIGHT, DOWN_WEIGHT.replace(".detach()", "")),
    one("loss", "downstream not clipped", DOWN_WEIGHT, "weight = _ratio(log_prob, old_log_prob).detach()"),
    one("loss", "downstream upper bound e_low", DOWN_WEIGHT, DOWN_WEIGHT.replace("clip_high", "clip_low")),
    one("loss", "downstream mask dropped", f"{DOWN_WEIGHT} * mask.to(log_prob.dtype)", DOWN_WEIGHT),
    one(
        "loss",
        "losses of the phases swapped",
        "upstream_loss(*arguments), downstream_loss(*arguments)",
        "downstream_loss(*arguments), upstream_loss(*arguments)",
    ),
    one("loss", "row scale dropped", "downstream_loss(*arguments)) * scale", "downstream_loss(*arguments))"),
    one("loss", "mean over the micro-batch", "loss = row_loss.sum() *", "loss = row_loss.mean() *"),
    one("loss", "dp_size dropped", 'loss = row_loss.sum() * data["dp_size"]', "loss = row_loss.sum()"),
    # SPEC section 6, rows and updates
    one("minibatch", "padding rows count", "trained = ~padding & (lengths > 0)", "trained = lengths > 0"),
    one(
        "minibatch",
        "segments without a sibling count",
        "return trained & (downstream | torch.isin(prompts, prompts[trained & downstream]))",
        "return trained",
    ),
    one(
        "minibatch",
        "mean over the prompts of the batch",
        "prompts_per_update[minibatch].to(",
        "prompts_per_update.sum().to(",
    ),
    one(
        "minibatch",
        "mean over the rows of the update",
        "torch.stack([minibatch[valid], prompts[valid]]), dim=1)",
        "torch.stack([minibatch[valid], valid.nonzero().flatten()]), dim=1)",
    ),
    one("minibatch", "group normaliser missing", " / pool_tokens[pool].clamp(min=1)", ""),
    one("minibatch", "group normaliser counts the segment", "(lengths * (valid & ~upstream))", "(lengths * valid)"),
    one("minibatch", "token mean divided by prompts as well", "(torch.ones_like(share) if pooled else share)", "share"),
    one("minibatch", "token mean per group", "minibatch if pooled else prompts", "prompts"),
    one("minibatch", "weights swapped", "weight_up * share, downstream)", "weight_down * share, downstream)"),
    one("minibatch", "invalid rows keep a scale", "return (scale * valid)", "return (scale * 1.0)"),
    one(
        "minibatch",
        "updates cut through prompts",
        "sorted(range(len(prompts)), key=lambda row: prompts[row])",
        "list(range(len(prompts)))",
    ),
    one(
        "minibatch",
        "number of the update forgets the ranks",
        "torch.arange(rows) % (rows // ranks)",
        "torch.arange(rows)",
    ),
    # what only a whole step shows
    Mutation(
        "trainer",
        "baselines read after the update",
        (
            (READ_BASELINES, ""),
            (f"        {ESTIMATE}\n", ""),
            (STORE_SEGMENTS, f"{READ_BASELINES}        {ESTIMATE}\n{STORE_SEGMENTS}"),
        ),
    ),
    one("trainer", "reward is a mean over tokens", '_flat(data["rm_scores"]))', '_flat(data["rm_scores"])) / sizes'),
    one("trainer", "log-probs for rewards", 'data["rm_scores"]', "data[log_probs[0]]"),
    one(
        "trainer",
        "mean length of trained tokens alone",
        "torch.bincount(prompts, sizes * siblings)",
        "torch.bincount(prompts, lengths * siblings)",
    ),
    one(
        "trainer",
        "failed siblings in the mean length",
        "siblings = valid & (phase == DOWNSTREAM)",
        "siblings = phase == DOWNSTREAM",
    ),
    one(
        "trainer",
        "groups by prompt in place of visit",
        '[key.rsplit("_", 2)[0] for key in batch.keys]\n        number',
        'data.get("id").tolist()\n        number',
    ),
    one(
        "trainer",
        "padding goes first",
        "zip(padding, uids, strict=True)))",
        "zip([not one for one in padding], uids, strict=True)))",
    ),
    one(
        "trainer",
        "weights of the objectives swapped",
        "(self.settings.weight_up, self.settings.weight_down)",
        "(self.settings.weight_down, self.settings.weight_up)",
    ),
    one("trainer", "aggregation of the settings ignored", "valid, *weights, aggregation)", "valid, *weights)"),
    one("trainer", "clock does not advance", "        self.state.clock.advance(policy_kl)\n", ""),
    one("trainer", "log-ratio not used", "mean_length, measured.get(ids[row])", "mean_length"),
    one("base_trainer", "log-ratio without the absolute value", "now[index]).abs().mean()", "now[index]).mean().abs()"),
)


def path_of(mutation: Mutation, root: Path = ROOT) -> Path:
    """The module's file."""
    return root / "recipe" / "skpo" / f"{mutation.module}.py"


def mutated(mutation: Mutation, text: str) -> str:
    """The text with the mutation's changes.

    Raises:
        ValueError: a text to change is not there exactly once.
    """
    for old, new in mutation.changes:
        if text.count(old) != 1:
            raise ValueError(f"{mutation.module}: {mutation.name}: occurs {text.count(old)} times, not once: {old!r}")
        text = text.replace(old, new)
    return text


def _run_tests(copy: Path, modules: list[str], log: Path) -> None:
    """In a forked process: pytest on the copy.  Exit code 0 green, 1 red, anything else is no verdict."""
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.dont_write_bytecode = True
        os.environ["COLUMNS"] = "300"  # or pytest's summary is cut before the error
        sys.path.insert(0, str(copy))
        # verl has imported our plugin while it was loaded; from now on the copy is what is imported.
        for name in [name for name in sys.modules if name.split(".")[0] in ("recipe", "tests")]:
            del sys.modules[name]
        for module in modules:
            file_name = importlib.import_module(f"recipe.skpo.{module}").__file__
            if not str(file_name).startswith(str(copy)):
                raise RuntimeError(f"{module} was imported from {file_name}, not from the copy")
        import pytest
        from hypothesis import Phase, settings

        importlib.import_module("tests.reference")  # which loads the profile of the golden tests
        settings.register_profile("no shrinking", settings.default, phases=[Phase.explicit, Phase.generate])
        settings.load_profile("no shrinking")
        files = sorted({str(copy / f"tests/golden/test_golden_{TESTS[module]}.py") for module in modules})
        options = ["-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--rootdir", str(copy), "-k", FAST]
        code = pytest.main([*options, *files])
    sys.exit(int(code))


def run(copy: Path, modules: list[str], log: Path) -> tuple[int, str]:
    """Exit code and output of the golden tests of these modules."""
    process = multiprocessing.get_context("fork").Process(target=_run_tests, args=(copy, modules, log))
    process.start()
    process.join()
    return int(process.exitcode or 0), log.read_text()


def preload() -> None:
    """Import what every forked process needs and no mutation changes."""
    import hypothesis  # noqa: F401
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for name in ("tensordict", "transfer_queue", "verl.trainer.ppo.v1.trainer_sync", "verl.workers.utils.padding"):
        importlib.import_module(name)
    for name in ("verl.trainer.ppo.v1.agent_loop_tq", "verl.utils.tensordict_utils", "pytest"):
        importlib.import_module(name)


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[[], *TESTS], help="modules to mutate; all without any")
    chosen = set(parser.parse_args().modules or TESTS)
    mutations = [mutation for mutation in MUTATIONS if mutation.module in chosen]
    for mutation in mutations:
        mutated(mutation, path_of(mutation).read_text())
    started = time.monotonic()
    preload()
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        copy, log = Path(temporary) / "copy", Path(temporary) / "log"
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("recipe", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        code, output = run(copy, sorted(chosen), log)
        if code:
            print(f"the golden tests fail without any mutation:\n{output[-4000:]}", file=sys.stderr)
            return 1
        print("| module | mutation | caught by |\n|---|---|---|", flush=True)
        for mutation in mutations:
            path = path_of(mutation, copy)
            original = path.read_text()
            path.write_text(mutated(mutation, original))
            code, output = run(copy, [mutation.module], log)
            path.write_text(original)
            caught = re.search(r"^FAILED \S*::(test_\w+)\S*(?: - (\w+))?", output, re.MULTILINE)
            if code == 1 and caught and caught[2] not in BROKEN:
                print(f"| `{mutation.module}` | {mutation.name} | `{caught[1]}` |", flush=True)
            else:
                survivors.append(mutation)
                print(f"| `{mutation.module}` | {mutation.name} | **not caught** |", flush=True)
                print(output[-1500:], file=sys.stderr)
    minutes = (time.monotonic() - started) / 60
    print(f"\n{len(mutations) - len(survivors)} of {len(mutations)} mutations caught in {minutes:.1f} minutes")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
