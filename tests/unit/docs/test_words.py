"""The words hook of pre-commit, also without pre-commit."""

import re
import subprocess

import yaml

from tests.conftest import REPOSITORY


def test_no_file_has_a_word_that_the_hook_refuses() -> None:
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hook = next(hook for hook in config["repos"][0]["hooks"] if hook["id"] == "words")
    words, kinds = re.compile(hook["entry"], re.IGNORECASE), (".py", ".md", ".yaml", ".sh", ".toml")
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split("\n")
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name in files
        if name.endswith(kinds) and not re.match(hook["exclude"], name) and (REPOSITORY / name).is_file()
        for number, line in enumerate((REPOSITORY / name).read_text(encoding="utf-8").split("\n"), 1)
        if words.search(line)
    ]
    assert not found, "\n".join(found)
    assert words.search(" ".join(["for", "ever"])) and "README.md" in files
