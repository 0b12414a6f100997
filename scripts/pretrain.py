# SPDX-License-Identifier: Apache-2.0
"""
Pretrains a Vision Transformer: on labels, or on images alone.

    python scripts/pretrain.py --train_dir photos --variant S/16                       the paper's way, on labels
    python scripts/pretrain.py --train_dir photos --variant S/16 --objective mae       without labels
    accelerate launch scripts/finetune.py --model_name_or_path outputs/photos-pretrained --train_dir fewer_photos

Objectives: supervised, mpp (the paper's masked patch prediction), simmim, mae, dino, distillation (the features
of a --teacher_model). What it writes is the --model_name_or_path of scripts/finetune.py.
"""

from startup.quick import before_torch, run_command_line


def main() -> None:
    with before_torch():
        from modeling_vit_scratch.pretraining.arguments import PRETRAIN
        from modeling_vit_scratch.training.command_line import parse_arguments

        parsed = parse_arguments(script=PRETRAIN, description=__doc__)
        model_arguments, data_arguments, training_arguments, pretraining, problems = parsed

    from modeling_vit_scratch.cards.records import build_record, result_message, write_record
    from modeling_vit_scratch.cards.writing import write_training_card
    from modeling_vit_scratch.data.held_out import read_earlier
    from modeling_vit_scratch.data.splits import read_data
    from modeling_vit_scratch.pretraining.build import build_pretraining

    seed, is_first = training_arguments.seed, training_arguments.process_index == 0
    start, checkpoint = model_arguments.model_name_or_path, training_arguments.resume_from_checkpoint
    hub = {"revision": model_arguments.model_revision, "cache_dir": model_arguments.cache_dir}
    earlier = read_earlier(start, checkpoint, data_arguments.train_val_split, **hub)
    cache, needs_labels = model_arguments.cache_dir, pretraining.is_supervised
    data = read_data(data_arguments, seed, problems, cache, needs_labels, earlier)
    trainer, origin = build_pretraining(model_arguments, pretraining, data, training_arguments)
    if is_first:
        print(data.describe(), *origin, *trainer.describe(), sep="\n")

    outcome = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    scores = trainer.evaluate()
    trainer.save_state()

    if is_first:
        wall_time = outcome.metrics["train_runtime"]
        record = build_record(trainer, data, model_arguments, scores, wall_time, pretraining.metadata())
        write_record(record, training_arguments.output_dir)
        write_training_card(trainer, record)
    trainer.save_model()
    if is_first:
        print(result_message(record, training_arguments.output_dir))
    if training_arguments.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
