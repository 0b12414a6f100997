# SPDX-License-Identifier: Apache-2.0
"""
Measures how fast this library is beside what one would use without it, on this machine.

    python scripts/benchmark.py data                          photos that the script makes: 12 megapixels and 500 x 375
    python scripts/benchmark.py data --train_dir photos       your own
    python scripts/benchmark.py processor                     the image processor, beside transformers'
    python scripts/benchmark.py finetune                      training on photos, beside transformers' example
    python scripts/benchmark.py prediction                    photos to a table of labels, beside transformers' pipeline
    python scripts/benchmark.py inference --variant B/16      the network, beside those of transformers, timm, ...
    python scripts/benchmark.py training --dtype bfloat16     the same, whole training steps
    python scripts/benchmark.py packing                       images of many sizes in one pass
    python scripts/benchmark.py loading                       imports and from_pretrained
    python scripts/benchmark.py soak --minutes 60             memory and open files of long runs

`data`: from photo files to a normalised batch for training, on one core. `processor`: images for the network, exactly.
`finetune`: whole runs of finetune.py's trainer. `prediction`: what predict.py does once its model is loaded. `packing`:
without padding. `loading`: until there is a model, in fresh processes. `soak`: predict.py and finetune.py. `inference`,
`training`: the same weights in everybody's implementation, where it is installed (timm, torchvision and vit-pytorch in
an environment of their own: see README); the logits must be equal before anything is timed; on a CPU
`inference` has OpenVINO and ONNX Runtime beside them, which convert the model in their first step. On a GPU:
--dtype bfloat16 --compile --batch_size 256 --profile. Ways that are compared take turns, round by round; the table has
medians over the rounds, and the ratio of each way to ours within a round, with its quartiles. All numbers, with the
hardware, the versions and the command, go into OUTPUT_DIR/TASK.json, and a picture beside it.
"""

import importlib.util
import sys

from startup.quick import before_torch, run_command_line


def declare_operators() -> None:
    """
    Lets a torchvision be imported that was built for another torch: without this it takes timm, vit-pytorch and
    transformers with it, for two operators that no ViT has. Before transformers is imported.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    import torch

    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError):
        for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        OPERATORS.append(operators)


# Declared as long as they are here.
OPERATORS = []
if __name__ == "__mp_main__":  # a process that measures memory
    declare_operators()


def main() -> None:
    with before_torch():
        from benchmarks.tasks import build_parser, check

        parser = build_parser(__doc__)
        arguments = parser.parse_args()
        check(parser, arguments)
        declare_operators()
    arguments.measure(arguments)


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
