# SPDX-License-Identifier: Apache-2.0
"""Names to tensors, read from a file one by one, and the error of a checkpoint that can't be."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


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
