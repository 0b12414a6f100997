# SPDX-License-Identifier: Apache-2.0
"""
Publishes the folder of a model on the Hub, in one commit, after a look at what it would be.

    python scripts/publish.py outputs/pets me/vit-pets            shows files, sizes and card; uploads nothing
    python scripts/publish.py outputs/pets me/vit-pets --yes      uploads
    python scripts/publish.py outputs/pets me/vit-pets --yes --private --revision v2
    python scripts/publish.py outputs/pets me/vit-pets --space --yes    a page to try the published model on
    python scripts/publish.py outputs/pets me/vit-pets --space --static --yes    that needs no server
    python scripts/publish.py outputs/pets --refresh_code         renews the code of a folder, or of a Hub id

What goes: weights (safetensors), configuration, processor, the code files, card, figures, the record. What stays:
checkpoints, the optimizer's state, pickles, logs. A folder with tokens or local paths in its files is refused.
With --space it is a Space with the page of scripts/app.py for the model me/vit-pets; FOLDER may be any model's Hub id.
With --static it is the folder of `export.py --format web`: the model is in it, and runs in the browser.

With --refresh_code the code files are replaced by those of this version, which newer versions of transformers run, if
the outputs of the old and the new code are the same.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from startup.quick import before_torch, run_command_line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", help="of a finished model, e.g. outputs/pets")
    parser.add_argument("repo_id", nargs="?", metavar="USER/NAME", help="where to; made if it is not there")
    parser.add_argument("--space", action="store_true", help="publish a page in the browser, for the published model")
    parser.add_argument("--static", action="store_true", help="with --space: a page that runs the model in the browser")
    parser.add_argument("--images", nargs="+", metavar="FILE", help="with --static: photos to compare on and to click")
    parser.add_argument("--refresh_code", action="store_true", help="renew the code of FOLDER, which may be a Hub id")
    parser.add_argument("--yes", action="store_true", help="upload; without it, only show what would be uploaded")
    parser.add_argument("--private", action="store_true", help="make a new repository that only you can read")
    parser.add_argument("--revision", help="commit to this branch, made from main if there is none of that name")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request in place of a commit to main")
    parser.add_argument("--commit_message", help="title of the commit (default: Upload model, or Upload page)")
    parser.add_argument("--license", help="the licence of the model, for its card. Example: apache-2.0")
    for name in ("--license_name", "--license_link"):
        parser.add_argument(name, help="of a --license other")
    return parser


def main(argv: list[str] | None = None) -> None:
    with before_torch():
        arguments = build_parser().parse_args(argv)

    from huggingface_hub import get_token
    from transformers.utils.logging import disable_progress_bar

    from modeling_vit_scratch.common.errors import InputError, Problems
    from modeling_vit_scratch.hub.commit import ConnectionLost, check_permission, commit, look_up, prepare
    from modeling_vit_scratch.hub.contents import leaks_in
    from publishing.space import check_served, plan_space, plan_static

    disable_progress_bar()
    if arguments.refresh_code:
        from publishing.refreshing import refresh_code

        return refresh_code(arguments)
    repo_id, problems, served = arguments.repo_id, Problems(), None
    if not arguments.space and not Path(arguments.folder).is_dir():
        raise InputError(f"{arguments.folder} is no folder. Give that of a finished model, e.g. outputs/digits.")
    if repo_id is None or repo_id.count("/") != 1:
        raise InputError(
            f"{repo_id or 'Where to publish it'}: give USER/NAME, e.g. me/{Path(arguments.folder).resolve().name}."
        )
    if arguments.create_pr and arguments.revision:
        raise InputError("--create_pr opens its pull request against main: leave out --revision.")
    if (arguments.static or arguments.images) and not (arguments.space and arguments.static):
        raise InputError("--static goes with --space, and --images with --static.")
    if arguments.space and arguments.license:
        raise InputError("--license is that of a model. The code of the page is under Apache 2.0.")
    print(f"{'The Space ' if arguments.space else ''}{repo_id}, from {arguments.folder}:")
    if arguments.static:
        (uploads, faults, served), notes = plan_static(arguments.folder, repo_id, arguments.images), []
    elif arguments.space:
        (uploads, faults, served), notes = plan_space(arguments.folder, repo_id), []
    else:
        uploads, faults, notes = plan_model(arguments, Path(arguments.folder))
    for line in [*faults, *leaks_in(uploads, get_token())]:
        problems.add(line)
    for upload in uploads:
        print(f"  {upload.size:>14,} bytes  {upload.path}")
    print(f"  {sum(upload.size for upload in uploads):>14,} bytes in {len(uploads)} files")
    print(*notes, sep="\n", end="\n" if notes else "")
    card = next((upload for upload in uploads if upload.path == "README.md"), None)
    if card is not None:
        head = card.text().splitlines()[:40]
        print("README.md begins:", *(f"  | {line}" for line in head), sep="\n")
    if problems.messages:
        raise problems.as_error()

    kind = "space" if arguments.space else "model"
    if not arguments.yes:
        try:
            remote = look_up(repo_id, arguments.revision, kind)
            if remote.exists and not arguments.create_pr:
                check_permission(repo_id, kind)
            print("It is new, or not visible to you." if not remote.exists else "It exists: this would be an update.")
            for path in remote.outdated(uploads):
                print(f"  would be removed there: {path}")
            if served and (advice := check_served(served, arguments)):
                print(advice)
        except InputError as error:
            print(f"The Hub was not asked or does not agree: {error}")
        print("Nothing was uploaded. To upload, add --yes.")
        return

    try:
        advice = check_served(served, arguments) if served else None
        where = (repo_id, arguments.private or None, arguments.revision, arguments.create_pr, kind)
        remote = prepare(*where, space_sdk="static" if arguments.static else "gradio")
        message = arguments.commit_message or ("Upload page" if arguments.space else "Upload model")
        url = commit(remote, uploads, message, arguments.create_pr)
    except ConnectionLost as error:
        raise ConnectionLost(f"{error} Run the same command again later.") from error
    print(f"Published: {url}", *([advice] if advice else []), sep="\n")


def plan_model(arguments: argparse.Namespace, folder: Path) -> tuple[list[Any], list[str], list[str]]:
    """What is uploaded of a model's folder; what is wrong with it; and what else there is to say, a line each."""
    from modeling_vit_scratch.cards.records import CardOptions
    from modeling_vit_scratch.cards.writing import card_to_publish
    from modeling_vit_scratch.hub.contents import collect, prepare_card
    from publishing.checks import changed_code, check_model, license_notes, stale_reports

    faults, terms = check_model(folder), (arguments.license, arguments.license_name, arguments.license_link)
    architecture = None if faults else json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0]
    text = card_to_publish(folder, CardOptions(*terms, hub_model_id=arguments.repo_id))
    card, lines = prepare_card(folder, architecture, arguments.repo_id, terms, text)
    uploads, left_out = collect(folder, card=card)
    notes = license_notes(folder, card and card.text())
    notes += [f"  left out: {path} ({reason})" for path, reason in left_out.items()]
    if code := changed_code(folder):
        notes.append(f"  of this version, not of the folder: {', '.join(code)}")
    return uploads, [*faults, *lines, *stale_reports(folder)], notes


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
