"""What crosses steps: visits, baselines, trackers, and the checkpoint file that carries them."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.skpo.settings import SkpoSettings, TrackerSettings
from recipe.skpo.trainer.state import FILE_NAME, SkpoState, StateError, StoredSegments, require_state_file

seeds = st.integers(0, 2**32)


def fresh(response_budget: int = 200, **changes: Any) -> SkpoState:
    return SkpoState(SkpoSettings(**changes), response_budget)


def train(state: SkpoState, rng: np.random.Generator, steps: int) -> list[tuple[Any, ...]]:
    """Some steps of a made-up run; everything that the state decided or said in them."""
    said: list[tuple[Any, ...]] = []
    for step in range(1, steps + 1):
        for number in rng.integers(0, 6, 4):
            key = f"prompt-{number}"
            said.append((state.next_visit(key, step), state.baseline(key)))
            squares = np.full(2, state.prompts.squares(key))
            state.signal.observe(rng.normal(size=2), np.zeros(2), squares, rng.uniform(size=2))
            reward, mean_length = float(rng.integers(-8, 9)) / 8, float(rng.uniform(1, 200))
            said.append((state.observe(key, reward, mean_length), state.prompts.length(key), state.prompts.count(key)))
            size = int(rng.integers(1, 9))
            state.segments.put(key, rng.integers(0, 99, size), rng.normal(size=size))
            state.tokens_generated += size
        state.clock.advance(float(rng.exponential(0.01)))
    return said


def content(state: SkpoState) -> str:
    parts = (state.prompts, state.segments, state.signal)
    counters = (state.visits, state.tokens_generated)
    return repr(([part.state_dict() for part in parts], state.rng.bit_generator.state, counters))


# ---------------------------------------------------------------- visits and baselines


def test_the_baseline_is_the_tracked_value_in_reward_units_from_before_the_visit() -> None:
    state = fresh()
    assert state.baseline("a") == 0.0
    state.observe("a", reward=-0.5, mean_length=10)
    assert state.prompts.value("a") == 0.25  # kept in [0, 1]
    assert (state.baseline("a"), state.baseline("b")) == (-0.5, 0.0)


def test_visits_are_numbered_over_the_run_and_drawn_by_the_seed_alone() -> None:
    state = fresh()
    visits = [state.next_visit("a", 1) for _ in range(1000)]
    assert [visit.ordinal for visit in visits] == list(range(1000))
    assert len({visit.seed for visit in visits}) == 1000 and all(0 <= visit.seed < 2**31 for visit in visits)
    # Neither the step nor boundaries change a draw of the adaptive split.
    same = (fresh(seed=3), fresh(seed=3, split="boundary_token", boundaries=["."]))
    first, second = ([(v.split_position, v.seed) for v in (s.next_visit("a", n) for n in (1, 2))] for s in same)
    third, other = (fresh(seed=seed).next_visit("a", 2) for seed in (3, 4))
    assert first == second and first[0] == (third.split_position, third.seed) != (other.split_position, other.seed)


@pytest.mark.parametrize(("initial_length", "budget", "assumed"), [(1024, 120, 120), (60, 120, 60)])
def test_assumed_length_is_bounded_by_the_response_budget(initial_length: int, budget: int, assumed: int) -> None:
    state = fresh(budget, initial_length=initial_length)
    assert state.prompts.length("a") == assumed
    splits = {state.next_visit("a", 1).split_position for _ in range(600)}
    assert (min(splits), max(splits)) == (assumed // 6, assumed // 2)


def test_split_position_follows_the_tracked_length_of_its_prompt() -> None:
    state = fresh(1000)
    state.observe("a", 1.0, 12)
    assert {state.next_visit("a", 1).split_position for _ in range(100)} == {2, 3, 4, 5, 6}
    assert min(state.next_visit("b", 1).split_position for _ in range(100)) > 100


def test_split_range_of_the_settings_is_used() -> None:
    state = fresh(100, split_low=0.3, split_high=0.32)
    assert {state.next_visit("a", 1).split_position for _ in range(100)} == {30, 31, 32}


@pytest.mark.parametrize(("step", "expected"), [(1, 10), (2, 30), (3, 10)])
def test_a_fixed_split_takes_both_ends_in_turn_and_draws_only_the_seed(step: int, expected: int) -> None:
    state, plain = fresh(60, split="fixed", seed=3), np.random.default_rng(3)
    visit = state.next_visit("a", step)
    assert visit.split_position == expected
    assert visit.seed == plain.integers(2**31 - 1)
    assert state.rng.bit_generator.state == plain.bit_generator.state


def test_without_a_measurement_logratio_counts_steps() -> None:
    state = fresh(tracker=TrackerSettings(drift="logratio", half_life=0.06))
    state.observe("a", 1.0, 20)
    state.clock.advance(0.0)
    assert state.observe("a", 1.0, 20) == 1.0


# ---------------------------------------------------------------- stored segments


def test_a_stored_segment_is_the_last_one_of_its_prompt() -> None:
    segments = StoredSegments()
    assert "a" not in segments and len(segments) == 0
    segments.put("a", [1, 2, 3], [-1.0, -2.0, -3.0])
    segments.put("b", [9], [-0.5])
    segments.put("a", [7, 8], [-0.25, -0.75])
    assert "a" in segments and len(segments) == 2
    tokens, logprobs = segments.get("a")
    assert (tokens.tolist(), logprobs.tolist()) == ([7, 8], [-0.25, -0.75])
    assert (tokens.dtype, logprobs.dtype) == (np.int32, np.float32)


def test_over_its_bound_the_segments_stored_longest_ago_are_dropped() -> None:
    segments = StoredSegments(most_tokens=5)
    batch = torch.arange(8.0)
    for key, size in (("a", 2), ("b", 2), ("a", 1), ("c", 2)):
        segments.put(key, range(size), batch[:size])
    assert len(segments) == 3, "a was replaced, and is now the younger one"
    batch[:] = -1.0
    assert segments.get("c")[1].tolist() == [0.0, 1.0], "a copy: a view would keep the batch"
    segments.put("d", [7, 8], [0.0, 0.0])
    assert ["a" in segments, "b" in segments, "c" in segments, "d" in segments] == [True, False, True, True]
    fewer = StoredSegments(most_tokens=4)
    fewer.load_state_dict(segments.state_dict())
    assert len(fewer) == 2 and "a" not in fewer, "a checkpoint of a run without the bound is loaded as far as it goes"


@pytest.mark.parametrize(("prompts", "size", "drops"), [(17_000, "1.1 GB", False), (2_000_000, "128.0 GB", True)])
def test_the_memory_of_segments_is_told(prompts: int, size: str, drops: bool) -> None:
    told = StoredSegments().expected(prompts, 8_000)
    assert f"segments of {prompts:,} prompts: at most {size}" in told
    assert ("over 8.0 GB those stored longest ago are dropped" in told) is drops


@pytest.mark.parametrize(("tokens", "logprobs"), [([], []), ([1, 2], [-1.0]), ([1], [-1.0, -2.0])])
def test_a_stored_segment_needs_one_log_prob_per_token(tokens: list[int], logprobs: list[float]) -> None:
    segments = StoredSegments()
    with pytest.raises(ValueError, match=f"{len(tokens)} tokens with {len(logprobs)} log-probs for prompt a"):
        segments.put("a", tokens, logprobs)
    assert "a" not in segments


@settings(max_examples=30)
@given(st.dictionaries(st.text(min_size=1, max_size=4).filter(lambda key: "\0" not in key), st.integers(1, 5)), seeds)
def test_stored_segments_survive_a_checkpoint(rows: dict[str, int], seed: int) -> None:
    rng, stored, loaded = np.random.default_rng(seed), StoredSegments(), StoredSegments()
    loaded.put("what it held is replaced", [1], [-1.0])
    for key, size in rows.items():
        stored.put(key, rng.integers(0, 2**31, size), rng.normal(size=size))
    loaded.load_state_dict(stored.state_dict())
    assert len(loaded) == len(rows)
    for key in rows:
        for mine, theirs in zip(loaded.get(key), stored.get(key), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_failures_are_kept_and_absent_from_older_checkpoints(tmp_path: Path) -> None:
    state = fresh()
    for trained in (False, False):
        state.note_outcome("p", trained)
    path = state.save(tmp_path)
    resumed = fresh()
    resumed.load(tmp_path)
    assert resumed.failures == {"p": 2}
    rewrite(path, lambda meta, arrays: meta.pop("failures"))
    resumed.load(tmp_path)
    assert resumed.failures == {}
    rewrite(path, lambda meta, arrays: meta.update(failures={"p": -1}))
    with pytest.raises(StateError, match="cannot be read"):
        resumed.load(tmp_path)


# ---------------------------------------------------------------- checkpoint


@settings(max_examples=25)
@given(seed=seeds, steps=st.integers(0, 6))
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    unbroken, stopped = fresh(seed=5), fresh(seed=5)
    train(unbroken, np.random.default_rng(seed), steps)
    train(stopped, np.random.default_rng(seed), steps)
    assert stopped.save(folder) == folder / FILE_NAME
    resumed = fresh(seed=99)
    train(resumed, np.random.default_rng(1), 2)  # what it holds is replaced
    resumed.load(folder)
    assert content(resumed) == content(unbroken)
    rest = np.random.default_rng(seed + 1)
    assert train(resumed, rest, 5) == train(unbroken, np.random.default_rng(seed + 1), 5)


def test_saving_makes_the_folder_and_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    fresh().save(tmp_path / "checkpoints" / "global_step_1")
    assert [path.name for path in (tmp_path / "checkpoints" / "global_step_1").iterdir()] == [FILE_NAME]


def test_saving_does_not_draw_from_the_generator(tmp_path: Path) -> None:
    saved, plain = fresh(), fresh()
    saved.save(tmp_path)
    assert saved.next_visit("a", 1) == plain.next_visit("a", 1)


def test_state_file_holds_no_pickle(tmp_path: Path) -> None:
    state = fresh()
    train(state, np.random.default_rng(0), 2)
    with np.load(state.save(tmp_path), allow_pickle=False) as archive:
        assert {archive[name].dtype.kind for name in archive.files} <= {"U", "f", "i", "u"}
        assert json.loads(str(archive["meta"]))["group_size"] == 8


@pytest.mark.parametrize("fails_at", ["numpy.savez", "os.fsync"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    state = fresh()
    train(state, np.random.default_rng(0), 1)
    state.save(tmp_path)
    kept = content(state)
    train(state, np.random.default_rng(1), 1)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        if hasattr(args[0], "write"):
            args[0].write(b"PK half of a file")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fails_at, full_disk)
        with pytest.raises(OSError, match="No space left"):
            state.save(tmp_path)
    loaded = fresh()
    loaded.load(tmp_path)
    assert content(loaded) == kept
    state.save(tmp_path)  # and what was left over does not disturb the next one
    loaded.load(tmp_path)
    assert content(loaded) == content(state)


def test_a_checkpoint_without_state_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for call in (lambda: fresh().load(tmp_path), lambda: require_state_file(tmp_path)):
        with pytest.raises(StateError, match=rf"{tmp_path}: holds no {FILE_NAME}.*trainer.resume_mode=disable"):
            call()
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(StateError, match="holds no"):
        require_state_file(tmp_path)


def saved_bytes(tmp_path: Path) -> tuple[Path, bytes]:
    state = fresh()
    train(state, np.random.default_rng(0), 2)
    path = state.save(tmp_path)
    return path, path.read_bytes()


def test_a_flipped_byte_never_changes_the_state_silently(tmp_path: Path) -> None:
    path, whole = saved_bytes(tmp_path)
    reference = fresh()
    reference.load(tmp_path)
    refused = 0
    for position in range(0, len(whole), 13):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        loaded = fresh()
        try:
            loaded.load(tmp_path)
        except Exception:
            refused += 1
        else:
            assert content(loaded) == content(reference), f"byte {position}"
    assert refused > 50


def test_any_damage_is_refused_as_state_error(tmp_path: Path) -> None:
    path, whole = saved_bytes(tmp_path)
    version = whole.index(b"PK\x01\x02") + 6  # "version needed" in the first entry of the directory
    foreign = io.BytesIO()
    np.savez(foreign, weights=np.zeros(3))
    cut_off = (whole[:size] for size in range(4, len(whole), 97))
    for damaged in (
        b"",
        b"not an archive",
        whole[:version] + b"\xff" + whole[version + 1 :],
        foreign.getvalue(),
        *cut_off,
    ):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=r"cannot be read as SKPO state.*resume_from_path"):
            fresh().load(tmp_path)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Save the file again with changed metadata or arrays."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    meta = json.loads(str(arrays.pop("meta")))
    change(meta, arrays)
    with path.open("wb") as file:
        np.savez(file, meta=np.array(json.dumps(meta)), **arrays)


def swap_lengths(lengths: np.ndarray) -> None:
    """Shift the first row's tokens to the second: the total stays."""
    lengths[1] += lengths[0]
    lengths[0] = 0


SHORT, ANOTHER, RANGE = "different lengths", "another kind", "not a number in range"


def put(name: str, array: Any) -> Callable[[dict, dict], Any]:
    return lambda meta, arrays: arrays.update({name: np.array(array)})


def fill(name: str, value: float) -> Callable[[dict, dict], Any]:
    return lambda meta, arrays: arrays[name].fill(value)


def said(**values: Any) -> Callable[[dict, dict], Any]:
    return lambda meta, arrays: meta.update(values)


def lose(name: str) -> Callable[[dict, dict], Any]:
    return lambda meta, arrays: (arrays if "." in name else meta).pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lose(name), name) for name in ("visits", "rng", "tokens_generated", "segments.keys", "signal.visits")),
        *((lose(f"prompts.{name}"), f"lack.*{name}") for name in ("counts", "squares", "total_kl", "text")),
        (lambda meta, arrays: meta["rng"].update(bit_generator="MT19937"), ""),
        (lambda meta, arrays: meta["rng"]["state"].update(state=10**80), ""),
        (said(format=2), "format 2.*reads 3 to 5; resume with the version that wrote it"),
        (said(visits=-1), "visits is -1"),
        (said(visits=math.inf), "visits is inf"),
        (said(tokens_generated=10**80), "tokens_generated is 1"),
        (put("prompts.lengths", [0.0]), SHORT),
        (put("segments.token_ids", np.zeros(1, np.int32)), SHORT),
        (put("segments.lengths", np.zeros(0, np.int64)), SHORT),
        (put("segments.keys", ["a"]), SHORT),
        (put("prompts.values", np.ones(2, np.int64)), ANOTHER),
        (put("more", [0.0]), "has more"),
        (lambda meta, arrays: swap_lengths(arrays["segments.lengths"]), "0 tokens"),
        (fill("prompts.values", math.nan), "not a number"),
        (fill("prompts.values", 1.5), "outside 0 to 1"),
        (fill("prompts.lengths", 2.0**62), "outside 0 to 1e"),
        (fill("prompts.lengths", -3), "outside 0 to"),
        (fill("prompts.counts", -1), RANGE),
        (fill("prompts.visit_steps", 10**9), RANGE),
        (fill("prompts.visit_kl", math.inf), RANGE),
        (fill("prompts.squares", 1.5), "outside 0 to 1"),
        (fill("signal.visits", -1.0), "out of range"),
        (put("signal.visits", np.ones((2, 2))), "another shape"),
        (fill("segments.token_ids", -1), "out of range"),
        (fill("segments.logprobs", math.nan), "out of range"),
    ],
)
def test_a_foreign_or_incomplete_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], message: str
) -> None:
    path, _ = saved_bytes(tmp_path)
    rewrite(path, change)
    with pytest.raises(StateError, match=message if "format" in message else f"cannot be read.*{message}") as caught:
        fresh().load(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("older", [3, 4])
def test_a_file_of_an_older_format_is_read(tmp_path: Path, older: int) -> None:
    """Format 3 had a table each for values and lengths, and one for visits, over a shared numbering.

    Neither had the sums of squared weights, which are taken as if every earlier visit weighed alike.
    """
    state = fresh()
    state.clock.advance(0.25)
    for key, reward, length in (("a", 0.5, 30.0), ("é", -1.0, 8.0), ("a", 1.0, 50.0)):
        state.observe(key, reward, length)
    state.segments.put("a", [7, 8], [-0.5, -0.25])
    state.clock.advance(0.5)
    path = state.save(tmp_path)
    counts = [state.prompts.count("a"), 1.0]
    meta = json.loads(str(np.load(path)["meta"])) | {"format": older}
    with np.load(path) as archive:
        lacking = ("meta", "prompts.squares", "signal.visits")
        of_4 = {name: archive[name] for name in archive.files if name not in lacking}
    of_3 = {
        "prompts.text": np.frombuffer("aé".encode(), dtype=np.uint8),
        "prompts.lengths": np.array([1, 1], dtype=np.int32),
        "values.values": np.array([state.prompts.value("a"), 0.0]),
        "values.counts": np.array(counts),
        "lengths.values": np.array([state.prompts.length("a"), 8.0]),
        "lengths.counts": np.array(counts),
        "clock.visit_steps": np.array([1, 1]),
        "clock.visit_kl": np.array([0.25, 0.25]),
        "clock.steps": np.array(2),
        "clock.total_kl": np.array(0.75),
        "segments.keys": np.array(["a"]),
        "segments.lengths": np.array([2]),
        "segments.token_ids": np.array([7, 8], dtype=np.int32),
        "segments.logprobs": np.array([-0.5, -0.25], dtype=np.float32),
    }
    with path.open("wb") as file:
        np.savez(file, meta=np.array(json.dumps(meta)), **(of_3 if older == 3 else of_4))
    resumed = fresh(seed=9)
    resumed.load(tmp_path)
    assert resumed.prompts.squares("a") == 1 / counts[0] > state.prompts.squares("a")
    resumed.prompts._columns["squares"] = state.prompts.state_dict()["squares"]
    assert content(resumed) == content(state)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": 4}, r"group_size=8, this run has 4.*resume_mode=disable"),
        ({"tracker": TrackerSettings(drift="nats")}, r"drift=kl_steps, this run has nats"),
    ],
)
def test_state_of_other_settings_is_refused_with_both(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    fresh().save(tmp_path)
    with pytest.raises(StateError, match=said):
        fresh(**changes).load(tmp_path)


def test_other_settings_may_change_between_runs(tmp_path: Path) -> None:
    saved = fresh()
    saved.observe("a", 0.5, 30)
    saved.save(tmp_path)
    resumed = fresh(weight_up=0.3, split_high=0.4, tracker=TrackerSettings(half_life=2.0))
    resumed.load(tmp_path)
    assert resumed.baseline("a") == 0.5
    assert resumed.prompts.half_life == 2.0
