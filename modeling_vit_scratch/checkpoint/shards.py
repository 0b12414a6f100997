# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training with FSDP: each process writes its own part of every weight, into one folder."""

import os
import pickle

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .tensor_file import CheckpointError, TensorFile


_PREFIX = "model."  # accelerate's


class _SafeUnpickler(pickle.Unpickler):
    """Builds what the index of a sharded checkpoint is made of, and nothing else."""

    ALLOWED = {
        "torch": ("Size", "device", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))),
        "torch.serialization": ("_get_layout",),
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
        "collections": ("OrderedDict",),
        "pathlib": ("PosixPath", "WindowsPath"),
        "pathlib._local": ("PosixPath", "WindowsPath"),  # from Python 3.13 on
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> object:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _ShardReader(FileSystemReader):
    """As in torch, which runs whatever code is in the index."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            return _SafeUnpickler(file).load()


def open_shards(folder: str) -> TensorFile:
    """
    The weights in a folder that accelerate wrote through torch.distributed.checkpoint, each put together when it is
    read, for any number of processes that wrote it.

    Raises:
        CheckpointError: if it is none, or damaged.
    """
    try:
        stored = _ShardReader(folder).read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, AttributeError, EOFError) as error:
        raise CheckpointError(f"{folder}: not a sharded checkpoint, or damaged ({error}).") from error
    entries = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}

    def read(name: str) -> Tensor:
        key = _PREFIX + name
        tensor = torch.empty(entries[key].size, dtype=entries[key].properties.dtype)
        load({key: tensor}, storage_reader=_ShardReader(folder), no_dist=True)
        return tensor

    shapes = {key.removeprefix(_PREFIX): tuple(entry.size) for key, entry in entries.items()}
    return TensorFile(folder, shapes, read)
