"""The model against the float64 reference, layer by layer; then decoder, log-n and NTK, and the inputs it refuses."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from torch import nn

from mmpeft_fast import LoRA, add_peft, fuse, provider
from mmpeft_fast.models.qwen_vl.decoder import QwenVLRotaryEmbedding
from mmpeft_fast.models.qwen_vl.vision import resized_positions, sincos_positions
from mmpeft_fast.ops.attention import HeadTransform, attention, attention_ref, transform_heads
from mmpeft_fast.ops.rotary import rotate
from tests.closeness import assert_as_close_as_eager, assert_exact
from tests.models.qwen_vl import reference
from tests.tiny_models import first_text_token, loss_and_grads, randomize_trainable, tiny_batch, tiny_model, token_id

NUM_LAYERS, TOWER_LAYERS, HEADS, TOWER_HEADS = 2, 2, 4, 4
IMG, END, PAD = (token_id(name) for name in ("<img>", "</img>", "<imgpad>"))


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen_vl", num_layers=NUM_LAYERS).double().eval()


@pytest.fixture(scope="module")
def state(model):
    return dict(model.state_dict())


def random_images(count, seed=0):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_text(count, seed=0):
    return torch.randint(first_text_token(), 60, (count,), generator=torch.Generator().manual_seed(seed))


def test_fixed_positions():
    expected = reference.sincos_table(64, 4)
    assert torch.equal(sincos_positions(64, 4), expected.float())
    assert expected[1, 0] == math.sin(1) and expected[4, 0] == 0  # the second patch of the first row: x = 1, y = 0
    big = sincos_positions(4096, 16)
    assert big.shape == (256, 4096) and big[17, 2048 + 3].item() == pytest.approx(math.sin(10000 ** (-3 / 1024)))


@pytest.mark.parametrize("source, target", [(16, 32), (16, 8), (4, 7), (5, 5)])
def test_resized_positions(source, target):
    table = torch.randn(source**2, 6, dtype=torch.float64)
    assert_exact(resized_positions(table, target), reference.resize_positions(table, target))


def test_resized_positions_of_half_precision():
    table = torch.randn(256, 6).bfloat16()
    wide = reference.resize_positions(table.double(), 32)
    assert_as_close_as_eager(resized_positions(table, 32), wide.bfloat16(), wide)


def test_tower_and_resampler(model, state):
    visual, images = model.transformer.visual, random_images(2)
    prefix = "transformer.visual."
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    block = reference.tower_block(x[1], state, prefix + "transformer.resblocks.1.", TOWER_HEADS)
    assert_exact(visual.transformer.resblocks[1](x)[1], block, "block")
    assert_exact(visual.attn_pool(x)[0], reference.resampler(x[0], state, prefix + "attn_pool."), "resampler")
    features = visual(images)
    for image, got in zip(images, features, strict=True):
        assert_exact(got, reference.image_features(image, state, TOWER_LAYERS, TOWER_HEADS), "features")


def test_heads_of_the_tower_are_groups_of_q_k_v(model):
    """Three blocks instead of groups would give other numbers: moving rows of one head moves only that head."""
    attention = copy.deepcopy(model.transformer.visual.transformer.resblocks[0].attn)
    attention.out_proj = nn.Identity()
    x = torch.randn(1, 5, 64, dtype=torch.float64)
    before = attention(x)
    attention.in_proj.weight.data[3 * 16 : 6 * 16].neg_()  # q, k, v of the second head of 16
    changed = (attention(x) != before).any(0).any(0)
    assert changed[16:32].all() and not changed[:16].any() and not changed[32:].any()


def test_decoder_layer(model, state):
    x = torch.randn(1, 7, 256, dtype=torch.float64)
    kept = model.transformer(inputs_embeds=x, output_hidden_states=True).hidden_states
    assert_exact(kept[1][0], reference.decoder_layer(x[0], state, "transformer.h.0.", HEADS))
    assert len(kept) == 1 + NUM_LAYERS and torch.equal(kept[0], x)
    assert model.transformer(inputs_embeds=x).hidden_states is None


def test_logits_and_loss_with_images_in_several_rows(model, state):
    """Three images: two in the first row, none in the second, one in the third."""
    span = [IMG, *[PAD] * 16, END]
    text = random_text(60).tolist()
    rows = [text[:3] + span + text[3:5] + span + text[5:8], text[8:52], text[52:55] + span + text[:23]]
    assert {len(row) for row in rows} == {44}
    ids, images = torch.tensor(rows), random_images(3)
    labels = torch.where(torch.rand(3, 44, generator=torch.Generator().manual_seed(2)) < 0.3, ids, -100)
    got = model(input_ids=ids, pixel_values=images, labels=labels)
    features = [reference.image_features(image, state, TOWER_LAYERS, TOWER_HEADS) for image in images]
    expected = torch.stack(
        [
            reference.logits(reference.embed(row, mine, state, IMG), state, NUM_LAYERS, HEADS)
            for row, mine in zip(ids, (features[:2], [], features[2:]), strict=True)
        ]
    )
    assert_exact(got.logits, expected, "logits")
    truth = reference.next_token_loss(expected, labels)
    assert_as_close_as_eager(got.loss, truth.float(), truth, "loss")  # transformers computes it in float32


@pytest.fixture(scope="module")
def short():
    """A model whose log-n and NTK begin at 8 positions."""
    model = tiny_model("qwen_vl", num_layers=NUM_LAYERS).double()
    model.config.seq_length = 8
    return model


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("length, alpha", [(1, 1), (7, 1), (8, 1), (9, 3), (16, 3), (17, 7), (33, 15)])
def test_logn_and_ntk_at_inference_only(short, length, alpha, fused):
    assert reference.ntk_alpha(length, 8) == alpha
    model, state = copy.deepcopy(short), dict(short.state_dict())
    if fused:
        fuse(model, keep_logits=True)
    ids = random_text(length, seed=length)
    x = state["transformer.wte.weight"][ids]
    with torch.no_grad():
        expected = reference.logits(x, state, NUM_LAYERS, HEADS, alpha=alpha, logn=8)
        assert_exact(model.eval()(input_ids=ids[None]).logits[0], expected, "eval")
        plain = reference.logits(x, state, NUM_LAYERS, HEADS)
        assert_exact(model.train()(input_ids=ids[None], labels=ids[None]).logits[0], plain, "training")
    assert torch.equal(expected, plain) == (length <= 8)


@pytest.mark.parametrize("setting", ["use_logn_attn", "use_dynamic_ntk"])
def test_settings_are_honoured(short, setting):
    model, state, ids = copy.deepcopy(short).eval(), dict(short.state_dict()), random_text(20)
    setattr(model.config, setting, False)
    options = {"alpha": 7} if setting == "use_logn_attn" else {"logn": 8}
    with torch.no_grad():
        expected = reference.logits(state["transformer.wte.weight"][ids], state, NUM_LAYERS, HEADS, **options)
        assert_exact(model(input_ids=ids[None]).logits[0], expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prompt, alpha", [(5, 1), (12, 3), (17, 7)])
def test_the_prompts_factor_stays_with_its_cache(short, prompt, alpha, fused):
    """Continuing in two pieces, past the next threshold, and another prompt in between."""
    model, state, ids = copy.deepcopy(short).eval(), dict(short.state_dict()), random_text(36)
    if fused:
        fuse(model)
    x = state["transformer.wte.weight"][ids]
    expected = reference.logits(x, state, NUM_LAYERS, HEADS, alpha=alpha, logn=8)
    with torch.no_grad():
        first = model(input_ids=ids[None, :prompt], use_cache=True)
        model(input_ids=random_text(33)[None], use_cache=True)
        second = model(input_ids=ids[None, prompt : prompt + 1], past_key_values=first.past_key_values)
        third = model(input_ids=ids[None, prompt + 1 :], past_key_values=second.past_key_values)
    got = torch.cat([first.logits, second.logits, third.logits], dim=1)[0]
    assert_exact(got, expected)


def test_fused_generation_beyond_the_training_length(short):
    model = copy.deepcopy(short).float().eval()
    ids = random_text(2 * 20).view(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": token_id("<pad>")}
    eager = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(fuse(model).generate(input_ids=ids, attention_mask=mask, **options), eager)


@pytest.mark.parametrize("fused", [False, True])
def test_logn_goes_by_the_column(short, fused):
    """Whatever the positions are, as the publisher's: rotation is relative, so shifted positions change nothing."""
    model, ids = copy.deepcopy(short).eval(), random_text(20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model = fuse(model) if fused else model
        assert_exact(model(input_ids=ids, position_ids=torch.arange(20)[None] + 30).logits, expected)


@pytest.mark.parametrize("kind", ["to", "autocast"])
def test_rotary_tables_are_float32(kind):
    """The publisher rotates in float32 and rounds once. Far out, tables in bf16 would be off by their own rounding."""
    model = tiny_model("qwen_vl", num_layers=1).eval()
    seen = []
    model.transformer.h[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    ids, positions = random_text(20)[None], torch.arange(20)[None] + 5000
    context = nullcontext() if kind == "to" else torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), context:
        (model.to(torch.bfloat16) if kind == "to" else model)(input_ids=ids, position_ids=positions)
    cos, sin = seen[0]
    assert cos.dtype == sin.dtype == torch.float32
    one = torch.eye(64, dtype=torch.float64)[:1].expand(20, -1)  # rotated by the first frequency, which is 1
    truth = reference.rotate_heads(one, positions[0].tolist())
    assert_as_close_as_eager(cos[0, :, 0], truth[:, 0].float(), truth[:, 0])
    assert_as_close_as_eager(sin[0, :, 0], truth[:, 32].float(), truth[:, 32])


@pytest.mark.parametrize("provider_name", ["torch", "cpu"])
def test_attention_rotates_in_float32_and_rounds_once(provider_name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, 64, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    rotary = QwenVLRotaryEmbedding(32, 10000.0)
    cos, sin, _ = rotary(q, torch.arange(9)[None] + 500)
    heads = transform_heads(q, HeadTransform(), cos, sin, 32, 1e-6)
    expected = rotate(q.float().unflatten(-1, (-1, 32)), cos[:, :, None], sin[:, :, None]).bfloat16().transpose(1, 2)
    assert heads.dtype == torch.bfloat16 and torch.equal(heads, expected)

    def run(function, parts, *angles):
        parts = [part.detach().requires_grad_() for part in parts]
        out = function(*parts, *angles, head_dim=32)
        out.backward(torch.ones_like(out))
        return [out.detach(), *(part.grad for part in parts)]

    wide = rotary(q.double(), torch.arange(9)[None] + 500)[:2]
    truth = run(attention_ref, [q.double(), k.double(), v.double()], *wide)
    eager = run(attention_ref, [q, k, v], cos, sin)
    with provider(provider_name):
        got = run(attention, [q, k, v], cos, sin)
    for one, of_eager, right in zip(got, eager, truth, strict=True):
        assert one.dtype == torch.bfloat16
        assert_as_close_as_eager(one, of_eager, right)


def test_a_prompt_in_chunks_is_refused(short):
    model = copy.deepcopy(short).eval()
    with pytest.raises(ValueError, match=r"expected prefill_chunk_size=None, as dynamic NTK depends .* got 4"):
        model.generate(input_ids=random_text(20)[None], prefill_chunk_size=4)


def test_left_padding_changes_nothing(short):
    model, ids = copy.deepcopy(short).eval(), random_text(20)
    model.config.use_logn_attn = False  # it goes by the column
    model.config.use_dynamic_ntk = False  # its prompt length is the padded one
    padded = torch.cat([torch.full((5,), token_id("<pad>")), ids])[None]
    mask = (torch.arange(25) >= 5).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(input_ids=ids[None]).logits
        among = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
        fused = fuse(model)(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    assert_exact(among, alone)
    assert_exact(fused, alone)


def test_gradients_of_a_trained_resampler_reach_it_through_the_span(model):
    wide = copy.deepcopy(model).train().requires_grad_(False)
    wide.transformer.visual.attn_pool.requires_grad_(True)
    narrow = copy.deepcopy(wide).float()
    truth = loss_and_grads(wide, tiny_batch("qwen_vl", dtype=torch.float64))
    batch = tiny_batch("qwen_vl")
    batch["pixel_values"] = tiny_batch("qwen_vl", dtype=torch.float64)["pixel_values"].float()
    eager = loss_and_grads(narrow, batch)
    fused = loss_and_grads(fuse(narrow), batch)
    assert set(eager[1]) == set(fused[1]) and len(eager[1]) >= 10
    for name, grad in eager[1].items():
        assert grad.abs().sum() > 0, name
        assert_as_close_as_eager(fused[1][name], grad, truth[1][name], name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = fuse(add_peft(tiny_model("qwen_vl"), LoRA(r=4, alpha=8, dropout=0.3), train_connector=True)).train()
    randomize_trainable(model)
    batch = tiny_batch("qwen_vl")
    torch.manual_seed(0)
    loss, grads = loss_and_grads(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(0)
    again, again_grads = loss_and_grads(model, batch)
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        torch.testing.assert_close(again_grads[name], grad)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(model, attention):
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    batch = tiny_batch("qwen_vl", padding_side="left", dtype=torch.float64)
    with torch.no_grad():
        real = batch["attention_mask"].bool()
        assert_exact(other(**batch).logits[real], model(**batch).logits[real])


def ids_with_path(path, pad=PAD):
    data = list(str(path).encode())
    return torch.tensor([[*random_text(2).tolist(), IMG, *data, *[pad] * (16 - len(data)), END, first_text_token()]])


@pytest.fixture(scope="module")
def with_bytes(model):
    """A vocabulary of 60 has no ids for all bytes: the same model with 300 embeddings."""
    model = copy.deepcopy(model)
    model.transformer.wte = nn.Embedding(300, 256).double()
    return model


def test_paths_in_the_ids_are_read(with_bytes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 30), (255, 100, 0)).save("ä.png")
    ids = ids_with_path("ä.png")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)
    colour = (torch.tensor([255, 100, 0]) / 255.0 - mean) / deviation
    pixels = colour[None, :, None, None].expand(1, 3, 64, 64)
    with torch.no_grad():
        read = with_bytes(input_ids=ids).logits
        given = with_bytes(input_ids=ids, pixel_values=pixels).logits
    assert_as_close_as_eager(read.float(), given.float(), given)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda ids: ids[:, :-2], r"expected 16 ids between each <img> and its </img>, got <img> at \[\[0, 2\]\]"),
        (lambda ids: torch.cat([ids[:, :10], ids[:, 11:]], 1), "expected 16 ids between"),
        (lambda ids: torch.cat([ids, ids], 1), r"an image for each of 2 spans, got pixel_values \[1, 3, 64, 64\]"),
        (lambda ids: random_text(9)[None], "an image for each of 0 spans"),
    ],
)
def test_images_that_do_not_fit_are_refused(with_bytes, change, message):
    with pytest.raises(ValueError, match=message):
        with_bytes(input_ids=change(ids_with_path("a")), pixel_values=random_images(1))


def test_refused_inputs(with_bytes):
    embeddings = torch.zeros(1, 3, 256, dtype=torch.float64)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        with_bytes()
    with pytest.raises(ValueError, match="expected input_ids with pixel_values"):
        with_bytes(inputs_embeds=embeddings, pixel_values=random_images(1))
    with pytest.raises(ValueError, match=r"expected pixel_values \[images, 3, 64, 64\], got \[1, 3, 32, 64\]"):
        with_bytes(input_ids=ids_with_path("a"), pixel_values=random_images(1)[:, :, :32])
    with pytest.raises(ValueError, match="attention weights are not kept"):
        with_bytes(inputs_embeds=embeddings, output_attentions=True)
    with pytest.raises(ValueError, match=r"no\.png cannot be decoded"):
        with_bytes.transformer._read_images(ids_with_path("no.png"), torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match="expected pixel_values, or the bytes of a path"):
        with_bytes(input_ids=torch.where(ids_with_path("a") == ord("a"), PAD, ids_with_path("a")))
