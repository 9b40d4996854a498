"""What the server of ``preloaded`` imports before it forks."""

import datasets  # noqa: F401
import pandas  # noqa: F401
import ray  # noqa: F401
import tensordict  # noqa: F401
import torch  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
