# SPDX-License-Identifier: Apache-2.0
"""
Fine-tunes a model on several data sets, from its weights and from scratch, over several seeds, and writes the table.

    python scripts/transfer.py --model_name_or_path outputs/pretrained --data digits pets=photos/pets
    python scripts/transfer.py --model_name_or_path B_16.npz --data pets=photos/train food=food101 \\
        --flags pets='--validation_dir photos/test --num_train_epochs 30' --scratch_learning_rate 3e-4 1e-3 --jobs 4
    python scripts/transfer.py compare outputs/scratch outputs/tuned      finished runs side by side, by their records

Every run is one of scripts/finetune.py, with the same flags from both starts: the last step counts, and nothing is
chosen on held-out images but, if you give several, the learning rate from scratch, in its favour. A second table shows
what the features are worth without fine-tuning, beside those of the same network with random weights: few-shot least
squares and a linear classifier, by scripts/probe.py. Other flags are those of scripts/finetune.py, for all data sets;
--flags adds some for one.

OUTPUT_DIR/transfer.json has every value, with its command, hardware and versions; transfer.md the tables; transfer.png
the picture. Stop with Ctrl-C; the same command goes on, and repeats no run that is finished.
"""

import sys
import time
from pathlib import Path

from startup.quick import before_torch, run_command_line


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        from experiments.comparison import compare

        compare(sys.argv[2:])
        return
    with before_torch():
        from experiments.arguments import build_parser

        arguments, common = build_parser(__doc__).parse_known_args()

    from experiments.plan import plan_runs
    from experiments.running import run_all
    from experiments.summary import build_cells, build_record
    from experiments.writing import write_transfer

    begin, folder = time.perf_counter(), Path(arguments.output_dir)
    runs = plan_runs(arguments, common)
    records = run_all(runs, Path(__file__).parent, folder / "runs", arguments.jobs, arguments.keep_models)
    record = build_record(build_cells(runs, records), arguments, time.perf_counter() - begin)
    write_transfer(record, folder)


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
