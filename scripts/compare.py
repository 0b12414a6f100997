# SPDX-License-Identifier: Apache-2.0
"""
Finished runs side by side: what each started from, how good it got, and what that is more than the first one.

    python scripts/compare.py outputs/scratch outputs/tuned

Reads results.json in the folders of scripts/finetune.py, and says where they can't be compared: other held-out images,
or another budget. For several seeds and data sets there is scripts/transfer.py.
"""

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run", help="the --output_dir of a run; the first is compared with")
    arguments = parser.parse_args()

    from experiments.comparison import compare_runs, read_runs

    print(compare_runs(read_runs(arguments.runs)))


if __name__ == "__main__":
    from modeling_vit_scratch.common.errors import run_command_line

    sys.exit(run_command_line(main))
