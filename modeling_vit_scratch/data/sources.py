# SPDX-License-Identifier: Apache-2.0
"""Where images come from: one reader for each kind of source, all of them returning a `Source`."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ..common.errors import Problems
from .arguments import DataArguments
from .columns import LABEL_COLUMNS
from .listing import image_endings, read_csv, walk
from .streams import ImageStream


# Which reader of `datasets` reads a file.
FILE_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".tar": "webdataset"}
# Paths in a table are relative to the folder of its file, which is kept in this column.
FOLDER_COLUMN = "__folder__"
# What a split of held-out images is called, the likelier first.
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
# A folder of these is a folder of splits, not of classes.
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class Source:
    """
    Images and labels as they are stored, and what is known about them.

    Attributes:
        name: for people.
        train, validation: splits with whatever columns they have; `validation` is None where there is none.
        augmentation: "photo" or "digit".
        num_channels: 1 for grey images, 3 for colour.
        hub_id: the id on the Hub, if it came from there.
        license: an SPDX identifier, if it is known.
        url, note: where it is described, and what readers of a result should know.
    """

    name: str
    train: datasets.Dataset | ImageStream
    validation: datasets.Dataset | None = None
    augmentation: str = "photo"
    num_channels: int = 3
    hub_id: str | None = None
    license: str | None = None
    url: str | None = None
    note: str | None = None


def read_source(
    arguments: DataArguments, cache_dir: str | None, problems: Problems, needs_labels: bool = True
) -> Source | None:
    """
    Reads what the command line names. No image is decoded.

    Args:
        arguments: the command line's.
        cache_dir: where to keep what is downloaded.
        problems: the mistakes found so far.
        needs_labels: whether folders must be of classes; if not, images may lie anywhere in them.

    Returns:
        The source, or None if it can't be read; why not is then among the problems.
    """
    if arguments.train_dir is not None:
        return _read_own(arguments, cache_dir, problems, needs_labels)
    if arguments.dataset_name == "digits":
        return read_digits()
    if arguments.dataset_name == "elpv":
        return read_elpv(problems)
    return _read_hub(arguments, cache_dir, problems)


def read_digits() -> Source:
    """The 1,797 scanned digits of scikit-learn, 8 x 8 pixels in 17 levels of grey. Nothing is downloaded."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    columns = {"image": [Image.fromarray(array) for array in pixels], "label": digits.target.tolist()}
    return Source(
        name="digits of scikit-learn",
        train=datasets.Dataset.from_dict(columns, features=features),
        augmentation="digit",
        num_channels=1,
        license="cc-by-4.0",
        url="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        note="These are the 1,797 images that the authors of the data kept for testing; here they are split anew, so a "
        "writer may be on both sides.",
    )


def read_elpv(problems: Problems) -> Source | None:
    """
    The ELPV photographs of solar cells (Buerhop-Lutz et al. 2018, Deitsch et al. 2019 and 2021), 300 x 300 pixels.

    A cell is "defective" where experts put the probability of a defect at one half or more (it is 0, 1/3, 2/3 or 1).
    """
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or package.origin is None:
        problems.add("--dataset_name elpv needs the package that holds the images: pip install elpv-dataset")
        return None
    folder = Path(package.origin).parent / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line.strip()]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["functional", "defective"])}
    )
    columns = {
        "image": [str(folder / path) for path, _, _ in rows],
        "label": [int(float(probability) >= 0.5) for _, probability, _ in rows],
    }
    return Source(
        name="ELPV",
        train=datasets.Dataset.from_dict(columns, features=features),
        num_channels=1,
        license="cc-by-nc-sa-4.0",
        url="https://github.com/zae-bayern/elpv-dataset",
        note="Images are split one by one: cells of the same solar module may be on both sides, and 401 of the 2,624 "
        "labels are ones that the experts were not sure of.",
    )


def _read_hub(arguments: DataArguments, cache_dir: str | None, problems: Problems) -> Source | None:
    name = arguments.dataset_name
    try:
        splits = datasets.load_dataset(name, arguments.dataset_config_name, cache_dir=cache_dir)
    except Exception as error:  # the library raises a dozen types here, all of them about the name or the connection
        problems.add(f"--dataset_name {name} can't be read: {str(error).strip()}")
        return None
    if "train" not in splits:
        problems.add(f"--dataset_name {name} has no train split; it has: {', '.join(splits)}.")
        return None
    validation = next((splits[split] for split in VALIDATION_SPLITS if split in splits), None)
    is_local = Path(name).exists()
    return Source(
        name=Path(name).resolve().name if is_local else name,
        train=splits["train"],
        validation=validation,
        hub_id=None if is_local else name,
        license=splits["train"].info.license or None,
        url=None if is_local else f"https://huggingface.co/datasets/{name}",
    )


def _read_own(arguments: DataArguments, cache_dir: str | None, problems: Problems, needs_labels: bool) -> Source | None:
    """--train_dir and --validation_dir; both are read even if the first fails, so that all mistakes are told."""
    train = read_place("--train_dir", arguments.train_dir, cache_dir, problems, needs_labels)
    validation = None
    if arguments.validation_dir is not None:
        validation = read_place("--validation_dir", arguments.validation_dir, cache_dir, problems, needs_labels)
    if train is None or (arguments.validation_dir is not None and validation is None):
        return None
    return Source(name=place_name(arguments.train_dir), train=train, validation=validation)


def place_name(place: str) -> str:
    """The last part of a path that says something: no card should show where on a disk the images were."""
    parts = [part for part in Path(place).absolute().parts if "*" not in part]
    while len(parts) > 1 and Path(parts[-1]).stem.lower() in SPLIT_NAMES | {"metadata"}:
        parts.pop()
    return Path(parts[-1]).stem or "images"


def read_place(
    flag: str, place: str, cache_dir: str | None, problems: Problems, needs_labels: bool
) -> datasets.Dataset | None:
    path = Path(place).expanduser()
    if path.is_dir() and needs_labels and (metadata := _metadata_file(path)) is not None:
        path, place = metadata, str(metadata)
    if path.is_dir():
        if not needs_labels and not _has_class_folders(path):
            return _read_unlabelled(flag, path, problems)
        return _read_class_folders(flag, path, problems)
    found = own_files(flag, place, problems)
    if found is None:
        return None
    reader, files = found
    try:
        return _read_files(reader, files, cache_dir)
    except Exception as error:  # a broken file raises whatever its parser raises
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        problems.add(f"{flag} {place} can't be read as {reader}: {cause}")
        return None


def own_files(flag: str, place: str, problems: Problems) -> tuple[str, list[Path]] | None:
    """The files that a name or a pattern stands for, and which reader of `datasets` reads them."""
    path = Path(place).expanduser()
    files = [path] if path.is_file() else sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
    if not files:
        problems.add(f"{flag} {place} does not exist.")
        return None
    reader = FILE_READERS.get(files[0].suffix.lower())
    if reader is None or any(file.suffix.lower() != files[0].suffix.lower() for file in files):
        kinds = ", ".join(sorted({file.suffix or "no ending" for file in files}))
        problems.add(
            f"{flag} {place}: give a folder, or files of one kind among {', '.join(FILE_READERS)}, not {kinds}."
        )
        return None
    return reader, files


def _read_files(reader: str, files: list[Path], cache_dir: str | None) -> datasets.Dataset:
    if reader == "webdataset" or (reader == "parquet" and files[0].stem != "metadata"):
        names = [str(file) for file in files]
        return datasets.load_dataset(reader, data_files=names, split="train", cache_dir=cache_dir)
    tables = []
    for file in files:
        if reader == "csv":
            table = datasets.Dataset.from_dict(read_csv(str(file)))
        else:
            table = datasets.load_dataset(reader, data_files=str(file), split="train", cache_dir=cache_dir)
        tables.append(table.add_column(FOLDER_COLUMN, [str(file.parent)] * len(table)))
    return datasets.concatenate_datasets(tables)


def _metadata_file(folder: Path) -> Path | None:
    """
    The table that says what is in a folder of images, as `imagefolder` of `datasets` has it: with a column "file_name",
    and here with one of labels too, unless the images lie in class folders.
    """
    for file in (folder / f"metadata{ending}" for ending in (".jsonl", ".csv", ".parquet")):
        if not file.is_file():
            continue
        if not _has_class_folders(folder) or sum(entry.is_dir() for entry in folder.iterdir()) < 2:
            return file
        try:
            columns = _read_files(FILE_READERS[file.suffix], [file], None).column_names
        except Exception:  # a broken file raises whatever its parser raises; whoever reads it for good tells
            return file
        if any(column.lower() in LABEL_COLUMNS for column in columns):
            return file
    return None


def _has_class_folders(folder: Path) -> bool:
    """Whether it has folders, none of them a split, and no images beside them."""
    folders = {entry.name.lower() for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    return bool(folders - SPLIT_NAMES) and not any(
        entry.suffix.lower() in image_endings() for entry in folder.iterdir()
    )


def _read_unlabelled(flag: str, folder: Path, problems: Problems) -> datasets.Dataset | None:
    """All images at any depth."""
    files = _images_below(flag, folder, problems)
    if not files:
        problems.add(f"{flag} {folder} has no images in it.")
        return None
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": [str(file) for file in files]}, features=features)


def _images_below(flag: str, folder: Path, problems: Problems) -> list[Path]:
    """
    The images in a folder at any depth, sorted. Also pipes and links to nothing: whoever checks the images tells why
    these are none.
    """
    endings, found = image_endings(), []
    for item in walk(str(folder)):
        if item.fault:
            problems.add(f"{flag} {item.path}: {item.fault}. Change its permissions, or move it away.")
        elif Path(item.path).suffix.lower() in endings:
            found.append(Path(item.path))
    unnameable = [file for file in found if any("\udc80" <= sign <= "\udcff" for sign in str(file))]
    if unnameable:
        names = listed([ascii(file.name) for file in unnameable])
        problems.add(f"{flag} {folder}: {names}: these names are no UTF-8, and no table can hold them. Rename.")
    return sorted(set(found) - set(unnameable))


def _read_class_folders(flag: str, folder: Path, problems: Problems) -> datasets.Dataset | None:
    """One folder for each class, images at any depth below. Classes are in the order of their sorted names."""
    endings = image_endings()
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes or {name.lower() for name in classes} <= SPLIT_NAMES:
        problems.add(_not_class_folders(flag, folder, classes))
        return None
    loose = [entry.name for entry in folder.iterdir() if entry.suffix.lower() in endings]
    if loose:
        problems.add(f"{flag} {folder}: {listed(sorted(loose))} in no class folder. Move to one, or away.")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = _images_below(flag, folder / name, problems)
        if not files:
            problems.add(f"{flag} {folder}: the class folder {name!r} has no images. Fill it or remove it.")
        paths += [str(file) for file in files]
        labels += [label] * len(files)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


def _not_class_folders(flag: str, folder: Path, classes: list[str]) -> str:
    if classes:
        train = next((name for name in classes if name.lower().startswith("train")), classes[0])
        other = next((name for name in classes if not name.lower().startswith("train")), "validation")
        return (
            f"{flag} {folder} has splits in it ({', '.join(classes)}), not classes. Give --train_dir {folder / train} "
            f"--validation_dir {folder / other}."
        )
    tables = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in FILE_READERS)
    if tables:
        return f"{flag} {folder} has files in it, not class folders. Give the file, e.g. {flag} {folder / tables[0]}."
    return (
        f"{flag} {folder} has no class folders. Put the images of each class into a folder that is named as the class."
    )


def listed(names: list[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
