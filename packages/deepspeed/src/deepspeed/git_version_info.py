"""The version; of git "unknown", as the package need not come from a checkout."""

from __future__ import annotations

import torch

from deepspeed._names import names_of
from deepspeed.version import __version__

version = __version__
git_hash = git_branch = "unknown"
#: Operators are built at first use, so none is installed beforehand: `ds ops report` lists them.
installed_ops: dict[str, bool] = {}
accelerator_name = ""
torch_info = {
    "version": ".".join(torch.__version__.split(".")[:2]),
    "cuda_version": torch.version.cuda or "0.0",
    "hip_version": torch.version.hip or "0.0",
    "bf16_support": True,
}

__getattr__, __dir__ = names_of(
    __name__,
    {},
    missing={"compatible_ops": "operators are built at first use: `ds ops report` lists them"},
)
