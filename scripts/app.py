# SPDX-License-Identifier: Apache-2.0
"""
A page in the browser on which people try a model: photos in, classes and what the model looks at out.

    python scripts/app.py outputs/pets
    python scripts/app.py google/vit-base-patch16-224 --server_port 7861
    python scripts/app.py microsoft/resnet-50 --share

Needs gradio: pip install -e ".[app]". For a page on the Hub: python scripts/publish.py --space --help
"""

import argparse
from pathlib import Path
from typing import Any

from startup.quick import before_torch, run_command_line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="an image classifier: a folder, a Hub id, a .npz or other checkpoint of a ViT")
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub (default: main)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model of others")
    parser.add_argument(
        "--examples", nargs="+", metavar="PHOTO", help="photos or folders to click on (default: two of scikit-learn)"
    )
    parser.add_argument(
        "--server_name", default="127.0.0.1", help="0.0.0.0 for the whole network (default: this machine)"
    )
    parser.add_argument("--server_port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also a public link, through Gradio's servers, for a week")
    return parser


def main(argv: list[str] | None = None) -> None:
    with before_torch():
        arguments = build_parser().parse_args(argv)

    from modeling_vit_scratch.common.errors import InputError

    try:
        from httpx import HTTPError  # of gradio

        from modeling_vit_scratch.page.layout import build, launch
    except ModuleNotFoundError as error:
        raise InputError(f'{error}. The page needs gradio: pip install -e ".[app]"') from error
    examples = example_photos(arguments.examples)
    credit = "" if arguments.examples else " (photos: danielbuechele and vultilion on Flickr, CC BY 2.0)"
    viewer = open_viewer(arguments.model, arguments.revision, arguments.trust_remote_code)
    card = Path(arguments.model, "README.md")
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    link = None if Path(arguments.model).exists() else f"https://huggingface.co/{arguments.model}"
    where = {"server_name": arguments.server_name, "server_port": arguments.server_port}
    try:
        launch(build(viewer, link, examples, text, credit), share=arguments.share, allowed_paths=examples, **where)
    except (OSError, ValueError, HTTPError) as error:  # the port is taken; the server does not answer in time
        port = f" --server_port {arguments.server_port}" if arguments.server_port else ""
        raise InputError(
            f"--server_name {arguments.server_name}{port}: no page can be served there. {error}"
        ) from error


def example_photos(given: list[str] | None) -> list[str]:
    """Up to eight photos to click on. Raises InputError if there is none."""
    from modeling_vit_scratch.visualization.arrays import find_photos

    if given:
        return find_photos(given)[:8]
    from sklearn.datasets import load_sample_images

    return load_sample_images().filenames


def open_viewer(source: str, revision: str, trust_remote_code: bool) -> Any:
    """What the Auto classes load; if they can't, what `from_pretrained` of this package reads beside that."""
    from modeling_vit_scratch.acceleration.speed_up import speed_up
    from modeling_vit_scratch.common.errors import InputError
    from modeling_vit_scratch.page.model import Viewer, load
    from modeling_vit_scratch.visualization.arrays import open_model

    try:
        viewer = load(source, trust_remote_code, revision)
        speed_up(viewer.model)
        return take_openvino(viewer)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip()
    try:
        model, processor = open_model(source, revision)
    except InputError as error:
        message = str(error) if Path(source).is_file() else f"The model {source} can't be loaded: {reason}"
        raise InputError(message) from error
    if not getattr(model, "num_labels", 0) or not hasattr(model, "classifier"):
        raise InputError(f"The model {source} has no trained classifier. Train one with scripts/finetune.py.")
    return take_openvino(Viewer(speed_up(model), processor, Path(source).name or source))


def take_openvino(viewer: Any) -> Any:
    """Lets OpenVINO compute the scores of photos without maps, where it is installed and all photos get one size."""
    import torch
    from PIL import Image
    from transformers.modeling_outputs import ImageClassifierOutput

    from modeling_vit_scratch.acceleration.openvino import Program, is_installed
    from modeling_vit_scratch.common.errors import InputError

    if is_installed():
        photos = [Image.new("RGB", size) for size in ((300, 200), (200, 300))]
        try:
            shapes = [viewer.processor(images=[one], return_tensors="pt")["pixel_values"].shape[1:] for one in photos]
            if shapes[0] == shapes[1]:
                program = Program(viewer.model, tuple(shapes[0]), False, torch.get_num_threads())
                viewer.scorer = lambda pixel_values: ImageClassifierOutput(logits=program(pixel_values)[0])
        except (InputError, ValueError) as error:
            print(f"torch computes all scores: {error}")
    return viewer


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
