"""Settings of torch that the actor needs on GPUs; imported in its processes through ``model.external_lib``."""

import torch

from recipe.skpo.output.console import configure_logging

configure_logging()

# torch >= 2.11 prefers cuDNN's attention on Hopper.  With a mask its backward can return NaN there (pytorch issue
# 196678), and padded rows have a mask.
torch.backends.cuda.enable_cudnn_sdp(False)
