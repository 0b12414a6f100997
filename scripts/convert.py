# SPDX-License-Identifier: Apache-2.0
"""
Converts a Vision Transformer's checkpoint: any known format in, this package's folder or any known format out.

    python scripts/convert.py ViT-B_16.npz vit_b16_384 --image_size 384 --num_labels 10
    python scripts/convert.py google/vit-base-patch16-224 vit_b16.npz --format npz --inexact
    python scripts/convert.py model.safetensors converted --verify

OUTPUT is a folder, which is then complete (`pipeline("image-classification", OUTPUT, trust_remote_code=True)` serves
it), or, with --format, also a single file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from startup.quick import before_torch, run_command_line


# The names of `checkpoint.formats.FORMATS`, which torch would be imported for.
FORMATS = ("npz", "timm", "transformers", "torchvision", "vit_scratch")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s SOURCE OUTPUT [...]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a file, a folder or a Hub id")
    parser.add_argument("output", help="where to write")
    parser.add_argument("--format", choices=FORMATS, default="vit_scratch", help="what to write (default: %(default)s)")
    parser.add_argument(
        "--image_size", type=int, nargs="+", metavar="N", help="height and width, or one number for both"
    )
    parser.add_argument("--patch_size", type=int, nargs="+", metavar="N", help="the same for patches")
    parser.add_argument("--num_channels", type=int, help="channels of the images")
    parser.add_argument("--num_labels", type=int, help="labels of a new classifier, which starts at zero")
    parser.add_argument("--labels", type=Path, help="names of labels: a line each, or a JSON list or id2label")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the source's")
    parser.add_argument("--num_attention_heads", type=int, help="where the source doesn't say")
    parser.add_argument("--source_image_size", type=int, nargs=2, metavar="N", help="of positions on a rectangle")
    parser.add_argument("--verify", action="store_true", help="run the source's own implementation, if it is installed")
    parser.add_argument(
        "--inexact", action="store_true", help="write a format whose own code computes a little differently"
    )
    parser.add_argument("--overwrite", action="store_true", help="write into OUTPUT although something is there")
    return parser


def main() -> None:
    with before_torch():
        parser = build_parser()
        arguments = read_arguments(parser)

    import torch

    from conversion.steps import convert
    from modeling_vit_scratch.checkpoint.files import CheckpointError

    if "dtype" in arguments:
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    try:
        convert(arguments.pop("source"), arguments.pop("output"), **arguments)
    except (CheckpointError, ValueError) as error:
        parser.exit(1, f"{error}\n")


def read_arguments(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What is given, as `convert` takes it."""
    arguments = vars(parser.parse_args())
    for name in ("image_size", "patch_size"):
        if arguments[name] is not None:
            if len(arguments[name]) > 2:
                parser.error(f"--{name} takes one number or two")
            arguments[name] = arguments[name] * 2 if len(arguments[name]) == 1 else arguments[name]
    labels = arguments.pop("labels")
    if labels is not None:
        text = labels.read_text(encoding="utf-8")
        names = json.loads(text) if labels.suffix == ".json" else text.split("\n")
        names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
        arguments["id2label"] = dict(enumerate(name.strip() for name in names if name.strip()))
    return {name: value for name, value in arguments.items() if value is not None}


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
