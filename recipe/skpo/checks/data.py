"""Start-up checks of the data files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pyarrow as pa
from omegaconf import DictConfig

from data_prep.schema import DataError, check_parquet
from recipe.skpo.checks.reward import OUR_REWARD
from recipe.skpo.settings import ConfigError
from reward_fns import route


def check_data(config: DictConfig) -> None:
    """Check the parquet files, and that our own reward, where it is used, knows their data sources.

    Raises:
        DataError: naming file, row or column, and the fix.
    """
    tables = []
    roles: tuple[Literal["train", "val"], ...] = ("train", "val")
    for role in roles:
        for file in prompt_files(config, role):
            tables.append((role, file, check_parquet(Path(file), role=role, prompt_key=config.data.prompt_key)))
    train = [(file, table) for role, file, table in tables if role == "train"]
    rows = sum(table.num_rows for _, table in train)
    if rows < config.data.train_batch_size:
        raise DataError(
            f"data.train_files: {rows} rows are fewer than data.train_batch_size={config.data.train_batch_size}"
        )
    if config.reward.custom_reward_function.path == OUR_REWARD:
        for _, file, table in tables:
            for data_source in table["data_source"].unique().to_pylist():
                try:
                    route(data_source)
                except ValueError as error:
                    raise DataError(f"{file}: {error}") from error
    _check_unique_overprompt_files(train)


def _check_unique_overprompt_files(tables: Iterable[tuple[str, pa.Table]]) -> None:
    seen: dict[str, str] = {}
    for file, table in tables:
        for prompt_id in table["id"].to_pylist():
            if seen.setdefault(prompt_id, file) != file:
                raise DataError(
                    f"{file}: id {prompt_id} is in {seen[prompt_id]} too; ids must be unique over all "
                    f"of data.train_files"
                )


def prompt_files(config: DictConfig, role: Literal["train", "val"]) -> list[str]:
    """``data.train_files`` or ``data.val_files`` as a list.

    Raises:
        ConfigError: none is named.
    """
    value = config.data[f"{role}_files"]
    if not value:
        raise ConfigError(f"data.{role}_files: is not set; name a parquet file, or choose a data set with data=<name>")
    return [str(file) for file in ([value] if isinstance(value, str) else value)]
