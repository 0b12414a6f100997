# SPDX-License-Identifier: Apache-2.0
"""The flags that name the images to learn from."""

from dataclasses import dataclass, field
from typing import Any


# What a built-in data set changes in the defaults, so that its name alone is a good command.
SOURCE_DEFAULTS: dict[str, dict[str, Any]] = {
    # So small that reading them is no work for another process.
    "digits": {"variant": "Mi/4", "image_size": [8], "num_train_epochs": 40.0, "dataloader_num_workers": 0},
    # A defect is a small part of a cell: most of the cell must stay in view.
    "elpv": {"variant": "Mi/8", "smallest_area": 0.7, "num_train_epochs": 40.0},
}
for _defaults in SOURCE_DEFAULTS.values():
    # The accuracy of an epoch that was chosen on the held-out images is no longer that of images held out.
    _defaults["load_best_model_at_end"] = False


@dataclass
class DataArguments:
    """What to learn from."""

    _argument_group_name = "data: what to learn from"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "digits: 1,797 scanned digits that come with scikit-learn. elpv: 2,624 photographs of solar cells "
            "(pip install elpv-dataset). Anything else: a data set of the Hub, or a folder that holds a copy of one. "
            "Default: digits, unless there is a --train_dir. Example: food101"
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of --dataset_name, where it has several."}
    )
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Your own images: a folder with one folder for each class, or with a metadata.jsonl, .csv or "
            ".parquet; or a .parquet, .csv, .jsonl or .tar (WebDataset) file; or a quoted pattern for several files. A "
            "column of lists gives each image any number of labels. Example: photos/train, or: 'shards/*.tar'"
        },
    )
    validation_dir: str | None = field(
        default=None,
        metadata={"help": "Held-out images, in the form of --train_dir. Default: a part of --train_dir, see the next."},
    )
    train_val_split: float = field(
        default=0.15,
        metadata={
            "help": "The part of the training images to hold out, the same part of every class, where the data has no "
            "validation split. Between 0 and 1."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training images while training goes on, for data that is larger than the disk: Parquet, "
            "WebDataset, JSON lines or CSV files, or a data set of the Hub that is not downloaded. Needs held-out "
            "images of their own, and --max_steps unless it is Parquet, whose rows are counted."
        },
    )
    shuffle_buffer_size: int = field(
        default=2048,
        metadata={
            "help": "With --streaming: so many images that follow one another are shuffled among themselves, and kept "
            "in memory as they are stored. The files come in a new order in every epoch."
        },
    )
    label_names_file: str | None = field(
        default=None,
        metadata={
            "help": "With --streaming: a text file with the name of a label in each line, in the order of the class "
            "numbers, where the data does not say it (ClassLabel)."
        },
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "The column of the images. Default: the only one that can be it."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={"help": "The column of the labels. Default: the only one that can be it. Example: fine_label"},
    )
    label_separator: str | None = field(
        default=None,
        metadata={
            "help": "What stands between the labels of an image, where images have any number of them and a table has "
            'them as text; an empty text is no label. Lists need no flag: ["cat", "dog"] in Parquet or JSON lines. '
            "Example: '|'"
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on no more than so many images, chosen at random. For a quick try."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Hold out no more than so many images, chosen at random. For a quick try."}
    )
    verify_images: bool = field(
        default=True,
        metadata={"help": "Decode every image once before training, to find broken files first. A pass over the data."},
    )
    export_examples: str | None = field(
        default=None,
        metadata={
            "help": "Write ten held-out images to this folder as INDEX_LABEL.png, to try the model on. "
            "Example: examples"
        },
    )
