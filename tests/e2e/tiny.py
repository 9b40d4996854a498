"""A tiny random Llama with its own tokenizer, a task and a reward for it: the real stack in a minute."""

from pathlib import Path

import reward_fns
from data_prep.schema import Row, write_parquet
from reward_fns.code_tests import read_tests

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}answer: {% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
REWARD = "reward.custom_reward_function"
OPENS, CLOSES = "<think>", "</think>"


def make_model(folder: Path, thinks: bool = False) -> Path:
    """Write a Llama of about 100,000 parameters with a byte-level tokenizer of 260 tokens; returns the folder.

    One that ``thinks`` has both marks of a thought as tokens, and closes a thought after about eight tokens.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens([OPENS, CLOSES] if thinks else [])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=not thinks,
    )
    model = LlamaForCausalLM(config).float()
    if thinks:
        with torch.no_grad():
            # All hidden states share a direction, which raises the logit of the closing mark.
            model.model.embed_tokens.weight[:, 0] = 1.0
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(CLOSES), 0] = 0.45
    model.save_pretrained(folder)
    return folder


def make_data(folder: Path, rows: int = 16) -> tuple[Path, Path]:
    """Write train and val parquet files of made-up problems; returns both paths."""
    paths = []
    for split in ("train", "val"):
        path = folder / f"{split}.parquet"
        write_parquet(
            [
                Row(
                    "tiny",
                    [{"role": "user", "content": f"{split} {index}"}],
                    str(index),
                    "none",
                    split,
                    index,
                    f"{split} {index}",
                )
                for index in range(rows)
            ],
            path,
        )
        paths.append(path)
    return paths[0], paths[1]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: object = None, **kwargs: object
) -> dict[str, float]:
    """Right where the response has an even number of characters: a coin that a random model can win."""
    correct = len(solution_str) % 2 == 0
    return {"score": 1.0 if correct else -1.0, "acc": float(correct), "well_formed": 1.0}


def score_of_program(
    data_source: str, solution_str: str, ground_truth: str, extra_info: object = None, **kwargs: object
) -> dict[str, float | str]:
    """The recipe's own reward of a program, which a random model cannot write: a right one after an even text."""
    tests = read_tests(ground_truth)
    known = {str(given): result for (given,), result in tests.tests}
    found = f"{known!r}[str(value)]" if len(solution_str) % 2 == 0 else "None"
    program = f"```python\ndef {tests.names[0]}(value):\n    return {found}\n```\n"
    return reward_fns.compute_score(data_source, program, ground_truth)


def score_of_answer(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict, **kwargs: object
) -> float:
    """Right where an odd number of ASCII characters follows the thought: a coin that an open thought does not win."""
    answer = extra_info.get("response_after_thought", solution_str)
    return 1.0 if sum(map(str.isascii, answer)) % 2 else -1.0


def overrides(folder: Path, thinks: bool = False) -> list[str]:
    """Overrides of ``recipe.skpo.main`` that train the tiny model in ``folder``."""
    train, val = make_data(folder)
    model = make_model(folder / "model", thinks)
    thinking = ["+data.apply_chat_template_kwargs.enable_thinking=true", f"{REWARD}.name=score_of_answer"]
    return [
        *(thinking if thinks else []),
        "platform=cpu",
        "data=files",
        f"data.train_files={train}",
        f"data.val_files={val}",
        "data.train_batch_size=4",
        "data.max_prompt_length=48",
        "data.max_response_length=16",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        # The same precision on both sides, high enough to tell agreement from luck.
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.rollout.temperature=1.0",
        "skpo.group_size=4",
        f"{REWARD}.path={Path(__file__).resolve()}",
        f"output_dir={folder / 'out'}",
        "trainer.save_freq=2",
        "trainer.test_freq=1000",
    ]
