"""Rows as verl hands a micro-batch of them to an engine."""

from typing import Any

import torch
from tensordict import TensorDict


def micro_batch(prompts: list[torch.Tensor], responses: list[torch.Tensor], temperature: Any) -> TensorDict:
    from verl.utils import tensordict_utils as tu

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    inputs = [torch.cat(row) for row in zip(prompts, responses, strict=True)]
    fields = {
        "prompts": nested(prompts),
        "responses": nested(responses),
        "input_ids": nested(inputs),
        "position_ids": nested([torch.arange(len(row)) for row in inputs]),
        "response_mask": nested([torch.ones_like(row) for row in responses]),
        "loss_mask": nested([torch.ones_like(row) for row in responses]),
    }
    data = TensorDict(fields, batch_size=len(prompts))
    tu.assign_non_tensor(data, use_remove_padding=False, calculate_entropy=True, pad_token_id=0)
    if isinstance(temperature, torch.Tensor):
        data["temperature"] = temperature
    else:
        tu.assign_non_tensor(data, temperature=temperature)
    return data
