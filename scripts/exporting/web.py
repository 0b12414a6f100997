# SPDX-License-Identifier: Apache-2.0
"""
A classifier for browsers: a folder that transformers.js, ONNX Runtime Web and its own page open, without a server.

transformers.js knows no vit_scratch, but it computes nothing of a network itself: it takes the architecture's name from
config.json and the pixels from preprocessor_config.json, and runs the graph. So the configuration is a stock ViT's,
whatever is in the graph.
"""

import argparse
import html
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from onnxruntime import InferenceSession
from transformers import ViTConfig
from transformers.exporters.configs import ExportFormat
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import ImageClassifierOutput

from exporting.export import check, compare, count_right, export, photographs, quantizer, save
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.evaluation.data import EvaluationData
from modeling_vit_scratch.image_processing_vit_scratch import PILLOW_CHOOSES_AXIS, ViTScratchImageProcessor
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification


# The version that the tests run the page with.
ONNXRUNTIME_WEB = "1.30.0"
EXACT, SMALL = "onnx/model.onnx", "onnx/model_quantized.onnx"  # transformers.js asks for these names
MAX_BYTES = 1_900_000_000  # a file of ONNX holds 2 GB, and so does the memory of a page
EXAMPLES, EXAMPLE_SIDE = 8, 640
CREDIT = "Photos by danielbuechele and vultilion on Flickr, CC BY 2.0"


class Program:
    """The bytes of an ONNX file, which ONNX Runtime runs."""

    def __init__(self, graph: onnx_ir.Model) -> None:
        self.content = onnx_ir.to_proto(graph).SerializeToString()
        self.session = InferenceSession(self.content, providers=["CPUExecutionProvider"])

    def __call__(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        (logits,) = self.session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        return ImageClassifierOutput(logits=torch.from_numpy(logits))


@dataclass(frozen=True)
class WebFolder:
    """The files by their paths, the programs by what they are, and a line on how each compares with the model."""

    files: dict[str, bytes]
    programs: dict[str, Program]
    lines: list[str]

    def save_pretrained(self, folder: Path) -> None:
        for path, content in self.files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)


def build(
    model: ViTScratchForImageClassification,
    processor: ViTScratchImageProcessor,
    images: list[Any] | None,
    name: str,
    link: str | None = None,
    card: str | None = None,
) -> WebFolder:
    """
    The folder of a model in float32, compared with it on `images`, or scikit-learn's photographs; the page has the
    first of them to click on. Its title is `name`; it links the card, which is at `link`, or has the text `card`.
    Raises InputError for a model or pixels that a browser can't have, and where the program is not the model's.
    """
    settings = pixel_settings(processor, model.config.num_channels)
    if (size := sum(weight.nbytes for weight in model.state_dict().values())) > MAX_BYTES:
        raise InputError(f"The weights take {size / 1e9:.1f} GB: a page holds {MAX_BYTES / 1e9:.1f} GB at most.")
    count, credit = EXAMPLES, ""
    if images is None:
        images, count, credit = photographs(), 2, CREDIT  # no quarters of photographs on the page
    pixel_values = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
    programs, lines = compared_programs(model, pixel_values)
    photos = {f"examples/{i + 1}.jpg": small_copy(processor, image) for i, image in enumerate(images[:count])}
    config = stock_config(model)
    if SMALL not in programs:  # which transformers.js takes in a browser if it is not told
        config["transformers.js_config"] = {"dtype": "fp32"}
    page = {
        "name": name,
        "link": link or ("card.md" if card else None),
        "labels": [str(model.config.id2label[index]) for index in range(model.num_labels)],
        "is_multi_label": model.config.problem_type == "multi_label_classification",
        "is_calibrated": model.config.temperature != 1,
        "pixels": settings | {"background_color": processor.background_color, "rows_first": PILLOW_CHOOSES_AXIS},
        "programs": {path: len(program.content) for path, program in programs.items()},
        "examples": list(photos),
        "credit": credit,
        "onnxruntime": f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{ONNXRUNTIME_WEB}/dist/ort.wasm.bundle.min.mjs",
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = template.replace("{{ name }}", html.escape(name))
    text = text.replace("{{ settings }}", json.dumps(page).replace("<", "\\u003c"))  # no </script> in a label
    # For other pages too, with transformers.js: its own way of resizing has other scores.
    script = template.partition('<script id="pixels">')[2].partition("</script>")[0]
    record = {"export_format": "web", "onnxruntime_web": ONNXRUNTIME_WEB, "comparisons": lines}
    files = {path: program.content for path, program in programs.items()} | photos
    files |= {"index.html": text.encode(), "pixels.js": f"{script}\nexport {{ pixelValues, scoresOf }};\n".encode()}
    files |= {"card.md": card.encode()} if card else {}
    for path, content in (("config", config), ("preprocessor_config", settings), ("export", record)):
        files[f"{path}.json"] = (json.dumps(content, indent=2) + "\n").encode()
    return WebFolder(files, programs, lines)


def export_web(
    arguments: argparse.Namespace, labelled: EvaluationData | None, model: ViTScratchForImageClassification,
    processor: ViTScratchImageProcessor,
) -> None:  # fmt: skip
    """What --format web does: writes the folder and tells of it. `labelled`: images to count on, or None."""
    web = build(model, processor, arguments.images, *name_and_card(arguments.model))
    save([web], arguments.output, sum(map(len, web.files.values())))
    print(f"{arguments.output}:", *web.lines, sep="\n  ")
    if labelled:
        print(count_right(model, processor, labelled, {"the model": model, **web.programs}))
    print(f"""To see the page: python -m http.server --directory {arguments.output}, and open http://localhost:8000
In transformers.js: pipeline("image-classification", "{arguments.output.name}", {{ dtype: "fp32" }}),
  which resizes photos less exactly than the page: see docs/howto/export.md""")


def compared_programs(
    model: ViTScratchForImageClassification, pixel_values: torch.Tensor
) -> tuple[dict[str, Program], list[str]]:
    """
    The programs of a model by their paths, and a line on each. That with weights of 8 bits is left out if it is too far
    from the model.
    """
    exact = export(model, "onnx").program
    graphs = {EXACT: exact, SMALL: quantizer().quantize(exact, {}, ExportFormat.ONNX)}
    programs, lines = {}, []
    for path, graph in graphs.items():
        program, is_small = Program(graph), path == SMALL
        comparison = compare(model, program, pixel_values)
        try:
            check(comparison, "onnx", is_small)
        except InputError as error:
            if not is_small:
                raise
            lines.append(f"{path} is left out. {str(error).partition(' Nothing was written')[0]}")
            continue
        programs[path] = program
        lines.append(
            f"{path}: {len(program.content) / 1e6:,.1f} MB. On {comparison.n} images logits differ from the model's by "
            f"up to {comparison.difference:.1e}, and {comparison.agreement:.0%} have the same best label."
        )
    return programs, lines


def name_and_card(source: str) -> tuple[str, str | None, str | None]:
    """The name of a model in a folder or on the Hub, a link to its card, and the card's text where it has no link."""
    if not Path(source).exists():
        return source, f"https://huggingface.co/{source}", None
    card = Path(source, "README.md")
    return Path(source).resolve().name, None, card.read_text("utf-8") if card.is_file() else None


def stock_config(model: ViTScratchForImageClassification) -> dict[str, Any]:
    """config.json of transformers' ViTForImageClassification, as far as its fields can say what the model is."""
    own = model.config.to_dict()
    fields = {name: own[name] for name in ViTConfig.__annotations__ if name in own}
    labels = {"id2label": model.config.id2label, "label2id": model.config.label2id}
    config = ViTConfig(**fields, **labels, problem_type=model.config.problem_type)
    return config.to_diff_dict() | {"architectures": ["ViTForImageClassification"], "model_type": "vit"}


def pixel_settings(processor: ViTScratchImageProcessor, num_channels: int) -> dict[str, Any]:
    """
    preprocessor_config.json of transformers' ViTImageProcessor, which makes the same pixels. Raises InputError for what
    the page does not do.
    """
    size = {key: value for key, value in dict(processor.size).items() if value}
    crop = dict(processor.crop_size) if processor.do_center_crop else None
    if processor.crop_pct is not None and size["height"] == size["width"]:
        crop, size = size, {"shortest_edge": math.floor(size["height"] / processor.crop_pct)}
    faults = [
        (num_channels not in (1, 3), f"images of {num_channels} channels (1 and 3 are known)"),
        (not processor.do_resize, "do_resize false"),
        (size.keys() != {"height", "width"} and not (size.keys() == {"shortest_edge"} and crop), f"size {size}"),
        (processor.crop_pct is not None and "height" in size, f"crop_pct {processor.crop_pct} of {size}"),
        (processor.resample not in (PILImageResampling.BILINEAR, PILImageResampling.BICUBIC),
         f"resample {processor.resample} (2, bilinear, and 3, bicubic, are known)"),
    ]  # fmt: skip
    if unknown := [what for is_fault, what in faults if is_fault]:
        raise InputError(f"The page can't prepare images as this model's processor does: {', '.join(unknown)}.")
    mean, std = (
        [float(value) for value in (values if isinstance(values, (list, tuple)) else [values] * num_channels)]
        for values in (processor.image_mean, processor.image_std)
    )
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True, "size": size, "resample": int(processor.resample),
        "do_rescale": processor.do_rescale, "rescale_factor": processor.rescale_factor,
        "do_normalize": processor.do_normalize, "image_mean": mean, "image_std": std,
        "do_convert_rgb": num_channels == 3,
    }  # fmt: skip
    if num_channels == 1:
        settings["do_convert_grayscale"] = True  # of transformers.js
    return settings | ({"do_center_crop": True, "crop_size": crop} if crop else {})


def small_copy(processor: ViTScratchImageProcessor, image: Any) -> bytes:
    """An image as a small JPEG file, without what a camera writes into it."""
    image = processor.decode(image)
    image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    image.info.clear()
    image.save(buffer := io.BytesIO(), "JPEG", quality=90)
    return buffer.getvalue()
