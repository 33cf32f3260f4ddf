"""Weights that `fuse` has put into one buffer are saved, loaded, moved and sharded like others."""

import copy

import pytest
import torch
from accelerate import Accelerator, disk_offload
from accelerate.utils import compute_module_sizes, find_tied_parameters
from huggingface_hub import save_torch_model
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from mmpeft_fast import LoRA, add_peft, fuse, unfuse
from mmpeft_fast.ops import dispatch, stacking
from tests.closeness import assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

SHARD = "500KB"


def plain_model(dtype=torch.float32):
    """Qwen2's q, k, v have biases: weights, biases and branches are stacked."""
    model = add_peft(tiny_model("qwen2", dtype=dtype), LoRA(r=4, alpha=8, dropout=0.0))
    randomize_trainable(model)
    return model


def attention_of(model):
    return model.model.layers[0].self_attn


def contents(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_contents(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def by_pretrained(model, folder):
    model.save_pretrained(folder, max_shard_size=SHARD)


def by_accelerate(model, folder):
    Accelerator(cpu=True).save_model(model, folder, max_shard_size=SHARD)


def by_hub(model, folder):
    save_torch_model(model, folder, max_shard_size=SHARD)


def by_safetensors(model, folder):
    save_model(model, str(folder / "model.safetensors"))


def by_save_file(model, folder):
    save_file(model.state_dict(), folder / "model.safetensors")


def shards_and_contents(model, save, folder):
    folder.mkdir()
    save(model, folder)
    return len(list(folder.glob("*.safetensors"))), contents(folder)


@pytest.fixture
def spare_columns(monkeypatch):
    monkeypatch.setattr(dispatch, "wants_layout", lambda *arguments: True)


@pytest.mark.parametrize("save", [by_pretrained, by_accelerate, by_hub, by_safetensors, by_save_file])
def test_saved_as_unfused(save, tmp_path):
    num_shards, expected = shards_and_contents(plain_model(), save, tmp_path / "plain")
    fused = fuse(plain_model())
    assert stacking.as_rows([attention_of(fused).q_proj.weight, attention_of(fused).k_proj.weight]) is not None
    got_shards, got = shards_and_contents(fused, save, tmp_path / "fused")
    assert got_shards == num_shards
    assert_same_contents(got, expected)


@pytest.mark.parametrize("save", [by_pretrained, by_accelerate])
def test_saved_with_spare_columns(save, spare_columns, tmp_path):
    num_shards, expected = shards_and_contents(plain_model(), save, tmp_path / "plain")
    got_shards, got = shards_and_contents(fuse(plain_model()), save, tmp_path / "fused")
    assert got_shards == num_shards
    assert_same_contents(got, expected)


def test_spare_columns_are_refused_where_contiguous_tensors_are_expected(spare_columns, tmp_path):
    """Documented limits: an error, and `unfuse` is the way out."""
    model = fuse(plain_model())
    with pytest.raises(ValueError, match="non contiguous tensor"):
        by_save_file(model, tmp_path)
    with pytest.raises(RuntimeError, match="no suitable name to keep"):
        by_safetensors(model, tmp_path)
    unfuse(model)
    for save in (by_save_file, by_safetensors):
        save(model, tmp_path)
        assert_same_contents(contents(tmp_path), plain_model().state_dict())


def test_loaded_by_safetensors(tmp_path):
    by_safetensors(plain_model(), tmp_path)
    model = fuse(plain_model())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_model(model, str(tmp_path / "model.safetensors"))
    assert_same_contents(model.state_dict(), plain_model().state_dict())


def test_no_two_tensors_of_a_state_dict_share_a_storage():
    model = fuse(plain_model())
    for part in (model, attention_of(model)):
        storages = [value.untyped_storage().data_ptr() for value in part.state_dict().values()]
        assert len(set(storages)) == len(storages)
    assert not find_tied_parameters(model)
    assert compute_module_sizes(model) == compute_module_sizes(plain_model())


def test_a_state_dict_is_still_the_parameters_memory():
    model = fuse(plain_model())
    for name, value in model.state_dict().items():
        assert value.data_ptr() == model.get_parameter(name).data_ptr()
    model.state_dict()["model.layers.0.self_attn.k_proj.weight"].fill_(3)
    assert (attention_of(model).k_proj.weight == 3).all()
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())


def test_bytes_on_disk(tmp_path):
    sizes = []
    for model in (plain_model(), fuse(plain_model())):
        for name, value in (("all", model.state_dict()), ("one", attention_of(model).q_proj.state_dict())):
            torch.save(value, tmp_path / name)
        sizes.append([(tmp_path / name).stat().st_size for name in ("all", "one")])
    assert sizes[0] == sizes[1]


def test_unfuse_gives_every_weight_memory_of_its_own(spare_columns):
    model = unfuse(fuse(plain_model()))
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size(), name
    assert not any(module._state_dict_hooks for module in model.modules())


def replaced_data(model):
    weight = attention_of(model).k_proj.weight
    weight.data = weight.data * 2
    return model


def assigned(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)
    return model


def double_of_half(model):
    return model.half().double()


@pytest.mark.parametrize("change", [copy.deepcopy, replaced_data, assigned, double_of_half], ids=lambda f: f.__name__)
@pytest.mark.parametrize("again", [False, True])
def test_changed_after_fusing(change, again):
    """`again`: fused once more, which stacks what has come apart."""
    batch = tiny_batch("qwen2")
    expected_loss, expected = loss_and_grads(change(plain_model(torch.float64)).train(), batch)
    model = change(fuse(plain_model(torch.float64)))
    if again:
        fuse(model)
    loss, grads = loss_and_grads(model.train(), batch)
    assert_same_in_double(loss, expected_loss)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_same_in_double(grad, expected[name], name)
    storages = [value.untyped_storage().data_ptr() for value in model.state_dict().values()]
    assert len(set(storages)) == len(storages)


def test_moved_to_meta():
    model = fuse(plain_model()).to(device="meta")
    assert all(parameter.is_meta for parameter in model.parameters()) and len(model.state_dict())


def test_offloaded_to_disk(tmp_path):
    batch = tiny_batch("qwen2")
    expected = plain_model().eval()(**batch).logits
    model = fuse(plain_model()).eval()
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(**batch).logits, expected)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    rendezvous = tmp_path_factory.mktemp("group") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def flat(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def by_parameter(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


@pytest.mark.parametrize("shard", [flat, by_parameter], ids=lambda f: f.__name__)
def test_sharded(shard, process_group):
    batch = tiny_batch("qwen2")
    expected = loss_and_grads(plain_model(torch.float64).train(), batch)[0]
    model = shard(fuse(plain_model(torch.float64)).train())
    loss = model(**batch).loss
    loss.backward()
    assert_same_in_double(loss, expected)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.numel())


def test_fsdp2_refuses_spare_columns(process_group, spare_columns):
    """Documented limit."""
    with pytest.raises(NotImplementedError, match="non-contiguous"):
        by_parameter(fuse(plain_model()))
