"""verl's data set without its second count of every prompt's tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.utils.dataset.rl_dataset import RLHFDataset

from recipe.skpo.task.prompt_lengths import lengths_file, read_lengths


class CountedDataset(RLHFDataset):
    """verl's data set; ``data.filter_overlong_prompts`` reads the lengths that the start-up check has kept."""

    def maybe_filter_out_long_prompts(self, dataframe: Any = None) -> Any:
        """Leave out prompts longer than ``data.max_prompt_length``; verl counts where not all lengths are known."""
        lengths = self._lengths(len(dataframe)) if self.filter_overlong_prompts else None
        if lengths is None:
            return super().maybe_filter_out_long_prompts(dataframe)
        return dataframe.select(np.flatnonzero(lengths <= self.max_prompt_length))

    def _lengths(self, rows: int) -> np.ndarray | None:
        """Read the lengths of all rows, int32 (rows,); None if some are not known, or if verl counts otherwise."""
        if self.processor is not None or self.tool_schemas is not None:
            return None
        options: Any = OmegaConf.to_container(OmegaConf.create(self.apply_chat_template_kwargs))
        found = [
            read_lengths(lengths_file(Path(file), self.prompt_key, self.tokenizer, options)) for file in self.data_files
        ]
        known = [lengths for lengths in found if lengths is not None]
        # With data.train_max_samples these are not all rows of the files.
        return np.concatenate(known) if sum(map(len, known)) == rows and len(known) == len(found) else None


@contextmanager
def counted_dataset(config: DictConfig) -> Iterator[None]:
    """Have verl make ``CountedDataset``, unless the user names a class, by the option that is for such a class."""
    given = config.data.custom_cls
    with open_dict(config):
        if not given.path:
            config.data.custom_cls = {"path": f"pkg://{__name__}", "name": CountedDataset.__name__}
        try:
            yield
        finally:
            config.data.custom_cls = given
