# SPDX-License-Identifier: Apache-2.0
"""The flags that name the images to learn from."""

from dataclasses import dataclass
from pathlib import Path

from ..common.errors import Problems
from ..common.flags import LabelFlags, flag


# Data sets that need no file: see `sources`.
BUILT_IN = ("digits", "elpv")


@dataclass
class DataArguments(LabelFlags):
    """What to learn from."""

    dataset_name: str | None = flag(
        None,
        "digits (comes with scikit-learn), elpv (solar cells: pip install elpv-dataset), or any data set of the Hub. "
        "Default: digits, without a --train_dir. Example: food101",
        metavar="NAME",
    )
    train_dir: str | None = flag(
        None,
        "Your images: a folder with one folder per class, or with a metadata.jsonl, .csv or .parquet; a .parquet, "
        ".csv, .jsonl or .tar (WebDataset) file; or a quoted pattern: 'shards/*.tar'",
        metavar="DIR",
    )
    validation_dir: str | None = flag(None, "Held-out images. Default: see --train_val_split.", metavar="DIR")
    train_val_split: float = 0.15
    streaming: bool = flag(
        False,
        "Read training images during training, for data larger than the disk. Needs held-out images, and --max_steps "
        "for formats other than Parquet.",
    )
    shuffle_buffer_size: int = flag(2048, "With --streaming: images in the shuffle buffer.", at_least=1)
    label_names_file: str | None = flag(
        None, "With --streaming: a text file with one label per line, where the data have only numbers.", metavar="FILE"
    )
    max_train_samples: int | None = flag(None, "Train on at most N images, chosen at random.", at_least=1)
    verify_images: bool = flag(True, "Decode every image once before training, to find broken files first.")
    export_examples: str | None = flag(None, "Save ten held-out images here to try the model.", metavar="DIR")

    def check(self, problems: Problems) -> None:
        """Adds what is wrong with the values, but for limits of single flags."""
        if self.dataset_name and self.train_dir:
            problems.add("--dataset_name and --train_dir each say what to learn from. Keep one of them.")
        if self.validation_dir and not self.train_dir:
            problems.add("--validation_dir goes with --train_dir. Give that too, or leave this out.")
        if self.dataset_config_name and self.dataset_name in (None, *BUILT_IN):
            problems.add("--dataset_config_name goes with a --dataset_name of the Hub. Leave it out.")
        if self.streaming and self.dataset_name in BUILT_IN:
            problems.add(f"--streaming: {self.dataset_name} is small and here already. Leave it out.")
        if self.streaming and self.max_train_samples is not None:
            problems.add(
                "--max_train_samples chooses from all images, which --streaming can't. Give --max_steps instead."
            )
        if self.label_names_file and not self.streaming:
            problems.add("--label_names_file goes with --streaming. Leave it out: all labels are read before training.")
        if self.export_examples and Path(self.export_examples).is_file():
            problems.add(f"--export_examples {self.export_examples} is a file. Give a folder.")
