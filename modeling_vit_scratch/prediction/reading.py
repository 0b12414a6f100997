# SPDX-License-Identifier: Apache-2.0
"""From INPUTs to batches of pixels. The main process reads the rows of tables; workers read and decode the files."""

import glob
import itertools
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..common.errors import InputError, Problems, take_in_hand
from ..common.flags import BUILT_IN, DataArguments
from ..data import listing
from ..data.collation import prepare_workers
from ..data.listing import Item, image_column_of
from ..image_decoding_vit_scratch import ImageDecodeError
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .arguments import PredictionArguments


if TYPE_CHECKING:
    import datasets  # which imports pandas: needed for tables alone

MAX_BYTES = 1 << 30  # of an encoded image in a shard or a table
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_ROWS_AT_A_TIME = 64  # of a Parquet file


class Inputs:
    """The images of the INPUTs; tables among them are read row by row."""

    def __init__(self, arguments: PredictionArguments) -> None:
        self._arguments = arguments
        self.left_out: Counter[str] = Counter()  # files in folders, by their endings
        self._tables: dict[str, tuple[Any, str]] = {}  # and their columns of images
        # The Parquet file that is being read, its next row, and the values from there on.
        self._reading: tuple[str, int, Iterator[Any]] = ("", 0, iter(()))

    def items(self) -> Iterator[Item]:
        """All images, input after input. Raises InputError with all mistakes, after the images of the other inputs."""
        problems = Problems()
        for given in self._arguments.inputs:
            count = 0
            try:
                for item in self._list(given):
                    count += 1
                    yield item
                if not count:
                    problems.add(f"INPUT {given}: no images in it.")
            except InputError as error:
                problems.add(f"INPUT {error}")
        if problems.messages:
            raise problems.as_error()

    def _list(self, given: str) -> Iterator[Item]:
        ending = Path(given).suffix.lower()
        if given == "-":
            yield from listing.list_lines(sys.stdin, "")
        elif given.startswith(listing.URLS):
            yield Item(given, given)
        elif os.path.lexists(given) and (given not in BUILT_IN or os.path.isfile(given)):
            yield from self._list_path(given)
        elif any(sign in given for sign in "*?["):
            found = (path for path in glob.iglob(given, recursive=True) if not _is_in_circle(path))
            paths = sorted(found, key=lambda path: path.split(os.sep))
            if not paths:
                raise InputError(f"{given}: nothing matches this pattern.")
            for path in paths:
                yield from self._list_path(path)
        elif ending in listing.image_endings():
            yield Item(given, given)  # one missing photo among others is no reason to stop
        elif _HUB_NAME.fullmatch(given) and ending not in (*listing.TABLES, *listing.LISTS, ".parquet", ".tar"):
            yield from (Item(f"{given}#{row}", given, row) for row in range(len(self._hub(given)[0])))
        else:
            raise InputError(f"{given} does not exist.")

    def _list_path(self, path: str) -> Iterator[Item]:
        ending = Path(path).suffix.lower()
        if os.path.isdir(path):
            yield from listing.list_folder(path, self.left_out)
        elif ending == ".parquet":
            rows = range(self._parquet(path)[0].metadata.num_rows)
            yield from (Item(f"{path}#{row}", path, row) for row in rows)
        elif ending == ".tar":
            yield from listing.list_shard(path)
        elif ending in listing.TABLES:
            yield from listing.list_table(path, self._arguments.image_column_name)
        elif ending in listing.LISTS:
            with listing.opened(path) as file:
                yield from listing.list_lines(file, os.path.dirname(path))
        else:
            yield listing.item_of_file(path, path)

    def read(self, item: Item) -> bytes | str | None:
        """The file in a row of a table as bytes, or its path. ValueError if the row is damaged or too large."""
        path, row, folder = item.path, item.start, ""
        if path.lower().endswith(".parquet"):
            folder = os.path.dirname(path)
            if self._reading[0] != path or self._reading[1] > row:
                self._reading = (path, row, self._values(path, row))
            _, position, values = self._reading
            value = next(itertools.islice(values, row - position, None), None)
            self._reading = (path, row + 1, values)
        else:
            table, column = self._hub(path)
            value = table[row][column]
        if isinstance(value, ValueError):
            raise value
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            _check_size(len(value), "table")
        if not isinstance(value, str | bytes | None):
            raise ValueError(f"the row holds {str(value)[:80]}, and not a path or the bytes of a file")
        return listing.path_beside(folder, value) if isinstance(value, str) else value

    def _parquet(self, path: str) -> tuple[pyarrow.parquet.ParquetFile, str]:
        if path not in self._tables:
            import datasets

            try:
                file = pyarrow.parquet.ParquetFile(path, memory_map=True)
                features = datasets.Features.from_arrow_schema(file.schema_arrow)
            except (OSError, ValueError, pyarrow.ArrowException) as error:
                raise InputError(f"{path} can't be read as Parquet: {_first_line(error)}") from error
            column = image_column_of(path, self._arguments.image_column_name, features)
            self._tables = {path: (file, column)}  # one open file at a time
        return self._tables[path]

    def _values(self, path: str, first: int) -> Iterator[Any]:
        """The values of a Parquet file from a row on. A damaged row group gives errors, and the next one is read."""
        file, column = self._parquet(path)
        end = 0
        for group in range(file.num_row_groups):
            row, end = end, end + file.metadata.row_group(group).num_rows
            if end <= first:
                continue
            try:
                for batch in file.iter_batches(_ROWS_AT_A_TIME, [group], [column], use_threads=False):
                    for value in batch.column(0):
                        if row >= first:
                            yield value.as_py()
                        row += 1
            except (OSError, ValueError, pyarrow.ArrowException) as error:
                reason = f"row group {group} can't be read: {_first_line(error)}"
                yield from (ValueError(reason) for _ in range(max(row, first), end))

    def _hub(self, name: str) -> "tuple[datasets.Dataset, str]":
        if name not in self._tables:
            import datasets

            table = self._load(name)
            column = image_column_of(name, self._arguments.image_column_name, table.features)
            table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            self._tables[name] = table, column
        return self._tables[name]

    def _load(self, name: str) -> "datasets.Dataset":
        import datasets

        from ..data.sources import read_source

        options, problems = self._arguments, Problems()
        if name in BUILT_IN:
            source = read_source(DataArguments(dataset_name=name), options.cache_dir, problems)
            if source is None:
                raise problems.as_error()
            return source.train
        try:
            splits = datasets.load_dataset(name, options.dataset_config_name, cache_dir=options.cache_dir)
        except Exception as error:  # the library raises a dozen types, all about the name or the connection
            raise InputError(f"{name} does not exist here, and as a data set of the Hub it can't be read: "
                             f"{str(error).strip()}") from error  # fmt: skip
        if options.split is None and len(splits) == 1:
            return next(iter(splits.values()))
        if options.split not in splits:
            given = "Give one with --split" if options.split is None else f"--split {options.split} is none of them"
            raise InputError(f"{name} has the splits {', '.join(splits)}. {given}.")
        return splits[options.split]


def _is_in_circle(path: str) -> bool:
    """Whether a link on the way leads back to a folder that it is in: glob follows it some forty times."""
    folders = Path(path).absolute().parents
    return any(one.is_symlink() and one.resolve() in map(Path.resolve, one.parents) for one in folders)


def _first_line(error: Exception, name: str = "") -> str:
    """Of a message, without the name of the image, which has a column of its own."""
    message = str(error).removeprefix(name).removeprefix(" cannot be read as an image").lstrip(": ").strip()
    return (message.splitlines() or [type(error).__name__])[0]


class Batch(NamedTuple):
    """B images; the first is image number * batch size of the run."""

    number: int
    names: list[str]
    pixels: torch.Tensor  # (B, C, H, W), uint8; zeros for images that can't be read
    errors: list[str | None]  # why an image can't be read


class ItemDataset(Dataset):
    """Batches of pixels, resized and cropped by the processor, and not yet normalised."""

    def __init__(self, processor: ViTScratchImageProcessor, fast_decode: bool) -> None:
        self.processor, self.fast_decode = processor, fast_decode
        size = processor.crop_size if processor.do_center_crop else processor.size if processor.do_resize else None
        if size is None or not (size.height and size.width):
            raise InputError(
                "The image processor of MODEL makes images of different sizes, which fit into no batch. Give it a size "
                "with height and width, or do_center_crop, in its preprocessor_config.json."
            )
        channels = processor.num_channels if processor.do_convert_rgb else len(np.atleast_1d(processor.image_mean))
        self.shape = (channels, size.height, size.width)

    def __getitem__(self, batch: tuple[int, list[tuple[Item, Any]]]) -> Batch:
        number, items = batch
        dtype = torch.uint8 if self.processor.do_eight_bits else torch.float32
        pixels, errors = torch.zeros((len(items), *self.shape), dtype=dtype), []
        for row, (item, content) in enumerate(items):
            errors.append(item.error)
            if item.error is None:
                try:
                    pixels[row] = self._read(item, content)
                except ValueError as error:  # ImageDecodeError, or an image that does not fit the processor
                    errors[-1] = _first_line(error, item.name)
        return Batch(number, [item.name for item, _ in items], pixels, errors)

    def _read(self, item: Item, content: Any) -> torch.Tensor:
        if isinstance(content, ValueError):
            raise content
        name, source = item.name, item.path if item.start is None else content
        take_in_hand(name)
        if item.size is not None:
            source = _read_member(item)
        if source is None:
            raise ImageDecodeError(f"{name} cannot be read as an image: the row has neither bytes nor a path")
        bands = self.processor.fit(source, name=name, do_fast_resize=self.fast_decode)
        if len(bands) != self.shape[0]:
            raise ValueError(f"it has {len(bands)} channels, and the model takes {self.shape[0]}")
        return torch.from_numpy(np.stack(bands))


def _check_size(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, and {MAX_BYTES:,} are the limit for an image in a {where}")


def _read_member(item: Item) -> bytes:
    _check_size(item.size, "shard")
    try:
        with open(item.path, "rb") as file:
            file.seek(item.start)
            content = file.read(item.size)
    except OSError as error:
        raise ValueError(f"its shard can't be read: {error.strerror}") from error
    if len(content) < item.size:
        raise ValueError(f"the shard ends after {len(content):,} of its {item.size:,} bytes")
    return content


def build_loader(
    batches: Iterable[tuple[int, list[Item]]], inputs: Inputs, processor: ViTScratchImageProcessor,
    arguments: PredictionArguments, pin_memory: bool = False,
) -> Iterable[Batch]:  # fmt: skip
    """Batches, given by their numbers and items, in their order; worker processes read ahead."""
    # Pillow warns of large photos; those that are too large are errors anyway.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    dataset, size = ItemDataset(processor, arguments.fast_decode), arguments.per_device_eval_batch_size
    # Decoded as uint8 and normalised as float32.
    needed, memory = 5 * size * math.prod(dataset.shape), psutil.virtual_memory().total
    if needed > memory / 2:
        raise InputError(
            f"MODEL takes images of {dataset.shape[1]} x {dataset.shape[2]} pixels, and --per_device_eval_batch_size "
            f"{size} of them {needed / 1e9:,.1f} GB; this machine has {memory / 1e9:,.1f} GB. Take fewer, or another "
            "size in its preprocessor_config.json."
        )
    workers, with_rows = arguments.dataloader_num_workers, _with_rows(batches, inputs)
    loader = DataLoader(dataset, None, sampler=with_rows, num_workers=workers, pin_memory=pin_memory)
    prepare_workers(loader)
    return loader


def _with_rows(
    batches: Iterable[tuple[int, list[Item]]], inputs: Inputs
) -> Iterator[tuple[int, list[tuple[Item, Any]]]]:
    """Adds what is in the rows of tables, or a ValueError if they can't be read."""
    for number, items in batches:
        contents: list[Any] = [None] * len(items)
        for index, item in enumerate(items):
            if item.start is not None and item.size is None and item.error is None:
                try:
                    contents[index] = inputs.read(item)
                except ValueError as error:
                    contents[index] = ValueError(str(error))
        yield number, list(zip(items, contents))
