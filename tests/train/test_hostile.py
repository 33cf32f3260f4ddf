"""Generated hostile inputs: whatever comes in, the answer is one sentence or exactly what was asked for.

A case mutates something valid (settings, a command line, records, an image, an adapter, a checkpoint, a log, a model's
configuration) by a random generator of its own number. It passes where the code refuses with a ValueError or OSError
of one line, or accepts and then shows that nothing was silently changed. Any other exception is a traceback, more than
ten seconds of processor time a hang. The default run takes every seventh of the 1,000 cases, `--nightly` all.
"""

import contextlib
import copy
import io
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmpeft_fast import LoRA, add_peft, cli, fuse, load_peft, save_peft, unfuse
from mmpeft_fast.data import Collator, load_conversations
from mmpeft_fast.methods import METHODS, make_method
from mmpeft_fast.plan.request import Request, model_config
from mmpeft_fast.stored.slots import read_carried
from mmpeft_fast.train import TrainConfig, train
from mmpeft_fast.train.identity import weights_digest
from mmpeft_fast.train.log import _rows_through
from mmpeft_fast.train.state import OPTIMIZER, PARAMETERS, STATE, load_checkpoint, read_position
from tests.tiny_models import tiny_model

NUM_CASES, EVERY = 1000, 7
SECONDS = 10.0

DEEP = json.loads("[" * 300 + "]" * 300)
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 8, 64, 2**31, 2**63, -(2**63), 10**20, 10**400, 99999999999),
    *(0.0, -0.0, 0.5, 1.0, 1e-9, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), 0.9999999),
    *(
        "",
        "no",
        "yes",
        "true",
        "null",
        "1",
        "q",
        "attention",
        "both",
        "\0",
        "\ud800",
        "../x",
        "/",
        "é" * 40,
        "x" * 5000,
    ),
    *([], [1], ["q", "v"], ["q", "q"], [None], [["q"]], {}, {"a": 1}, {"q": None}, DEEP),
    *("(", "[", "(a+)+$", ".*", "*", "(?P<n>", "a{99999999999}", "(" * 3000, "(.*.*.*.*.*.*.*)*x", "\\"),
    *("nan", "gelu", "kaiming", "series", "fp32", "cpu", "LORA"),
)


class Hang(BaseException):
    """The case took too long."""


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def stop(number, frame):
        raise Hang(f"more than {SECONDS} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _refused(call: Callable[[], object]) -> bool:
    """Whether the call refuses with one line; anything but ValueError and OSError passes through."""
    try:
        call()
    except (ValueError, OSError) as error:
        assert str(error).strip()
        return True
    return False


def _mutated(value: object, rng: random.Random) -> object:
    """A copy of a JSON value with one to three places changed: replaced, dropped, doubled, renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holder, depth = value, rng.randint(0, 4)
        for _ in range(depth):
            inner = [each for each in (holder.values() if isinstance(holder, dict) else holder) if each]
            inner = [each for each in inner if isinstance(each, dict | list)]
            if not inner:
                break
            holder = rng.choice(inner)
        if not holder:
            continue
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        action = rng.choice(("replace", "replace", "replace", "drop", "double", "rename"))
        if action == "replace":
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif action == "drop":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[rng.choice(("unknown", "", "r", "x" * 300))] = holder[key] if action == "double" else holder.pop(key)
    return value


def _text(value: object, rng: random.Random) -> bytes:
    """JSON of a value, now and then damaged as text."""
    text = json.dumps(value).encode()
    if rng.random() < 0.3:
        text = _damaged(text, rng)
    if rng.random() < 0.05:
        text = b'{"a":' * 100_000
    return text


def _damaged(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        if not content:
            break
        place = rng.randrange(len(content))
        action = rng.choice(("flip", "flip", "cut", "insert", "zeros"))
        if action == "flip":
            content[place] ^= 1 << rng.randrange(8)
        elif action == "cut":
            del content[place : place + rng.randint(1, 64)]
        elif action == "insert":
            content[place:place] = rng.randbytes(rng.randint(1, 16))
        else:
            content[place : place + 32] = bytes(len(content[place : place + 32]))
    return bytes(content[: rng.randrange(len(content) + 1)]) if rng.random() < 0.1 else bytes(content)


def _value(plain: object, rng: random.Random) -> object:
    """Anything, or a value like the plain one."""
    if rng.random() < 0.5:
        return rng.choice(VALUES)
    if isinstance(plain, bool):
        return not plain
    if isinstance(plain, int | float):
        return type(plain)(rng.choice((1, 2, 4, 16, 0.5, 0.25)))
    return plain


# The kinds of input. Each takes the random generator and the test's tools, and asserts.


def settings(rng, tools):
    """A method's settings in Python: what is taken is what was given."""
    name = rng.choice(list(METHODS))
    known = asdict(make_method(name)) | {"unknown": 1}
    given = {key: _value(known[key], rng) for key in rng.sample(list(known), rng.randint(1, min(3, len(known))))}
    taken = []
    if not _refused(lambda: taken.append(make_method(name, **given))):
        for key, value in given.items():
            assert getattr(taken[0], key) is value
            plain = getattr(make_method(name), key)
            assert isinstance(value, bool) == isinstance(plain, bool)
        taken[0].place()


def configurations_of_runs(rng, tools):
    kind, known = rng.choice(((TrainConfig, {}), (Request, {"model": "llava-1.5-7b"})))
    fields = kind.__dataclass_fields__
    given = {name: _value(fields[name].default, rng) for name in rng.sample(list(fields), rng.randint(1, 3))}
    taken = []
    if not _refused(lambda: taken.append(kind(**known | given))):
        for key, value in given.items():
            assert getattr(taken[0], key) is value or (key, value) == ("images", None)


def command_lines(rng, tools):
    """Words of every sub-command. The data file of `train` is missing, so that no line of words trains."""
    command = rng.choice(("train", "train", "plan", "plan", "study", "doctor", "profile"))
    words = {
        "train": ["--model", "tiny-llava", "--method", "lora", "--set", "r=4", "--data", "nowhere.json", "--output"],
        "plan": ["--model", str(tools["config"]), "--device", "a100-80", "--batch-size", "2", "--seq-len", "128"],
        "study": ["--report-only", "--output"],
        "doctor": ["--json"],
        "profile": ["--model", "tiny-none", "--output"],
    }[command]
    words = [*words, str(tools["folder"] / "out")] if words[-1] == "--output" else list(words)
    for _ in range(rng.randint(1, 3)):
        value = rng.choice(VALUES)
        text = value if isinstance(value, str) else json.dumps(value)
        text = text if rng.random() < 0.5 else str(rng.choice((1, 2, 4, 0.5)))
        option = rng.choice(
            {
                "train": ("--set", "--batch-size", "--learning-rate", "--epochs", "--seed", "--max-steps", "--tracker",
                          "--output", "--eval-data", "--images", "--limit", "--dtype", "--padding-side",
                          "--max-length"),
                "plan": ("--set", "--batch-size", "--seq-len", "--images", "--image-size", "--supervised-fraction",
                         "--dtype", "--device", "--sweep", "--method", "--r", "--csv", "--plot", "--model"),
                "study": ("--steps", "--batch-size", "--seed", "--threads", "--data", "--models", "--output"),
                "doctor": ("--json", "--unknown"),
                "profile": ("--set", "--batch-size", "--steps", "--model", "--method"),
            }[command]
        )  # fmt: skip
        if option in ("--set", "--sweep") and rng.random() < 0.8:
            text = rng.choice(("r", "alpha", "targets", "dropout", "rank_stabilized", "batch_size", "")) + "=" + text
        place = rng.randrange(len(words) + 1)
        words[place:place] = [f"{option}={text}"] if rng.random() < 0.5 else [option, text]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(tools["folder"]):
        try:
            code = cli.main([command, *words])
        except SystemExit as exit_:
            code = exit_.code
    assert code in (0, 2), (code, err.getvalue())
    assert code == 0 or err.getvalue().count("\n") == 1, err.getvalue()
    assert code == 0 or not (tools["folder"] / "out").exists()


def records(rng, tools):
    """Conversations: what is read is what the file says, and collates."""
    entries = json.loads(tools["data"].read_text())
    content = _text(_mutated(entries, rng), rng)
    path = tools["folder"] / rng.choice(("data.json", "data.jsonl"))
    path.write_bytes(content if path.suffix == ".json" else b"\n".join(_text(entry, rng) for entry in entries))
    taken = []
    if not _refused(lambda: taken.extend(load_conversations(path, tools["images"]))):
        if path.suffix == ".json":
            for sample, entry in zip(taken, json.loads(content), strict=True):
                texts = [turn["value"].strip() for turn in entry["conversations"]]
                assert [*sample.questions] == texts[::2] and [*sample.answers] == texts[1::2]
        _refused(lambda: tools["collator"](taken[:2]))


def images(rng, tools):
    picture = Image.effect_noise((rng.randint(1, 40), rng.randint(1, 40)), 60)
    picture = picture.convert(rng.choice(("RGB", "L", "RGBA", "P", "1", "CMYK", "I")))
    content = io.BytesIO()
    kinds = {"RGBA": ("png", "webp"), "CMYK": ("jpeg", "tiff"), "I": ("tiff",)}
    picture.save(content, rng.choice(kinds.get(picture.mode, ("png", "gif", "bmp", "tiff"))))
    path = tools["folder"] / "image.png"
    path.write_bytes(_damaged(content.getvalue(), rng))
    sample = tools["sample"](path)
    taken = []
    if not _refused(sample.check_image) and not _refused(lambda: taken.append(sample.load_image())):
        assert taken[0].mode == "RGB"
        _refused(lambda: tools["collator"]([sample]))


def adapters(rng, tools):
    """An adapter's folder: refused with the model as it was, or taken with the tensors that the file holds."""
    folder = tools["folder"] / "adapter"
    shutil.copytree(tools["adapter"], folder)
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if rng.random() < 0.75:
        config.write_bytes(_text(_mutated(json.loads(config.read_text()), rng), rng))
    elif rng.random() < 0.5:
        tensors.write_bytes(_damaged(tensors.read_bytes(), rng))
    else:
        values = load_file(tensors)
        key = rng.choice(list(values))
        changed = {
            "nan": lambda x: x * float("nan"),
            "float8": lambda x: x.to(torch.float8_e4m3fn),
            "float64": lambda x: x.double() / 3,
            "int": lambda x: x.to(torch.int32),
            "bool": lambda x: x > 0,
            "scalar": lambda x: x.sum(),
            "empty": lambda x: x[:0],
        }[rng.choice(("nan", "float8", "float64", "int", "bool", "scalar", "empty"))]
        save_file(values | {key: changed(values[key]).contiguous()}, tensors)
    model, before = tools["model"], tools["model_digest"]
    taken = []
    if _refused(lambda: taken.append(load_peft(model, folder))):
        assert weights_digest(model) == before and not hasattr(model, "peft_method")
        return
    tools["model"] = None  # made anew by the next case
    stored = load_file(tensors)
    for key, slot in read_carried(model).slots.items():
        assert torch.equal(slot.tensor.reshape(stored[key].shape), stored[key])
    said = json.loads(config.read_text())
    assert said.get("r", 8) == model.peft_method.r and said.get("lora_alpha", 8) == model.peft_method.alpha


def checkpoints(rng, tools):
    """A damaged checkpoint is refused; a byte that says nothing (white space in JSON) changes nothing."""
    folder = tools["folder"] / tools["checkpoint"].name
    shutil.copytree(tools["checkpoint"], folder)
    name = rng.choice((STATE, STATE, STATE, PARAMETERS, OPTIMIZER))
    whole = (folder / name).read_bytes()
    if name == STATE and rng.random() < 0.6:
        (folder / name).write_bytes(_text(_mutated(json.loads(whole), rng), rng))
    else:
        (folder / name).write_bytes(_damaged(whole, rng))
    identity = json.loads((tools["checkpoint"] / STATE).read_text())["run"]
    model, taken = tools["make_model"](), []

    def read():
        taken.extend((read_position(folder, identity), load_checkpoint(folder, model)))

    if not _refused(read):
        assert (folder / name).read_bytes() == whole or json.loads((folder / name).read_bytes()) == json.loads(whole)


def logs(rng, tools):
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 8)]
    lines = [_text(_mutated(row, rng) if rng.random() < 0.2 else row, rng) for row in rows]
    path = tools["folder"] / "train_log.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    taken = []
    if not _refused(lambda: taken.extend(_rows_through(path, 5))):
        steps = [json.loads(line)["step"] for line in taken]
        assert all(isinstance(step, int) and 1 <= step <= 5 for step in steps)


def models(rng, tools):
    """A model's configuration: built, or refused; what is built has the sizes that the file says."""
    folder = tools["folder"] / "config"
    folder.mkdir()
    content = _mutated(json.loads((tools["config"] / "config.json").read_text()), rng)
    (folder / "config.json").write_bytes(_text(content, rng))
    taken = []
    if not _refused(lambda: taken.append(model_config(str(folder)))):
        said = json.loads((folder / "config.json").read_bytes()).get("text_config") or {}
        for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
            assert name not in said or getattr(taken[0].text_config, name) == said[name]


RUN = TrainConfig(global_batch_size=4, batch_size=4, max_steps=2, save_every=1, learning_rate=1e-2)


def _lora(model, **changes):
    settings = {"r": 2, "alpha": 4, "dropout": 0.1, "targets": ("q", "v")} | changes
    return fuse(add_peft(model, LoRA(**settings)))


def continuations(rng, tools):
    """A run that is resumed with one thing changed: named and refused; or free to change, and the same to the bit."""
    output = tools["folder"] / "run"
    shutil.copytree(tools["resumable"], output)
    fresh = tools["make_model"]
    run = tools["run"] | {"model": _lora(fresh())}

    def other_weights():
        model = _lora(fresh())
        weight = rng.choice([p for p in model.parameters() if not p.requires_grad])
        place = tuple(rng.randrange(size) for size in weight.shape)
        with torch.no_grad():
            weight[place] += 1e-3
        return model

    def other_config():
        model = _lora(fresh())
        model.config.text_config.attention_dropout = 0.1
        return model

    def other_modules():
        model = _lora(fresh())
        decoder = model.model.language_model
        change = rng.choice((
            lambda: decoder.rotary_emb.inv_freq.mul_(0.5),
            lambda: setattr(decoder.layers[0].input_layernorm, "variance_epsilon", 1e-3),
            lambda: setattr(decoder.layers[0].self_attn, "scaling", 0.5),
            lambda: setattr(decoder.layers[0].mlp, "act_fn", torch.nn.GELU()),
            lambda: fuse(model, keep_logits=True),
        ))  # fmt: skip
        change()
        return model

    def other_attention():
        model = _lora(fresh())
        model.set_attn_implementation({"vision_config": "eager"})
        return model

    def other_order():
        first, second = rng.sample(range(len(run["dataset"])), 2)
        samples = list(run["dataset"])
        samples[first], samples[second] = samples[second], samples[first]
        return samples

    def other_text():
        index = rng.randrange(len(run["dataset"]))
        sample = run["dataset"][index]
        return [*run["dataset"][:index], replace(sample, answers=("other",)), *run["dataset"][index + 1 :]]

    def other_image():
        Image.new("RGB", (28, 28), "white").save(tools["folder"] / "other.png")
        return [replace(run["dataset"][0], image=tools["folder"] / "other.png"), *run["dataset"][1:]]

    def collator(**changes):
        settings = {"padding_side": "right", "max_length": None} | changes
        return Collator(tools["collator"].processor, **settings)

    changes = {
        "method.alpha": lambda: {"model": _lora(fresh(), alpha=8)},
        "method.dropout": lambda: {"model": _lora(fresh(), dropout=0.0)},
        "method.rank_stabilized": lambda: {"model": _lora(fresh(), rank_stabilized=True)},
        "method.independent_masks": lambda: {"model": _lora(fresh(), independent_masks=True)},
        "method.targets": lambda: {"model": _lora(fresh(), targets=("q", "k"))},
        "model.fused": lambda: {"model": unfuse(_lora(fresh()))},
        "model.dtype": lambda: {"model": _lora(fresh().bfloat16())},
        "model.weights": lambda: {"model": other_weights()},
        "model.config.text_config.attention_dropout": lambda: {"model": other_config()},
        "model.modules": lambda: {"model": other_modules()},
        r"model\.attention of model\.vision_tower": lambda: {"model": other_attention()},
        "model.trained_values": lambda: {"model": _lora(fresh()).requires_grad_(True)},
        "data": lambda: {"dataset": rng.choice((other_order, other_text, other_image))()},
        "num_samples": lambda: {"dataset": run["dataset"][:-1]},
        "collator.loss": lambda: {"collator": collator(loss="answers")},
        "collator.padding_side": lambda: {"collator": collator(padding_side="left")},
        "collator.multiple_of": lambda: {"collator": collator(multiple_of=32)},
        "collator.max_length": lambda: {"collator": collator(max_length=500)},
        **{
            name: lambda name=name, value=value: {"config": replace(RUN, **{name: value})}
            for name, value in {
                "learning_rate": 1e-3, "connector_learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.5,
                "beta2": 0.5, "epsilon": 1e-4, "warmup_ratio": 0.5, "max_grad_norm": 0.1, "max_steps": 3,
                "global_batch_size": 8, "batch_size": 2, "gradient_checkpointing": True, "seed": 1,
            }.items()
        },
        None: lambda: {"config": replace(RUN, keep_checkpoints=9, log_every=2, save_every=0)},
    }  # fmt: skip
    name = rng.choice(list(changes))
    run |= changes[name]()
    if name is not None:
        with pytest.raises(ValueError, match=rf"expected the settings the run began with: .*\b{name} .* \(now "):
            train(**run, output=output, resume=True, cpu=True, progress=False)
        assert [path.name for path in output.iterdir() if path.is_dir()] == ["checkpoint-000001"]
        return
    assert train(**run, output=output, resume=True, cpu=True, progress=False).losses == tools["losses"][1:]


KINDS = (
    settings,
    command_lines,
    records,
    adapters,
    models,
    images,
    checkpoints,
    configurations_of_runs,
    logs,
    continuations,
)


def pytest_generate_tests(metafunc):
    if "number" in metafunc.fixturenames:
        step = 1 if metafunc.config.getoption("--nightly") else EVERY
        metafunc.parametrize("number", range(0, NUM_CASES, step))


@pytest.fixture(scope="module")
def valid(tmp_path_factory, data, samples, collator, tokenizer):
    """What the cases mutate, made once."""
    folder = tmp_path_factory.mktemp("valid")
    plain = tiny_model("llava", num_layers=1)
    trained = add_peft(copy.deepcopy(plain), LoRA(r=8, alpha=8, targets="attention"))
    save_peft(trained, folder / "adapter")
    plain.config.save_pretrained(folder / "config")
    return {
        "data": data[0],
        "images": data[1],
        "collator": collator,
        "adapter": folder / "adapter",
        "config": folder / "config",
        "plain": plain,
        "model": None,
        "folder": folder,
        "sample": lambda path: type(samples[0])(
            id="0", questions=("<image>\nwhat?",), answers=("yes",), image=path, source="here"
        ),
    }


@pytest.fixture
def tools(valid, make_model, samples, collator, tmp_path):
    if "checkpoint" not in valid:
        config = TrainConfig(global_batch_size=4, batch_size=4, max_steps=1)
        quiet = {"cpu": True, "progress": False}
        valid["checkpoint"] = train(
            make_model(), config, samples, collator, output=valid["folder"] / "run", **quiet
        ).checkpoint
        valid["run"] = {"model": None, "config": RUN, "dataset": samples, "collator": collator}
        valid["resumable"] = valid["folder"] / "resumable"
        valid["losses"] = train(
            **valid["run"] | {"model": _lora(make_model())}, output=valid["resumable"], **quiet
        ).losses
        shutil.rmtree(valid["resumable"] / "checkpoint-000002")
    if valid["model"] is None:
        valid["model"] = copy.deepcopy(valid["plain"])
        valid["model_digest"] = weights_digest(valid["model"])
    tools = {**valid, "make_model": make_model, "folder": tmp_path}
    yield tools
    valid["model"] = tools["model"]


@pytest.mark.filterwarnings("ignore")
def test_one_sentence_or_what_was_asked_for(number, tools):
    rng = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    with _bounded():
        kind(rng, tools)
