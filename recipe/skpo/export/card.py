"""The model card of an export: method, data, numbers and versions, without secrets and without paths of a machine."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.untrusted import UntrustedError, one_line, read_yaml
from recipe.skpo.errors import ConfigError
from recipe.skpo.output.metrics import read_steps
from recipe.skpo.output.redaction import hide_secrets
from recipe.skpo.output.summary import LABELS, decoding, held_out
from recipe.skpo.trainer.fingerprint import Fingerprint

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

SETTINGS = {
    "responses per prompt (G)": "skpo.group_size",
    "prompts per step": "data.train_batch_size",
    "prompts per update": "actor_rollout_ref.actor.ppo_mini_batch_size",
    "longest prompt, tokens": "data.max_prompt_length",
    "longest response, tokens": "data.max_response_length",
    "sampling temperature": "actor_rollout_ref.rollout.temperature",
    "learning rate": "actor_rollout_ref.actor.optim.lr",
    "LoRA rank": "actor_rollout_ref.model.lora_rank",
    "LoRA alpha": "actor_rollout_ref.model.lora_alpha",
    "seed": "skpo.seed",
    "options of the chat template": "data.apply_chat_template_kwargs",
}
"""Rows of the card to keys of the run's config."""

_ABSOLUTE = re.compile(r"(?:\bfile:/+|(?<![\w./:~-])/+|(?<=:)/(?!/)|(?<![\w./~-])~[\w.-]*/)(?:[^\s'\",\]})]*/)?")
"""The folders of a path in a text; not those of ``org/model``, ``pkg://module`` or a URL."""


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        name: title.
        step: of the checkpoint.
        adapter: the export is a LoRA adapter alone.
        config: of the run, without secrets; empty if it is not known.
        identity: the fingerprint of the checkpoint, without secrets; empty if it has none.
        numbers: metrics by step.
        decoding: how validation drew its responses.
    """

    name: str
    step: int
    adapter: bool
    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    numbers: Mapping[int, dict[str, Any]]
    decoding: str

    @classmethod
    def read(cls, actor: Path, run: Path | None, name: str, adapter: bool) -> "Card":
        """Read what is known of a checkpoint, ``global_step_N/actor``, and of its run's folder."""
        step = int(actor.parent.name.removeprefix("global_step_"))
        config: Any = {}
        if run is not None:
            try:
                config = hide_secrets(read_yaml(run / "config.yaml"))
            except (UntrustedError, OSError) as error:
                raise ConfigError(f"{run / 'config.yaml'}: cannot be read as a run's config ({error})") from None
        fingerprint = Fingerprint.read(actor.parent)
        return cls(
            name=name,
            step=step,
            adapter=adapter,
            config=config,
            identity=hide_secrets(asdict(fingerprint)) if fingerprint else {},
            numbers={line["step"]: line for line in read_steps(run / "metrics.jsonl")} if run else {},
            decoding=decoding(run) if run else "",
        )

    @property
    def hub(self) -> str | None:
        """Name of the base model on the hub; None for a folder."""
        base = self._value("actor_rollout_ref.model.path")
        return base if isinstance(base, str) and HUB_NAME.fullmatch(base) else None

    def text(self) -> str:
        """Compose the card, Markdown with the front matter that the hub reads."""
        base, hub = self._value("actor_rollout_ref.model.path"), self.hub
        matter = [f"library_name: {'peft' if self.adapter else 'transformers'}", "pipeline_tag: text-generation"]
        matter += [f"base_model: {hub}"] if hub else []
        matter += ["tags: [skpo, verl, reinforcement-learning]"]
        method = str(self.identity.get("method") or self._value("method.name") or "an unknown method")
        what = "LoRA adapter trained" if self.adapter else "Model trained"
        return "\n".join(
            [
                *("---", *matter, "---", f"# {shown(self.name)}", ""),
                f"{what} by {shown(method)} with verl-skpo: step {self.step} of a run.",
                "The licence of the base model applies.",
                *("", *self._training(base), "", *self._held_out(), *self._use(hub), ""),
            ]
        )

    def _value(self, dotted: str) -> Any:
        found: Any = self.config
        for key in dotted.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def _training(self, base: Any) -> Iterator[str]:
        yield from ("## Training", "", "| | |", "|---|---|")
        if base is not None:
            yield f"| base model | {shown(file_name(base))} |"
        for role in ("train", "val"):
            for content in self.identity.get(role, ()):
                rows = f", {shown(content['rows'])} rows" if content.get("rows") else ""
                digest = f", sha256 {shown(content['digest'])}..." if content.get("digest") else ""
                yield f"| {role} data | {shown(file_name(content['path']))}{rows}{digest} |"
        if reward := self.identity.get("reward"):
            yield f"| reward | {shown(file_name(reward['path']))} |"
        for label, key in SETTINGS.items():
            value = self._value(key)
            without_adapter = "LoRA" in label and not self._value("actor_rollout_ref.model.lora_rank")
            if value not in (None, {}) and not without_adapter:
                yield f"| {label} | {shown(value)} |"
        for package, version in self.identity.get("versions", {}).items():
            yield f"| {'commit of verl-skpo' if package == 'verl-skpo' else shown(package)} | {shown(version)} |"

    def _held_out(self) -> Iterator[str]:
        """Yield a table of the validation numbers before training and at the checkpoint's step."""
        validated = {step: held_out(line) for step, line in self.numbers.items()}
        after = validated.get(self.step)
        if not after:
            return
        first = min(step for step in validated if validated[step])
        steps = sorted({first, self.step})
        how = f" ({self.decoding})" if self.decoding else ""
        yield from (f"## Validation{how}", "", f"| data | | {' | '.join(f'step {step}' for step in steps)} |")
        yield f"|---|---|{'---|' * len(steps)}"
        for source, numbers in after.items():
            for key, label in LABELS.items():
                if key in numbers:
                    found = (validated[step].get(source, {}).get(key) for step in steps)
                    cells = " | ".join("" if value is None else f"{value:.3f}" for value in found)
                    yield f"| {shown(source)} | {label} | {cells} |"
        yield ""

    def _use(self, hub: str | None) -> Iterator[str]:
        yield from ("## Use", "", "```python", *(["from peft import PeftModel"] if self.adapter else []))
        yield from ("from transformers import AutoModelForCausalLM, AutoTokenizer", "")
        yield 'folder = "."  # this folder, or the name of its repository'
        if self.adapter:
            yield f"base = AutoModelForCausalLM.from_pretrained({hub or '<base model>'!r})"
            yield "model = PeftModel.from_pretrained(base, folder)"
        else:
            yield "model = AutoModelForCausalLM.from_pretrained(folder)"
        yield "tokenizer = AutoTokenizer.from_pretrained(folder)"
        kwargs = self._value("data.apply_chat_template_kwargs")
        options = f", **{shown_python(kwargs)}" if isinstance(kwargs, Mapping) and kwargs else ""
        yield 'messages = [{"role": "user", "content": "What is 3 + 4?"}]'
        yield (
            f'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
            f"return_dict=True{options})"
        )
        yield "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
        yield "```"


def file_name(path: Any) -> str:
    """Return the last part of a path; names on the hub and of packages stay."""
    text = str(path)
    return text if HUB_NAME.fullmatch(text) or text.startswith("pkg://") else text.rstrip("/").rpartition("/")[2]


def without_paths(text: str) -> str:
    """Replace each path of a machine in a text by its last part; names such as ``org/model`` stay."""
    return _ABSOLUTE.sub("", text)


def shown(value: Any) -> str:
    """Format a value of a run for a table: one line, no path, no Markdown or HTML of its own."""
    text = without_paths(value if isinstance(value, str) else json.dumps(value, default=str))
    return re.sub(r"([\\`*_{}\[\]<>()#|!&])", r"\\\1", one_line(text))


def shown_python(value: Any) -> str:
    """Format options as a Python literal in one line, without paths."""
    return one_line(without_paths(repr(value))).replace("`", "\\x60")
