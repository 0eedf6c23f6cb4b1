"""torch's attention on GPUs, as `attention` calls it: cuDNN's and flash attention's kernels.

cuDNN uses what sm_90 and newer have for products of matrices, flash attention as torch has it does
not: there ours is used for what cuDNN does not take. On sm_80 and its kin flash attention is the
faster one. Of few queries keys are what is read: flash attention cuts them into parts for more
programs on any GPU, and cuDNN would plan anew for each number of keys, which in a decode changes
with every step. Source: Dao 2023, section 4 (sm_80); Shah et al. 2024, section 4 (sm_90).
"""

from __future__ import annotations

import torch

from ds_core.ops.attention import UNBOUNDED
from ds_ops.triton_kernels import targets

aten = torch.ops.aten

#: That the kernels compute in.
DTYPES = (torch.bfloat16, torch.float16)
#: Largest head size of cuDNN's kernels, forward and backward.
_CUDNN_HEAD = 128
#: Queries of a sequence, up to which they are few.
_FEW = 16
CUDNN, FLASH = "cudnn", "flash"


def refusal(
    q: torch.Tensor,
    k: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = UNBOUNDED,
    max_keys: int = UNBOUNDED,
) -> str | None:
    """Why neither kernel is for a call, or None."""
    target = targets.of_architecture(targets.architecture(q.device.type, q.device.index) or "")
    if target is None or target.backend != "cuda":
        return f"{q.device.type}: for NVIDIA's GPUs of sm_80 and newer only"
    if q.numel() == 0 or k.numel() == 0:
        return "q or k: without elements"
    if _is_for_flash(target, q, query_starts):
        if not torch.backends.cuda.flash_sdp_enabled():
            return "flash attention is turned off (torch.backends.cuda.enable_flash_sdp)"
        known = query_starts is None or UNBOUNDED not in (max_queries, max_keys)
        return None if known else "query_starts: without max_queries and max_keys"
    if query_starts is not None or left != UNBOUNDED:
        return f"{target.name}: neither packed sequences nor windows"
    if right != UNBOUNDED and (right != 0 or q.shape[1:2] != k.shape[1:2]):
        return f"{target.name}: causal for as many queries as keys only"
    if q.shape[-1] > _CUDNN_HEAD:
        return f"q: heads of {q.shape[-1]}, up to {_CUDNN_HEAD} are taken on {target.name}"
    return _cudnn_refusal(k)


def _is_for_flash(
    target: targets.Target, q: torch.Tensor, query_starts: torch.Tensor | None
) -> bool:
    return target.name == "sm_80" or (query_starts is None and q.shape[1:2] <= (_FEW,))


def _cudnn_refusal(k: torch.Tensor) -> str | None:
    """Why cuDNN's kernel is not for these keys, or at all at present, by torch's own rules."""
    if k.shape[1:2] == (1,):
        return "k: cuDNN takes no single key"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "cuDNN's attention is turned off (torch.backends.cuda.enable_cudnn_sdp)"
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    if torch.are_deterministic_algorithms_enabled() and not warned:
        return "cuDNN's gradients differ from run to run (torch.use_deterministic_algorithms)"
    return None


def library(
    q: torch.Tensor, k: torch.Tensor, query_starts: torch.Tensor | None, *rest: object
) -> str | None:
    """Whose kernel is for a call: `CUDNN`, `FLASH`, or None."""
    refused = refusal(q, k, query_starts, *rest)  # type: ignore[arg-type]
    if q.dtype not in DTYPES or refused is not None:
        return None
    return FLASH if _is_for_flash(targets.of_device(q.device), q, query_starts) else CUDNN


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = UNBOUNDED,
    max_keys: int = UNBOUNDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both results of a call that is taken."""
    rest = (query_starts, key_starts, scale, left, right, max_queries, max_keys)
    if library(q, k, *rest) == CUDNN:
        turned = (t.transpose(1, 2) for t in (q, k, v))
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *(*turned, None, True, 0.0, right == 0, False), scale=scale
        )
        return out.transpose(1, 2).contiguous(), lse.view(lse.shape[:3]).contiguous()
    most = _most(q, k, query_starts, max_queries, max_keys)
    out, lse, *_ = aten._flash_attention_forward(
        *(q, k, v, query_starts, key_starts, *most, 0.0, right == 0, False),
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    # Rows that see no key have inf there.
    return out.contiguous(), lse.masked_fill(lse == torch.inf, -torch.inf)


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = UNBOUNDED,
    max_keys: int = UNBOUNDED,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a call that is taken."""
    rest = (query_starts, key_starts, scale, left, right, max_queries, max_keys)
    most = _most(q, k, query_starts, max_queries, max_keys)
    if library(q, k, *rest) == CUDNN:
        g, *turned = (t.transpose(1, 2) for t in (grad, q, k, v, out))
        unused = q.new_empty((), dtype=torch.int64)  # of dropout
        found = aten._scaled_dot_product_cudnn_attention_backward(
            *(g, *turned, lse.unsqueeze(-1), unused, unused, None, None, None, *most),
            *(0.0, right == 0),
            scale=scale,
        )
        dq, dk, dv = (t.transpose(1, 2).contiguous() for t in found)
        return dq, dk, dv
    unused = q.new_empty(2, dtype=torch.uint64)  # of dropout
    levels = lse.masked_fill(lse == -torch.inf, torch.inf)
    dq, dk, dv = aten._flash_attention_backward(
        *(grad, q, k, v, out, levels, query_starts, key_starts, *most, 0.0, right == 0),
        *(unused, q.new_empty(0)),
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _most(
    q: torch.Tensor,
    k: torch.Tensor,
    query_starts: torch.Tensor | None,
    max_queries: int,
    max_keys: int,
) -> tuple[int, int]:
    """The tokens of the longest sequence, of queries and keys."""
    return (q.shape[1], k.shape[1]) if query_starts is None else (max_queries, max_keys)
