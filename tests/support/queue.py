"""TransferQueue in a dictionary: the functions that trainer and rollout workers call, and what they left."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from recipe.skpo.method.rows import RECORD, RolloutRecord, RowKey, read_record


def packed(cells: list[Any]) -> Any:
    """One column of rows as TransferQueue returns it: scalars dense, tensors jagged, all else a stack."""
    if not all(isinstance(cell, torch.Tensor) for cell in cells):
        return NonTensorStack(*cells)
    if all(cell.dim() == 0 for cell in cells):
        return torch.stack(cells)
    return torch.nested.as_nested_tensor(cells, layout=torch.jagged)


@dataclass
class Queue:
    """Rows of all partitions; no key is in two of them.

    Attributes:
        rows: key to the fields of the row, without the batch dimension.
        tags: key to its tag.
        partitions: key to its partition, keys of prompts included.
        events: ("row", key) or (status, uid), in order.
        cleared: partitions, once per call.
        before_row: called with the key of each row before it is stored.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    tags: dict[str, dict[str, Any]] = field(default_factory=dict)
    partitions: dict[str, str] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)
    cleared: list[str] = field(default_factory=list)
    before_row: Callable[[str], Any] | None = None

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None, data_parser=None):
        for name in fields.keys() if fields is not None else ():
            column = fields.get(name)
            cells = column.unbind() if isinstance(column, torch.Tensor) else column.tolist()
            for key, cell in zip(keys, cells, strict=True):
                self.rows.setdefault(key, {})[name] = cell
        for key, tag in zip(keys, tags or [], strict=False):
            self.tags[key] = tag
        for key in keys:
            self.partitions[key] = partition_id
            self.events.append(("row", key))
        return self.batch(list(keys), partition_id)

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        assert {self.partitions[key] for key in keys} == {partition_id}
        names = [name for name in self.rows[keys[0]] if select_fields is None or name in select_fields]
        return TensorDict({name: packed([self.rows[key][name] for key in keys]) for name in names}, len(keys))

    def kv_clear(self, keys, partition_id):
        for key in keys:
            del self.rows[key], self.tags[key], self.partitions[key]
        self.cleared.append(partition_id)

    async def async_kv_put(self, key, partition_id, fields=None, tag=None, data_parser=None):
        assert fields is None
        await asyncio.sleep(0)
        self.partitions[key] = partition_id
        self.events.append((tag["status"], key))

    async def async_kv_batch_put(self, keys, partition_id, fields=None, tags=None, data_parser=None):
        for key in keys:
            if self.before_row is not None:
                await self.before_row(key)
        await asyncio.sleep(0)
        return self.kv_batch_put(keys, partition_id, fields, tags)

    # ---------------------------------------------------------------- for tests

    def store(self, rows: list[tuple[str, dict[str, Any], dict[str, Any]]], partition_id: str = "train"):
        """Put rows (key, fields, tag) in this order and return their batch."""
        for key, fields, tag in rows:
            self.rows[key], self.tags[key], self.partitions[key] = fields, tag, partition_id
        return self.batch([key for key, _, _ in rows], partition_id)

    def batch(self, keys: list[str], partition_id: str = "train"):
        """The batch of these rows, as the replay buffer hands it to the trainer."""
        from transfer_queue import KVBatchMeta

        tags = [dict(self.tags.get(key, {})) for key in keys]
        return KVBatchMeta(partition_id=partition_id, keys=keys, tags=tags, extra_info={"temperature": 0.6})

    def status(self, uid: str) -> list[str]:
        """What was said of a prompt."""
        return [status for status, key in self.events if key == uid]

    def row(self, uid: str, session: int) -> dict[str, Any]:
        """A row by its visit and session."""
        return self.rows[f"{uid}_{session}_0"]

    def record(self, uid: str) -> RolloutRecord:
        """The record of a visit's rollout."""
        record = read_record(self.row(uid, 0)["extra_fields"][RECORD])
        assert isinstance(record, RolloutRecord)
        return record

    def siblings(self, uid: str) -> list[dict[str, Any]]:
        """A visit's responses, in order."""
        keys = sorted(RowKey.parse(key) for key in self.rows if key.startswith(f"{uid}_"))
        return [self.row(uid, key.session) for key in keys if key.session]


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Put the dictionary in the place of TransferQueue."""
    import transfer_queue

    made = Queue()
    monkeypatch.setattr(transfer_queue, "init", lambda *args, **kwargs: None)
    for name in ("kv_batch_put", "kv_batch_get", "kv_clear", "async_kv_put", "async_kv_batch_put"):
        monkeypatch.setattr(transfer_queue, name, getattr(made, name))
    return made
