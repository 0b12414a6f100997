# SPDX-License-Identifier: Apache-2.0
"""
Evaluates a model on labelled images: accuracies with intervals, calibration, every class, figures.

    python scripts/evaluate.py outputs/digits digits
    python scripts/evaluate.py outputs/pets photos/test --crops 10
    python scripts/evaluate.py outputs/pets photos --label_issues
    accelerate launch scripts/evaluate.py outputs/pets photos/test --calibrate

Reports accuracy, F1, NLL, Brier score and calibration error with 95 % intervals, every class, a confusion matrix and a
reliability diagram; for images with several labels mean average precision, F1 and precision-recall curves. Writes
results.json, predictions.csv and figures into MODEL/evaluation/DATASET, and updates the card, MODEL/README.md.
"""

import importlib.util
import sys
from pathlib import Path

from startup.quick import before_torch, run_command_line


def _is_here(place: str) -> bool:
    return Path(place or ".").resolve() == Path(__file__).resolve().parent


# Python puts this folder first on its path, where the name of this file would hide the library `evaluate`, also from
# the other scripts here. This folder goes to the end of the path until `import evaluate` has given the library.
sys.path.sort(key=_is_here)
if __name__ == "evaluate" and getattr(sys.modules.get(__name__), "__file__", None) == __file__:
    del sys.modules[__name__]
    import evaluate  # noqa: F401

    # First again: another package may have the name of a folder here.
    sys.path.sort(key=lambda place: not _is_here(place))


def main() -> None:
    with before_torch():
        from modeling_vit_scratch.evaluation.arguments import parse_arguments

        arguments = parse_arguments(description=__doc__)

    import torch
    from accelerate import Accelerator

    from modeling_vit_scratch.acceleration.speed_up import speed_up
    from modeling_vit_scratch.cards.writing import refresh_card
    from modeling_vit_scratch.evaluation.data import read_evaluation_data
    from modeling_vit_scratch.evaluation.predictions import MULTI_LABEL, load_model, predict
    from modeling_vit_scratch.evaluation.report import build_report, report_message, write_report

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with accelerator.main_process_first():
        model, processor = load_model(arguments)
        names = [str(model.config.id2label[index]) for index in range(model.num_labels)]
        is_multi_label = model.config.problem_type == MULTI_LABEL
        data = read_evaluation_data(arguments, names, is_multi_label, verify=accelerator.is_main_process)
    data = data.without_broken()
    predictions = predict(speed_up(model), processor, data.examples, accelerator, arguments)
    if not accelerator.is_main_process:
        pass
    elif arguments.label_issues:
        from evaluating.label_issues import write_label_issues

        print(write_label_issues(model.config, data, predictions, arguments))
    elif arguments.problem_type == "regression":
        from evaluating.regression import write_regression

        print(write_regression(data, predictions, arguments))
    else:
        report = build_report(arguments, model, data, predictions, accelerator)
        files = write_report(report, data, model, arguments)
        if importlib.util.find_spec("matplotlib") is None:
            print('No figures: they are drawn with matplotlib, pip install -e ".[plot]"')
        else:
            from evaluating.figures import draw_report

            files += draw_report(report, data, model, processor, Path(arguments.output_dir))
        card = refresh_card(arguments.model, arguments.output_dir) if arguments.update_card else None
        print(*filter(None, (report_message(report.record, arguments.model, files), card)), sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
