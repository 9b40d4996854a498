"""The handling of every fault taken away, one place each; a test of docs/operations.md's matrix must notice.

Whole runs (``tests/e2e``) are not in here: they take minutes, and what they show is made of what is.
"""

from tests.mutations import Mutation


def one(module: str, name: str, old: str, new: str, *tests: str, file: str = "test_faults.py") -> Mutation:
    """A mutation in one place, and the tests of ``file`` of which one must notice."""
    return Mutation(module, name, ((old, new),), tuple(f"{file}::{test}" for test in tests))


CANDIDATE, SIBLING = "test_a_failing_candidate_is_left_out", "test_a_failing_sibling_leaves_an_untrained_row"
FAILURE = "test_a_prompt_that_cannot_be_rolled_out_is_a_failure_without_rows"
WRONG_REWARDS = "test_a_prompt_whose_rewards_are_all_wrong_is_dropped"
SHARE = "test_more_dropped_prompts_than_the_share_stop_the_run"
VALIDATION = "test_validation_goes_on_without_a_reward"
WEIGHTS = "test_weights_that_nobody_acknowledges_stop_the_run"
TRAINER, KILLS = "test_trainer.py", "test_kills.py"
EVERY_KILL = "test_a_run_killed_at_every_point_is_the_run_that_never_was"

MUTATIONS = (
    # answers of the server
    one(
        "rollout",
        "one failing candidate ends the prompt",
        "for index in range(self.settings.candidate_count)\n            ),\n            return_exceptions=True,",
        "for index in range(self.settings.candidate_count)\n            ),",
        CANDIDATE,
    ),
    one(
        "rollout",
        "one failing sibling ends the prompt",
        "asyncio.gather(*requests, *own, return_exceptions=True)",
        "asyncio.gather(*requests, *own)",
        SIBLING,
    ),
    one("rollout", "answers are not checked", "if problem is not None:", "if False:", CANDIDATE),
    one(
        "rollout",
        "answers are not checked, for the baselines either",
        "if problem is not None:",
        "if False:",
        "test_a_baseline_goes_on_without_a_response_that_failed",
    ),
    one(
        "rollout",
        "an empty answer is no flaw of its own",
        "if not tokens or len(tokens) != len(logprobs):",
        "if len(tokens) != len(logprobs):",
        "test_what_failed_is_counted_by_its_cause",
    ),
    one(
        "rollout",
        "log-probs may be too few",
        "if not tokens or len(tokens) != len(logprobs):",
        "if not tokens or not len(logprobs):",
        SIBLING,
    ),
    one("rollout", "aborted answers are taken", 'output.stop_reason == "aborted"', "False", SIBLING),
    one("rollout", "token ids may be negative", "min(tokens) < 0 or max(tokens)", "max(tokens)", CANDIDATE),
    one(
        "rollout", "token ids may be too large", "or max(tokens) >= vocabulary", "or max(tokens) > vocabulary", SIBLING
    ),
    one("rollout", "log-probs may be no numbers", "not math.isfinite(math.fsum(logprobs))", "False", SIBLING),
    one("rollout", "no candidate is left unnoticed", "if not candidates:", "if False:", FAILURE),
    one("rollout", "no sibling is left unnoticed", "if not responses:", "if False:", FAILURE),
    one(
        "rollout",
        "a sibling that failed is trained",
        "row.response_mask = [0]\n        row.reward_score = 0.0",
        "row.reward_score = 0.0",
        SIBLING,
    ),
    one(
        "rollout",
        "a sibling that failed counts in the segment's reward",
        "for response in scored) / len(scored)",
        "for response in scored) / size",
        SIBLING,
    ),
    one(
        "rollout",
        "failures are not counted",
        "self.failures[cause_of(kind, result)] += 1\n",
        "pass\n",
        "test_what_failed_is_counted_by_its_cause",
    ),
    one(
        "rollout",
        "dropped prompts have no cause",
        'self.failures[cause_of("prompt", error)] += 1\n',
        "pass\n",
        "test_a_dropped_prompt_is_counted_by_its_cause",
    ),
    one(
        "rollout",
        "errors of other actors count by Ray's line",
        "while isinstance(error, RayTaskError) and error.cause is not None:",
        "while False:",
        "test_an_error_of_another_actor_is_counted_by_its_first_line",
    ),
    # time
    one(
        "rollout",
        "a prompt may take for ever",
        "async with asyncio.timeout(self.settings.prompt_timeout_s):\n                rows",
        "async with asyncio.timeout(None):\n                rows",
        FAILURE,
    ),
    one(
        "rollout",
        "a baseline's response may take for ever",
        'limit = None if trajectory["validate"] else self.settings.prompt_timeout_s',
        "limit = None",
        "test_a_baseline_does_not_wait_for_ever",
    ),
    one(
        "rollout",
        "a response of validation is bounded from when it is sent",
        'limit = None if trajectory["validate"] else self.settings.prompt_timeout_s',
        "limit = self.settings.prompt_timeout_s",
        "test_a_long_wait_for_the_server_is_no_fault_in_validation",
    ),
    one(
        "rollout",
        "a reward may take for ever",
        "async with asyncio.timeout(self.settings.prompt_timeout_s):\n            await super()._compute_score",
        "async with asyncio.timeout(None):\n            await super()._compute_score",
        f"{VALIDATION}[hangs]",
    ),
    one(
        "rollout",
        "a time-out may cut a row in two",
        "bound.reschedule(None)",
        "pass",
        "test_a_row_of_a_baseline_is_stored_whole_whatever_the_time",
    ),
    one(
        "rollout",
        "a worker's counts may take for ever",
        "timeout=_ANSWER_S",
        "timeout=None",
        "test_the_manager_adds_up_the_failures_of_its_workers_and_does_not_wait_for_ever",
    ),
    # rewards
    one(
        "rollout",
        "rewards may be anything",
        "if not isinstance(reward, Real) or not math.isfinite(reward):",
        "if False:",
        WRONG_REWARDS,
        "test_a_baseline_stores_no_row_with_a_wrong_reward",
    ),
    one(
        "rollout",
        "rewards may be NaN",
        "not isinstance(reward, Real) or not math.isfinite(reward)",
        "not isinstance(reward, Real)",
        "test_a_baseline_stores_no_row_with_a_wrong_reward",
        f"{VALIDATION}[not_a_number]",
    ),
    one(
        "rollout",
        "rewards may leave what trackers know",
        '"tracker" in self.config.method.uses and not -1 <= reward <= 1',
        "False",
        WRONG_REWARDS,
    ),
    one(
        "rollout",
        "rewards are bounded for methods without trackers",
        '"tracker" in self.config.method.uses and not',
        "not",
        "test_only_methods_with_trackers_bound_the_reward",
    ),
    one(
        "rollout",
        "one wrong reward ends the prompt",
        "asyncio.gather(*requests, *own, return_exceptions=True)",
        "asyncio.gather(*requests, *own)",
        "test_one_wrong_reward_costs_one_sibling",
    ),
    # rows
    one(
        "rollout",
        "a row that cannot be stored is no failure",
        "if errors:\n                raise errors[0]",
        "if False:\n                raise errors[0]",
        "test_rows_are_settled_before_a_prompt_is_called_a_failure",
    ),
    one(
        "rollout",
        "the status does not wait for the rows",
        "asyncio.gather(*puts, return_exceptions=True)",
        "asyncio.gather(*puts)",
        "test_rows_are_settled_before_a_prompt_is_called_a_failure",
    ),
    one(
        "rollout",
        "only our own errors drop a prompt",
        "except Exception as error:  # process border: verl must learn",
        "except RolloutError as error:  # process border: verl must learn",
        "test_a_prompt_without_an_id_is_dropped_and_named",
    ),
    # lengths
    one(
        "rollout",
        "a skip prompt may fill the context",
        "if budget < 1:",
        "if budget < 0:",
        "test_a_skip_prompt_at_the_length_limit",
    ),
    one(
        "rollout",
        "the context does not bound a response",
        "min(limits.response_length - opened, limits.max_model_len - len(skip.request_ids))",
        "limits.response_length - opened",
        "test_a_skip_prompt_at_the_length_limit",
    ),
    one(
        "rollout",
        "only an end token ends a candidate early",
        "finished = len(output.token_ids) < split_position or ",
        "finished = ",
        "test_a_split_position_beyond_what_was_written_halves_the_candidate",
    ),
    one(
        "segments",
        "a segment may be empty",
        "max(1, len(token_ids) // 2)",
        "len(token_ids) // 2",
        "test_candidates_of_one_token_make_a_segment_of_one_token",
    ),
    one(
        "advantage",
        "a group without a spread divides by zero",
        "torch.where(std > EPSILON, centred / std.clamp(min=EPSILON), torch.zeros_like(value))",
        "centred / std",
        "test_one_sibling_left_is_a_group_without_an_advantage",
    ),
    one(
        "state",
        "a prompt never seen has a baseline",
        "KLAdaptiveTracker(0.5, **constants",
        "KLAdaptiveTracker(1.0, **constants",
        "test_an_unknown_prompt_id_is_a_first_visit",
        file=TRAINER,
    ),
    # batches
    one(
        "replay",
        "any number of prompts may be dropped",
        "if not kept or dropped > self.max_dropped_share * batch_size:",
        "if not kept:",
        SHARE,
    ),
    one(
        "replay",
        "the share itself is too many",
        "dropped > self.max_dropped_share * batch_size",
        "dropped >= self.max_dropped_share * batch_size",
        SHARE,
    ),
    one(
        "replay",
        "a batch without rows is verl's to explain",
        "except RuntimeError as error:",
        "except ZeroDivisionError as error:",
        "test_a_batch_without_a_row_always_stops_the_run",
    ),
    one(
        "replay",
        "a batch may take for ever",
        "time.monotonic() - self._since > self.patience_s",
        "False",
        "test_prompts_of_a_worker_that_died_stop_the_run",
    ),
    one(
        "replay",
        "patience is for the batch",
        "if ended != self._ended:",
        "if self._ended < 0:",
        "test_a_slow_batch_in_which_prompts_still_end_is_waited_for",
    ),
    one(
        "replay",
        "patience goes on from the batch before",
        "self._ended, self._since = -1, time.monotonic()\n        where",
        "where",
        "test_patience_begins_anew_with_every_batch",
    ),
    one(
        "replay",
        "a dead worker hides what happened",
        "except Exception as error:  # process border: a worker",
        "except ZeroDivisionError as error:  # process border: a worker",
        "test_prompts_of_a_worker_that_died_stop_the_run",
    ),
    one(
        "base_trainer",
        "verl's replay buffer is kept",
        "return BoundedReplayBuffer(buffer, *limits, lambda: self.agent_loop_manager.take_failures())",
        "return buffer",
        "test_every_trainer_waits_with_a_bound",
        file=TRAINER,
    ),
    one(
        "base_trainer",
        "a dead replica is Ray's to explain",
        "except RayActorError as error:",
        "except ZeroDivisionError as error:",
        "test_a_replica_that_died_stops_the_run_and_names_the_way_on",
        file=TRAINER,
    ),
    one(
        "base_trainer",
        "failures are in no metric",
        "= sum(requests)",
        "= 0",
        "test_failed_requests_of_the_step_are_a_metric",
        file=TRAINER,
    ),
    one(
        "trainer",
        "dropped prompts are in no metric",
        "self.config.data.train_batch_size - len(segments)",
        "0",
        "test_a_dropped_prompt_is_counted_and_its_trackers_stay",
        file=TRAINER,
    ),
    # weights to vLLM
    one(
        "weight_sync",
        "the sender waits for ever for an answer",
        "(zmq.RCVTIMEO, zmq.SNDTIMEO)",
        "(zmq.SNDTIMEO,)",
        WEIGHTS,
    ),
    one("weight_sync", "the sender waits for ever to send", "(zmq.RCVTIMEO, zmq.SNDTIMEO)", "(zmq.RCVTIMEO,)", WEIGHTS),
    one("weight_sync", "other sockets keep the time-out", "context.sockopts = before", "pass", WEIGHTS),
    one("weight_sync", "vLLM's own error is lost", "self.receiving = result", "pass", WEIGHTS),
    one(
        "weight_sync",
        "vLLM's own error is waited for",
        "wait_for(self.receiving, _TELL_S)",
        "wait_for(self.receiving, None)",
        WEIGHTS,
    ),
    one(
        "main",
        "verl's adapter is kept",
        '        libraries.append("recipe.skpo.weight_sync_registration")\n',
        "",
        "test_every_run_registers_the_adapter",
    ),
    # kills
    one(
        "base_trainer",
        "trackers are saved after the mark",
        "        self.state.save(folder)\n        super()._save_checkpoint()\n",
        "        super()._save_checkpoint()\n        self.state.save(folder)\n",
        EVERY_KILL,
        file=KILLS,
    ),
    one(
        "base_trainer",
        "what a killed save left is kept",
        "        remove_checkpoint(folder)\n",
        "",
        EVERY_KILL,
        file=KILLS,
    ),
    one(
        "base_trainer",
        "the mark stays on later steps",
        "        mark(self._checkpoint_folder().parent, own)\n",
        "",
        "test_going_back_to_an_older_checkpoint_makes_it_the_one_that_counts",
        "test_starting_anew_forgets_the_old_mark",
        file=KILLS,
    ),
    one(
        "base_trainer",
        "old checkpoints stay",
        "        super()._save_checkpoint()\n        remove_older(folder.parent, self.global_steps, keep)\n",
        "        super()._save_checkpoint()\n",
        "test_one_checkpoint_is_enough_to_survive_a_kill",
        file=KILLS,
    ),
    one(
        "base_trainer",
        "the line of a step that was saved is lost",
        "self.saved_metrics = json.loads((folder / METRICS_FILE).read_text())",
        "pass",
        EVERY_KILL,
        file=KILLS,
    ),
    one(
        "checkpoints",
        "an empty mark stays",
        "        mark(folder, step)\n    return step",
        "        pass\n    return step",
        EVERY_KILL,
        file=KILLS,
    ),
    one(
        "checkpoints",
        "half of a checkpoint counts as whole",
        "(path / FILE_NAME).is_file() and missing_piece(path, config) is None",
        "True",
        "test_a_marker_that_a_kill_left_empty_gets_the_last_whole_checkpoint",
        file="test_preflight.py",
    ),
    one(
        "checkpoints",
        "the tracker file of a removed checkpoint stays",
        "[folder / FILE_NAME, folder / METRICS_FILE, *folder",
        "[folder / METRICS_FILE, *folder",
        "test_the_last_whole_ones_are_kept",
        "test_files_of_others_stay_in_a_removed_checkpoint",
        file="test_checkpoints.py",
    ),
    one(
        "state",
        "the tracker file is written in place",
        'temporary = folder / f".{FILE_NAME}.{os.getpid()}"',
        "temporary = folder / FILE_NAME",
        "test_a_failing_write_leaves_the_old_file",
        file="test_state.py",
    ),
    one(
        "state",
        "the tracker file is read with pickle",
        "with np.load(path, allow_pickle=False) as archive:\n                meta",
        "with np.load(path, allow_pickle=True) as archive:\n                meta",
        "test_a_hostile_state_file_is_refused_and_runs_nothing",
        file="test_security.py",
    ),
)
