"""Hydra keeps what it has parsed and composed: a composition takes 0.1 s of processor time instead of 0.5 s.

Only for config files that do not change while tests run, the recipe's, verl's and Hydra's own. Hydra changes the nodes
of a composed config, so each caller gets a copy.
"""

import pickle
from copy import copy, deepcopy
from functools import cache
from typing import Any

import omegaconf.base
import pytest
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.plugins.config_source import ConfigSource


class _Copies:
    """A repository whose configs can be changed."""

    def __init__(self, repository: Any) -> None:
        self.repository = repository

    def __getattr__(self, name: str) -> Any:
        return getattr(self.repository, name)

    def load_config(self, config_path: str) -> Any:
        result = copy(self.repository.load_config(config_path))
        if result is not None:
            result.config = deepcopy(result.config)
        return result


def install(patch: pytest.MonkeyPatch, folder: str) -> None:
    """Patch Hydra for this process.

    Args:
        patch: undoes it.
        folder: root of the files that do not change.
    """
    load, compose = ConfigRepository.load_config, ConfigLoaderImpl._compose_config_from_defaults_list
    loaded: dict[Any, Any] = {}
    composed: dict[Any, bytes] = {}

    def stays(source: ConfigSource) -> bool:
        return source.scheme() in ("pkg", "structured") or (source.path or "").startswith(folder)

    def key_of(sources: list[ConfigSource]) -> tuple | None:
        return tuple((each.scheme(), each.path) for each in sources) if all(map(stays, sources)) else None

    def load_once(self: ConfigRepository, config_path: str) -> Any:
        key = key_of(self.sources)
        if key is None:
            return load(self, config_path)
        if (key, config_path) not in loaded:
            loaded[key, config_path] = load(self, config_path)
        return loaded[key, config_path]

    def compose_once(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> Any:
        sources = key_of(repo.get_sources())
        if sources is None:
            return compose(self, defaults, repo)
        key = (sources, *((each.config_path, each.package, each.primary) for each in defaults))
        if key not in composed:
            composed[key] = pickle.dumps(compose(self, defaults, _Copies(repo)))
        return pickle.loads(composed[key])

    make_map, maps = defaults_list._create_interpolation_map, {}

    def map_once(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        """Values for interpolations between the defaults of a file; read only."""
        texts = [str(each) for each in defaults if not (self_added and each.is_self())]
        key = (*overrides.known_choices.items(), *texts)
        if key not in maps:
            maps[key] = make_map(overrides, defaults, self_added)
        return maps[key]

    patch.setattr(defaults_list, "_create_interpolation_map", map_once)
    patch.setattr(ConfigRepository, "load_config", load_once)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", compose_once)
    patch.setattr(omegaconf.base, "parse", cache(omegaconf.base.parse))
    # Without --multirun, Hydra composes a first time only to ask for the mode.
    patch.setattr(Hydra, "get_mode", lambda self, config_name, overrides: None)
