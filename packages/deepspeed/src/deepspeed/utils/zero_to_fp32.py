"""Whole fp32 weights of a sharded checkpoint, ours or one of the original package.

Nothing in a checkpoint is executed, and one tensor at a time is in memory where the caller keeps
none. `ds checkpoint export` does the same for ours from the command line.
"""

from __future__ import annotations

import argparse
import atexit
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ds_core.checkpoint import (
    LazyStateDict,
    export_torch,
    find,
    read_state,
    weights_of,
)
from ds_core.checkpoint.any_format import is_ours
from ds_core.checkpoint.export import write_weights
from ds_core.cli.checkpoint_tables import bytes_of
from ds_core.errors import CheckpointError

M = TypeVar("M", bound=torch.nn.Module)

OUTPUT_DTYPE_NAMES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


class CheckpointFileNotFoundError(CheckpointError, FileNotFoundError):
    """A file of a checkpoint is not there."""


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str, tag: str | None = None, exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> Mapping[str, torch.Tensor]:  # fmt: skip
    """The whole model of a checkpoint, weights in fp32, on the CPU.

    Args:
        checkpoint_dir: a folder of checkpoints.
        tag: which one. Default: the one that `latest` names.
        exclude_frozen_parameters: leave out what was not trained.
        lazy_mode: return a mapping that reads each tensor when it is looked up.

    Raises CheckpointError if there is none, or it is damaged.
    """
    state = _weights(checkpoint_dir, tag, torch.float32, exclude_frozen_parameters)
    return state if lazy_mode else _in_memory(state)


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str,
    output_dir: str,
    dtype: torch.dtype | str = torch.float32,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the whole model of a checkpoint as files, for torch or for Hugging Face's libraries.

    Weights that `output_dir` has already are replaced.

    Args:
        checkpoint_dir: a folder of checkpoints.
        output_dir: where to write; created.
        dtype: of floating-point tensors, also by name, such as "bf16".
        max_shard_size: largest file, such as "5GB"; None: one file.
        safe_serialization: model.safetensors, rather than pytorch_model.bin.
        tag: which checkpoint. Default: the one that `latest` names.
        exclude_frozen_parameters: leave out what was not trained.
    """
    wanted = OUTPUT_DTYPE_NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None or wanted not in OUTPUT_DTYPE_NAMES.values():
        raise CheckpointError(f"dtype: got {dtype!r}, expected one of {sorted(OUTPUT_DTYPE_NAMES)}")
    state = _weights(checkpoint_dir, tag, wanted, exclude_frozen_parameters)
    limit = bytes_of(str(max_shard_size)) if max_shard_size is not None else None
    if not safe_serialization:
        export_torch(state, output_dir, max_shard_bytes=limit, overwrite=True)
        return
    whole = sum(
        state.dtype(name).itemsize * torch.Size(state.shape(name)).numel() for name in state
    )
    write_weights(Path(output_dir), state, max_shard_bytes=limit or max(whole, 1), overwrite=True)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str,
    output_dir: str,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """`convert_zero_checkpoint_to_state_dict` in fp32."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir,
        output_dir,
        max_shard_size=max_shard_size,
        safe_serialization=safe_serialization,
        tag=tag,
        exclude_frozen_parameters=exclude_frozen_parameters,
    )


def load_state_dict_from_zero_checkpoint(
    model: M, checkpoint_dir: str, tag: str | None = None
) -> M:
    """Move `model` to the CPU, put a checkpoint's weights into it, and return it.

    Names that only one of them has are passed over, as the original does.
    """
    model.cpu()
    state = _weights(checkpoint_dir, tag, torch.float32, exclude_frozen=False)
    model.load_state_dict(_in_memory(state), strict=False)
    return model


def get_model_state_file(checkpoint_dir: str, zero_stage: int) -> str:
    """The file of one checkpoint that holds what rank 0 saved beside its shards.

    Of a checkpoint of the original it is its own file. Of ours it is a file for `torch.load` that
    is made now, in a temporary folder: the client state and the counters, without any tensor.
    """
    folder = _existing(checkpoint_dir)
    if is_ours(folder):
        return str(_written(folder) / "mp_rank_00_model_states.pt")
    name = "mp_rank_00_model_states.pt" if zero_stage <= 2 else (
        "zero_pp_rank_0_mp_rank_00_model_states.pt"
    )  # fmt: skip
    if not (folder / name).is_file():
        raise CheckpointFileNotFoundError(f"{folder} has no file {name}")
    return str(folder / name)


def get_optim_files(checkpoint_dir: str) -> list[str]:
    """The files of one checkpoint that hold the optimizer's shards, in the order of the ranks.

    Of ours one file, made now, that tells the ZeRO stage and holds no tensor.
    """
    folder = _existing(checkpoint_dir)
    if is_ours(folder):
        return [str(_written(folder) / "zero_pp_rank_0_mp_rank_00_optim_states.pt")]
    return get_checkpoint_files(checkpoint_dir, "*_optim_states.pt")


def get_model_state_files(checkpoint_dir: str) -> list[str]:
    """The files of one checkpoint with model states, in the order of the ranks."""
    folder = _existing(checkpoint_dir)
    if is_ours(folder):
        return [get_model_state_file(checkpoint_dir, 0)]
    return get_checkpoint_files(checkpoint_dir, "*_model_states.pt")


def get_checkpoint_files(checkpoint_dir: str, glob_pattern: str) -> list[str]:
    """The files of a folder that fit a pattern, numbers in their names in ascending order."""
    found = sorted(_existing(checkpoint_dir).glob(glob_pattern), key=lambda p: _natural(p.name))
    if not found:
        raise CheckpointFileNotFoundError(f"{checkpoint_dir} has no file {glob_pattern}")
    return [str(path) for path in found]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _weights(
    checkpoint_dir: str, tag: str | None, dtype: torch.dtype, exclude_frozen: bool
) -> LazyStateDict:
    return weights_of(_existing(checkpoint_dir), tag, dtype=dtype, exclude_frozen=exclude_frozen)


def _existing(checkpoint_dir: str) -> Path:
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        raise CheckpointFileNotFoundError(f"{folder} does not exist, or is not a folder")
    return folder


def _in_memory(state: LazyStateDict) -> dict[str, torch.Tensor]:
    """All tensors, a tied one under each of its names, as one tensor."""
    found = {name: state[name] for name in state if name not in state.aliases}
    return {name: found[state.aliases.get(name, name)] for name in state}


def _written(folder: Path) -> Path:
    """A temporary folder, until the end of the program, with the original's files for ours."""
    state = read_state(find(folder))
    about, engine = state.get("about", {}), state.get("engine", {})
    stage = re.search(r"stage (\d)", str(about.get("sharding", "")))
    out = Path(tempfile.mkdtemp(prefix="ds-checkpoint-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    model = {
        **state.get("client", {}),
        "global_steps": engine.get("global_step", 0),
        "skipped_steps": engine.get("skipped_steps", 0),
        "buffer_names": list(about.get("buffers", ())),
    }
    torch.save(model, out / "mp_rank_00_model_states.pt")
    optimizer = {"optimizer_state_dict": {"zero_stage": int(stage[1]) if stage else 0}}
    torch.save(optimizer, out / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return out


def main(args: Sequence[str] | None = None) -> None:
    """The command lines `zero_to_fp32.py` and `zero_to_torch`."""
    parser = argparse.ArgumentParser(
        prog="python -m deepspeed.utils.zero_to_fp32",
        description="Write the whole model of a sharded checkpoint as files of weights.",
    )
    add = parser.add_argument
    add("checkpoint_dir", help="folder of checkpoints")
    add("output_dir", help="folder to write; created")
    add("--dtype", choices=sorted(OUTPUT_DTYPE_NAMES), default="fp32")
    add("--max_shard_size", default="5GB", help="largest file, such as 500MB")
    add("--safe_serialization", action="store_true", help="safetensors, not torch.save")
    add("-t", "--tag", help="which checkpoint; default: the one that `latest` names")
    add("--exclude_frozen_parameters", action="store_true")
    add("-d", "--debug", action="store_true", help="makes no difference")
    given: dict[str, Any] = vars(parser.parse_args(args))
    del given["debug"]
    convert_zero_checkpoint_to_state_dict(**given)


if __name__ == "__main__":
    main()
