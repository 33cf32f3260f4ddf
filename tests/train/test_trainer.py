import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmpeft_fast import LoRA, add_peft, fuse, make_method
from mmpeft_fast.atomic import exclusive
from mmpeft_fast.data import HOST_HINTS, IGNORE_INDEX, SharedContextCollator
from mmpeft_fast.train import TrainConfig, seed_everything, train
from mmpeft_fast.train.log import LOG
from mmpeft_fast.train.state import PARAMETERS, _digest

CONFIG = TrainConfig(learning_rate=1e-2, global_batch_size=4, batch_size=2, max_steps=6, save_every=2, warmup_ratio=0.0)


@pytest.fixture
def run(make_model, samples, collator, tmp_path):
    """Train a new model on the CPU and return it with the result; the output folder is tmp_path / "out"."""

    def run(config=CONFIG, *, dropout=0.0, dtype=torch.float32, **options):
        model = options.pop("model", None) or make_model(dropout).to(dtype)
        options = {"output": tmp_path / "out", "progress": False, "cpu": True, "collator": collator, **options}
        return model, train(model, config, options.pop("dataset", samples), options.pop("collator"), **options)

    return run


def rows(output):
    return [json.loads(line) for line in (output / LOG).read_text().splitlines()]


def test_resume_is_bit_exact(run, tmp_path):
    whole, full = run(dropout=0.3, output=None)
    assert len(full.losses) == 6 and full.losses[-1] < full.losses[0]
    interrupting = replace(CONFIG, keep_checkpoints=9)
    run(interrupting, dropout=0.3)
    for step in (4, 6):  # as if the run had been killed in step 4, after its row was logged
        for file in (tmp_path / "out" / f"checkpoint-00000{step}").iterdir():
            file.unlink()
        file.parent.rmdir()
    resumed, rest = run(interrupting, dropout=0.3, resume=True)
    assert rest.losses == full.losses[2:]
    assert (rest.steps, rest.tokens, rest.supervised_tokens) == (6, full.tokens, full.supervised_tokens)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows(tmp_path / "out")] == full.losses


def test_token_budgets_change_no_step(run, samples, collator):
    by_samples = run(replace(CONFIG, batch_size=4), dtype=torch.float64, output=None)[1]
    for how in (collator, SharedContextCollator(collator.processor)):
        budget = 2 * max(size.length for size in how.packing(samples, 1).sizes)
        packed = run(replace(CONFIG, tokens_per_batch=budget), dtype=torch.float64, output=None, collator=how)[1]
        assert packed.losses == pytest.approx(by_samples.losses, rel=1e-6)
        assert packed.supervised_tokens == by_samples.supervised_tokens


def test_runs_with_a_token_budget_resume_bit_for_bit(run, samples, collator, tmp_path):
    budget = 2 * max(size.length for size in collator.packing(samples, 1).sizes)
    config = replace(CONFIG, tokens_per_batch=budget, batch_size=3)
    whole, full = run(config, dropout=0.3, output=None)
    run(config, dropout=0.3)
    shutil.rmtree(tmp_path / "out" / "checkpoint-000006")
    resumed, rest = run(config, dropout=0.3, resume=True)
    assert rest.losses == full.losses[4:]
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=rf"tokens_per_batch {budget} \(now {budget + 1}\)"):
        run(replace(config, tokens_per_batch=budget + 1), resume=True)


def test_a_sample_beyond_the_token_budget(run, samples, tmp_path):
    with pytest.raises(ValueError, match=r"expected at most 8 tokens \(tokens_per_batch\), got \d+; raise it, or cut"):
        run(replace(CONFIG, tokens_per_batch=8))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected a collator that knows the samples' sizes, got function"):
        run(replace(CONFIG, tokens_per_batch=8), collator=lambda samples: samples)


def test_dropout_is_what_makes_resuming_hard(run):
    """Guards the test above: its runs do draw random numbers."""
    assert run(dropout=0.3, output=None)[1].losses != run(output=None)[1].losses


def test_accumulation_is_the_mean_over_all_supervised_tokens(run, make_model, samples, collator):
    one_step = replace(CONFIG, max_steps=1, max_grad_norm=1e9, global_batch_size=8)
    counts = [(collator([sample])["labels"][:, 1:] != IGNORE_INDEX).sum().item() for sample in samples]
    assert len(set(counts)) > 1
    losses, weights = [], []
    for batch_size in (8, 2, 1):
        model, result = run(replace(one_step, batch_size=batch_size), dtype=torch.float64, output=None)
        losses.append(torch.tensor(result.losses, dtype=torch.float64))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    for loss, weight in zip(losses[1:], weights[1:], strict=True):
        torch.testing.assert_close(loss.float(), losses[0].float())
        torch.testing.assert_close(weight, weights[0], atol=1e-2 * torch.finfo(torch.float32).eps, rtol=0)

    model, batch = make_model().double(), collator(samples)
    batch = {name: value for name, value in batch.items() if name not in HOST_HINTS}
    expected = model(**batch).loss.detach()
    torch.testing.assert_close(losses[0].float(), expected.float().reshape(1))


def test_fused_and_eager_models_take_the_same_steps(run, make_model):
    losses = []
    for fused in (False, True):
        model = add_peft(make_model().double(), LoRA(r=4, alpha=8, dropout=0.0), train_connector=True)
        seed_everything(1)  # LoRA's up starts at zero: move it, so that its gradients matter from the first step
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        _, result = run(model=fuse(model) if fused else model, output=None)
        losses.append(torch.tensor(result.losses))
    torch.testing.assert_close(*losses)


def test_rows_are_complete_and_finite(run, tmp_path):
    _, result = run(replace(CONFIG, log_every=4))
    logged = rows(tmp_path / "out")
    assert [row["step"] for row in logged] == [4, 6]
    fields = ["step", "loss", "lr", "grad_norm", "tokens_per_s", "supervised_tokens", "peak_mib", "elapsed_s", "data_s"]
    for row in logged:
        assert list(row) == fields
        assert all(row[name] > 0 for name in fields)
    assert logged[1]["loss"] == result.losses[5]


def test_checkpoints_are_kept_up_to_the_limit(run, tmp_path):
    _, result = run(replace(CONFIG, max_steps=5, keep_checkpoints=2))
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == ["checkpoint-000004", "checkpoint-000005"]
    assert result.checkpoint.name == folders[-1]
    assert (result.checkpoint / PARAMETERS).is_file()


def test_only_trainable_parameters_change_and_are_saved(run, make_model, tmp_path):
    from safetensors.torch import load_file

    model = make_model().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    _, result = run(replace(CONFIG, connector_learning_rate=1e-2), model=model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    saved = load_file(result.checkpoint / PARAMETERS)
    assert changed == saved.keys() == {name for name in before if "multi_modal_projector" in name}
    for name, value in saved.items():
        assert torch.equal(value, model.get_parameter(name))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_asked_for_end_saves_after_the_step_and_resumes(run, collator, tmp_path, number):
    _, full = run(output=None)
    calls = []

    def interrupting(batch):
        calls.append(batch)
        if len(calls) == 7:  # the batch after step 3 is collated while that step runs
            os.kill(os.getpid(), number)
        return collator(batch)

    interrupting.settings = collator.settings  # the same collator otherwise, so the same run
    before = signal.getsignal(number)
    _, result = run(collator=interrupting)
    assert signal.getsignal(number) is before
    assert (result.interrupted, result.steps, result.checkpoint.name) == (True, 3, "checkpoint-000003")
    _, rest = run(resume=True)
    assert not rest.interrupted
    assert result.losses + rest.losses == full.losses


def test_second_interrupt_stops_at_once(run, collator, tmp_path):
    def interrupting(batch):
        os.kill(os.getpid(), signal.SIGINT)
        return collator(batch)

    with pytest.raises(KeyboardInterrupt):
        run(collator=interrupting)


def test_non_finite_loss_stops_before_it_is_applied(run, make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    before = model.model.multi_modal_projector.linear_1.weight.clone()
    with pytest.raises(FloatingPointError, match="step 1: expected a finite loss, got nan"):
        run(model=model)
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, before)


def test_outputs_are_not_overwritten(run, tmp_path):
    run(replace(CONFIG, max_steps=1))
    with pytest.raises(ValueError, match="expected a folder without a run; resume the one it holds"):
        run()
    with pytest.raises(ValueError, match="resume: expected an output folder"):
        run(output=None, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder for the output, got a file"):
        run(output=tmp_path / "file")


def test_resume_refuses_other_settings_and_damaged_checkpoints(run, make_model, tmp_path, samples):
    _, result = run(replace(CONFIG, max_steps=2))
    with pytest.raises(ValueError, match=r"settings the run began with: learning_rate 0\.01 \(now 0\.02\)"):
        run(replace(CONFIG, max_steps=2, learning_rate=2e-2), resume=True)
    with pytest.raises(ValueError, match=r"num_samples 8 \(now 7\)"):
        run(replace(CONFIG, max_steps=2), dataset=samples[:7], resume=True)
    frozen = make_model()
    frozen.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model\.trained_values \d+ \(now \d+\), model\.weights '\w+' \(now '\w+'\)$"):
        run(replace(CONFIG, max_steps=2), model=frozen, resume=True)
    with pytest.raises(
        ValueError, match=r"model\.dtype \['float32'\] \(now \['float64'\]\), model\.modules '\w+' \(now '\w+'\)$"
    ):
        run(replace(CONFIG, max_steps=2), dtype=torch.float64, resume=True)
    weights = result.checkpoint / PARAMETERS
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="expected a readable checkpoint"):
        run(replace(CONFIG, max_steps=2), resume=True)
    (result.checkpoint / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json cannot be read"):
        run(replace(CONFIG, max_steps=2), resume=True)


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.pt", "state.json"])
def test_one_changed_byte_of_a_checkpoint_is_found(run, tmp_path, file):
    _, result = run(replace(CONFIG, max_steps=2))
    content = bytearray((result.checkpoint / file).read_bytes())
    digit = next(place for place in range(len(content) // 2, len(content)) if chr(content[place]) in "123456789")
    content[digit] -= 1
    (result.checkpoint / file).write_bytes(content)
    with pytest.raises(ValueError, match="has changed since it was written"):
        run(replace(CONFIG, max_steps=2), resume=True)


@pytest.mark.parametrize("step", [-5, 10**9, 1, "2", None])
def test_a_position_that_no_run_reaches_is_refused(run, tmp_path, step):
    """Even where the digest is right, as if a program had written it."""
    _, result = run(replace(CONFIG, max_steps=2))
    path = result.checkpoint / "state.json"
    state = json.loads(path.read_text())
    state["position"]["step"] = step
    state["digest"] = _digest(state)
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"expected the (position|step) of"):
        run(replace(CONFIG, max_steps=2), resume=True)


def test_a_damaged_log_row_is_named(run, tmp_path):
    run(replace(CONFIG, max_steps=2))
    log = tmp_path / "out" / LOG
    log.write_text(log.read_text().replace('"step": 1', '"step": null'))
    with pytest.raises(ValueError, match=r"train_log\.jsonl line 1: step: expected an integer of at least 1, got None"):
        run(replace(CONFIG, max_steps=2), resume=True)


def test_leftovers_and_older_checkpoints_go_with_the_next_run(run, tmp_path):
    run(replace(CONFIG, max_steps=5, keep_checkpoints=9))
    for name in (".checkpoint-000009.abcdefgh", ".result.json.abcdefgh", ".adapter.old", ".mine.abcdefgh"):
        (tmp_path / "out" / name).mkdir()
    (tmp_path / "out" / "adapter").mkdir()
    run(replace(CONFIG, max_steps=5, keep_checkpoints=2), resume=True)
    names = {"checkpoint-000004", "checkpoint-000005", LOG, ".mine.abcdefgh", "adapter"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_two_runs_in_one_folder_are_kept_apart(run, tmp_path):
    """Another process holds the lock; when it is killed, its lock is gone, whatever file it left."""
    run(replace(CONFIG, max_steps=2))
    code = "import sys, time, pathlib; from mmpeft_fast.atomic import exclusive\n"
    code += "with exclusive(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        before = (tmp_path / "out" / LOG).read_bytes()
        with pytest.raises(ValueError, match=f"expected no other run at work in it, process {other.pid} is"):
            run(replace(CONFIG, max_steps=2), resume=True)
        assert (tmp_path / "out" / LOG).read_bytes() == before
        other.kill()
    assert (tmp_path / "out" / ".lock").exists()
    run(replace(CONFIG, max_steps=2), resume=True)
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_forked_worker_does_not_hold_its_parents_lock(tmp_path):
    with exclusive(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
    try:
        with exclusive(tmp_path):
            pass
    finally:
        child.kill()
        child.join()


def test_a_full_disk_loses_nothing_that_was_saved(run, tmp_path):
    """A bound on the size of files stands for it: the system refuses to write on in the same way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    _, result = run(replace(CONFIG, max_steps=1))
    size = (result.checkpoint / PARAMETERS).stat().st_size  # the optimizer's file is twice as large
    for file in (PARAMETERS, "optimizer.pt"):
        with pytest.raises(OSError, match=r"cannot be written .*; what was saved before is whole") as caught:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2 if file == PARAMETERS else size, limits[1]))
            try:
                run(replace(CONFIG, max_steps=6), output=tmp_path / file)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename.endswith(file)
        assert [path.name for path in (tmp_path / file).iterdir()] == [LOG]


@pytest.mark.parametrize("name", [LOG, "checkpoint-000001"])
def test_what_stands_in_the_way_is_found_before(run, tmp_path, name):
    (tmp_path / "out").mkdir()
    if name == LOG:
        (tmp_path / "out" / name).mkdir()
    else:
        (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name}: expected a|expected a folder without a run"):
        run(resume=name == LOG)
    with pytest.raises(ValueError, match="got the root of the file system"):
        run(output="/")
    with pytest.raises(ValueError, match="expected a folder for the output, got a file"):
        run(output=Path(__file__) / "below")


def test_a_log_line_cut_short_is_dropped_on_resume(run, tmp_path):
    run(replace(CONFIG, max_steps=2))
    log = tmp_path / "out" / LOG
    whole = log.read_text()
    log.write_text(whole + '{"step": 3, "lo')
    run(replace(CONFIG, max_steps=2), resume=True)
    assert log.read_text() == whole


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_data_is_one_sentence_and_leaves_nothing(run, samples, tmp_path, num_workers):
    (tmp_path / "bad.png").write_text("no image")
    bad = [
        replace(sample, image=tmp_path / "bad.png", source=f"data.json entry {i}") for i, sample in enumerate(samples)
    ]
    with pytest.raises(ValueError, match=r"^data\.json entry \d: expected a readable image") as caught:
        run(replace(CONFIG, num_workers=num_workers), dataset=bad)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not multiprocessing.active_children()  # though the error is kept


def test_trackers(run, tmp_path):
    with pytest.raises(ValueError, match=r"tracker: expected none or one of .*tensorboard.* got 'tensorbored'"):
        run(replace(CONFIG, tracker="tensorbored"))
    with pytest.raises(ValueError, match="tracker: expected an output folder for 'tensorboard'"):
        run(replace(CONFIG, tracker="tensorboard"), output=None)
    assert not (tmp_path / "out").exists()
    run(replace(CONFIG, tracker="tensorboard", max_steps=1))
    assert list((tmp_path / "out" / "tracking").rglob("events.out.tfevents.*"))


def test_gradient_checkpointing_changes_no_number(run):
    checkpointing = replace(CONFIG, gradient_checkpointing=True, max_steps=2)
    assert run(checkpointing, output=None)[1].losses == run(replace(CONFIG, max_steps=2), output=None)[1].losses


def test_after_each_step_the_caller_may_look(make_model, samples, collator):
    model, steps = add_peft(make_model(), make_method("ia3")), []

    def look(step):
        steps.append((step, model.training))

    config = TrainConfig(learning_rate=1e-3, global_batch_size=4, batch_size=4, max_steps=3)
    result = train(model, config, samples, collator, progress=False, cpu=True, after_step=look)
    assert steps == [(1, True), (2, True), (3, True)] and result.steps == 3
