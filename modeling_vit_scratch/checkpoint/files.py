# SPDX-License-Identifier: Apache-2.0
"""
Files of tensors, read one tensor at a time and never as code: `.npz`, safetensors and PyTorch's own. The first bytes
say what a file is, whatever its name.
"""

import argparse
import datetime
import json
import math
import os
import pickle
import re
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_file, is_offline_mode

from ..common.files import atomic_write


# What a checkpoint file is called where it has a usual name; an index lists the parts of one in several files.
WEIGHT_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_BESIDE = ("config.json", "preprocessor_config.json")
# The folder in a checkpoint of accelerate in which each process of FSDP keeps its part of the weights.
SHARDS = "pytorch_model_fsdp_0"
# A file may hold so many numbers for each of its bytes, and so many more: a compressed .npz of zeros has 256 of float32
# in a byte, and a view in a pickle may repeat one without end. Weights have one in four bytes, or in one.
_MOST_PER_BYTE, _MOST_AT_ALL = 20, 100_000_000
SUFFIXES = (".npz", ".safetensors", ".bin", ".pth", ".pt")
_SCALAR, _ARRAY = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]  # the functions that unpickle them
# Plain values that training scripts store beside the weights, some under older names. To build them runs no code.
_HARMLESS: list[Any] = [
    argparse.Namespace, types.SimpleNamespace, datetime.date, datetime.datetime, datetime.timedelta, np.dtype,
    np.ndarray, *{type(np.dtype(kind)) for kind in np.typecodes["All"] if kind != "O"},
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((PurePath, f"{module}.{kind}Path") for module in ("pathlib", "pathlib._local")
      for kind in ("", "Pure", "Posix", "Windows", "PurePosix", "PureWindows")),
    *((dict, f"{module}.AttributeDict") for module in (
        "lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "pytorch_lightning.utilities.parsing")),
]  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that can't be read, or not exactly. The message has the file's name, the reason and a way out."""


class TensorFile(Mapping[str, Tensor]):
    """Names to tensors, each read when it is asked for. `shapes` has all shapes without reading one."""

    def __init__(self, path: str, shapes: dict[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self.path, self.shapes, self._read = path, shapes, read

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        try:
            return self._read(name)
        except Exception as error:  # parsers of damaged files raise anything
            raise CheckpointError(f"{self.path}: {name} can't be read ({error}). Is the file damaged?") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_tensors(path: str | os.PathLike) -> TensorFile:
    """A file of tensors, or the index (`.index.json`) of several. Raises CheckpointError."""
    path = os.fspath(path)
    if path.endswith(".index.json"):
        return _open_index(path)
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be opened ({error}).") from error
    try:
        if head[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                is_torch = any(name.endswith("/data.pkl") or name == "data.pkl" for name in archive.namelist())
            return _refuse_bomb(_open_torch(path) if is_torch else _open_npz(path))
        if head[8:9] == b"{":
            return _open_safetensors(path)  # holds what it says that it holds, or is refused
        if head[:1] == b"\x80":
            return _refuse_bomb(_open_torch(path))
    except CheckpointError:
        raise
    except Exception as error:  # parsers of damaged files raise anything
        raise CheckpointError(f"{path}: cut short or damaged ({error}). Fetch it again.") from error
    raise CheckpointError(f"{path}: {_what_else(head)}")


def _refuse_bomb(file: TensorFile) -> TensorFile:
    """Before any tensor is read."""
    count, size = sum(map(math.prod, file.shapes.values())), os.path.getsize(file.path)
    if count > _MOST_PER_BYTE * size + _MOST_AT_ALL:
        raise CheckpointError(
            f"{file.path}: {size:,} bytes that would become {count:,} numbers. No trained weights can be packed like "
            "that; the file is damaged, or is meant to fill the memory."
        )
    return file


def _what_else(head: bytes) -> str:
    if not head:
        return "the file is empty."
    if head.startswith(b"version https://git-lfs"):
        return "this is Git LFS's pointer to the file, not the file. Run `git lfs pull`."
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not a checkpoint. Download the file itself."
    if head.startswith(b"\x93NUMPY"):
        return "this is a single array (.npy), not the .npz of a checkpoint."
    return "not a checkpoint: neither .npz nor safetensors nor a file of torch.save."


def _open_npz(path: str) -> TensorFile:
    archive = np.load(path, allow_pickle=False)
    shapes = {}
    for name in archive.zip.namelist():
        if not name.endswith(".npy"):
            raise CheckpointError(f"{path}: holds {name!r}, which is no array; this is not an .npz file.")
        with archive.zip.open(name) as member:
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(np.lib.format.read_magic(member))
            if read_header is None:
                raise CheckpointError(f"{path}: {name!r} is in an unknown version of the .npy format.")
            shape, _, dtype = read_header(member)
        if dtype.hasobject:
            raise CheckpointError(
                f"{path}: {name!r} holds pickled Python objects, which are not read: they can run code."
            )
        if dtype.itemsize > 16:  # complex128 has 16 bytes
            raise CheckpointError(f"{path}: {name!r} is of the unknown type {dtype}.")
        shapes[name.removesuffix(".npy")] = shape
    return TensorFile(path, shapes, lambda name: to_tensor(archive[name]))


def to_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor. numpy has no bfloat16: JAX's arrives as two-byte void, or as 16-bit integers."""
    if (array.dtype.kind == "V" and array.dtype.itemsize == 2) or array.dtype == np.uint16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16).reshape(array.shape)
    if array.dtype.kind == "V":
        raise CheckpointError(f"an array of the unknown type {array.dtype}")
    array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).reshape(array.shape)


def to_array(tensor: Tensor) -> np.ndarray:
    """The inverse of `to_tensor`: bfloat16 as two-byte void, as JAX's users save it."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("V2")
    return tensor.numpy()


def _open_safetensors(path: str) -> TensorFile:
    with safe_open(path, "pt") as file:  # checks the header, and that the file is as long as it says
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name).clone()  # the library's own lives in the mapped file, which others may change

    return TensorFile(path, shapes, read)


def _open_torch(path: str) -> TensorFile:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = named[1] if named else str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: holds Python objects that are not read, since they can run code ({what}). Save the model's"
            " state_dict() alone, best as safetensors."
        ) from error
    tensors = dict(_flat(content, set()))
    if not tensors:
        raise CheckpointError(f"{path}: there is no dictionary of tensors in it.")
    return TensorFile(path, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__)


def _flat(content: object, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in dictionaries of dictionaries, once, by the keys that lead to it, joined by dots."""
    if not isinstance(content, Mapping) or id(content) in seen:
        return
    seen.add(id(content))
    for key, value in content.items():
        if torch.is_tensor(value):
            yield f"{prefix}{key}", value
        else:
            yield from _flat(value, seen, f"{prefix}{key}.")


def _open_index(path: str) -> TensorFile:
    try:
        weight_map = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the index of a checkpoint ({error!r}).") from error
    parts = {part: open_tensors(os.path.join(os.path.dirname(path), part)) for part in sorted(set(weight_map.values()))}
    lost = [name for name, part in weight_map.items() if name not in parts[part]]
    if lost:
        raise CheckpointError(f"{path}: its parts lack {', '.join(lost[:10])}.")
    shapes = {name: parts[part].shapes[name] for name, part in weight_map.items()}
    return TensorFile(path, shapes, lambda name: parts[weight_map[name]][name])


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors in the kind of file that the suffix names; all at once or, if that fails, not at all."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}, to say what to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        if path.suffix == ".npz":
            with open(unfinished, "wb") as file:  # to a name numpy may add a suffix
                np.savez(file, **{name: to_array(tensors[name]) for name in tensors})
        elif path.suffix == ".safetensors":
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, unfinished, {"format": "pt"})
        else:
            torch.save({name: t.detach().contiguous().clone() for name, t in tensors.items()}, unfinished)


def find_files(source: str | os.PathLike, **hub: str) -> tuple[str, dict, dict]:
    """
    The file of weights of a file name, a folder or a Hub id (`hub`: as in transformers), and the contents of
    `config.json` and `preprocessor_config.json` beside it, each `{}` where there is none. Raises CheckpointError.
    """
    source = os.fspath(source)
    if os.path.isfile(source):
        folder, name = os.path.split(source)
        # Of the files in a folder of downloads, config.json is about none that can be told.
        is_its_own = name in WEIGHT_NAMES or _weight_files(folder) == [name]
        return source, *(_read_json(os.path.join(folder, name) if is_its_own else None) for name in _BESIDE)
    if os.path.isdir(source):
        folder = os.path.join(source, hub.get("subfolder") or "")
        usual = [name for name in WEIGHT_NAMES if os.path.isfile(os.path.join(folder, name))]
        found = usual[:1] or _weight_files(folder)
        if is_sharded(folder):
            raise CheckpointError(
                f"{folder}: FSDP's processes keep its weights in parts. Join them first: accelerate merge-weights"
                f" {os.path.join(folder, SHARDS)} {folder}"
            )
        if len(found) != 1:
            what = f"more than one: {', '.join(found)}; name the one to read" if found else "none"
            raise CheckpointError(f"{folder}: wanted one file of weights in this folder, found {what}.")
        return os.path.join(folder, found[0]), *(_read_json(os.path.join(folder, name)) for name in _BESIDE)
    if source.endswith(SUFFIXES):
        raise CheckpointError(f"{source}: there is no such file.")

    def fetch(name: str) -> str | None:
        try:
            return cached_file(source, name, **hub)
        except OSError as error:
            # A file that the repository lacks is the one error without a cause. A Hub that can't be reached is asked
            # once, with all its retries, and not again for every file.
            is_offline = is_offline_mode() and isinstance(error.__cause__, LocalEntryNotFoundError)
            if error.__cause__ is not None and not is_offline:
                raise
            return None

    try:
        weights = next(filter(None, map(fetch, WEIGHT_NAMES)), None)
        beside = [_read_json(fetch(name)) for name in _BESIDE]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: neither a file nor a folder, and the Hub does not give it ({error})"
        ) from error
    if weights is None:
        raise CheckpointError(
            f"{source}: the Hub's repository (offline: its cache) has none of {', '.join(WEIGHT_NAMES)}."
        )
    if weights.endswith(".index.json"):
        for part in sorted(set(json.loads(Path(weights).read_text(encoding="utf-8"))["weight_map"].values())):
            fetch(part)
    return weights, *beside


def _weight_files(folder: str) -> list[str]:
    names = sorted(os.listdir(folder or os.curdir))
    return [name for name in names if name.endswith(SUFFIXES) and name != "training_args.bin"]


def is_sharded(folder: str) -> bool:
    """Whether shards are the only weights in a folder."""
    has_whole = any(os.path.isfile(os.path.join(folder, name)) for name in WEIGHT_NAMES)
    return not has_whole and os.path.isdir(os.path.join(folder, SHARDS))


def _read_json(path: str | None) -> dict[str, Any]:
    if not path or not os.path.isfile(path):
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no dictionary of settings.")
    return content
