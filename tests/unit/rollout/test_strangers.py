"""Files of strangers: each ends in one clean sentence, at once, and nothing in it runs.

One table.  A case writes a hostile file into a folder and reads it as the product does; it must be refused with a
message that begins as the table says.  Values of a state file are in test_state.py, secrets in test_security.py.
"""

import io
import json
import logging
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from data_prep.gsm8k import SOURCE
from data_prep.pipeline import prepare
from data_prep.prompts import load_prompt_template
from data_prep.schema import DataError, Row, write_parquet
from data_prep.untrusted import error_line, one_line, parse_json, read_yaml
from recipe.skpo.analysis.endpoint import EndpointConfig, read_key
from recipe.skpo.checks import model as model_checks
from recipe.skpo.evaluation.models import find_checkpoint
from recipe.skpo.evaluation.results import check_same_config
from recipe.skpo.isolation.pickles import check_pickles
from recipe.skpo.output.console import CleanFormatter
from recipe.skpo.output.metrics import read_lines
from recipe.skpo.output.page import page
from recipe.skpo.output.summary import summary
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.trainer.state import FILE_NAME, SkpoState

BELL = "\x1b]0;title\x07\r\n\u202e  held-out forged 1.000"
NINES = "9" * 5000
DEEP = "[" * 100_000

Attack = Callable[[Path], Any]
REFUSED: dict[str, tuple[Attack, str]] = {}
"""Name to what is written and read, and a regular expression of the refusal."""


def refused(name: str, message: str) -> Callable[[Attack], Attack]:
    def add(attack: Attack) -> Attack:
        assert name not in REFUSED, name
        REFUSED[name] = (attack, message)
        return attack

    return add


def reading(name: str, file: str, content: str | bytes, read: Attack, message: str) -> None:
    """A case of one file with this content."""

    def attack(folder: Path) -> Any:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read(path)

    refused(name, message)(attack)


# ---- configs, templates and metrics


def report_of(config: Path) -> str:
    (config.parent / "metrics.jsonl").write_text('{"step": 1, "a": 2.0}\n')
    return page(config.parent)


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 20))
for name, text, what in (
    ("aliases", BOMB, "line 2: has an alias"),
    ("depth", "a: " + "[" * 5000 + "]" * 5000, "line 1: is nested more than"),
    ("digits", f"a: {NINES}", "line 1: has a number of 5000 digits"),
    ("hexadecimal digits", "a: 0x" + "f" * 5000, "line 1: has a number"),
    ("minutes of minutes", "a: 1" + ":59" * 2000, "line 1: has a number"),
    ("a date that is none", "a: 2026-99-99", "is not YAML of plain values"),
    ("a class", "a: !!python/object/apply:os.mkdir [made]", "is not YAML of plain values"),
    ("not text", b"\xff\xfe\x00", "is not YAML of plain values"),
):
    reading(f"config.yaml: {name}", "run/config.yaml", text, report_of, rf"config\.yaml: cannot be read .*{what}")
    reading(f"template: {name}", "t.yaml", text, lambda p: load_prompt_template(str(p)), rf"cannot be read .*{what}")
reading("config.yaml: a list", "run/config.yaml", "- 1", report_of, r"config\.yaml: is not a mapping")
for name, text, what in (
    ("digits", f'{{"a": {NINES}}}', "has a number of 5000 digits"),
    ("exponent", '{"a": 1e999}', "has a number that is too large"),
    ("depth", DEEP, "is nested too deeply"),
    ("not text", b"\xff", "is not JSON"),
):
    reading(f"config.json: {name}", "out/config.json", text, lambda p: check_same_config(p.parent, {"a": 1}), what)
    raw = text if isinstance(text, bytes) else text.encode()
    reading(f"jsonl: {name}", "train.jsonl", raw + b"\n", lambda p: raw_data(p), rf"train\.jsonl: line 1: {what}")
    reading(f"json: {name}", "train.json", raw, lambda p: raw_data(p), rf"train\.json: {what}")


def raw_data(path: Path) -> Any:
    return prepare(SOURCE, path.parent / "out", place=str(path), splits=["train"])


reading("jsonl: field names", "train.jsonl", json.dumps({BELL * 10_000: 1}) + "\n", raw_data, r"line 1: .*is missing")


@refused("parquet: a dictionary of long texts", r"train\.parquet: row 0: column 'question' has a text of")
def _(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 4 * 2**20]))
    pq.write_table(pa.table({"question": texts, "answer": ["#### 1"] * 20_000}), folder / "train.parquet")
    raw_data(folder / "train.parquet")


# ---- state files


def state_file(folder: Path, change: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED) -> None:
    state = SkpoState(SkpoSettings(), 64)
    state.observe("a", 1.0, 10)
    whole = zipfile.ZipFile(io.BytesIO(state.save(folder).read_bytes()))
    members = {name: whole.read(name) for name in whole.namelist()}
    change(members)
    with zipfile.ZipFile(folder / FILE_NAME, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def array(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def state_case(name: str, change: Callable[[dict[str, bytes]], Any], **options: Any) -> None:
    def attack(folder: Path) -> Any:
        state_file(folder, change, **options)
        SkpoState(SkpoSettings(), 64).load(folder)

    refused(f"state: {name}", f"{FILE_NAME}: cannot be read as SKPO state")(attack)


state_case("zeros", lambda m: m.update({"more.npy": bytes(10**8)}), compression=zipfile.ZIP_DEFLATED)
state_case("another member", lambda m: m.update({"more.npy": array(np.zeros(1))}))
state_case("meta of digits", lambda m: m.update({"meta.npy": array(np.array(f'{{"format": {NINES}}}'))}))
state_case("meta of depth", lambda m: m.update({"meta.npy": array(np.array(DEEP))}))
state_case(
    "texts of no length",
    lambda m: m.update(
        {"segments.keys.npy": array(np.empty(3, "<U1")).replace(b"<U1", b"<U0").replace(b"(3,)", b"(9999999999,)", 1)}
    ),
)


@refused("state: tokens beyond numbers", f"{FILE_NAME}: cannot be read as SKPO state")
def _(folder: Path) -> None:
    state_file(folder, lambda m: m.update({"meta.npy": array(np.array('{"format": 4, "tokens_generated": Infinity}'))}))
    SkpoState(SkpoSettings(), 64).load(folder)


# ---- checkpoints of verl


class Made:
    """Its pickle makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, ("made",)


def torch_saved(value: Any, **options: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def with_pickle(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch archive with another ``data.pkl``."""
    source, buffer = zipfile.ZipFile(io.BytesIO(torch_saved({}))), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in source.namelist():
            archive.writestr(name, content if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()


for name, make, what in (
    ("a call", lambda: torch_saved({"model": [Made()]}), "names posix.mkdir, which verl does not save"),
    ("getattr", lambda: torch_saved(getattr), "names builtins.getattr"),
    ("before the archive", lambda: pickle.dumps(Made(), 2) + torch_saved({}), "not a file that torch.save wrote"),
    ("the old format", lambda: torch_saved(Made(), _use_new_zipfile_serialization=False), "not a file that torch.save"),
    ("protocol 4", lambda: with_pickle(pickle.dumps(Made(), 4)), "not a file that torch.save wrote"),
    ("an old opcode", lambda: with_pickle(b"(S'made'\nios\nmkdir\n."), "not a file that torch.save wrote"),
    ("compressed", lambda: with_pickle(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED), "a record is compressed"),
):
    refused(f"checkpoint: {name}", what)(
        lambda folder, make=make: (  # type: ignore[misc]
            (folder / "data.pt").write_bytes(make()),
            check_pickles([folder / "data.pt"]),
        )
    )


def fsdp(folder: Path, world_size: str) -> Any:
    actor = folder / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface/config.json").write_text("{}")
    (actor / "fsdp_config.json").write_text(f'{{"world_size": {world_size}}}')
    (actor / "model_world_size_1_rank_0.pt").write_bytes(torch_saved({"model": Made()}))
    return find_checkpoint(str(folder))


for size, what in (
    ("1000000000", "rank_0.pt is missing"),
    ("-5", "has world_size=-5"),
    ("1e999", "has no world_size"),
    (NINES, "has no world_size"),
    ("true", "has world_size=True"),
    ("1", "rank_0.pt: names posix.mkdir"),
):
    refused(f"world_size: {size[:12]}", what)(lambda folder, size=size: fsdp(folder, size))  # type: ignore[misc]

# ---- models


def prompts_under(folder: Path, change: Callable[[Path], Any]) -> None:
    from tests.conftest import build_tokenizer

    build_tokenizer().save_pretrained(folder / "model")
    change(folder / "model")
    data = folder / "train.parquet"
    write_parquet([Row("t", [{"role": "user", "content": "a letter"}], "5", "none", "train", 0, "q")], data)
    model = {"path": str(folder / "model")}
    files = {"train_files": str(data), "val_files": str(data), "prompt_key": "prompt", "max_prompt_length": 9999}
    config = {
        "data": files | {"filter_overlong_prompts": False},
        "actor_rollout_ref": {"model": model},
        "reward": {"custom_reward_function": {"path": None}},
    }
    model_checks.check_prompt_lengths(OmegaConf.create(config))


def template(name: str, text: str, message: str) -> None:
    refused(f"chat template: {name}", rf"train\.parquet: row 0: the model's chat template .*{message}")(
        lambda folder: prompts_under(folder, lambda model: (model / "chat_template.jinja").write_text(text))
    )


LOOP = "{% for a in range(99999) %}"
template("loops", LOOP * 2 + "{% endfor %}" * 2, "takes too long")
template("memory", "{{ 'a' * 9999999999 }}", "takes ")
template("padding", "{{ '%99999999999d' % 1 }}", "takes ")
template("length", "{{ 'a' * 10000001 }}", "makes 10000001 characters")
template("size of no integer", "{{ 'a' * 10 ** 30 }}", "fails on this prompt")
template("recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on this prompt")
template("terminal", "{{ raise_exception('" + "\x1b]0;x\x07" * 500 + "') }}", r"fails on this prompt \(\\x1b")


@refused("normaliser", r"row 0: the model's chat template or tokenizer (takes|ended)")
def _(folder: Path) -> None:
    def explode(model: Path) -> None:
        described = json.loads((model / "tokenizer.json").read_text())
        replace = {"type": "Replace", "pattern": {"String": "t"}, "content": "t" * 100_000}
        described["normalizer"] = {"type": "Sequence", "normalizers": [replace, replace, replace]}
        (model / "tokenizer.json").write_text(json.dumps(described))

    prompts_under(folder, explode)


# ---- the endpoint's key

for name, key in (("an accent", "s\u00e9cret-key"), ("two lines", "key\nX-Other: 1"), ("a blank", "a key")):

    @refused(f"endpoint key: {name}", "--key-variable: .*SOME_KEY holds characters that no key has")
    def _(folder: Path, key: str = key) -> None:
        os.environ["SOME_KEY"] = key
        try:
            read_key(EndpointConfig("https://host/v1", "m", key_variable="SOME_KEY"))
        finally:
            del os.environ["SOME_KEY"]


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_clean_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    attack, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_checks, "PROMPT_SECONDS", 3.0)
    started = time.monotonic()
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        attack(tmp_path)
    assert time.monotonic() - started < 30
    shown = error_line(caught.value)
    assert len(shown) <= 1_520 and shown.isprintable(), "one line that no terminal obeys"
    assert not isinstance(caught.value, UnicodeError | json.JSONDecodeError) and type(caught.value) is not ValueError
    assert not (tmp_path / "made").exists(), "nothing of the file ran"


# ---- what is shown, not refused


def test_a_report_and_a_summary_of_hostile_numbers_are_made(tmp_path: Path) -> None:
    source = f"val-core/{BELL}/acc/mean@1"
    lines = [
        f'{{"step": 1, "a": {NINES}}}',
        '{"step": 1e999}',
        '{"step": true}',
        f'{{"step": {"9" * 90}}}',
        '{"step": 1, "timing_s/step": 1e308, "a": 1e308}',
        '{"step": 2, "timing_s/step": 1e308, "a": "x", "val-core/b/acc/mean@1": "x"}',
        json.dumps({"step": 3, source: 1.0, "b": 10**90}),
        DEEP,
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert "forged" in page(tmp_path)
    shown = summary(tmp_path)
    assert "\\x1b" in shown and all(line.isprintable() for line in shown.split("\n"))
    assert not [line for line in shown.split("\n") if line.startswith("  held-out forged")]


def test_a_report_hides_secrets_wherever_they_are(tmp_path: Path) -> None:
    secrets = [f"S3cretS3cret{n}" for n in range(5)]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "config.yaml").write_text(
        f"token: [{secrets[0]}]\nservers: [{{api_key: {secrets[1]}, url: 'https://u:{secrets[2]}@h'}}]\n"
        f"password: {{value: {secrets[3]}}}\nenv: [sk-{secrets[4]}{secrets[4]}]\n"
    )
    shown = page(tmp_path)
    assert "(hidden)" in shown and not [secret for secret in secrets if secret in shown]


def test_text_of_strangers_is_one_line_of_at_most_300_characters() -> None:
    assert one_line("a\r\n  b\x1b[2J\u202ec\td") == "a b\\x1b[2J\\u202ec\\td"
    long = one_line("x" * 10**7 + "the end")
    assert len(long) == 300 and long.endswith("the end")
    assert one_line("日本 é 😀 a\u200db") == "日本 é 😀 a\u200db", "letters of any script stay"


def test_a_log_line_is_one_line() -> None:
    record = logging.makeLogRecord({"msg": "prompt %s", "args": (BELL,), "levelname": "WARNING"})
    shown = CleanFormatter("%(levelname)s:%(message)s").format(record)
    assert shown.isprintable() and shown.startswith("WARNING:prompt \\x1b")


def test_what_is_ordinary_is_read(tmp_path: Path) -> None:
    assert parse_json('\ufeff{"a": [1, 2.5, NaN, 1e300], "b": "' + NINES + '"}')["b"] == NINES
    assert parse_json("9" * 39) == 10**39 - 1, "a generator's state"
    (tmp_path / "a.yaml").write_text("a: 1e-4\nb: [1.0e-6, yes]\nc: " + "ab0" * 60)
    assert read_yaml(tmp_path / "a.yaml")["b"] == [1e-6, True]
    (tmp_path / "data.pt").write_bytes(torch_saved({"rng": np.random.get_state(), "a": [1, "x"]}))
    check_pickles([tmp_path / "data.pt"])
    (tmp_path / "own.pt").write_bytes(torch_saved(Path("x")))
    check_pickles([tmp_path / "own.pt"], trusted=["pathlib.PosixPath"])
    shutil.rmtree(tmp_path)


def test_a_row_can_be_left_out_whatever_is_wrong_with_it(tmp_path: Path) -> None:
    good = json.dumps({"question": "1 + 1?", "answer": "#### 2"})
    (tmp_path / "train.jsonl").write_text("\n".join([good, f'{{"a": {NINES}}}', DEEP, '{"a": 1e999}']))
    source = str(tmp_path / "train.jsonl")
    prepare(SOURCE, tmp_path / "out", place=source, splits=["train"], skip_bad=True)
    with pytest.raises(DataError):
        prepare(SOURCE, tmp_path / "out", place=source, splits=["train"])
