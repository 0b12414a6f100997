# SPDX-License-Identifier: Apache-2.0
"""
Makes a program of a classifier, for ONNX Runtime, OpenVINO or torch.export: for serving without this package.

    python scripts/export.py outputs/pets outputs/pets-onnx --format onnx
    python scripts/export.py outputs/pets outputs/pets-int8 --format onnx --int8 --dataset photos
    python scripts/export.py outputs/pets outputs/pets-openvino --format openvino --any_size
    python scripts/export.py outputs/pets outputs/pets-fast --format openvino --int8 --calibration_dir photos
    python scripts/export.py outputs/pets outputs/pets-web --format web --images photos/*.jpg

The program is compared with the model on real images before it is written: logits within 1e-4, and the same best
labels. Its speed is shown beside that of the model. `pip install -e ".[export]"` brings what ONNX and OpenVINO need.

--format web writes a folder for browsers: a page (index.html), and what transformers.js opens. Photos are classified on
the device of who looks at it; a server only hands out the files.
"""

import argparse
from pathlib import Path

from startup.quick import before_torch, run_command_line


MIN_AGREEMENT = 0.97  # with products of 8 bits


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="the folder of a classifier, its id on the Hub, or a checkpoint")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a new folder")
    parser.add_argument(
        "--format", choices=("torch", "onnx", "openvino", "web"), default="onnx",
        help="torch: torch.export's .pt2; onnx; openvino: OpenVINO's IR; web: ONNX and a page, for browsers (default: "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument("--any_size", action="store_true", help="images of any height and width that the patch divides")
    parser.add_argument("--int8", action="store_true", help="8 bits, a quarter of the size: with --format onnx the "
                        "weights; with --format openvino and --calibration_dir the products too")  # fmt: skip
    parser.add_argument("--calibration_dir", metavar="DIR", help="images that scripts/evaluate.py reads, labelled or "
                        "not: some calibrate the program in int8, it is compared on others")  # fmt: skip
    parser.add_argument("--calibration_images", type=int, default=300, metavar="N", help="how many calibrate (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--min_agreement", type=float, default=MIN_AGREEMENT, metavar="SHARE", help="of images that "
                        "don't calibrate, the share that must keep its best label (default: %(default)s)")  # fmt: skip
    parser.add_argument("--images", nargs="+", metavar="FILE", help="what to compare on, and examples of the page "
                        "(default: two photographs that come with scikit-learn, and their quarters)")  # fmt: skip
    parser.add_argument("--dataset", help="labelled images, as in scripts/evaluate.py: how many are right before and "
                        "after")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=8, help="images in a batch that is timed (default: 8)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed, 0: not at all (default: 7)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is an earlier program")
    parser.add_argument("--model_revision", default="main", help="branch, tag or commit of MODEL on the Hub")
    return parser


def main(argv: list[str] | None = None) -> None:
    with before_torch():
        arguments = build_parser().parse_args(argv)

    import torch
    from transformers.utils import logging

    from benchmarks.timing import format_table, summarize, time_in_turns
    from exporting.calibration import calibrate, check_flags
    from exporting.export import (
        check,
        check_output,
        compare,
        count_right,
        export,
        labelled_images,
        missing_packages,
        photographs,
        save,
    )  # fmt: skip
    from modeling_vit_scratch.common.errors import InputError
    from modeling_vit_scratch.evaluation.arguments import EvaluationArguments
    from modeling_vit_scratch.evaluation.predictions import load_model

    logging.disable_progress_bar()
    check_flags(arguments)
    if missing := missing_packages("openvino in int8" if arguments.calibration_dir else arguments.format):
        raise InputError(f'--format {arguments.format} needs {", ".join(missing)}: pip install -e ".[export]"')
    if arguments.any_size and arguments.format == "web":
        raise InputError("--any_size: the page of --format web prepares images of the model's own size. Leave it out.")
    if arguments.batch_size < 1 or arguments.rounds < 0:
        raise InputError(
            f"--batch_size {arguments.batch_size} must be at least 1, --rounds {arguments.rounds} at least 0."
        )
    inputs = [arguments.model, *filter(None, [arguments.dataset, arguments.calibration_dir]), *(arguments.images or ())]
    check_output(arguments.output, arguments.overwrite, inputs)
    evaluation = EvaluationArguments(model_revision=arguments.model_revision)
    evaluation.model, evaluation.dataset = arguments.model, arguments.dataset or ""
    model, processor = load_model(evaluation)
    model = model.float().eval()
    labelled = labelled_images(model, evaluation)
    if arguments.format == "web":
        from exporting.web import export_web

        return export_web(arguments, labelled, model, processor)
    runs = {"the model, eager": lambda pixel_values: model(pixel_values=pixel_values)}
    if arguments.calibration_dir:
        exported, runs["the program in float32"], pixel_values = calibrate(model, processor, arguments)
        comparison = compare(model, exported, pixel_values)
    else:
        images = arguments.images or photographs()
        pixel_values = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
        exported = export(model, arguments.format, arguments.any_size, arguments.int8)
        comparison = compare(model, exported, pixel_values)
        check(comparison, arguments.format, arguments.int8)
    # Before the program is written, so that who sees that it is slow or wrong can stop here.
    if labelled:
        print(count_right(model, processor, labelled, {"the model": model, "the program": exported}))
    if arguments.rounds:
        batch = pixel_values.repeat(-(-arguments.batch_size // len(pixel_values)), 1, 1, 1)[: arguments.batch_size]
        batch, program = batch.contiguous(), "the program"
        functions = {
            name: torch.inference_mode()(lambda run=run: run(pixel_values=batch))
            for name, run in {program: exported, **runs}.items()
        }
        summary = summarize(time_in_turns(functions, arguments.rounds), arguments.batch_size, program)
        print(format_table(f"Batches of {arguments.batch_size}:", summary, program))
    weights = sum(weight.nbytes for weight in model.state_dict().values())
    save((exported, processor), arguments.output, 0 if arguments.int8 else weights)
    size = sum(file.stat().st_size for file in arguments.output.iterdir()) / 1e6
    print(f"{arguments.output}: {size:,.1f} MB. On {comparison.n} images logits differ from the model's by up to "
          f"{comparison.difference:.1e}, and {comparison.agreement:.0%} have the same best label.")  # fmt: skip
    print(f"""To use it:

    from transformers import AutoImageProcessor
    from transformers.exporters import ExportedModel
    processor = AutoImageProcessor.from_pretrained("{arguments.output}", trust_remote_code=True)
    model = ExportedModel.from_pretrained("{arguments.output}", trust_remote_code=True)
    print(model(**processor("image.png", return_tensors="pt")).logits)
""")  # fmt: skip
    if arguments.format == "openvino":
        print('OpenVINO computes in bfloat16 where the CPU has it, to 2 or 3 digits. In float32, as compared here:\n'
              '    model.to(config={"INFERENCE_PRECISION_HINT": "f32"})')  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
