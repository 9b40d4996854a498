"""The embedded model and task, as the default run trains them."""

import os
import tempfile
from pathlib import Path
from typing import Any


def model_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, made if the cache does not hold it."""
    from data_prep import smollm2

    return smollm2.prepare(Path(os.environ.get("SKPO_CACHE", ".cache")) / "smollm2-135m-instruct")


def problems(count: int) -> list[dict[str, Any]]:
    """Make ``count`` training rows of the arithmetic task."""
    import pandas

    from data_prep import arithmetic

    with tempfile.TemporaryDirectory() as folder:
        path = arithmetic.prepare(Path(folder), train=count, val=1)["train"]
        return pandas.read_parquet(path).to_dict("records")
