# SPDX-License-Identifier: Apache-2.0
"""What is timed does what it says, and the numbers are those of the times. No time is asserted."""

import copy
import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import load_script
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.comparison import Comparison
from benchmarks.data import OURS, DataBenchmark, find_photos, make_photos
from benchmarks.finetuning import STOCK, FinetuneBenchmark, normalized
from benchmarks.kernels import IDLE, device_kernels, group_of, summarize_kernels
from benchmarks.loading import in_process_ways, load_ways, save_models
from benchmarks.memory import memory_in_this_process
from benchmarks.models import ACCELERATED, ModelBenchmark
from benchmarks.peers import build_peers, check_equal, random_batch
from benchmarks.prediction import PredictionBenchmark, fresh_model
from benchmarks.processor import FAST, THEIRS, differences, processor_ways, resizing_alone, times_faster, to_time
from benchmarks.soak import commands, summarize_samples, watch
from benchmarks.timing import format_table, summarize, time_in_turns
from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.prediction.arguments import parse_arguments as parse_prediction
from modeling_vit_scratch.training.command_line import parse_arguments as parse_finetuning


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    return make_photos(tmp_path / "photos", (160, 120), 3)


def test_photos_are_the_same_for_everybody_and_as_large_as_they_should_be(photos, tmp_path):
    again = make_photos(tmp_path, (160, 120), 3)
    for first, second in zip(photos, again):
        assert first.read_bytes() == second.read_bytes()
        with Image.open(first) as image:
            assert (image.size, image.mode, image.format) == ((160, 120), "RGB", "JPEG")
            assert np.asarray(image).std() > 20
    assert photos[0].read_bytes() != photos[1].read_bytes()


def test_all_ways_make_what_they_are_compared_for(photos):
    ways = DataBenchmark(photos, image_size=32).ways()
    batches = {name: way() for name, way in ways.items()}
    assert all((batch.shape, batch.dtype) == ((3, 3, 32, 32), torch.float32) for batch in batches.values())
    exact, part, resized, again, processed = (batch for name, batch in batches.items() if name != OURS)
    assert torch.allclose(exact, part, atol=1e-6)  # the same part of the same photo, normalised by transformers
    assert torch.equal(resized, again)
    assert torch.allclose(resized, processed, atol=1e-6)
    assert not torch.allclose(exact, resized, atol=0.1)
    levels = DataBenchmark(photos, image_size=32).difference()
    difference = 127.5 * (batches[OURS] - exact).abs()
    assert 0 < levels["mean"] == pytest.approx(difference.mean().item(), abs=1e-4)
    assert levels["maximum"] == pytest.approx(difference.max().item(), abs=1e-4)


def test_ways_take_turns():
    order = []
    seconds = time_in_turns({name: lambda name=name: order.append(name) for name in "abc"}, rounds=4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_are_those_of_the_same_round():
    # A machine that gets slower by the round: the ratio stays, although the medians are of different rounds.
    seconds = {"ours": [1.0, 2.0, 4.0, 8.0, 16.0], "theirs": [3.0, 6.0, 12.0, 24.0, 64.0]}
    summary = summarize(seconds, items=8, ours="ours")
    assert summary["theirs"]["times_faster"] == 3.0
    assert summary["theirs"]["times_faster_quartiles"] == [3.0, 3.0]
    assert summary["ours"]["times_faster"] == 1.0
    assert summary["theirs"]["milliseconds_per_image"] == 1500.0
    assert summary["theirs"]["images_per_second"] == pytest.approx(8 / 12)
    assert "3.00 (3.00 to 3.00)" in format_table("title", summary)


def test_the_script_writes_what_it_shows(photos, tmp_path, monkeypatch, capsys):
    script, out = load_script("benchmark"), tmp_path / "out"
    more = ["--image_size", "16", "--count", "2", "--rounds", "2", "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "data", "--train_dir", str(photos[0].parent), *more])
    threads = torch.get_num_threads()
    script.main()
    torch.set_num_threads(threads)
    shown, record = capsys.readouterr().out, json.loads((out / "data.json").read_text())
    assert "--count 2 --rounds 2" in record["machine"]["command"]
    assert {"torch", "pillow", "transformers", "libjpeg-turbo"} < set(record["machine"]["versions"])
    (measured,) = record["sets"].values()
    assert measured["photos"] == 2
    for name, row in measured["summary"].items():
        assert f"{name:46} {row['milliseconds_per_image']:10.2f}" in shown
        assert len(measured["seconds"][name]) == 2
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in it"):
        find_photos(str(empty), 1)


def test_prediction_is_measured_on_a_whole_run_and_its_scores_are_compared(photos, tmp_path, monkeypatch, capsys):
    model = PredictionBenchmark(fresh_model("test/4", tmp_path / "model"), photos, 0, str(tmp_path))
    theirs, ours = (model.ways()[name]() for name in ("pipeline, photo after photo", "ours with --no_fast_decode"))
    with open(ours, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [one[0]["label"] for one in theirs]
    assert [float(row["score"]) for row in rows] == pytest.approx([one[0]["score"] for one in theirs], abs=1e-5)
    script, out = load_script("benchmark"), tmp_path / "out"
    more = ["--variant", "test/4", "--rounds", "2", "--num_workers", "1", "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "prediction", "--train_dir", str(photos[0].parent), *more])
    script.main()
    shown, record = capsys.readouterr().out, json.loads((out / "prediction.json").read_text())
    (measured,) = record["sets"].values()
    assert measured["photos"] == 3
    assert 0 < measured["difference_in_scores"]["mean"] <= measured["difference_in_scores"]["maximum"] < 0.1
    assert f"{measured['difference_in_scores']['other_label']} of 3 photos get another label" in shown


def test_both_fine_tune_the_same_network_on_the_same_pixels(tmp_path):
    (tmp_path / "photos").mkdir()
    photos = make_photos(tmp_path / "photos", (160, 120), 8)
    benchmark = FinetuneBenchmark(photos, tmp_path / "run", "Mi/8", batch_size=2, steps=3, num_workers=0, image_size=32)
    ours, stock = benchmark.our_trainer("--fast_decode", "False"), benchmark.stock_trainer()
    batch = ours.prepare_batch(ours.data_collator([ours.train_dataset[index] for index in range(4)]))
    for index in range(4):  # the same random part
        with Image.open(ours.train_dataset.examples.name(index)) as photo:
            part = ours.train_dataset.augmentation(photo.convert("RGB"), np.random.default_rng((42, 0, index)))
        assert torch.allclose(batch["pixel_values"][index], normalized(part), atol=1e-6)
    theirs = stock.data_collator(stock.train_dataset.__getitems__([0, 1, 2, 3]))
    assert torch.equal(theirs["labels"], batch["labels"])
    assert (theirs["pixel_values"].shape, theirs["pixel_values"].dtype) == ((4, 3, 32, 32), torch.float32)
    settings = ("max_steps", "per_device_train_batch_size", "dataloader_num_workers", "bf16", "optim", "max_grad_norm")
    assert [getattr(ours.args, name) for name in settings] == [getattr(stock.args, name) for name in settings]
    with torch.no_grad():
        logits = [trainer.model.eval()(batch["pixel_values"]).logits for trainer in (ours, stock)]
    assert torch.allclose(*logits, atol=1e-4)
    for name in (OURS, STOCK):
        trainer = benchmark.ways()[name]()
        assert (trainer.state.global_step, trainer._train_batch_size) == (3, 2)


def test_the_script_tells_how_long_fine_tuning_takes(photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    photos += [file.with_stem(f"{file.stem}_again") for file in photos]
    for file, again in zip(photos[:3], photos[3:]):
        again.write_bytes(file.read_bytes())
    argv = ["benchmark.py", "finetune", "--train_dir", str(photos[0].parent), "--rounds", "1", "--steps", "1"]
    argv += ["--batch_size", "2", "--num_workers", "0", "--variant", "Mi/16", "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    load_script("benchmark").main()
    record, shown = json.loads((out / "finetune.json").read_text()), capsys.readouterr().out
    (measured,) = record["sets"].values()
    assert measured["summary"][STOCK]["images_per_second"] == pytest.approx(2 / measured["seconds"][STOCK][0])
    assert f"{STOCK:46} {measured['summary'][STOCK]['milliseconds_per_image']:10.2f}" in shown


def test_mistakes_are_told(monkeypatch, capsys):
    for flag, value in (("--rounds", "0"), ("--smallest_area", "2")):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "data", flag, value])
        with pytest.raises(SystemExit):
            load_script("benchmark").main()
        assert f"{flag} {value} must be" in capsys.readouterr().err


def test_peers_have_our_weights_or_a_reason(tmp_path):
    config = ViTScratchConfig.from_variant("Mi/8", image_size=16, num_labels=5, zero_init_head=False)
    ours = ViTScratchForImageClassification(config).eval()
    models, missing = build_peers(ours, str(tmp_path))
    assert "transformers" in models
    assert sorted([*models, *missing]) == ["timm", "torchvision", "transformers", "vit-pytorch"]
    assert all(missing.values())
    theirs = models["transformers"]
    assert type(theirs).__module__.startswith("transformers.models.vit.")
    with torch.no_grad():
        theirs.classifier.weight[0] *= 1.01
    with pytest.raises(RuntimeError, match="transformers does not compute what ours does: logits differ by"):
        check_equal("transformers", ours, theirs)


def test_everybody_takes_the_same_steps_and_all_of_a_network_is_counted():
    benchmark = ModelBenchmark("training", "Mi/8", 32, num_labels=5)
    models, _ = benchmark.models()
    models = {name: model for name, model in models.items() if name in (OURS, ACCELERATED, "transformers")}
    before = copy.deepcopy(models[OURS].state_dict())
    losses = {name: [way().item() for _ in range(3)] for name, way in benchmark.ways(models, 4).items()}
    assert losses[OURS] == pytest.approx(losses["transformers"], rel=1e-4)
    assert losses[OURS] == pytest.approx(losses[ACCELERATED], rel=1e-4)
    assert losses[OURS][2] < losses[OURS][0]
    assert all(torch.equal(before[name], weight) for name, weight in models[OURS].state_dict().items())
    ours = models[OURS].eval()
    ours.set_attn_implementation("eager")  # the counter does not know the fused one of CPUs
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ours(random_batch(ours, 2, "cpu")[0], output_hidden_states=True)  # with all tokens of the last layer
    assert counter.get_total_flops() == 2 * ModelBenchmark("inference", "Mi/8", 32, num_labels=5).operations()
    assert benchmark.operations() == 3 * counter.get_total_flops() / 2
    half = ModelBenchmark("inference", "Mi/8", 32, "bfloat16", num_labels=5)
    assert {way().dtype for way in half.ways(half.models()[0], 2).values()} == {torch.bfloat16}


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_memory_holds_what_the_backward_pass_needs():
    threads = torch.get_num_threads()
    found = memory_in_this_process(ModelBenchmark("training", "Mi/8", 64), OURS, 64, threads)
    tokens, layers, width = 64 * 65, 6, 96
    inputs_of_products = tokens * layers * (width + 3 * width + width + width + 2 * width + 2 * width)
    assert 4 * inputs_of_products < found < 40 * inputs_of_products


def test_the_script_compares_models_and_draws(tmp_path, monkeypatch, capsys):
    script, out = load_script("benchmark"), tmp_path / "out"
    more = ["--variant", "Mi/8", "--image_size", "16", "--rounds", "2", "--batch_size", "1", "3", "--no_memory"]
    more += ["--profile", "--steps", "2", "--peers", "transformers", "timm"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "inference", *more, "--output_dir", str(out)])
    script.main()
    shown, record = capsys.readouterr().out, json.loads((out / "inference.json").read_text())
    assert list(record["batches"]) == ["1", "3"]
    for batch in record["batches"].values():
        for name, row in batch["summary"].items():
            assert f"{name:46} {row['milliseconds_per_image']:10.2f}" in shown
            share = (
                row["images_per_second"] * record["operations_per_image"] / max(record["peak_operations_per_second"])
            )
            assert row["share_of_peak"] == pytest.approx(share)
    profiles = record["batches"]["3"]["profiles"]
    assert next(iter(profiles)) == OURS
    assert all(sum(one["groups"].values()) == pytest.approx(one["milliseconds"]) for one in profiles.values())
    assert f"{profiles[OURS]['groups']['matrix products']:.3f}" in shown
    assert record["steps"] == 2
    for name, reason in record["missing"].items():
        assert f"not measured: {name} ({reason})" in shown
    with Image.open(out / "inference.png") as picture:
        assert picture.size[0] > 800
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "training", "--variant", "S/17", "--output_dir", str(out)])
    with pytest.raises(InputError, match="S/17"):
        script.main()


def test_who_fails_is_told_of_and_the_others_are_measured(monkeypatch, capsys):
    benchmark = ModelBenchmark("inference", "Mi/8", 16, num_labels=5, peers=("transformers", "vit-pytorch"))
    models, _ = benchmark.models()
    broken = copy.deepcopy(models[OURS])
    broken.vit.forward = lambda *_, **__: (_ for _ in ()).throw(ValueError("out of memory\nand more"))
    models = {**models, "timm": broken}
    monkeypatch.setattr(ModelBenchmark, "models", lambda self: (models, {}))
    written = []
    record = Comparison(benchmark, 2, 3, write=lambda record: written.append(json.dumps(record))).run([2])
    assert record["missing"] == {"timm": "ValueError: out of memory"}
    assert "batch 2: timm fails: ValueError: out of memory" in capsys.readouterr().out
    batch = record["batches"]["2"]
    assert set(batch["summary"]) == set(models) - {"timm"}
    for name, row in batch["summary"].items():  # a block has three steps of two images
        assert row["images_per_second"] == pytest.approx(6 / np.median(batch["seconds"][name]))
    assert json.loads(written[0])["batches"]["2"]["summary"][OURS]["rounds"] == 1  # there after the first round
    assert json.loads(written[-1]) == record
    models[OURS].vit.forward = broken.vit.forward
    with pytest.raises(ValueError, match="out of memory"):
        Comparison(benchmark, 2).run([2])


def test_peers_that_are_not_asked_for_are_not_built(tmp_path, monkeypatch):
    config = ViTScratchConfig.from_variant("Mi/8", image_size=16, num_labels=5, zero_init_head=False)
    ours = ViTScratchForImageClassification(config).eval()
    models, missing = build_peers(ours, str(tmp_path), ["transformers"])
    assert [*models, *missing] == ["transformers"]
    monkeypatch.setattr("benchmarks.peers.TOLERANCE", -1.0)
    models, missing = build_peers(ours, str(tmp_path), ["transformers"])
    assert not models
    assert "transformers does not compute what ours does" in missing["transformers"]


def test_kernels_are_grouped_and_what_is_left_is_idle():
    names = {
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3": "attention",
        "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTT": "matrix products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "matrix products",
        "sm90_xmma_wgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "matrix products",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "triton_per_fused_add_native_layer_norm_native_layer_norm_backward_12": "layer norm",
        "triton_poi_fused_gelu_gelu_backward_view_7": "activation",
        "triton_poi_fused__to_copy_3": "copies and casts",
        "triton_poi_fused_cat_transpose_view_11": "copies and casts",
        "triton_poi_fused__scaled_dot_product_flash_attention_backward_stack_5": "copies and casts",
        "triton_poi_fused__to_copy_add_cat_1": "other elementwise and sums",
        "triton_red_fused__to_copy_sum_view_9": "other elementwise and sums",
        "Memcpy HtoD (Pinned -> Device)": "copies and casts",
        "aten::addmm": "matrix products",
        "aten::native_layer_norm": "layer norm",
    }
    assert {name: group_of(name) for name in names} == names
    trace = [
        {"cat": "kernel", "name": "gemm", "ts": 10.0, "dur": 4000.0},
        {"cat": "gpu_user_annotation", "name": "Optimizer.step#AdamW.step", "ts": 10.0, "dur": 99000.0},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 90000.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 5010.0, "dur": 1000.0},
        {"cat": "kernel", "name": "gemm", "ts": 7010.0, "dur": 3000.0},
        {"ph": "M", "name": "process_name"},
    ]
    found = summarize_kernels(*device_kernels(trace), steps=2)
    assert found["milliseconds"] == 5.0
    assert found["groups"] == {"matrix products": 3.5, IDLE: 1.0, "copies and casts": 0.5}
    assert found["kernels"][0] == {"name": "gemm", "group": "matrix products", "milliseconds": 3.5, "count": 1.0}
    with pytest.raises(RuntimeError, match="saw nothing"):
        summarize_kernels(*device_kernels([]), steps=2)


def test_processors_agree_before_they_are_timed(photos, tmp_path, monkeypatch, capsys):
    decoded = [Image.open(file).convert("RGB") for file in photos]
    by_kind = [processor_ways(images, 32) for images in (decoded, photos)]
    assert not any(way() for ways in by_kind for way in to_time(ways).values())  # nothing is kept
    values = [torch.cat(list(way())) for ways in by_kind for name, way in ways.items() if name != FAST]
    assert values[0].shape == (3, 3, 32, 32)
    assert all(torch.allclose(values[0], others, atol=1e-6) for others in values[1:])
    for ways, limit in zip(by_kind, (1, 12)):
        found = differences(ways)
        assert found["largest_difference"] < 1e-6
        assert 0 < found["fast_mean_levels"] < found["fast_largest_levels"] < limit + 0.01
    alone = {name: list(way()) for name, way in resizing_alone(decoded, 32).items()}
    assert len(alone) == 2
    for resized, exactly in zip(*alone.values()):
        assert resized.size == exactly.size == (32, 32)
        assert np.abs(np.int16(resized) - np.int16(exactly)).max() <= 1
    faster = times_faster({FAST: [1.0, 2.0, 4.0], OURS: [2.0, 4.0, 8.0], THEIRS: [3.0, 8.0, 20.0]})
    assert faster == {"fast_times_faster": 4.0, "fast_times_faster_quartiles": [3.5, 4.5]}
    more = ["--train_dir", str(photos[0].parent), "--image_size", "16", "--rounds", "2", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "processor", *more])
    threads = torch.get_num_threads()
    load_script("benchmark").main()
    torch.set_num_threads(threads)
    record, shown = json.loads((tmp_path / "processor.json").read_text()), capsys.readouterr().out
    assert [title.rpartition(", ")[2] for title in record["sets"]] == ["decoded", "JPEG files"]
    assert all(measured["largest_difference"] < 1e-6 for measured in record["sets"].values())
    assert "transformers, Pillow" in shown
    assert [len(measured["seconds"]) for measured in record["sets"].values()] == [5, 3]
    assert all(f"{measured['fast_times_faster']:.2f} times as fast" in shown for measured in record["sets"].values())


def test_both_libraries_load_the_same_weights(tmp_path):
    folders = save_models(tmp_path, "Mi/8")
    models = {name: way().eval() for name, way in in_process_ways(folders).items()}
    images, _ = random_batch(models[OURS], 2, "cpu")
    with torch.no_grad():
        logits = [model(images).logits for model in models.values()]
    assert torch.allclose(*logits, atol=1e-5)
    load_ways(folders)[OURS]()  # a process of its own
    with pytest.raises(RuntimeError, match="nowhere"):
        load_ways({OURS: tmp_path / "nowhere"})[OURS]()


def test_the_script_tells_how_long_models_take_to_load(tmp_path, monkeypatch, capsys):
    argv = ["benchmark.py", "loading", "--variant", "Mi/8", "--rounds", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr("subprocess.run", lambda *words, **more: SimpleNamespace(returncode=0))
    load_script("benchmark").main()
    record, shown = json.loads((tmp_path / "loading.json").read_text()), capsys.readouterr().out
    assert len(record["sets"]) == 3
    assert "ms / model" in shown


def test_long_runs_are_looked_at_with_all_their_processes_and_stopped(tmp_path):
    holds = "import os, time; held = [open(os.devnull) for _ in range(50)] + [bytes([7]) * 50_000_000]; os.fork()"
    lines = {"holds": [sys.executable, "-c", f"{holds}; time.sleep(60)"]}
    with open(tmp_path / "log", "w") as log:
        samples = watch(lines, 1.5, 0.5, log)["holds"]
    assert len(samples) == 3
    assert samples[-1]["processes"] == 2
    assert samples[-1]["open_files"] >= 2 * 53
    assert 50 < samples[-1]["megabytes"] < 95  # what both have counts once
    with open(tmp_path / "log", "w") as log, pytest.raises(RuntimeError, match="ends ended with exit status 3"):
        watch({"ends": [sys.executable, "-c", "raise SystemExit(3)"]}, 30, 0.5, log)


def test_the_quarters_of_a_long_run_show_what_grows():
    samples = [
        {"seconds": 10.0 * number, "processes": 3, "megabytes": 500.0 - 400 * (number < 12), "open_files": number}
        for number in range(93)
    ]
    summary = summarize_samples(samples)
    assert summary["megabytes"] == {"quarters": [500.0] * 4, "most": 500.0}  # without the start
    assert summary["open_files"] == {"quarters": [22.5, 42.5, 62.5, 82.5], "most": 92}


def test_a_soak_s_commands_are_known_to_their_scripts(photos, tmp_path):
    lines = commands(tmp_path / "scripts", [*photos, tmp_path / "photos" / "b" / "1.jpg"], "model", tmp_path, 2, 1)
    assert (tmp_path / "photos.txt").read_text().splitlines()[4] == str(photos[0])
    for name, parse in (("predict.py", parse_prediction), ("finetune.py", parse_finetuning)):
        line = lines[name]
        assert line[1] == str(tmp_path / "scripts" / name)
        parse(line[2:])


def test_programs_that_people_deploy_compute_our_logits():
    pytest.importorskip("openvino")
    for dtype, tolerance in (
        ("float32", {"OpenVINO": 1e-5, "OpenVINO, int8": 0.3, "ONNX Runtime": 1e-5}),
        ("bfloat16", {"OpenVINO": 0.03}),
    ):
        benchmark = ModelBenchmark("inference", "test/4", 16, dtype, num_labels=5, peers=("openvino", "onnxruntime"))
        models, missing = benchmark.models()
        assert set(tolerance) <= {*models, *missing}
        if dtype == "bfloat16":
            assert missing["ONNX Runtime"] == "it computes in float32 here, not in bfloat16"
        steps = benchmark.ways(models, 3)
        expected = steps[OURS]().float()
        for name, allowed in tolerance.items():
            if name in steps:
                assert (steps[name]().float() - expected).abs().max() < allowed * expected.abs().max()
