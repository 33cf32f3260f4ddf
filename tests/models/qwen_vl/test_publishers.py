"""A model of the publisher's own classes: a stand-in with its modules, configuration and calling conventions."""

import copy

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmpeft_fast import LoRA, Prefix, add_peft, fuse, is_fused, make_method, saved_bytes, unfuse
from mmpeft_fast.layers.class_swap import is_swapped
from mmpeft_fast.models import family_of
from mmpeft_fast.models.qwen_vl.vision import QwenVLVision
from mmpeft_fast.peft_model import study_method
from tests.closeness import assert_as_close_as_eager, assert_exact, assert_same_in_double
from tests.tiny_models import first_text_token, loss_and_grads, randomize_trainable, tiny_batch, tiny_model


class QWenConfig(PretrainedConfig):
    """`visual` stays a dict, and nothing has transformers' later names."""

    model_type = "qwen"

    def __init__(self, **kwargs):
        settings = tiny_model("qwen_vl").config.to_dict()
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels", "seq_length",
            "intermediate_size", "layer_norm_epsilon", "use_logn_attn", "use_dynamic_ntk", "rotary_emb_base", "visual",
        ):  # fmt: skip
            setattr(self, name, kwargs.pop(name, settings[name]))
        self.no_bias, self.attn_dropout_prob, self.emb_dropout_prob, self.rotary_pct = True, 0.0, 0.0, 1.0
        self.use_cache = True
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class RotaryEmbedding(nn.Module):
    """Takes a length, not positions."""

    def __init__(self, dim, base):
        super().__init__()
        self.dim, self.base, self._ntk_alpha_cached = dim, base, 1.0

    def forward(self, max_seq_len, ntk_alpha=1.0):
        base = self.base * ntk_alpha ** (self.dim / (self.dim - 2))
        frequencies = base ** (-torch.arange(0, self.dim, 2).double() / self.dim)
        angles = torch.outer(torch.arange(max_seq_len).double(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)[None, :, None]
        return [angles.cos(), angles.sin()]


class QWenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.kv_channels
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.attn_dropout = nn.Dropout(config.attn_dropout_prob)

    def forward(self, hidden_states, rotary_pos_emb, attention_mask):
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.c_attn(hidden_states).chunk(3, dim=-1))
        cos, sin = (part.to(q.dtype) for part in rotary_pos_emb)

        def rotated(x):
            a, b = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-b, a), dim=-1) * sin

        q, k, v = (x.transpose(1, 2) for x in (rotated(q), rotated(k), v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.c_proj(out.transpose(1, 2).flatten(-2))


class QWenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class QWenBlock(nn.Module):
    """Returns a tuple, as models of its time did."""

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = (RMSNorm(config.hidden_size, config.layer_norm_epsilon) for _ in range(2))
        self.attn, self.mlp = QWenAttention(config), QWenMLP(config)

    def forward(self, hidden_states, rotary_pos_emb_list=None, attention_mask=None):
        x = hidden_states + self.attn(self.ln_1(hidden_states), rotary_pos_emb_list, attention_mask)
        return (x + self.mlp(self.ln_2(x)),)


class VisionTransformer(QwenVLVision):
    """The same modules under another class."""


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True

    def _init_weights(self, module):
        pass


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.rotary_emb = RotaryEmbedding(config.kv_channels, config.rotary_emb_base)
        self.h = nn.ModuleList(QWenBlock(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = VisionTransformer(tiny_model("qwen_vl").config.visual)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids, attention_mask, images):
        x = self.wte(input_ids)
        start = self.config.visual["image_start_id"]
        for (row, column), features in zip((input_ids == start).nonzero().tolist(), self.visual(images), strict=True):
            x = torch.cat([x[:row], self._filled(x[row], column, features)[None], x[row + 1 :]])
        length = input_ids.shape[1]
        mask = torch.ones(length, length).tril().bool()[None, None] & attention_mask.bool()[:, None, None]
        for block in self.h:
            (x,) = block(x, rotary_pos_emb_list=self.rotary_emb(length), attention_mask=mask)
        return self.ln_f(x)

    @staticmethod
    def _filled(x, column, features):
        return torch.cat([x[: column + 1], features, x[column + 1 + len(features) :]])


class QWenLMHeadModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        raise AssertionError("the publisher's own generation must not run in a fused model")

    def forward(self, input_ids, attention_mask=None, pixel_values=None, labels=None):
        logits = self.lm_head(self.transformer(input_ids, attention_mask, pixel_values))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.fixture
def pair():
    """The stand-in and this package's model with the same tensors."""
    ours = tiny_model("qwen_vl")
    theirs = QWenLMHeadModel(QWenConfig(num_hidden_layers=2))
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def test_it_is_recognised_by_its_modules(pair):
    theirs, ours = pair
    assert family_of(theirs) is family_of(ours)
    del theirs.transformer.visual
    with pytest.raises(ValueError, match="expected a QwenVLForConditionalGeneration, got QWenLMHeadModel"):
        family_of(theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["lora", "adapter", "ia3", "layernorm-simp"])
def test_loss_and_gradients_fused_and_not(pair, name, side):
    theirs, ours = pair
    for model in pair:
        torch.manual_seed(0)
        settings = {"lora": {"r": 4, "dropout": 0.0}, "adapter": {"bottleneck": 4, "dropout": 0.0}}.get(name, {})
        add_peft(model, study_method(model, name, **settings))
        randomize_trainable(model.train())
    batch = tiny_batch("qwen_vl", padding_side=side)
    wide = batch | {"pixel_values": batch["pixel_values"].double()}
    truth = loss_and_grads(copy.deepcopy(ours).double(), wide)
    in_double = loss_and_grads(fuse(copy.deepcopy(theirs).double()), wide)
    eager = loss_and_grads(theirs, batch)
    fused = loss_and_grads(fuse(theirs), batch)
    assert is_fused(theirs) and len(truth[1]) > 0
    for got in (eager, fused, in_double):
        assert set(got[1]) == set(truth[1])
        torch.testing.assert_close(got[0].float(), truth[0].float())
    for parameter, grad in truth[1].items():
        assert_same_in_double(in_double[1][parameter], grad, parameter)
    # All gradients of a layer share the rounding of what comes down to it, a hundred times that of their own sums; how
    # much of it one small gradient takes is chance. So in float32 they count together, each by its own size.
    assert_as_close_as_eager(*(_relative(grads, truth[1]) for grads in (fused[1], eager[1], truth[1])))


def _relative(grads, truth):
    """All gradients as one vector, each divided by the norm of its true value."""
    return torch.cat([(grads[name] / grad.norm().to(grads[name].dtype)).flatten() for name, grad in truth.items()])


def test_hf_peft_around_it(pair):
    from peft import LoraConfig, get_peft_model

    theirs, _ = pair
    config = LoraConfig(r=4, target_modules=["c_attn", "w1", "w2", "attn.c_proj"], init_lora_weights=False)
    model = get_peft_model(theirs, config).train()
    batch = tiny_batch("qwen_vl")
    truth_model = copy.deepcopy(model).double()
    truth = loss_and_grads(truth_model, batch | {"pixel_values": batch["pixel_values"].double()})
    eager, fused = loss_and_grads(model, batch), loss_and_grads(fuse(model), batch)
    for parameter, grad in eager[1].items():
        assert_as_close_as_eager(fused[1][parameter], grad, truth[1][parameter], parameter)


def test_unfuse_restores_classes_and_results(pair):
    theirs, _ = pair
    add_peft(theirs, LoRA(r=2)).eval()
    batch = tiny_batch("qwen_vl")
    classes = {name: type(module) for name, module in theirs.named_modules()}
    with torch.no_grad():
        before = theirs(**batch).logits
        fused = fuse(fuse(theirs))(**batch).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(fused[real], before[real])
        assert torch.equal(unfuse(theirs)(**batch).logits, before)
    assert classes == {name: type(module) for name, module in theirs.named_modules()}
    assert not any(is_swapped(module) for module in theirs.modules())


def test_fused_it_computes_what_ours_does(pair):
    """Beyond seq_length too, with the cache, and in generation."""
    theirs, ours = pair
    for model in pair:
        model.double().eval()
        model.config.seq_length = 8
    ids = torch.randint(first_text_token(), 60, (2, 20), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        assert_exact(fuse(theirs)(input_ids=ids).logits, ours(input_ids=ids).logits)
        ours.transformer.config.seq_length = 8
    assert fuse(theirs).can_generate()
    assert torch.equal(theirs.generate(input_ids=ids, **options), ours.generate(input_ids=ids, **options))


def test_gradient_checkpointing_after_fuse_and_not_before(pair):
    theirs, _ = pair
    theirs.transformer.gradient_checkpointing = True
    with pytest.raises(ValueError, match="expected it to be enabled after fuse"):
        fuse(theirs)
    assert not any(is_swapped(module) for module in theirs.modules())
    theirs.transformer.gradient_checkpointing = False
    model = fuse(add_peft(theirs, LoRA(r=4, dropout=0.3))).train()
    randomize_trainable(model)
    batch, results = tiny_batch("qwen_vl"), []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        results.append(loss_and_grads(model, batch))
    assert all(layer.gradient_checkpointing for layer in theirs.transformer.h)
    assert torch.equal(results[0][0], results[1][0])
    for parameter, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][parameter], grad)


def test_methods_of_the_publishers_time_do_not_reach_transformers(pair):
    """Its `_set_gradient_checkpointing(module, value)` and `_reorder_cache` of tuples: layers really checkpoint, and
    beams are found as with this package's model."""
    theirs, _ = pair

    class Dated(QWenLMHeadModel):
        def _set_gradient_checkpointing(self, module, value=False):
            raise AssertionError("the publisher's convention")

        @staticmethod
        def _reorder_cache(past_key_values, beam_idx):
            raise AssertionError("the publisher's convention")

    theirs.__class__ = Dated
    kept = {}
    for model in pair:
        fuse(add_peft(model, LoRA(r=4))).train()
        for enabled in (False, True):
            if enabled:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with saved_bytes(model) as saved:
                model(**tiny_batch("qwen_vl"))
            kept[model is theirs, enabled] = saved.bytes
        assert all(layer.gradient_checkpointing for layer in model.transformer.h)
        model.gradient_checkpointing_disable()
    assert kept[True, True] == kept[False, True] < kept[False, False] == kept[True, False]
    ids = torch.randint(first_text_token(), 60, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = [model.double().eval().generate(input_ids=ids, **options) for model in pair]
    assert torch.equal(*generated)


@pytest.mark.parametrize("past_end", [0, 1, 2])
def test_fused_it_stops_where_the_publishers_chat_stops(pair, past_end):
    """Its settings name `<|endoftext|>` alone; `<|im_start|>` and `<|im_end|>` follow it."""
    theirs, _ = pair
    theirs.double().eval()
    ids = torch.randint(first_text_token(), 60, (1, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    fuse(theirs)
    free = theirs.generate(input_ids=ids, eos_token_id=None, **options)[0, 9:].tolist()
    unfuse(theirs)
    end_of_text = free[3] - past_end
    theirs.generation_config = GenerationConfig(eos_token_id=end_of_text, chat_format="chatml")
    stops = {end_of_text, end_of_text + 1, end_of_text + 2}
    assert set(fuse(theirs).generation_config.eos_token_id) == stops
    first = next(i for i, token in enumerate(free) if token in stops)
    assert theirs.generate(input_ids=ids, **options)[0, 9:].tolist() == free[: first + 1]


def test_weights_that_are_not_known_to_be_the_checkpoints_are_refused(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path)
    theirs.config.name_or_path = str(tmp_path)
    weight = theirs.transformer.h[1].attn.c_proj.weight
    weight.data.neg_()
    with pytest.raises(ValueError, match=r"with QwenVLForConditionalGeneration\.from_pretrained"):
        fuse(theirs)
    assert not any(is_swapped(module) for module in theirs.modules())
    weight.data.neg_()
    assert is_fused(fuse(theirs))
    unfuse(theirs)
    theirs.config.name_or_path = ""
    theirs.transformer.rotary_emb.inv_freq = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match="not known to be from it"):
        fuse(theirs)


def test_what_cannot_work_is_refused(pair):
    theirs, ours = pair
    with pytest.raises(ValueError, match="QWenLMHeadModel cannot see a prefix; expected a QwenVLForConditional"):
        add_peft(theirs, Prefix())
    theirs.config.attn_dropout_prob = 0.1
    with pytest.raises(ValueError, match=r"attn_dropout_prob 0\.1"):
        fuse(theirs)
    assert not any(is_swapped(module) for module in theirs.modules())
    with pytest.raises(ValueError, match=r"family 'qwen_vl' has no roles \['k', 'v'\]; expected roles in \['qkv', 'o'"):
        add_peft(ours, make_method("ia3"))
