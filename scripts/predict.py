# SPDX-License-Identifier: Apache-2.0
"""
Labels, scores and embeddings of images: of a few on the screen, of any number in a file.

    python scripts/predict.py outputs/pets photo.jpg other.png --top_k 3
    python scripts/predict.py outputs/pets photos --output labels.parquet
    accelerate launch scripts/predict.py outputs/pets 'shards/*.tar' --output labels.csv --embeddings

A run with --output that was stopped, or killed at any moment, continues with the same command, and its file has the
same bytes as if it had not been. Broken images are listed with their reasons in OUTPUT.errors.csv.
"""

from startup.quick import before_torch, run_command_line


def main() -> int:
    with before_torch():
        from modeling_vit_scratch.prediction.arguments import parse_arguments

        arguments = parse_arguments(description=__doc__)

    import torch
    from accelerate import Accelerator
    from transformers.utils import logging

    from modeling_vit_scratch.prediction.model import load_predictor
    from modeling_vit_scratch.prediction.reading import Inputs
    from modeling_vit_scratch.prediction.running import finish, open_job, print_table, run_job, wait_for_all

    logging.disable_progress_bar()
    inputs = Inputs(arguments)
    if arguments.output is None:
        predictor = load_predictor(arguments, torch.accelerator.current_accelerator(check_available=True) or "cpu")
        return int(print_table(predictor, inputs, arguments) > arguments.max_broken_images)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with accelerator.main_process_first():
        predictor = load_predictor(arguments, accelerator.device)
    job, missing, processes = open_job(predictor, inputs, arguments, accelerator)
    run_job(job, missing, predictor, inputs, arguments, accelerator)
    wait_for_all(processes)
    broken = 0
    if accelerator.is_main_process:
        _, broken = finish(job)
    wait_for_all(processes)
    accelerator.end_training()
    return int(broken > arguments.max_broken_images)


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
