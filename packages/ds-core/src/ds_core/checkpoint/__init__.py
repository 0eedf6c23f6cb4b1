"""Checkpoints that load at any world size and sharding, and survive a crash at any byte.

    save("checkpoints", "step10", {"model": {...}, "optimizer": {...}, "step": 10})
    state = load("checkpoints", state={"model": {...}, "optimizer": {...}, "step": 0})

Every tensor is stored under its fully qualified name as boxes of its global shape, in safetensors
files with a JSON index; what a rank holds is a plain tensor, a `DTensor`, or a `FlatShard`, and the
loading ranks may hold something else than the saving ones did. A name is the keys that lead to a
tensor in the nested state, joined by dots: `model.blocks.0.attn.qkv.weight`,
`optimizer.exp_avg.blocks.0.attn.qkv.weight`. Values that are not tensors are JSON in the index.
Nothing that comes from disk is unpickled.

`AsyncSaver` does what `save` does from a thread, while training goes on. Directories may be URLs of
fsspec (`s3://bucket/run`), with the extra `ds-core[fsspec]`.

`load_weights` reads Hugging Face's files straight into what each rank holds.

`full_state_dict` reads whole weights one at a time, `weights_of` those of anybody's checkpoint,
`export_safetensors` and `export_dcp` write
what Hugging Face's libraries and torch's FSDP2 load, and `import_checkpoint` reads DeepSpeed's
checkpoints, torch's and Hugging Face's.

`SafetensorsWriter` and `SafetensorsReader` are the storage alone, for
`torch.distributed.checkpoint.save` and `load` with any state dict, such as FSDP2's.
"""

from ds_core.checkpoint.any_format import weights_of
from ds_core.checkpoint.asynchronous import AsyncSaver, PendingSave, SaveFigures
from ds_core.checkpoint.audit import Verified, verify
from ds_core.checkpoint.boxes import Box, Piece, cut_range
from ds_core.checkpoint.dcp_export import export_dcp
from ds_core.checkpoint.export import Exported, consolidate, export_safetensors
from ds_core.checkpoint.importing import ImportReport, import_checkpoint
from ds_core.checkpoint.inspection import Inspection, TensorFacts, inspect
from ds_core.checkpoint.intact import newest_intact
from ds_core.checkpoint.lazy import LazyStateDict, full_state_dict
from ds_core.checkpoint.pretrained import LoadedWeights, load_weights
from ds_core.checkpoint.sharded import FlatShard
from ds_core.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from ds_core.checkpoint.store import find, latest, load, read_state, save
from ds_core.checkpoint.torch_export import export_torch

__all__ = [
    "save",
    "AsyncSaver",
    "PendingSave",
    "SaveFigures",
    "load",
    "latest",
    "find",
    "newest_intact",
    "read_state",
    "inspect",
    "Inspection",
    "TensorFacts",
    "verify",
    "Verified",
    "full_state_dict",
    "LazyStateDict",
    "consolidate",
    "export_safetensors",
    "export_dcp",
    "export_torch",
    "weights_of",
    "Exported",
    "import_checkpoint",
    "ImportReport",
    "load_weights",
    "LoadedWeights",
    "FlatShard",
    "SafetensorsReader",
    "SafetensorsWriter",
    "Box",
    "Piece",
    "cut_range",
]
