"""Every command line of README and docs is read by the program that it names, and its values arrive as they are meant.

Nothing is started: a training goes up to its launch, the other programs up to the end of their own parsing.
"""

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from data_prep.__main__ import main as data_prep_main
from data_prep.command import commands
from recipe.skpo.evaluation.command import main as evaluation_main
from recipe.skpo.evaluation.config import EvaluationConfig
from tests.conftest import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
HELP = REPOSITORY / "recipe/skpo/config/hydra/help/skpo.yaml"
PYTHON = ("python", ".venv/bin/python", "/opt/verl-skpo/.venv/bin/python")
SHELL = ("cd", "sleep", "#SBATCH", "export", "source")
"""Words that begin a line of a shell script which starts no program of ours."""

MEANT = {r'["\n"]': ["\n"]}
"""Values that are not what their text looks like."""


def lines_of(document: Path) -> Iterator[str]:
    """Lines of the ``bash`` blocks, continued ones joined."""
    for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.strip().startswith("#"):
                yield " ".join(line.split())


def examples() -> list[str]:
    """The command lines of ``--help``."""
    template = yaml.safe_load(HELP.read_text(encoding="utf-8"))["template"]
    return re.findall(r"^ +(python -m (?!.*\[key=value\]).*)", template, re.MULTILINE)


LINES = [(document.name, line) for document in DOCUMENTS for line in dict.fromkeys(lines_of(document))]
LINES += [("--help", line) for line in examples()]


def words_of(line: str) -> tuple[list[str], bool]:
    """The words of a line as the shell gives them, and whether ``...`` leaves some out.

    ``<name>`` becomes a name, ``[--option value]`` its content, ``a|b`` the first alternative.
    """
    line = re.sub(r"<(\w[\w .]*)>", lambda match: match[1].replace(" ", "_"), line)
    line = re.sub(r"\[(--[^\]]*)\]", r"\1", line)
    words = [re.sub(r"^(\w+)\|[\w|]+$", r"\1", word) for word in shlex.split(line, comments=True)]
    return [word.replace("...", "left_out") for word in words if word != "..."], "..." in line


class Parsed(Exception):
    """Raised after a successful parse, to stop there."""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch):
    """Run a module or script up to the end of its parsing; returns what it read."""
    real = argparse.ArgumentParser.parse_args

    def run(program: str, arguments: list[str], loose: bool) -> argparse.Namespace:
        found: list[argparse.Namespace] = []

        def parse(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
            given = list(sys.argv[1:] if args is None else args)
            if loose:  # what is required may be among what is left out
                known = {option for action in every_action(parser) for option in action.option_strings}
                unknown = [word for word in given if word.startswith("--") and word not in known]
                assert not unknown, f"{program} does not know {unknown}"
            else:
                found.append(real(parser, given, namespace))
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.syspath_prepend(str(REPOSITORY))
        with pytest.raises(Parsed):
            if program.endswith(".py"):
                runpy.run_path(str(REPOSITORY / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        return found[0] if found else argparse.Namespace()

    return run


def every_action(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from every_action(below)


@pytest.mark.parametrize(("document", "line"), LINES, ids=[f"{name}: {line}"[:90] for name, line in LINES])
def test_a_documented_line_is_read(document: str, line: str, command_line, parsed, monkeypatch) -> None:
    words, loose = words_of(line)
    while words and (words[0] == "--" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
        words = words[1:]
    start = next((place for place, word in enumerate(words) if word in PYTHON), None)
    if words[0] == "bash" and words[1] == "run_skpo.sh":
        check_training(words[2:], command_line, monkeypatch)
    elif words[0] == "bash":
        assert (REPOSITORY / words[1]).is_file()
    elif start is not None:
        check_python(words[start + 1 :], loose, command_line, parsed, monkeypatch)
    elif all("=" in word for word in words) and re.match(r"\+?[a-z_]+[.=]", words[0]) and "$(" not in line:
        check_training(words, command_line, monkeypatch)
    else:
        assert line.startswith(SHELL) or "$(" in line or "ray start" in line, "a line that this test does not know"


def check_python(words: list[str], loose: bool, command_line, parsed, monkeypatch) -> None:
    if words[:2] == ["-m", "recipe.skpo.main"]:
        check_training(words[2:], command_line, monkeypatch)
    elif words[:2] == ["-m", "recipe.skpo.analysis.probe"]:
        from recipe.skpo.analysis.probe import PREFIX, Sizes

        check_training([word for word in words[2:] if not word.startswith(PREFIX)], command_line, monkeypatch)
        Sizes.of([word for word in words[2:] if word.startswith(PREFIX)], "cpu", 8)
    elif words[:2] == ["-m", "recipe.skpo.evaluation"]:
        from recipe.skpo.evaluation.command import read_config

        config = read_config([*words[2:], *(["benchmarks=[amc23]"] if loose else [])])
        assert config.checkpoint and config.benchmarks
    elif words[:2] == ["-m", "benchmarks"]:
        assert set(words[2:]) <= {*importlib.import_module("benchmarks.__main__").PARTS, "--steps"}
    elif words[0] == "-c":
        compile(words[1], "<documentation>", "exec")
    elif words[0] == "-m":
        parsed(words[1], words[2:], loose)
    else:
        parsed(words[0], words[1:], loose)


def check_training(words: list[str], command_line, monkeypatch) -> None:
    """Every override is launched with the value that it names."""
    monkeypatch.setattr("recipe.skpo.checks.engine.find_spec", lambda name: object())
    # What a document leaves out, or only the reader has.
    stands_for = {"/path/to/file.py": "pkg://reward_fns", "model=left_out": "model=qwen2_5_math_7b"}
    for gap, own in stands_for.items():
        words = [word.replace(gap, own) for word in words]
    if "data=files" in words and not any(word.startswith("data.train_files=") for word in words):
        words += ["data.train_files=train.parquet", "data.val_files=val.parquet"]
    # The paper's models are for GPUs, which are looked for on a real machine.
    platform = "gpu" if any(word.startswith(("model=", "trainer.n_gpus")) for word in words) else "cpu"
    monkeypatch.setenv("SLURM_NNODES", "2")
    words = [re.sub(r"\$\{?(\w+)\}?", "2", word) if "$SLURM" in word or "$address" in word else word for word in words]
    launched = command_line(*words, platform=platform)
    assert launched.message is None, launched.message
    if "--cfg" in words:
        return
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if "." in key or key == "output_dir":
            wanted = MEANT.get(value, value_of(value))
            found = OmegaConf.select(launched.config, key)
            found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
            if key == "skpo.boundaries":
                from recipe.skpo.settings import SkpoSettings

                found = SkpoSettings.from_config(launched.config.skpo).boundaries
            # Relative names are absolute by then.
            assert found == wanted or last_parts(found) == last_parts(wanted), key


def value_of(text: str) -> Any:
    """Read a value as Hydra does; YAML takes 1e-6 for text."""
    return float(text) if re.fullmatch(r"\d+e-\d+", text) else yaml.safe_load(text)


def last_parts(value: Any) -> list[str]:
    return [Path(str(item)).name for item in (value if isinstance(value, list) else [value])]


def test_folders_of_the_default_run_are_called_as_it_calls_them(compose_config) -> None:
    made = {compose_config().output_dir, compose_config("method=grpo").output_dir}
    for document in DOCUMENTS:
        named = set(re.findall(r"outputs/smollm2_135m[\w-]*", document.read_text(encoding="utf-8")))
        assert named <= made, document.name


# ---------------------------------------------------------------- what commands say of themselves


def test_help_names_options_with_their_values_and_what_can_be_chosen(command_line, compose_config, capsys) -> None:
    command_line("--help", "method=grpo", "skpo.group_size=6")
    said = capsys.readouterr().out
    options = dict(
        re.findall(r"^  ([a-z_]+(?:\.[a-z_]+)*) {2,}.*\((.+)\)$", said.partition("\nOptions")[2], re.MULTILINE)
    )
    config = compose_config("method=grpo", "skpo.group_size=6")
    assert len(options) == 16 and options.keys() == readme_options().keys()
    assert options == {key: str(OmegaConf.select(config, key)) for key in options}
    assert "cispo, dapo, dr_grpo, grpo, grpo_curriculum, gspo, papo, rloo, sapo, skpo, spo (grpo)" in said
    assert "--cfg job --package skpo" in said and len(said.splitlines()) < 50


def readme_options() -> dict[str, list[str]]:
    """Key to the last two cells of the README's table: the paper's value, and that of the first command."""
    table = DOCUMENTS[0].read_text(encoding="utf-8").partition("\n## Options\n")[2].partition("\n## ")[0]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[-2:] for row in rows}


def test_the_readme_shows_the_values_of_options(compose_config) -> None:
    configs = (compose_config("model=qwen2_5_math_7b", "data=files"), compose_config())
    wrong = []
    for key, cells in list(readme_options().items())[4:]:  # before these are paths
        for cell, config in zip(cells, configs, strict=True):
            found = OmegaConf.select(config, key)
            found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
            wrong += [] if value_of(cell) == found else [f"{key}: {cell}, is {found}"]
    assert not wrong


@pytest.mark.parametrize("package", ["data_prep", "recipe.skpo.analysis"])
def test_a_package_lists_its_commands(package: str, capsys, monkeypatch) -> None:
    folder = REPOSITORY / package.replace(".", "/")
    runnable = {
        path.stem for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    assert set(commands(folder, package)) == runnable - {"__main__"}
    monkeypatch.setattr(sys, "argv", [package])
    with suppress(SystemExit):
        runpy.run_module(package, run_name="__main__")
    said = capsys.readouterr().out
    assert all(f"python -m {package}.{name} " in said for name in runnable - {"__main__"})


def test_data_prep_runs_the_command_that_it_is_given(capsys) -> None:
    with pytest.raises(SystemExit):
        data_prep_main(["gsm8k", "--help"])
    assert "python -m data_prep.gsm8k" in capsys.readouterr().out
    assert (data_prep_main([]), data_prep_main(["gsm9k"])) == (0, 2)


def test_evaluation_lists_its_keys(capsys) -> None:
    with pytest.raises(SystemExit):
        evaluation_main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n{item.name}: " in said or f"\n{item.name}:\n" in said for item in fields(EvaluationConfig))
    assert "defaults:\n  - " not in said
