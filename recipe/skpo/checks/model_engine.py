"""verl's engine for the actor: what it needs is said before the settings that only another engine has."""

from importlib.util import find_spec

from omegaconf import DictConfig

from recipe.skpo.errors import ConfigError

ENGINES = {"megatron": "megatron.core", "torchtitan": "torchtitan", "veomni": "veomni"}
"""verl's engines that need a package, to its module."""


def check_model_engine(config: DictConfig) -> None:
    """Refuse an engine that cannot run on this platform or is not installed.

    Raises:
        ConfigError: naming the engine and what it needs.
    """
    engine = config.model_engine
    if engine not in ENGINES:
        return
    if config.platform.name == "cpu":
        raise ConfigError(f"model_engine: is {engine}, which needs GPUs; leave it out on the CPU platform")
    package = ENGINES[engine]
    if find_spec(package.partition(".")[0]) is None or find_spec(package) is None:
        raise ConfigError(f"model_engine: {engine} needs the package {package}, which is not installed; install it")
