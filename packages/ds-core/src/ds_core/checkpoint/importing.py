"""`import_checkpoint`: a checkpoint of another format, written in ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ds_core.checkpoint.foreign import deepspeed, torch_dcp, weights
from ds_core.checkpoint.foreign.foreign import Foreign
from ds_core.checkpoint.index import INDEX_NAME
from ds_core.checkpoint.lazy import LazyState
from ds_core.checkpoint.lazy_save import save_lazy
from ds_core.checkpoint.remote import Place
from ds_core.errors import CheckpointError

_Opener = Callable[..., Foreign]
#: How each format is recognised and opened, in the order of trial.
_FORMATS: Mapping[str, tuple[Callable[[Path], bool], _Opener]] = {
    "deepspeed": (deepspeed.looks_like, deepspeed.open_deepspeed),
    "dcp": (torch_dcp.looks_like, torch_dcp.open_dcp),
    "weights": (weights.looks_like, weights.open_weights),
}


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote, and what it could not place.

    Attributes:
        path: the checkpoint that was written.
        source: what was read, in words.
        num_tensors: tensors written, each of them once.
        num_bytes: their size, by kind: "parameters", "buffers", "optimizer exp_avg" and so on.
        aliases: further names of tied weights, which are stored once.
        missing: what the source speaks of, but does not hold.
        unexpected: tensors of the source of which it is not clear what they are.
        ignored: what was left out on purpose, and why.
    """

    path: Place
    source: str
    num_tensors: int
    num_bytes: Mapping[str, int]
    aliases: Mapping[str, str]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)


def import_checkpoint(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    tag: str | None = None,
    format: str | None = None,
    weights_only: bool = False,
    optimizer: bool = True,
    aliases: Mapping[str, str] | None = None,
    drop_objects: bool = False,
    strict: bool = True,
    model: torch.nn.Module | None = None,
) -> ImportReport:
    """Write a checkpoint of another format in ours, and say what became of every tensor.

    DeepSpeed (ZeRO stages 0 to 3, universal) and torch's distributed checkpoint (FSDP2, torchtitan)
    come with fp32 weights and optimizer states, so that an `Engine` trains on from them;
    safetensors and torch state dicts come as weights alone. Nothing in the source is executed.
    One tensor at a time is in memory.
    Collective: no; one process writes the checkpoint, any number may load it.

    Args:
        source: the checkpoint: a file, a folder, or a folder of tags with a `latest` file.
        directory: where ours go; created.
        tag: which of the source's tags, and the name of ours. Default: the source's own.
        format: "deepspeed", "dcp" or "weights". Default: found from the files.
        weights_only: leave out optimizer, schedule and client state.
        optimizer: if False, leave out the optimizer's states alone, which are most of the bytes.
        aliases: further names of tied weights, `{"lm_head.weight": "embed.weight"}`, where the
            source does not tell; what it holds under the further name is compared and dropped.
        drop_objects: leave out what can only be read by running code, rather than refuse the file.
        strict: whether anything missing or unexpected is an error.
        model: if given, its parameters and buffers must be those of the checkpoint, by name and
            shape. It may be on the meta device.

    Raises:
        CheckpointError: if the source is incomplete, damaged, of no known format or asks for code,
            or, if `strict`, not all of it can be placed, or the disk has no room for it; nothing
            is written then.
    """
    folder = _tag_folder(Path(source), tag)
    opener = _opener(folder, format)
    found = opener(folder, drop_objects=drop_objects)
    _tie(found, aliases or {})
    if weights_only:
        _keep_weights(found)
    elif not optimizer:
        _drop_optimizer(found)
    if model is not None:
        _compare(found, model)
    _check(folder, found, strict=strict)
    _check_room(directory, found)
    about = {
        "sharding": f"imported from {found.kind}",
        "aliases": found.aliases,
        "buffers": found.buffers,
    }
    if found.frozen is not None:
        about["frozen"] = found.frozen
    state = LazyState(found.state.tensors, {**found.state.values, "about": about})
    name = tag or (folder.stem if folder.is_file() else folder.resolve().name)  # of ".", too
    path = save_lazy(directory, name, state, facts={"imported_from": found.kind})
    return ImportReport(
        path,
        found.kind,
        len(found.state.tensors),
        bytes_by_kind(state),
        found.aliases,
        tuple(found.missing),
        tuple(found.unexpected),
        found.ignored,
    )


def open_foreign(source: Path, tag: str | None = None) -> Foreign:
    """What a checkpoint of another format holds, without objects that only code could read.

    Raises CheckpointError as `import_checkpoint` does.
    """
    folder = _tag_folder(source, tag)
    return _opener(folder, None)(folder, drop_objects=True)


def bytes_by_kind(state: LazyState) -> dict[str, int]:
    """The size of a state's tensors, by what they are."""
    buffers = set(state.values.get("about", {}).get("buffers", ()))
    total: dict[str, int] = {}
    for tensor in state.tensors.values():
        kind = kind_of(tensor.path, buffers)
        total[kind] = total.get(kind, 0) + tensor.nbytes
    return total


def kind_of(path: tuple[str | int, ...], buffers: set[str]) -> str:
    """What a tensor is, from the keys that lead to it."""
    if path[0] == "model":
        return "buffers" if str(path[-1]) in buffers else "parameters"
    return f"optimizer {path[1]}" if path[0] == "optimizer" and len(path) > 1 else str(path[0])


def _tag_folder(source: Path, tag: str | None) -> Path:
    """The folder of one tag, or the file."""
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    if source.is_file():
        return source
    if (source / INDEX_NAME).exists():
        raise CheckpointError(f"{source} is a checkpoint of ds-core already; load it as it is")
    pointer = source / "latest"
    if tag is not None and (source / tag).is_dir():
        return source / tag
    if pointer.is_file():
        named = source / pointer.read_text(encoding="utf-8").strip()
        if tag is not None or not named.is_dir():
            tags = sorted(path.name for path in source.iterdir() if path.is_dir())
            raise CheckpointError(f"{source} has no tag {tag or named.name!r}; it has {tags}")
        return named
    return source


def _opener(folder: Path, format: str | None) -> _Opener:
    if format is not None:
        if format not in _FORMATS:
            raise CheckpointError(f"format: got {format!r}, expected one of {', '.join(_FORMATS)}")
        return _FORMATS[format][1]
    for name, (looks_like, opener) in _FORMATS.items():
        if (folder.is_dir() or name == "weights") and looks_like(folder):
            return opener
    raise CheckpointError(
        f"{folder} is of no format that can be imported: expected DeepSpeed's *_model_states.pt, "
        "torch's .metadata, *.safetensors, or a torch state dict (.pt, .pth, .bin, .ckpt)"
    )


def _tie(found: Foreign, aliases: Mapping[str, str]) -> None:
    tensors = found.state.tensors
    for alias, kept in aliases.items():
        if f"model.{kept}" not in tensors:
            raise CheckpointError(f"aliases: {kept!r} is not a weight of {found.kind}")
        found.unexpected = [u for u in found.unexpected if not u.startswith(f"{alias}:")]
        own = tensors.get(f"model.{alias}")
        if own is not None and not torch.equal(own.read(), tensors[f"model.{kept}"].read()):
            raise CheckpointError(f"aliases: {alias!r} and {kept!r} are not equal, so not tied")
        for name in [n for n, t in tensors.items() if t.path[-1] == alias]:
            del tensors[name]
        for group in found.state.values.get("groups", []):
            group["names"] = [name for name in group["names"] if name != alias]
        found.aliases[alias] = kept


def _keep_weights(found: Foreign) -> None:
    found.state.tensors = {n: t for n, t in found.state.tensors.items() if t.path[0] == "model"}
    for key in list(found.state.values):
        del found.state.values[key]
        found.ignored[key] = "only weights were asked for"
    found.missing = [text for text in found.missing if not text.startswith("optimizer ")]


def _drop_optimizer(found: Foreign) -> None:
    tensors = found.state.tensors
    found.state.tensors = {n: t for n, t in tensors.items() if t.path[0] != "optimizer"}
    found.missing = [text for text in found.missing if not text.startswith("optimizer ")]
    found.ignored["optimizer"] = "its states were not asked for"


def _check_room(directory: str | os.PathLike[str], found: Foreign) -> None:
    """Raise CheckpointError if a folder of this machine has less room than the tensors take."""
    if "://" in os.fspath(directory):
        return
    folder = Path(directory).absolute()
    while not folder.exists():
        folder = folder.parent
    needed = sum(tensor.nbytes for tensor in found.state.tensors.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{found.kind} takes {needed / 1e9:.2f} GB in this format, and {folder} has "
            f"{free / 1e9:.2f} GB of room: make room, or run `ds checkpoint import` into a folder "
            f"on another disk and load that"
        )


def _compare(found: Foreign, model: torch.nn.Module) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    held = {str(t.path[-1]): t.shape for t in found.state.tensors.values() if t.path[0] == "model"}
    held |= {alias: held[kept] for alias, kept in found.aliases.items() if kept in held}
    found.missing += [f"{name}: the model has it" for name in expected.keys() - held.keys()]
    found.unexpected += [f"{name}: the model has it not" for name in held.keys() - expected.keys()]
    for name in held.keys() & expected.keys():
        if held[name] != expected[name]:
            told = f"{list(held[name])}, the model's is {list(expected[name])}"
            found.unexpected.append(f"{name}: its shape is {told}")


def _check(folder: Path, found: Foreign, *, strict: bool) -> None:
    problems = [f"missing: {text}" for text in sorted(found.missing)]
    problems += [f"unexpected: {text}" for text in sorted(found.unexpected)]
    if problems and strict:
        listed = "\n".join(f"- {problem}" for problem in problems[:20])
        more = f"\n- and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"{folder} ({found.kind}) cannot be imported whole:\n{listed}{more}\nTell tied weights "
            "apart with --alias, leave optimizer states out with --weights-only, or import what "
            "there is with --no-strict"
        )
    if not any(tensor.path[0] == "model" for tensor in found.state.tensors.values()):
        raise CheckpointError(f"{folder} ({found.kind}) holds no weights")
