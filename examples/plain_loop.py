"""ZeRO in a plain PyTorch loop: the smallest real program.

ds run --nproc 2 examples/plain_loop.py        # or torchrun; python alone is a world of one
"""

import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from ds_core import comm

STAGE = 2

comm.init()
model = nn.Sequential(
    nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1)
)
optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters(), lr=3e-3), stage=STAGE)

torch.manual_seed(dist.get_rank())  # other samples on each rank
for step in range(1, 201):
    x = torch.randn(64, 16)
    loss = (model(x) - x[:, :1] * x[:, 1:2]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)
comm.shutdown()
