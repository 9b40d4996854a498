"""What we rely on in verl 0.9.1, pinned: the signatures of all that we override or call.

When one fails after an upgrade of verl: read the change upstream, then what the message names on our side, adapt it,
and only then the table, verl_signatures.yaml.  docs/verl_seams.md tells the reason of each override;
scripts/verl_facts.yaml lists what we rely on in the text of its functions, which scripts/check_verl_version.py checks.
"""

import importlib
import inspect
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import verl
import yaml

SYNC = "verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync"
WORKER = "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.__ray_actor_class__"
BUFFER = "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer"
REPLICAS = "verl.checkpoint_engine:CheckpointEngineManager"
LOOPS = "verl.experimental.agent_loop.agent_loop"
DATASET = "verl.utils.dataset.rl_dataset"
MANAGER = "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ"
ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"

# Ray adds _ray_trace_ctx to the methods of an actor class; it is left out here.
TABLE = yaml.safe_load(Path(__file__).with_name("verl_signatures.yaml").read_text(encoding="utf-8"))
SEAMS = [(place, *row) for place, rows in TABLE.items() for row in rows.items()]
"""Where it is upstream, its signature without annotations, where and how we rely on it."""


def locate(place: str) -> Any:
    module, _, path = place.partition(":")
    return reduce(getattr, path.split("."), importlib.import_module(module))


def signature(function: Any) -> str:
    """Names, kinds and defaults of the parameters; annotations say nothing about a call."""
    full = inspect.signature(function)
    own = [p.replace(annotation=p.empty) for name, p in full.parameters.items() if name != "_ray_trace_ctx"]
    text = str(full.replace(parameters=own, return_annotation=inspect.Signature.empty)).replace(", *)", ")")
    return f"async {text}" if inspect.iscoroutinefunction(function) else text


def changed(what: str, ours: str) -> str:
    return f"verl {verl.__version__} is not the 0.9.1 we know: {what}.\nWhere we rely on it: {ours}."


def test_verl_is_the_pinned_release() -> None:
    assert verl.__version__ == "0.9.1", "another verl: run this file, repair what it names, then pin the new version"


@pytest.mark.parametrize(("place", "pinned", "ours"), SEAMS, ids=[place for place, _, _ in SEAMS])
def test_signature_is_the_pinned_one(place: str, pinned: str, ours: str) -> None:
    try:
        found = signature(locate(place))
    except (ImportError, AttributeError) as error:
        pytest.fail(changed(f"{place} is gone ({error})", ours))
    assert found == pinned, changed(f"{place} has another signature\n  0.9.1: {pinned}\n  now:   {found}", ours)


def our_classes() -> dict[str, tuple[type, str]]:
    """Every class of ours that stands below one of verl's, with the latter's place."""
    from recipe.skpo.engine import dense, fsdp
    from recipe.skpo.rollout import manager, two_phases, worker
    from recipe.skpo.trainer import base as base_trainer
    from recipe.skpo.trainer import baselines, dataset, timeouts
    from recipe.skpo.trainer import skpo as trainer

    found = {}
    for module in (worker, two_phases, manager, timeouts, base_trainer, trainer, baselines, dataset, dense, fsdp):
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                for place in (WORKER, MANAGER, SYNC, BUFFER, REPLICAS, ENGINE, f"{DATASET}:RLHFDataset"):
                    if issubclass(value, locate(place)):
                        found[name] = (value, place)
    return found


OURS = ["RolloutWorker", "SkpoAgentLoopWorker", "RolloutManager", "SkpoAgentLoopManager"]
OURS += [
    "ReplayBufferWithTimeout",
    "CheckpointManagerWithTimeout",
    "BaseTrainer",
    "SkpoTrainer",
    "BaselineTrainer",
    "SpoTrainer",
    "CountedDataset",
    "SharedPrefixEngine",
    "PackedEngine",
]


def overridden(name: str) -> dict[str, Any]:
    """What a class of ours overrides of verl's, by name."""
    ours, place = our_classes()[name]
    base = locate(place)
    found = {key: value for key, value in vars(ours).items() if callable(value) and hasattr(base, key)}
    if name.endswith("WithTimeout"):
        del found["__init__"]  # it takes over what verl's has built, and calls none
    return found


def test_every_class_below_one_of_verls_is_known_here() -> None:
    assert sorted(our_classes()) == sorted(OURS)
    # It only names another worker class.
    assert [name for name in OURS if not overridden(name)] == ["SkpoAgentLoopManager"]


@pytest.mark.parametrize("name", OURS)
def test_every_override_is_in_the_table(name: str) -> None:
    place = our_classes()[name][1]
    missing = {f"{place}.{key}" for key in overridden(name)} - {seam for seam, _, _ in SEAMS}
    assert not missing, f"pin the signature of {', '.join(sorted(missing))} in SEAMS"


@pytest.mark.parametrize("name", OURS)
def test_every_override_can_be_called_as_upstream_calls_it(name: str) -> None:
    base = locate(our_classes()[name][1])
    for key, value in overridden(name).items():
        upstream = inspect.signature(getattr(base, key))
        positional = [p.name for p in upstream.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        keywords = {p.name: None for p in upstream.parameters.values() if p.kind is p.KEYWORD_ONLY}
        keywords.pop("_ray_trace_ctx", None)  # Ray's own, handed over by its wrapper alone
        positional = [parameter for parameter in positional if parameter != "_ray_trace_ctx"]
        mine = inspect.signature(value)
        mine.bind(*positional, **keywords)  # raises TypeError where it cannot
        mine.bind("self", **{parameter: None for parameter in positional[1:]}, **keywords)
        assert inspect.iscoroutinefunction(value) == inspect.iscoroutinefunction(getattr(base, key)), key


def test_the_fake_llm_client_has_the_interface_of_verls(fake_llm) -> None:
    real = locate("verl.workers.rollout.llm_server:LLMServerClient.generate")
    assert signature(type(fake_llm()).generate) == signature(real)


# ---------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("place", "needed", "ours"),
    [
        (
            f"{LOOPS}:AgentLoopOutput",
            "prompt_ids response_ids response_mask response_logprobs reward_score num_turns metrics extra_fields",
            "rollout._row sets them",
        ),
        (
            "verl.workers.rollout.replica:TokenOutput",
            "token_ids log_probs extra_fields",
            "rollout reads them from every answer",
        ),
    ],
    ids=["AgentLoopOutput", "TokenOutput"],
)
def test_record_has_the_fields_we_use(place: str, needed: str, ours: str) -> None:
    missing = set(needed.split()) - set(locate(place).model_fields)
    assert not missing, changed(f"{place} has lost {sorted(missing)}", ours)


def test_transfer_queue_unpickles_nothing_that_came_by_another_way() -> None:
    """Besides ``decode``, which the run's key guards, it loads files that it wrote itself."""
    import transfer_queue

    package = Path(transfer_queue.__file__).parent
    texts = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
    assert {name for name, text in texts.items() if "pickle.loads(" in text} == {
        "utils/serial_utils.py",
        "storage/simple_storage.py",
    }
    assert not [name for name, text in texts.items() if "recv_pyobj" in text]


def test_batch_meta_can_be_reordered_and_counted() -> None:
    from transfer_queue import KVBatchMeta

    batch = KVBatchMeta(keys=["a", "b", "c"], tags=[{"n": 0}, {"n": 1}, {"n": 2}], partition_id="train")
    batch.reorder([2, 0, 1])
    assert (batch.keys, [tag["n"] for tag in batch.tags], len(batch)) == (["c", "a", "b"], [2, 0, 1], 3)


def test_a_metric_sum_adds_up_over_micro_batches() -> None:
    from verl.utils.metric import Metric

    metric = Metric.from_dict({"skpo/loss": 2.0}, aggregation="sum")["skpo/loss"]
    metric.append(3.0)
    assert metric.aggregate() == 5.0


# ---------------------------------------------------------------- actor classes, registries


@pytest.mark.parametrize("place", [WORKER, "verl.trainer.main_ppo:TaskRunnerV1.__ray_actor_class__"])
def test_the_plain_class_behind_an_actor_class_can_be_subclassed(place: str) -> None:
    plain = locate(place)
    assert inspect.isclass(plain), changed(f"{place} is no class", "rollout and main subclass it")
    assert issubclass(type("Sub", (plain,), {}), plain)


def test_our_names_are_registered_with_verl() -> None:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
    from verl.trainer.ppo.v1 import get_trainer_cls

    from recipe.skpo.trainer.baselines import BaselineTrainer, SpoTrainer
    from recipe.skpo.trainer.objective import skpo_estimator, skpo_policy_loss
    from recipe.skpo.trainer.skpo import SkpoTrainer

    assert get_trainer_cls("skpo") is SkpoTrainer
    assert get_trainer_cls("skpo_baseline") is BaselineTrainer
    assert get_trainer_cls("skpo_spo") is SpoTrainer
    assert get_adv_estimator_fn("skpo") is skpo_estimator
    assert get_policy_loss_fn("skpo") is skpo_policy_loss
