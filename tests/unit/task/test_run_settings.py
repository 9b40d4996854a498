"""Settings of a run for whoever looks at its model later: the prompts are those of the training, token by token."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.options import add_model_flags, model_settings
from recipe.skpo.task.model_files import load_tokenizer
from recipe.skpo.task.prompts import problem_tokens
from recipe.skpo.task.run_settings import Chat, run_settings
from tests.conftest import thinking_run

PLACES = [
    "",
    "checkpoints",
    "checkpoints/global_step_3",
    "checkpoints/global_step_3/actor",
    "checkpoints/global_step_3/actor/huggingface",
]


def flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("place", PLACES)
def test_a_runs_settings_are_found_from_any_of_its_folders(tmp_path: Path, model_folder: Path, place: str) -> None:
    run = thinking_run(tmp_path / "run", model_folder)
    found = run_settings(run / place)
    assert found is not None and found.config == run / "config.yaml"
    assert found.chat.chat_template_kwargs == {"enable_thinking": False} and "[think]" in str(
        found.chat.custom_chat_template
    )
    assert (found.reward_path, found.reward_name) == ("pkg://reward_fns", "compute_score")
    assert found.reward_kwargs == {"answer_format": "boxed"}


def test_a_model_of_no_run_has_none(tmp_path: Path, model_folder: Path, monkeypatch) -> None:
    assert run_settings("org/model") is None and run_settings(model_folder) is None
    monkeypatch.chdir(thinking_run(tmp_path / "run", model_folder))
    assert run_settings("") is None, "an endpoint has no folder, and this one is not its"
    shutil.copytree(model_folder, tmp_path / "project" / "model")
    (tmp_path / "project" / "config.yaml").write_text("somebody: elses\n")
    assert run_settings(tmp_path / "project" / "model") is None
    asked = model_settings(flags(), str(tmp_path / "project" / "model"))
    assert (asked.chat, asked.answer_format) == (Chat(), "any")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("skpo: [", "cannot be read as a run's config"),
        ("skpo: {}\nactor_rollout_ref: {model: {custom_chat_template: 5}}", "custom_chat_template is 5, must be a str"),
        ("skpo: {}\nactor_rollout_ref: {}\ndata: {apply_chat_template_kwargs: no}", "apply_chat_template_kwargs is "),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        run_settings(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.yaml'}: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_of_the_analyses_are_those_of_the_training(tmp_path: Path, model_folder: Path) -> None:
    from transformers import AutoTokenizer
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    run = thinking_run(tmp_path / "run", model_folder)
    config = OmegaConf.load(run / "config.yaml")
    messages = [{"role": "user", "content": "1 + 1?"}]
    # As verl's workers do: the custom template replaces the tokenizer's, the options go to the builder.
    trained = AutoTokenizer.from_pretrained(model_folder)
    trained.chat_template = config.actor_rollout_ref.model.custom_chat_template
    builder = create_continuous_token_builder(
        trained, hf_model_type="llama", chat_template_kwargs=config.data.apply_chat_template_kwargs
    )
    asked = model_settings(flags(), str(run))
    tokenizer = load_tokenizer(str(model_folder), asked.chat)
    ids = problem_tokens(tokenizer, messages)
    assert ids == list(builder.build_initial_tokens(messages))
    assert tokenizer.decode(ids).endswith("[no]") and asked.answer_format == "boxed"


def test_flags_go_over_the_runs_settings(tmp_path: Path, model_folder: Path) -> None:
    run = thinking_run(tmp_path / "run", model_folder)
    thinking = json.dumps({"enable_thinking": True})
    asked = model_settings(flags("--chat-template-kwargs", thinking, "--answer-format", "hash"), str(run))
    tokenizer = load_tokenizer(str(model_folder), asked.chat)
    assert tokenizer.decode(problem_tokens(tokenizer, [{"role": "user", "content": "1?"}])).endswith("[think]")
    assert asked.answer_format == "gsm8k"  # by its former name
    template = ("--custom-chat-template", "{{ messages[0]['content'] }}")
    with pytest.raises(
        ConfigError, match=r"^chat_template_kwargs\.enable_thinking: the chat template of .* does not r"
    ):
        load_tokenizer(str(model_folder), model_settings(flags(*template), str(run)).chat)
    plain = model_settings(flags(*template, "--chat-template-kwargs", "{}"), str(run))
    tokenizer = load_tokenizer(str(model_folder), plain.chat)
    assert tokenizer.decode(problem_tokens(tokenizer, [{"role": "user", "content": "1?"}])) == "1?"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("enable_thinkng", " does not read it; write enable_thinking, or leave it out"),
        ("reasoning_effort", " does not read it; leave it out"),
        ("tokenize", "tokenize: is an argument of transformers and not read by a template; leave it out"),
    ],
)
def test_options_that_no_template_reads_are_refused(tmp_path: Path, model_folder: Path, name: str, said: str) -> None:
    template = model_settings(flags(), str(thinking_run(tmp_path / "run", model_folder))).chat.custom_chat_template
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(model_folder), Chat(template, {"enable_thinking": True, name: 1}))
    assert str(error.value).startswith(f"chat_template_kwargs.{name}: ") and str(error.value).endswith(said)


@pytest.mark.parametrize("given", ["[1]", "5", "{"])
def test_options_that_are_not_an_object_are_refused(given: str, capsys) -> None:
    with pytest.raises(SystemExit):
        flags("--chat-template-kwargs", given)
    assert "argument --chat-template-kwargs: " in capsys.readouterr().err
