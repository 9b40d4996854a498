"""What we rely on in verl 0.9.1, pinned: the signatures of all that we override or call.

When one fails after an upgrade of verl: read the change upstream, then what the message names on our side, adapt it,
and only then the table.  docs/verl_seams.md tells the reason of each override; scripts/verl_facts.yaml lists what we
rely on in the text of its functions, which scripts/check_verl_version.py checks.
"""

import importlib
import inspect
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import verl

BASE = "verl.trainer.ppo.v1.trainer_base:PPOTrainer"
SYNC = "verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync"
WORKER = "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.__ray_actor_class__"
BUFFER = "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer"
REPLICAS = "verl.checkpoint_engine:CheckpointEngineManager"
LOOPS = "verl.experimental.agent_loop.agent_loop"
DATASET = "verl.utils.dataset.rl_dataset"
MANAGER = "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ"
ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"

# (where it is upstream, its signature without annotations, where and how we rely on it).  Ray adds _ray_trace_ctx to
# the methods of an actor class; it is left out here.
SEAMS = [
    # rollout.py: overridden
    (f"{WORKER}.__init__", "(self, *args, **kwargs)", "rollout.RolloutWorker.__init__ puts its client around verl's"),
    (
        f"{WORKER}._run_agent_loop",
        "async (self, sampling_params, trajectory, *, agent_name, trace=True, **kwargs)",
        "rollout.RolloutWorker._run_agent_loop adds a seed to the sampling parameters of a session",
    ),
    (
        f"{WORKER}._run_prompt",
        "async (self, prompt, sampling_params, trajectory, trace=False)",
        "rollout.SkpoAgentLoopWorker._run_prompt overrides it",
    ),
    (f"{MANAGER}.__init__", "(self, *args, **kwargs)", "rollout.RolloutManager.__init__ extends it"),
    # rollout.py: called, or what calls us
    (
        f"{WORKER}.generate_sequences",
        "async (self, batch)",
        "it starts one rollout._run_prompt per prompt, in the background",
    ),
    (f"{MANAGER}.generate_sequences", "(self, prompts)", "rollout.RolloutManager leaves out columns that nobody reads"),
    (
        f"{DATASET}:RLHFDataset.__init__",
        "(self, data_files, tokenizer, config, processor=None, max_samples=-1)",
        "checks.data reads the files by it, without a tokenizer",
    ),
    (f"{DATASET}:get_dataset_class", "(data_config)", "checks.data finds data.custom_cls by it"),
    (
        "verl.trainer.ppo.reward:resolve_reward_manager_cls",
        "(config)",
        "checks.reward finds the reward manager by it",
    ),
    (
        f"{WORKER}._agent_loop_postprocess",
        "async (self, output, validate, **kwargs)",
        "rollout._stored makes the same row",
    ),
    (f"{WORKER}._compute_multi_modal_inputs", "(self, output, input_ids)", "rollout._stored calls it"),
    (
        f"{WORKER}._compute_position_ids",
        "(self, input_ids, attention_mask, multi_modal_inputs, mm_processor_kwargs=None)",
        "rollout._stored calls it without the last",
    ),
    (
        f"{WORKER}._compute_score",
        "async (self, outputs, kwargs)",
        "rollout.RolloutWorker._compute_score bounds it in time and checks the reward; rollout._respond gets a "
        "sibling's reward by it, rollout._complete that of a candidate's own response",
    ),
    (
        f"{MANAGER}._init_agent_loop_workers",
        "async (self)",
        "it starts self.agent_loop_workers_class, which rollout.RolloutManager sets, as self.agent_loop_workers, whose "
        "counts take_tokens adds up",
    ),
    (
        "verl.workers.rollout.llm_server:LLMServerClient._acquire_server",
        "async (self, request_id, **extra)",
        "rollout.CheckedLLMClient replaces it by one whose server aborts what is cancelled",
    ),
    (
        "verl.workers.rollout.llm_server:LLMServerClient.generate",
        "async (self, request_id, *, prompt_ids, sampling_params, image_data=None, video_data=None, audio_data=None, "
        "mm_processor_kwargs=None, **kwargs)",
        "rollout.CheckedLLMClient wraps it for verl's agent loop and for rollout._generate; "
        "tests/conftest.py:FakeLLMClient stands for it",
    ),
    (
        "verl.utils.tokenizer.continuous_token_wiring:create_continuous_token_builder",
        "(tokenizer, *, model_family='auto', hf_model_type=None, chat_template_kwargs=None, mm_processor_kwargs=None, "
        "processor=None, **builder_kwargs)",
        "rollout.SkpoAgentLoopWorker.__init__ builds the tokens of q as verl's agent loops do",
    ),
    (
        "verl.utils.tokenizer.continuous_token:ContinuousTokenBuilder.build_initial_tokens",
        "(self, messages, *, tools=None, images=None, videos=None, audios=None, mm_inputs_out=None)",
        "rollout._tokenize calls it with the messages alone",
    ),
    (f"{LOOPS}:AgentLoopOutput.as_dict", "(self)", "rollout._row: the fields that are set become the stored fields"),
    (
        "transfer_queue:async_kv_put",
        "async (key, partition_id, fields=None, tag=None, data_parser=None)",
        "rollout._run_prompt puts a prompt's status by it",
    ),
    (
        "transfer_queue:async_kv_batch_put",
        "async (keys, partition_id, fields=None, tags=None, data_parser=None)",
        "rollout._run_prompt stores the rows of a prompt by it; tests/support/queue.py stands in for it",
    ),
    # isolation/messages.py: replaced, or called
    ("transfer_queue.utils.serial_utils:encode", "(obj)", "isolation.messages puts a signature behind the frames"),
    ("transfer_queue.utils.serial_utils:decode", "(frames)", "isolation.messages checks the signature before it"),
    ("transfer_queue.utils.zmq_utils:get_node_ip_address", "()", "isolation.messages answers 127.0.0.1 on one node"),
    (
        "ray.experimental.internal_kv:_internal_kv_put",
        "(key, value, overwrite=True, *, namespace=None)",
        "isolation.messages.create_key stores the run's key",
    ),
    (
        "ray.experimental.internal_kv:_internal_kv_get",
        "(key, *, namespace=None)",
        "isolation.messages.stored_key reads the run's key",
    ),
    # base_trainer.py, trainer.py, baselines.py: overridden
    (f"{SYNC}.__init__", "(self, config)", "base_trainer.BaseTrainer.__init__ extends it"),
    (f"{SYNC}._build_replay_buffer", "(self)", "base_trainer.BaseTrainer sets trainer_mode before it runs"),
    (f"{SYNC}._init_dataloader", "(self)", "base_trainer.BaseTrainer replaces train_dataloader after it"),
    (
        f"{DATASET}:RLHFDataset.maybe_filter_out_long_prompts",
        "(self, dataframe=None)",
        "dataset.CountedDataset filters by lengths that are known",
    ),
    (
        f"{SYNC}.on_init_end",
        "(self)",
        "base_trainer.BaseTrainer bounds the manager's waits there, trainer.SkpoTrainer sets the loss function",
    ),
    (
        f"{REPLICAS}.sleep_replicas",
        "(self)",
        "timeouts.CheckpointManagerWithTimeout gives it a time-out",
    ),
    (f"{SYNC}._load_checkpoint", "(self)", "base_trainer.BaseTrainer loads its state after it"),
    (f"{SYNC}._save_checkpoint", "(self)", "base_trainer.BaseTrainer saves its state before it; on_train_end calls it"),
    (
        f"{SYNC}.on_validate_begin",
        "(self)",
        "base_trainer.BaseTrainer adds its metrics file at the first hook of fit(); on_train_end calls it",
    ),
    (f"{SYNC}.on_train_begin", "(self)", "base_trainer.BaseTrainer adds its metrics file at the first hook of fit()"),
    (
        f"{BUFFER}.sample",
        "(self, global_steps, partition_id, batch_size)",
        "timeouts.ReplayBufferWithTimeout.sample counts the prompts that are missing",
    ),
    (
        f"{BUFFER}._wait_for_next_poll",
        "(self, partition_id, last_debug_time)",
        "timeouts.ReplayBufferWithTimeout._wait_for_next_poll gives up",
    ),
    (
        "verl.workers.rollout.base:get_rollout_class",
        "(rollout_name, mode='async')",
        "weight_sync_registration puts the name of weight_sync.ServerAdapterWithTimeout into its registry",
    ),
    (
        f"{SYNC}._write_generations",
        "(inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path, global_steps)",
        "base_trainer.BaseTrainer skips a dump that cannot be written",
    ),
    (f"{SYNC}.on_step_begin", "(self)", "base_trainer.BaseTrainer starts the token counts of the step there"),
    (f"{SYNC}.on_step_end", "(self)", "base_trainer.BaseTrainer ends training there when the budget is spent"),
    (f"{SYNC}.on_train_end", "(self)", "base_trainer.BaseTrainer saves and validates there when the budget is spent"),
    (
        f"{SYNC}.step",
        "(self, metrics, timing_raw)",
        "base_trainer.BaseTrainer keeps the step's metrics, which it saves with the checkpoint",
    ),
    (
        f"{SYNC}._fetch_one_gen_batch",
        "(self)",
        "base_trainer.BaseTrainer adds uid, split position, seed and step to its batch",
    ),
    (
        f"{SYNC}._balance_batch",
        "(self, batch, metrics, logging_prefix='global_seqlen', keep_minibatch=False)",
        "base_trainer.BaseTrainer sorts the rows before it, and replaces it where an update needs whole prompts",
    ),
    (f"{SYNC}._get_required_batch_multiple", "(self, dp_size)", "base_trainer._balance_batch pads to it"),
    (
        "verl.trainer.ppo.padding_utils:upsample_batch_to_divisible_size",
        "(batch, batch_multiple, eos_token_id)",
        "base_trainer._balance_batch pads by it",
    ),
    (
        "verl.utils.seqlen_balancing:log_seqlen_unbalance",
        "(seqlen_list, partitions, prefix)",
        "base_trainer._order_by_prompt logs the shares of the ranks by it",
    ),
    (
        "verl.single_controller.base.worker:Worker._query_dispatch_info",
        "(self, mesh_name)",
        "base_trainer._data_parallel_size finds the ranks of the actor by it",
    ),
    (
        f"{SYNC}._compute_old_log_prob",
        "(self, batch, metrics)",
        "base_trainer.BaseTrainer says how many rows belong together",
    ),
    (
        f"{SYNC}._compute_advantage",
        "(self, batch, metrics)",
        "trainer.SkpoTrainer and baselines.SpoTrainer replace it, baselines.BaselineTrainer logs after it",
    ),
    (
        f"{SYNC}._update_actor",
        "(self, batch, metrics)",
        "trainer.SkpoTrainer turns sums into shares after it, baselines.SpoTrainer reads the KL",
    ),
    # base_trainer.py, trainer.py, baselines.py and loss.py: called
    (f"{SYNC}._validate", "(self)", "base_trainer.on_train_end calls it and logs what it returns"),
    (f"{SYNC}.on_validate_end", "(self)", "base_trainer.on_train_end calls it after validation"),
    (
        "torchdata.stateful_dataloader:StatefulDataLoader.__init__",
        "(self, dataset, batch_size=1, shuffle=None, sampler=None, batch_sampler=None, num_workers=0, collate_fn=None, "
        "pin_memory=False, drop_last=False, timeout=0, worker_init_fn=None, multiprocessing_context=None, "
        "generator=None, *, prefetch_factor=None, persistent_workers=False, pin_memory_device='', in_order=True, "
        "snapshot_every_n_steps=1)",
        "base_trainer._init_dataloader gives it curriculum.PrioritisedBatches as batch_sampler",
    ),
    (
        "verl.utils.dataset.rl_dataset:collate_fn",
        "(data_list)",
        "base_trainer._init_dataloader collates prompts by it, as verl's own loader",
    ),
    (
        "verl.workers.engine_workers:ActorRolloutRefWorker.compute_log_prob",
        "(self, data)",
        "base_trainer._log_ratios asks for the log-probs of stored segments by it",
    ),
    (
        "verl.utils.tensordict_utils:list_of_dict_to_tensordict",
        "(list_of_dicts)",
        "base_trainer._log_ratios makes the rows that it puts by it",
    ),
    (
        "verl.workers.utils.padding:response_from_nested",
        "(tensor, response_mask)",
        "base_trainer._log_ratios cuts the responses' log-probs out by it",
    ),
    (
        "transfer_queue:kv_clear",
        "(keys, partition_id)",
        "base_trainer._log_ratios empties its own partition by it",
    ),
    (
        "verl.workers.engine_workers:ActorRolloutRefWorker.set_loss_fn",
        "(self, loss_fn)",
        "trainer.on_init_end sets objective.skpo_loss by it",
    ),
    (
        "transfer_queue:kv_batch_get",
        "(keys, partition_id, select_fields=None)",
        "trainer and baselines read rows by it in _compute_advantage, base_trainer._log_ratios all fields at once",
    ),
    (
        "transfer_queue:kv_batch_put",
        "(keys, partition_id, fields=None, tags=None, data_parser=None)",
        "trainer and baselines write advantages by it, base_trainer._log_ratios rows with tags",
    ),
    ("transfer_queue:KVBatchMeta.reorder", "(self, indexes)", "both _balance_batch order rows by it"),
    # dense.py
    (f"{ENGINE}.prepare_model_inputs", "(self, micro_batch)", "dense.SharedPrefixEngine packs rows there"),
    (
        f"{ENGINE}.prepare_model_outputs",
        "(self, output, output_args, micro_batch, logits_processor_func)",
        "dense.SharedPrefixEngine unpacks log-probs and entropies there",
    ),
    # engine/fsdp.py
    (f"{ENGINE}._build_module", "(self)", "PackedEngine chooses the attention of the module that it returns"),
    (
        f"{ENGINE}.forward_backward_batch",
        "(self, data, loss_function, forward_only=False)",
        "PackedEngine keeps a prompt's rows together before it",
    ),
    (
        f"{ENGINE}.forward_step",
        "(self, micro_batch, loss_function, forward_only)",
        "PackedEngine counts the positions that it computed",
    ),
    (
        "verl.utils.seqlen_balancing:rearrange_micro_batches",
        "(batch, max_token_len, dp_group=None, num_batches_divided_by=None, same_micro_num_in_dp=True, "
        "min_num_micro_batch=None, use_dynamic_bsz_balance=True, force_group_size=1)",
        "PackedEngine and base_trainer set force_group_size",
    ),
    (
        "verl.workers.engine.base:EngineRegistry.register",
        "(model_type, backend, device='cuda', vendor=None)",
        "dense registers SharedPrefixEngine for the device shared_prefix",
    ),
    (
        "verl.utils.torch_functional:logprobs_from_logits",
        "(logits, labels, inplace_backward=True)",
        "dense computes log-probs by it",
    ),
    ("verl.utils.torch_functional:entropy_from_logits", "(logits)", "dense computes entropies by it"),
    (
        "verl.trainer.ppo.core_algos:register_adv_est",
        "(name_or_enum)",
        "objective registers skpo_estimator as 'skpo'",
    ),
    (
        "verl.trainer.ppo.core_algos:get_adv_estimator_fn",
        "(name_or_enum)",
        "base.BaseTrainer looks the estimator of SKPO and SPO up",
    ),
    (
        "verl.trainer.ppo.v1.trainer_base:register_trainer",
        "(name)",
        "trainer registers SkpoTrainer as 'skpo', baselines theirs as 'skpo_baseline' and 'skpo_spo'",
    ),
    (
        "verl.utils.seqlen_balancing:get_seqlen_balanced_partitions",
        "(seqlen_list, k_partitions, equal_size)",
        "trainer._balance_batch shares rows out to ranks by it",
    ),
    (
        "verl.trainer.ppo.core_algos:register_policy_loss",
        "(name)",
        "objective registers skpo_policy_loss as 'skpo'",
    ),
    (
        "verl.workers.utils.losses:ppo_loss",
        "(config, model_output, data, dp_group=None)",
        "objective.skpo_loss wraps it",
    ),
    (
        "verl.trainer.ppo.core_algos:compute_policy_loss_vanilla",
        "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='token-mean', config=None, "
        "rollout_is_weights=None)",
        "objective.skpo_policy_loss has the parameters of verl's own policy losses",
    ),
    (
        "verl.trainer.ppo.core_algos:agg_loss",
        "(loss_mat, loss_mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, "
        "loss_scale_factor=None)",
        "objective.skpo_policy_loss sums tokens by it",
    ),
    (
        "verl.trainer.ppo.core_algos:kl_penalty",
        "(logprob, ref_logprob, kl_penalty)",
        "checks.loss asks it whether it knows actor.kl_loss_type",
    ),
    (
        "verl.trainer.ppo.rollout_corr_helper:compute_rollout_correction_weights",
        "(log_ratio, response_mask, rollout_is='token', rollout_is_threshold=2.0, rollout_is_batch_normalize=False)",
        "checks.loss asks it whether it knows the threshold",
    ),
    (
        "verl.trainer.ppo.rollout_corr_helper:compute_rollout_correction_and_rejection_mask",
        "(old_log_prob, rollout_log_prob, response_mask, rollout_is=None, rollout_is_threshold=2.0, "
        "rollout_is_batch_normalize=False, rollout_rs=None, rollout_rs_threshold=None)",
        "base.BaseTrainer computes importance weights by it",
    ),
    (
        "verl.utils.config:omega_conf_to_dataclass",
        "(config, dataclass_type=None)",
        "trainer.on_init_end makes the actor's config of the loss by it",
    ),
    (
        "verl.utils.metric:Metric.from_dict",
        "(data, aggregation)",
        "objective.skpo_loss reports its sums by it",
    ),
    # main.py
    ("verl.trainer.main_ppo:run_ppo", "(config, task_runner_class)", "launch.launch calls it"),
    (
        "verl.trainer.main_ppo:TaskRunnerV1.__ray_actor_class__.run",
        "(self, config)",
        "launch.SkpoTaskRunner.run extends it: it imports our trainers first",
    ),
    (
        "verl.utils.config:validate_config",
        "(config, use_reference_policy, use_critic)",
        "launch.launch calls it before Ray starts",
    ),
    ("verl.trainer.ppo.utils:need_critic", "(config)", "launch.launch calls it"),
    ("verl.trainer.ppo.utils:need_reference_policy", "(config)", "launch.launch calls it"),
]


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
