"""The evaluation's config: ``config/evaluate.yaml`` under Hydra overrides, typed and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.benchmarks import BENCHMARKS
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.engine import EngineConfig
from recipe.skpo.evaluation.models import ACCEPTED
from recipe.skpo.evaluation.options import RewardFunction, check_options, require
from recipe.skpo.output.redaction import reject_secrets

CONFIG = Path(__file__).parents[1] / "config/evaluate.yaml"


@dataclass(frozen=True)
class EvaluationConfig:
    """The keys of ``config/evaluate.yaml``, which says what each is."""

    checkpoint: str
    step: str | None
    benchmarks: list[str]
    data_dir: str
    output_dir: str | None
    k: dict[str, int]
    temperature: float
    top_p: float
    max_prompt_length: int
    max_response_length: int
    chat_template_kwargs: dict[str, Any] | None
    custom_chat_template: str | None
    seed: int
    resamples: int
    reward: RewardFunction
    trusted_globals: list[str]
    engine: EngineConfig

    def __post_init__(self) -> None:
        require(bool(self.benchmarks), f"benchmarks: is empty; name any of {', '.join(BENCHMARKS)}, or parquet files")
        require(self.temperature >= 0, f"temperature: must be >= 0, got {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p: must be in (0, 1], got {self.top_p}")
        require("default" in self.k, "k.default: is not set")
        counts = {f"k.{name}": value for name, value in self.k.items()}
        for name in ("max_prompt_length", "max_response_length", "resamples"):
            counts[name] = getattr(self, name)
        for name, value in counts.items():
            require(value >= 1, f"{name}: must be >= 1, got {value}")
        require(self.seed >= 0, f"seed: must be >= 0, got {self.seed}")
        check_options(self.engine, lambda item: f"engine.{item.name}")
        needed, context = self.max_prompt_length + self.max_response_length, self.engine.max_model_len
        require(
            context == 0 or context >= needed,
            f"engine.max_model_len: {context} is below the {needed} tokens of max_prompt_length and "
            f"max_response_length together; raise it, or leave it at 0",
        )

    def responses(self, benchmark: str) -> int:
        """Return k of one benchmark.

        Raises:
            ConfigError: more than one greedy response.
        """
        key = benchmark if benchmark in self.k else "default"
        require(
            self.temperature > 0 or self.k[key] == 1,
            f"k.{key}: is {self.k[key]}, but with temperature=0 all responses are the same; give k.{key}=1",
        )
        return self.k[key]

    @classmethod
    def from_config(cls, config: DictConfig) -> "EvaluationConfig":
        """Convert a composed config.

        Raises:
            ConfigError: an unknown key, a missing one, one of another type or one out of range.
        """
        for key, what in (("checkpoint", ACCEPTED), ("benchmarks", f"name any of {', '.join(BENCHMARKS)}, or files")):
            require(config.get(key) is not None, f"{key}: is not set; {what}")
        try:
            # OmegaConf converts and refuses types by a frozen record, which it takes for read-only; merging lifts that
            # from the outermost record alone.
            schema = OmegaConf.structured(cls)
            OmegaConf.set_readonly(schema, False)
            for name, record in (("reward", RewardFunction), ("engine", EngineConfig)):
                schema[name] = OmegaConf.structured(record)
                OmegaConf.set_readonly(schema[name], False)
            typed: Any = OmegaConf.to_object(OmegaConf.merge(schema, config))
        except OmegaConfBaseException as error:
            where = f"{error.full_key}: " if error.full_key else ""
            raise ConfigError(where + str(error).splitlines()[0]) from None
        return typed


def read_config(overrides: Sequence[str]) -> EvaluationConfig:
    """Compose ``config/evaluate.yaml`` under Hydra overrides.

    Raises:
        ConfigError: an override that Hydra or the record refuses.
    """
    try:
        with initialize_config_dir(str(CONFIG.parent), version_base=None):
            config = compose(CONFIG.stem, overrides=list(overrides))
        OmegaConf.resolve(config)
        reject_secrets(OmegaConf.to_container(config))
    except (HydraException, OmegaConfBaseException) as error:
        # Hydra spreads its message over lines and causes.
        text = "\n".join(str(cause) for cause in (error, error.__cause__) if cause)
        lines = [line for line in text.splitlines() if line.strip()]
        raise ConfigError("; ".join(dict.fromkeys(lines[:2]))) from None
    return EvaluationConfig.from_config(config)
