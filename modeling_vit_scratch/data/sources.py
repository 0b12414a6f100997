# SPDX-License-Identifier: Apache-2.0
"""Where images come from: folders, files, data sets of the Hub and two built-in ones. No image is decoded."""

import importlib.util
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow.parquet

from ..common.errors import InputError, Problems, TrainingStopped, listed
from ..common.flags import DataArguments
from . import listing
from .streams import ImageStream, Shard


FILE_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".tar": "webdataset"}
# Paths in a table are relative to the folder of its file, which is kept in this column.
FOLDER_COLUMN = "__folder__"
# Names of a split of held-out images, the likelier first.
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
# A folder of these is a folder of splits, not of classes.
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class Source:
    """Images and labels as they are stored, and what is known about them."""

    name: str
    train: datasets.Dataset | ImageStream | None  # with all columns; None if it can't be read
    validation: datasets.Dataset | None = None
    augmentation: str = "photo"  # or "digit"
    num_channels: int = 3
    hub_id: str | None = None
    license: str | None = None  # an SPDX identifier
    url: str | None = None
    note: str | None = None  # for readers of a result
    left_out: Counter[str] = field(default_factory=Counter)  # files in its folders, by their endings


def read_source(
    arguments: DataArguments, cache_dir: str | None, problems: Problems, needs_labels: bool = True
) -> Source | None:
    """What can't be read is None, as a whole or in part, and the reason is among the problems."""
    if arguments.train_dir is None and arguments.dataset_name == "digits":
        return read_digits()
    if arguments.train_dir is None and arguments.dataset_name == "elpv":
        return read_elpv(problems)
    reader = _Reader(arguments, cache_dir, problems, needs_labels)
    return reader.read_hub() if arguments.train_dir is None else reader.read_files()


def read_digits() -> Source:
    """The 1,797 scanned digits of scikit-learn, 8 x 8 pixels in 17 levels of grey. Nothing is downloaded."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    # As PGM: the bytes of a PNG, which decide what is held out, depend on the version of zlib.
    images = [{"bytes": b"P5 8 8 255\n" + array.tobytes()} for array in pixels]
    train = _table(images, digits.target.tolist(), [str(name) for name in digits.target_names])
    url = "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits"
    note = (
        "These are the 1,797 images that the authors of the data kept for testing; here they are split anew, so a "
        "writer may be on both sides."
    )
    return Source(
        "digits of scikit-learn", train, augmentation="digit", num_channels=1, license="cc-by-4.0", url=url, note=note
    )


def read_elpv(problems: Problems) -> Source | None:
    """
    The ELPV photographs of solar cells (Buerhop-Lutz et al. 2018, Deitsch et al. 2019 and 2021), 300 x 300 pixels. A
    cell is "defective" where experts put the probability of a defect (0, 1/3, 2/3 or 1) at one half or more.
    """
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or package.origin is None:
        problems.add("--dataset_name elpv needs the package that holds the images: pip install elpv-dataset")
        return None
    folder = Path(package.origin).parent / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line.strip()]
    labels = [int(float(probability) >= 0.5) for _, probability, _ in rows]
    train = _table([str(folder / path) for path, _, _ in rows], labels, ["functional", "defective"])
    url = "https://github.com/zae-bayern/elpv-dataset"
    note = (
        "Images are split one by one: cells of the same solar module may be on both sides, and 401 of the 2,624 "
        "labels are ones that the experts were not sure of."
    )
    return Source("ELPV", train, num_channels=1, license="cc-by-nc-sa-4.0", url=url, note=note)


def _table(images: list[Any], labels: list[int], names: list[str]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def find_columns(
    arguments: DataArguments, features: Mapping[str, Any], split: str, problems: Problems, needs_labels: bool
) -> tuple[str, str | None] | None:
    """The image and the label column; None if one is missing. Only without `needs_labels` there may be no labels."""
    image = listing.find_column("image", arguments.image_column_name, features, split, problems)
    needs_labels = needs_labels or arguments.label_column_name is not None
    label_problems = problems if needs_labels else Problems()
    label = listing.find_column("label", arguments.label_column_name, features, split, label_problems)
    return None if image is None or (label is None and needs_labels) else (image, label)


@dataclass(frozen=True)
class _Reader:
    arguments: DataArguments
    cache_dir: str | None
    problems: Problems
    needs_labels: bool  # or else images may lie anywhere in a folder
    left_out: Counter[str] = field(default_factory=Counter)

    def read_hub(self) -> Source | None:
        name, config, shards = self.arguments.dataset_name, self.arguments.dataset_config_name, []
        try:
            if self.arguments.streaming:
                builder = datasets.load_dataset_builder(name, config, cache_dir=self.cache_dir)
                splits = builder.as_streaming_dataset()
                files = (getattr(builder.config, "data_files", None) or {}).get("train", [])
                shards = _shards(splits["train"], [str(file) for file in files]) if "train" in splits else []
            else:
                splits = datasets.load_dataset(name, config, cache_dir=self.cache_dir)
        except Exception as error:  # the library raises a dozen types here, all about the name or the connection
            self.problems.add(f"--dataset_name {name} can't be read: {str(error).strip()}")
            return None
        if "train" not in splits:
            self.problems.add(f"--dataset_name {name} has no train split; it has: {', '.join(splits)}.")
            return None
        train, license = splits["train"], splits["train"].info.license or None
        validation = next((splits[split] for split in VALIDATION_SPLITS if split in splits), None)
        if self.arguments.streaming:
            train = self._open_stream(shards)
            if train is None:
                return None
            if validation is not None:  # a copy in the cache: loading the split by its name would fetch the others, too
                rows = _undecoded(validation)
                validation = datasets.Dataset.from_generator(lambda: iter(rows), rows.features, self.cache_dir)
        if Path(name).exists():
            return Source(Path(name).resolve().name, train, validation, license=license)
        url = f"https://huggingface.co/datasets/{name}"
        return Source(name, train, validation, hub_id=name, license=license, url=url)

    def read_files(self) -> Source | None:
        given, validation_dir = self.arguments.train_dir, self.arguments.validation_dir
        train = self._read_path("--train_dir", given, self.arguments.streaming)
        validation = None if validation_dir is None else self._read_path("--validation_dir", validation_dir)
        if train is None and validation is None:
            return None
        # The last part of the path with a meaning: no card should show where on a disk the images were.
        parts = [part for part in Path(given).absolute().parts if "*" not in part]
        while len(parts) > 1 and Path(parts[-1]).stem.lower() in SPLIT_NAMES | {"metadata"}:
            parts.pop()
        return Source(Path(parts[-1]).stem or "images", train, validation, left_out=self.left_out)

    def _read_path(self, flag: str, given: str, streaming: bool = False) -> datasets.Dataset | ImageStream | None:
        path = Path(given).expanduser()
        if path.is_dir() and streaming:
            self.problems.add(
                f"{flag} {given} is a folder: --streaming reads files of many images, e.g. {given}/'*.parquet' or "
                f"{given}/'*.tar'. Leave out --streaming for a folder of images."
            )
            return None
        if path.is_dir() and self.needs_labels and (metadata := _metadata_file(path)) is not None:
            path, given = metadata, str(metadata)
        if path.is_dir() and (self.needs_labels or _has_class_folders(path)):
            return self._read_class_folders(flag, path)
        if path.is_dir():
            if images := self._images_below(flag, path):
                return datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
            self.problems.add(f"{flag} {path} has no images in it.")
            return None
        reader, files = self._find_files(flag, given)
        if reader is None:
            return None
        try:
            if not streaming:
                table = _read_files(reader, files, self.cache_dir)
                if files[0].stem == "metadata":
                    self._count_unlisted(table, files[0])
                return table
            names = [str(file) for file in files]
            if reader == "csv":
                rows = datasets.IterableDataset.from_generator(_csv_rows, gen_kwargs={"files": names})
            else:
                cache = self.cache_dir
                rows = datasets.load_dataset(reader, data_files=names, split="train", cache_dir=cache, streaming=True)
            shards = _shards(rows, names)
        except Exception as error:  # a broken file raises whatever its parser raises
            cause = (str(error.__cause__ or error).strip().splitlines() or ["it is empty"])[0]
            cause = "it has no rows" if "corresponds to no data" in cause else cause
            self.problems.add(f"{flag} {given} can't be read as {reader}: {cause}")
            return None
        return self._open_stream(shards)

    def _find_files(self, flag: str, given: str) -> tuple[str | None, list[Path]]:
        path = Path(given).expanduser()
        files = [path] if path.is_file() else sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
        endings = {file.suffix.lower() for file in files}
        reader = FILE_READERS.get(min(endings)) if len(endings) == 1 else None
        if not files:
            self.problems.add(f"{flag} {given} does not exist.")
        elif reader is None:
            known, kinds = ", ".join(FILE_READERS), ", ".join(sorted({file.suffix or "no ending" for file in files}))
            self.problems.add(f"{flag} {given}: give a folder, or files of one kind among {known}, not {kinds}.")
        return reader, files

    def _read_class_folders(self, flag: str, folder: Path) -> datasets.Dataset | None:
        """One folder for each class, images at any depth below. Classes are in the order of their sorted names."""
        classes = _folders_in(folder)
        if not classes or {name.lower() for name in classes} <= SPLIT_NAMES:
            self.problems.add(_not_class_folders(flag, folder, classes))
            return None
        alike = Counter(unicodedata.normalize("NFC", name) for name in classes)
        for name in (name for name, count in alike.items() if count > 1):
            self.problems.add(f"{flag} {folder}: two class folders look alike, {name!r}. Make them one.")
        if loose := _loose_images(folder):
            self.problems.add(f"{flag} {folder}: {listed(loose)} in no class folder. Move to one, or away.")
        paths, labels = [], []
        for label, name in enumerate(classes):
            files = self._images_below(flag, folder / name)
            if not files:
                self.problems.add(f"{flag} {folder}: the class folder {name!r} has no images. Fill it or remove it.")
            paths += files
            labels += [label] * len(files)
        return _table(paths, labels, classes)

    def _images_below(self, flag: str, folder: Path) -> list[str]:
        """The images at any depth, sorted; also pipes and links to nothing, which the check of the images reports."""
        found = set()
        for item in listing.images_in(str(folder), self.left_out):
            if item.error and os.path.isdir(item.path):
                self.problems.add(f"{flag} {item.path}: {item.error}. Change its permissions, or move it away.")
            else:
                found.add(Path(item.path))
        if not_utf8 := {file for file in found if any("\udc80" <= sign <= "\udcff" for sign in str(file))}:
            names = f"{flag} {folder}: {listed([ascii(file.name) for file in sorted(not_utf8)])}"
            self.problems.add(f"{names}: these names are no UTF-8, and no table can hold them. Rename.")
        return [str(file) for file in sorted(found - not_utf8)]

    def _count_unlisted(self, table: datasets.Dataset, metadata: Path) -> None:
        """Counts the images beside a metadata file that it has no row for."""
        folder = str(metadata.parent)
        column = listing.find_column("image", self.arguments.image_column_name, table.features, "", Problems())
        if column is None or getattr(table.features[column], "dtype", None) != "string":
            return
        rows = {os.path.normpath(listing.path_beside(folder, name)) for name in table[column] if name}
        found = [os.path.normpath(item.path) for item in listing.images_in(folder, Counter()) if not item.error]
        if missing := sum(path not in rows for path in found):
            self.left_out[f"without a row in {metadata.name}"] = missing

    def _open_stream(self, shards: list[Shard]) -> ImageStream | None:
        """A stream with its columns and label names, after a look at its first records."""
        arguments = self.arguments
        first = next(iter(shards[0].rows), None)
        if first is None:
            self.problems.add(f"{shards[0].name} has no rows. Remove it.")
            return None
        types = shards[0].rows.features or {}
        features = {column: types.get(column) for column in first}
        needs_labels = self.needs_labels or bool(arguments.label_column_name or arguments.label_names_file)
        columns, names = find_columns(arguments, features, "training", self.problems, needs_labels), []
        label = columns and columns[1]
        if label is not None:
            label_problems = self.problems if needs_labels else Problems()
            names = _label_names(features[label], label, arguments.label_names_file, label_problems)
        if columns is None or (names is None and needs_labels):
            return None
        is_multi_label = arguments.label_separator is not None or listing.is_label_list(features.get(label))
        stream = ImageStream(shards, *columns, names or [], is_multi_label, arguments.label_separator)
        try:
            list(itertools.islice(stream.read(0), 32))  # to find wrong labels before training
        except (InputError, TrainingStopped) as error:
            self.problems.add(str(error))
            return None
        return stream


def _read_files(reader: str, files: list[Path], cache_dir: str | None) -> datasets.Dataset:
    if reader == "webdataset" or (reader == "parquet" and files[0].stem != "metadata"):
        names = [str(file) for file in files]
        table = datasets.load_dataset(reader, data_files=names, split="train", cache_dir=cache_dir)
        if reader == "parquet":  # all files of a pattern are in one folder
            return table.add_column(FOLDER_COLUMN, [str(files[0].parent)] * len(table))
        fields = table.features.get("json")  # whose fields may hold the label, e.g. {"label": "cat"}
        for name in fields if isinstance(fields, dict) else ():
            if name.lower() in listing.USUAL_NAMES["label"] and name not in table.column_names:
                table = table.add_column(name, [row[name] for row in table["json"]])
        return table
    tables = []
    for file in files:
        if reader == "csv":
            table = datasets.Dataset.from_dict(listing.read_csv(str(file)))
        else:
            table = datasets.load_dataset(reader, data_files=str(file), split="train", cache_dir=cache_dir)
        if not len(table):
            raise ValueError(f"{file.name} has no rows")
        tables.append(table.add_column(FOLDER_COLUMN, [str(file.parent)] * len(table)))
    return datasets.concatenate_datasets(tables)


def _metadata_file(folder: Path) -> Path | None:
    """The table of a folder of images, as for `datasets`' imagefolder. Beside class folders it must have labels."""
    for file in filter(Path.is_file, (folder / f"metadata{ending}" for ending in (".jsonl", ".csv", ".parquet"))):
        if not _has_class_folders(folder) or sum(entry.is_dir() for entry in folder.iterdir()) < 2:
            return file
        try:
            columns = _read_files(FILE_READERS[file.suffix], [file], None).column_names
        except Exception:  # a broken file raises whatever its parser raises; it is reported when it is read for good
            return file
        if any(column.lower() in listing.USUAL_NAMES["label"] for column in columns):
            return file
    return None


def _has_class_folders(folder: Path) -> bool:
    """Whether it has folders, none of them a split, and no images beside them."""
    return bool({name.lower() for name in _folders_in(folder)} - SPLIT_NAMES) and not _loose_images(folder)


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not listing.is_hidden(entry.name))


def _loose_images(folder: Path) -> list[str]:
    endings = listing.image_endings()
    entries = (entry for entry in folder.iterdir() if not entry.is_dir() and not listing.is_hidden(entry.name))
    return sorted(entry.name for entry in entries if entry.suffix.lower() in endings)


def _not_class_folders(flag: str, folder: Path, classes: list[str]) -> str:
    start = f"{flag} {folder} has"
    if classes:
        train = next((name for name in classes if name.lower().startswith("train")), classes[0])
        others = [name for name in classes if not name.lower().startswith("train")]
        other = min(others, key=lambda name: name.lower() not in VALIDATION_SPLITS, default="validation")
        flags = f"--train_dir {folder / train} --validation_dir {folder / other}"
        return f"{start} splits in it ({', '.join(classes)}), not classes. Give {flags}."
    if tables := sorted(file for file in folder.iterdir() if file.suffix.lower() in FILE_READERS):
        return f"{start} files in it, not class folders. Give the file, e.g. {flag} {tables[0]}."
    return f"{start} no class folders. Put the images of each class into a folder that is named as the class."


def _csv_rows(files: list[str]) -> Iterator[dict[str, Any]]:
    """Values stay text: "007" is not 7."""
    for file in files:
        yield from listing.read_rows(file)


def _shards(rows: datasets.IterableDataset, files: list[str]) -> list[Shard]:
    """One for each file; where `datasets` shards in another way, its own, not counted."""
    rows, count = _undecoded(rows), rows.num_shards
    if count != len(files):
        return [Shard(rows.shard(count, index), f"shard {index}") for index in range(count)]
    counts: list[int | None] = [None] * count
    if all(file.endswith(".parquet") for file in files):
        with ThreadPoolExecutor(16) as pool:  # mostly waiting, where files are far away
            counts = list(pool.map(_parquet_rows, files))
    return [
        Shard(rows.shard(count, index), Path(file).name, counts[index], str(Path(file).parent))
        for index, file in enumerate(files)
    ]


def _parquet_rows(file: str) -> int:
    with fsspec.open(file, "rb") as opened:
        return pyarrow.parquet.ParquetFile(opened).metadata.num_rows


def _undecoded(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _label_names(feature: Any, column: str, file: str | None, problems: Problems) -> list[str] | None:
    known = getattr(getattr(feature, "feature", feature), "names", None)  # of a ClassLabel, or of a list of them
    if file is None:
        if known is None:
            problems.add(
                f"Column {column!r} does not say which labels there are, and a stream can't be read through before "
                "training. Give --label_names_file FILE, a text file with a name in each line, in the order of numbers."
            )
        return known
    flag = f"--label_names_file {file}"
    if not Path(file).is_file():
        problems.add(f"{flag} is not a file. Give a text file with one name in a line.")
        return None
    names = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        problems.add(f"{flag}: {len(names)} names, {len(set(names))} of them different. Give each once.")
    elif known is not None and len(known) != len(names):
        problems.add(f"{flag} has {len(names)} names, but column {column!r} has {len(known)} labels.")
    else:
        return names
    return None
