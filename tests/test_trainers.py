"""Fused models inside transformers' Trainer and TRL's SFTTrainer and DPOTrainer: the same training as unfused ones."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from mmpeft_fast import FuseCallback, LoRA, add_peft, fuse, fuse_report, is_fused
from tests.tiny_models import randomize_trainable, tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*use_cpu.*")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": r".*layers.*\.(o|up|down)_proj"}


def samples(family, count=8):
    batches = [tiny_batch(family, batch_size=2, seed=seed) for seed in range(count // 2)]
    return [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(2)]


def arguments(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "seed": 0, "dataloader_pin_memory": False, "remove_unused_columns": False,
    }  # fmt: skip
    return TrainingArguments(**defaults | options)


def trained_values(model):
    values = [parameter.detach().float().flatten() for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat(values)


def losses_of(trainer):
    return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])


def assert_same_training(run):
    """run(how) trains and returns the trainer; the parameters end up where the unfused ones do, and have moved."""
    trainers = {how: run(how) for how in ("unfused", "before", "callback")}
    losses = {how: losses_of(trainer) for how, trainer in trainers.items()}
    assert len(losses["unfused"]) >= 4 and losses["unfused"][0] != losses["unfused"][-1]
    for how in ("before", "callback"):
        assert is_fused(trainers[how].model) and not is_fused(trainers["unfused"].model)
        torch.testing.assert_close(losses[how], losses["unfused"], rtol=2e-4, atol=2e-4)
    return trainers


def lora_model(family, how):
    model = get_peft_model(tiny_model(family), LoraConfig(**LORA))
    randomize_trainable(model)
    return fuse(model) if how == "before" else model


@pytest.mark.parametrize("family", ["llava", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_grad_norm": 0.5},
    ],
    ids=["plain", "accumulating and checkpointing"],
)
def test_trainer(family, options, tmp_path):
    def run(how):
        trainer = Trainer(
            lora_model(family, how),
            arguments(tmp_path, **options),
            train_dataset=samples(family),
            eval_dataset=samples(family, 4),
            callbacks=[FuseCallback(strict=True)] if how == "callback" else None,
        )
        trainer.train()
        return trainer

    trainers = assert_same_training(run)
    evaluated = {how: trainer.evaluate()["eval_loss"] for how, trainer in trainers.items()}
    assert evaluated["callback"] == pytest.approx(evaluated["unfused"], rel=1e-3)
    others = ["past_key_values", "image_hidden_states"]
    logits = {
        how: torch.as_tensor(trainer.predict(samples(family, 4), ignore_keys=others).predictions)
        for how, trainer in trainers.items()
    }
    torch.testing.assert_close(logits["callback"], logits["unfused"], rtol=1e-2, atol=1e-2)


def test_trainer_in_mixed_precision(tmp_path):
    def run(how):
        trainer = Trainer(
            lora_model("llava", how),
            arguments(tmp_path, bf16=True),
            train_dataset=samples("llava"),
            callbacks=[FuseCallback()] if how == "callback" else None,
        )
        trainer.train()
        return trainer

    fused = trained_values(run("callback").model)
    eager = trained_values(run("unfused").model)
    begin = trained_values(lora_model("llava", "unfused"))
    assert torch.linalg.vector_norm(fused - eager) < 0.1 * torch.linalg.vector_norm(eager - begin)


def test_trainer_saves_and_resumes(tmp_path):
    def trainer(steps):
        return Trainer(
            lora_model("llava", "before"),
            arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"),
            train_dataset=samples("llava"),
        )

    whole = trainer(4)
    whole.train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(trained_values(resumed.model), trained_values(whole.model))


def test_the_packages_own_methods_in_trainer(tmp_path):
    def run(how):
        model = add_peft(tiny_model("llava"), LoRA(r=4, alpha=8, dropout=0.0))
        randomize_trainable(model)
        trainer = Trainer(
            fuse(model) if how == "before" else model,
            arguments(tmp_path),
            train_dataset=samples("llava"),
            callbacks=[FuseCallback()] if how == "callback" else None,
        )
        trainer.train()
        return trainer

    assert_same_training(run)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 60)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("peft_config", [LoraConfig(**LORA), PrefixTuningConfig(num_virtual_tokens=4)])
def test_trl(peft_config, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(30, 60, (12 + i,), generator=generator).tolist() for i in range(8)]
    data = datasets.Dataset.from_list(
        [{"input_ids": row, "completion_mask": [0] * 6 + [1] * (len(row) - 6)} for row in rows]
    )

    def run(how):
        model = tiny_model("llama")
        peft_config.task_type = "CAUSAL_LM"
        if how == "before":
            set_seed(42)  # as the trainer does before it makes its adapters
            model = fuse(get_peft_model(model, peft_config))
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, use_cpu=True,
                report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, bf16=False,
                gradient_checkpointing=False, dataloader_pin_memory=False,
            ),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=None if how == "before" else peft_config,
            callbacks=[FuseCallback(strict=True)] if how == "callback" else None,
        )  # fmt: skip
        trainer.train()
        return trainer

    assert_same_training(run)


def test_trl_preferences(tmp_path):
    """Two answers to one prompt in TRL's DPOTrainer; the reference is the model with its adapter off."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    generator = torch.Generator().manual_seed(0)

    def words(count):
        return " ".join(f"w{i}" for i in torch.randint(30, 60, (count,), generator=generator).tolist())

    data = datasets.Dataset.from_list(
        [{"prompt": words(40 + i), "chosen": " " + words(5), "rejected": " " + words(3 + i)} for i in range(4)]
    )

    def run(how):
        trainer = trl.DPOTrainer(
            tiny_model("llama"),
            args=trl.DPOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, use_cpu=True,
                report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, bf16=False,
                gradient_checkpointing=False, dataloader_pin_memory=False,
            ),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
            callbacks=[FuseCallback(share_contexts=True)] if how == "callback" else None,
        )  # fmt: skip
        trainer.train()
        return trainer

    plain, fused = run("unfused"), run("callback")
    torch.testing.assert_close(losses_of(fused), losses_of(plain), rtol=1e-4, atol=1e-6)
    assert fuse_report(fused.model).contexts.startswith("in 8 calls of 8")  # each step's, and the reference's
