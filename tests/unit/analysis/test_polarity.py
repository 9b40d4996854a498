"""Words by polarity and one real update, with a random model of two layers and a sampler that has no model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recipe.skpo.analysis import polarity
from recipe.skpo.analysis.polarity import PolarityConfig, Row, binned, main, measure, rows_of, run, summary, words_of
from recipe.skpo.errors import ConfigError
from tests.unit.analysis.conftest import FakeSampler, engine, replace_weights


def config(model: Path, data: Path, **changes: Any) -> PolarityConfig:
    values: dict[str, Any] = {"model": str(model), "data": data, "engine": engine(), "problems": 3, "group_size": 4}
    return PolarityConfig(**(values | {"max_tokens": 40, "lr": 1e-4} | changes))


def answer(prompt: str, seed: int) -> str:
    """Half of the answers are right."""
    number = int(prompt.partition(" +")[0].split()[-1])
    return f"#### {2 * number if seed % 2 else 99}"


@pytest.fixture(scope="module")
def tiny_model_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model_folder`` with all of its weights, drawn at random."""
    folder = tmp_path_factory.mktemp("random_model")
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def sampler(tiny_model_folder: Path) -> FakeSampler:
    return FakeSampler(AutoTokenizer.from_pretrained(tiny_model_folder), answer)


def test_each_response_has_the_advantage_of_its_group(tiny_model_folder, problems_file, sampler, tmp_path) -> None:
    setting = config(tiny_model_folder, problems_file)
    rows = rows_of(setting, tmp_path, lambda: sampler)
    assert len(rows) == 3 * 4 and sampler.calls[0]["n"] == 4
    for start in (0, 4, 8):  # seeds of a group follow each other
        assert sorted(round(row.advantage, 6) for row in rows[start : start + 4]) == [-1, -1, 1, 1]
    equal = FakeSampler(sampler.tokenizer, lambda prompt, seed: "#### 99")
    with pytest.raises(ConfigError, match="all responses to a problem have equal rewards"):
        rows_of(setting, tmp_path / "equal", lambda: equal)


def test_the_update_is_a_real_one_and_its_change_is_measured_on_the_same_states(tiny_model_folder, tmp_path) -> None:
    rows = [Row((5, 6, 7), (8, 9, 10, 8), 1.0), Row((5, 6), (9, 9), -1.0), Row((7,), (11, 12, 13), 0.5)]
    setting = config(tiny_model_folder, tmp_path, temperature=0.8, lr=1e-3)
    found = measure(setting, rows)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)

    def distributions() -> list[torch.Tensor]:
        return [
            (model(torch.tensor([[*row.prompt, *row.response]])).logits[0, len(row.prompt) - 1 : -1] / 0.8).log_softmax(
                -1
            )
            for row in rows
        ]

    before = distributions()
    labels = [torch.tensor(row.response)[:, None] for row in rows]
    loss = -sum(
        row.advantage * values.gather(1, label).sum() for row, values, label in zip(rows, before, labels, strict=True)
    )
    (loss / 9).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0).step()
    entropies = [torch.special.entr(torch.cat(part).detach().exp()).sum(-1) for part in (before, distributions())]
    assert found["token"].tolist() == [8, 9, 10, 8, 9, 9, 11, 12, 13]
    assert found["advantage"].tolist() == [1.0] * 4 + [-1.0] * 2 + [0.5] * 3
    assert found["entropy"].tolist() == pytest.approx(entropies[0].tolist(), rel=1e-4)
    assert found["change"].tolist() == pytest.approx((entropies[1] - entropies[0]).tolist(), rel=1e-2, abs=1e-5)
    assert found["change"].abs().max() > 1e-4, "the update moved the policy"
    assert (found["polarity"] == found["advantage"] * found["slope"]).all()


def test_words_are_ranked_and_bins_hold_equally_many_tokens() -> None:
    tokens = pd.DataFrame(
        {
            "token": [1, 1, 2, 3, 2, 4] * 10,
            "advantage": [1.0, 1.0, -1.0, 1.0, -1.0, 0.0] * 10,
            "probability": [0.5] * 60,
            "entropy": [1.0] * 60,
            "slope": [0.2, -0.1, 0.3, 0.4, 0.1, 0.5] * 10,
            "change": [0.02, -0.01, -0.03, 0.04, -0.01, 0.0] * 10,
        }
    )
    tokens["polarity"] = tokens["advantage"] * tokens["slope"]
    words = words_of(tokens, lambda token: f"w{token}")
    assert words["text"].tolist() == ["w3", "w1", "w4", "w2"]
    assert words.set_index("text").loc["w1", ["expanding", "contracting", "count"]].tolist() == [0.5, 0.5, 20]
    bins = binned(tokens)
    assert bins["count"].sum() == 50 and set(bins["count"]) <= {2, 3}, "a token without an advantage predicts nothing"
    assert (bins["polarity"].diff().dropna() > -1e-12).all()
    found = summary(tokens, words, bins)
    assert found["expanding"]["words"] == ["w3", "w1"] and found["contracting"]["words"] == ["w2"]
    assert found["expanding"]["token_share"] == pytest.approx(2 / 6)
    assert found["correlation_of_tokens"] == pytest.approx(1.0)
    assert found["same_sign_share"] == 1.0


def test_the_command_writes_picture_and_numbers_and_draws_once(
    tiny_model_folder, problems_file, sampler, tmp_path, capsys
) -> None:
    setting = config(tiny_model_folder, problems_file)
    files = run(setting, tmp_path / "out", lambda: sampler)
    assert {file.name for file in files} >= {"polarity.png", "polarity.svg", "polarity.json", "words.csv", "bins.csv"}
    found = json.loads((tmp_path / "out/polarity.json").read_text())["summary"]
    assert found["tokens"] > 20 and np.isfinite(found["correlation_of_tokens"])
    said = capsys.readouterr().out
    assert "expanding" in said and "predicted against measured" in said
    calls = len(sampler.calls)
    again = run(config(tiny_model_folder, problems_file, lr=1e-5), tmp_path / "out", lambda: sampler)
    assert len(sampler.calls) == calls and again == files, "another update of the same draws"


def test_other_weights_at_the_same_path_are_another_model(own_model, problems_file, tmp_path) -> None:
    sampler = FakeSampler(AutoTokenizer.from_pretrained(own_model), answer)
    rows_of(config(own_model, problems_file), tmp_path / "out", lambda: sampler)
    replace_weights(own_model)
    with pytest.raises(
        ConfigError, match=r"made with weights.model='\w+', now it is '\w+'; give another output folder"
    ):
        rows_of(config(own_model, problems_file), tmp_path / "out", lambda: sampler)


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--temperature", "0"], "--temperature: must be > 0"), (["--lr", "0"], "--lr: must be inside"), ([], "--data")],
)
def test_what_cannot_be_measured_is_refused(refusal, flags: list[str], said: str) -> None:
    assert refusal(main, ["--model", "m", "--data", "none.parquet", *flags]).startswith(said)


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--model: .* cannot be loaded"):
        polarity._loaded(str(tmp_path))
