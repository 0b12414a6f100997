# SPDX-License-Identifier: Apache-2.0
"""
A few images, one by one, with nothing but transformers: what a stranger to this package gets from a saved model.

    python scripts/classify.py outputs/digits examples/*.png
    python scripts/classify.py outputs/digits photo.jpg --top_k 3

A file that can't be read is named, and the rest go on; the exit status is then 1. For many images there is predict.py.
"""

import argparse
import importlib.util
import sys

from transformers import Pipeline, pipeline
from transformers.utils import logging


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a model, or its id on the Hub")
    parser.add_argument("images", nargs="+", metavar="image", help="image files or URLs")
    parser.add_argument("--top_k", type=int, default=1, help="labels to print for each image, best first (default: 1)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub (default: main)")
    arguments = parser.parse_args()
    if arguments.top_k < 1:
        parser.error(f"--top_k {arguments.top_k} must be at least 1")

    logging.disable_progress_bar()
    try:
        classify = pipeline(
            "image-classification", model=arguments.model, revision=arguments.revision, trust_remote_code=True
        )
    except (OSError, ValueError) as error:
        print(f"error: {arguments.model} can't be loaded: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    kind = type(classify.model)
    origin = (
        f"its code comes from {arguments.model}" if kind.__module__.startswith("transformers_modules") else "installed"
    )
    here = "is" if importlib.util.find_spec("modeling_vit_scratch") else "is not"
    print(f"{kind.__name__}: {origin}; the package modeling_vit_scratch {here} installed here.")
    return print_table(classify, arguments.images, arguments.top_k)


def print_table(classify: Pipeline, images: list[str], top_k: int) -> int:
    """One row for each of the best labels of each image. Returns the exit status."""
    width = max(len("file"), *map(len, images))
    label_width = max(len("label"), *map(len, classify.model.config.id2label.values()))
    print(f"{'file':<{width}}  {'label':<{label_width}}  score")
    status = 0
    for image in images:
        try:
            predictions = classify(image, top_k=top_k)
        except Exception as error:  # whatever a decoder or a connection raises, the other images can be read
            print(f"error: {image}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            status = 1
            continue
        for prediction in predictions:
            print(f"{image:<{width}}  {prediction['label']:<{label_width}}  {prediction['score']:.4f}")
    return status


if __name__ == "__main__":
    sys.exit(main())
