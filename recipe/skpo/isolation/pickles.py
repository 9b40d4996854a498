"""Checkpoints of verl are pickles: what they would import is read from them before anything loads them.

verl loads them by ``torch.load(weights_only=False)``, which runs what a file names.  The names stand in one small
record of the archive; reading it takes milliseconds, whatever the size of the weights, and runs nothing.
"""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.untrusted import one_line
from recipe.skpo.errors import ConfigError

_LARGEST_PICKLE = 2**30
"""Bytes; that of a model with 100,000 tensors has 30 MB."""

_SPEC, _PLACEMENTS = "torch.distributed.tensor._dtensor_spec", "torch.distributed.tensor.placement_types"
KNOWN_GLOBALS = frozenset(
    {
        # State of numpy's generator, in extra_state.
        *("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray"),
        # Sharded tensors of FSDP2, and of FSDP1 with a device mesh, which verl always gives.
        *("torch.distributed.tensor.DTensor", "torch.distributed.device_mesh.DeviceMesh"),
        *(f"{_SPEC}.{name}" for name in ("DTensorSpec", "ShardOrderEntry", "TensorMeta")),
        *(f"{_PLACEMENTS}.{name}" for name in ("Shard", "_StridedShard", "Replicate", "Partial")),
    }
)
"""What the files of verl's FSDP engine name beyond what ``weights_only=True`` allows; none of it runs other code."""


def check_pickles(files: Iterable[Path], trusted: Sequence[str] = ()) -> None:
    """Refuse files of ``torch.save`` that name anything but tensors and what verl's FSDP engine saves.

    Args:
        files: whole archives, as written by ``torch.save``.
        trusted: further names that are allowed.

    Raises:
        ConfigError: naming the file and what it names.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    for file in files:
        try:
            _check_archive(file)
            named = set(get_unsafe_globals_in_checkpoint(str(file)))
        except Exception as error:  # a process border: zip, torch's reader and its scanner have errors of their own
            reason = one_line(error) or type(error).__name__
            raise ConfigError(
                f"{file}: is not a file that torch.save wrote ({reason}); take another checkpoint"
            ) from None
        unknown = ",".join(sorted(named - KNOWN_GLOBALS - set(trusted)))
        if unknown:
            raise ConfigError(
                f"{file}: names {one_line(unknown)}, which verl does not save and which runs when the file is loaded; "
                f"take a checkpoint whose origin you trust, or, if it is your own, give "
                f"'trusted_globals=[{one_line(unknown)}]'"
            )


def _check_archive(file: Path) -> None:
    """Refuse what torch.save does not write: compressed records, and a record that is there twice."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("a record is compressed")
    if len({record.filename for record in records}) < len(records):
        raise ValueError("a record is there twice")
    if any(record.filename.endswith("/data.pkl") and record.file_size > _LARGEST_PICKLE for record in records):
        raise ValueError("its pickle is too large")
