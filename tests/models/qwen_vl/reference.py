"""Qwen-VL-Chat in plain float64 torch, from the published facts alone: no code is shared with the package.

Every function takes the state dict's tensors by their published names and numbers; nothing is a module.
"""

import itertools
import math

import torch


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def rms_norm(x, weight, eps=1e-6):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x, weight, bias, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight + bias


def softmax_attention(q, k, v, mask=None):
    """[T, D] matrices of one head; mask [Tq, Tk], True = may see."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
    return weights / weights.sum(1, keepdim=True) @ v


def cubic(t, a=-0.75):
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    if t < 2:
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return 0.0


def resize_matrix(target, source):
    """[target, source]: bicubic weights on pixel centres (align_corners false), the border repeated."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), source - 1)] += cubic(centre - j)
    return matrix


def resize_positions(positions, side):
    source = math.isqrt(positions.shape[0])
    if source == side:
        return positions
    matrix = resize_matrix(side, source)
    grid = positions.reshape(source, source, -1)
    return torch.einsum("ai,bj,ijc->abc", matrix, matrix, grid).reshape(side * side, -1)


def sincos_table(width, side):
    table = torch.zeros(side * side, width, dtype=torch.float64)
    half = width // 2
    for y in range(side):
        for x in range(side):
            for axis, position in enumerate((x, y)):  # the axis that varies fastest comes first
                for i in range(half // 2):
                    angle = position * 10000 ** (-i / (half / 2))
                    table[y * side + x, axis * half + i] = math.sin(angle)
                    table[y * side + x, axis * half + half // 2 + i] = math.cos(angle)
    return table


def patches(image, weight):
    """image [3, S, S], weight [W, 3, P, P] -> [(S/P)^2, W]."""
    size = weight.shape[-1]
    side = image.shape[-1] // size
    rows = [
        weight.reshape(len(weight), -1) @ image[:, y * size : (y + 1) * size, x * size : (x + 1) * size].reshape(-1)
        for y in range(side)
        for x in range(side)
    ]
    return torch.stack(rows)


def tower_block(x, state, prefix, num_heads):
    t = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    h = layer_norm(x, t["ln_1.weight"], t["ln_1.bias"])
    width = x.shape[1] // num_heads
    heads = []
    for head in range(num_heads):  # rows of in_proj: q, k, v of one head after the other
        q, k, v = (
            h @ t["attn.in_proj.weight"][rows].T + t["attn.in_proj.bias"][rows]
            for rows in (slice((3 * head + part) * width, (3 * head + part + 1) * width) for part in range(3))
        )
        heads.append(softmax_attention(q, k, v))
    x = x + torch.cat(heads, 1) @ t["attn.out_proj.weight"].T + t["attn.out_proj.bias"]
    h = layer_norm(x, t["ln_2.weight"], t["ln_2.bias"])
    inner = gelu(h @ t["mlp.c_fc.weight"].T + t["mlp.c_fc.bias"])
    return x + inner @ t["mlp.c_proj.weight"].T + t["mlp.c_proj.bias"]


def tower(image, state, prefix, num_layers, num_heads):
    """[patches, W] of one image."""
    x = patches(image, state[prefix + "conv1.weight"])
    x = x + resize_positions(state[prefix + "positional_embedding"], math.isqrt(len(x)))
    x = layer_norm(x, state[prefix + "ln_pre.weight"], state[prefix + "ln_pre.bias"])
    for layer in range(num_layers):
        x = tower_block(x, state, f"{prefix}transformer.resblocks.{layer}.", num_heads)
    return x


def resampler(x, state, prefix):
    """[queries, D] from patches [P, W]; heads of 128."""
    t = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    values = layer_norm(x @ t["kv_proj.weight"].T, t["ln_kv.weight"], t["ln_kv.bias"])
    keys = values + resize_positions(t["pos_embed"], math.isqrt(len(x)))
    queries = layer_norm(t["query"], t["ln_q.weight"], t["ln_q.bias"]) + t["pos_embed"]
    width = queries.shape[1]
    q, k, v = (
        part @ weight.T + bias
        for part, weight, bias in zip(
            (queries, keys, values),
            t["attn.in_proj_weight"].split(width),
            t["attn.in_proj_bias"].split(width),
            strict=True,
        )
    )
    heads = [softmax_attention(q[:, c : c + 128], k[:, c : c + 128], v[:, c : c + 128]) for c in range(0, width, 128)]
    return torch.cat(heads, 1) @ t["attn.out_proj.weight"].T + t["attn.out_proj.bias"]


def image_features(image, state, num_layers, num_heads, prefix="transformer.visual."):
    x = resampler(tower(image, state, prefix, num_layers, num_heads), state, prefix + "attn_pool.")
    x = layer_norm(x, state[prefix + "ln_post.weight"], state[prefix + "ln_post.bias"])
    return x @ state[prefix + "proj"]


def ntk_alpha(length, seq_length):
    return max(1, 2 ** math.ceil(math.log2(length / seq_length) + 1) - 1)


def rotate_heads(x, positions, base=10000.0):
    """[T, DH] of one head, rotate-half."""
    half = x.shape[1] // 2
    frequencies = [base ** (-2 * i / x.shape[1]) for i in range(half)]
    angles = torch.tensor([[p * f for f in frequencies] for p in positions], dtype=torch.float64)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)


def decoder_layer(x, state, prefix, num_heads, *, alpha=1.0, logn=None):
    """[T, H] of one sequence at positions 0, 1, ..; `logn`: length up to which queries are not scaled."""
    t = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    length, width = x.shape
    dim = width // num_heads
    y = rms_norm(x, t["ln_1.weight"]) @ t["attn.c_attn.weight"].T + t["attn.c_attn.bias"]
    base = 10000.0 * alpha ** (dim / (dim - 2))
    causal = torch.ones(length, length).tril().bool()
    heads = []
    for head in range(num_heads):
        q, k, v = (y[:, part * width + head * dim : part * width + (head + 1) * dim] for part in range(3))
        q, k = rotate_heads(q, range(length), base), rotate_heads(k, range(length), base)
        if logn is not None:
            scales = [math.log(p, logn) if p > logn else 1.0 for p in range(1, length + 1)]
            q = q * torch.tensor(scales, dtype=torch.float64)[:, None]
        heads.append(softmax_attention(q, k, v, causal))
    x = x + torch.cat(heads, 1) @ t["attn.c_proj.weight"].T
    h = rms_norm(x, t["ln_2.weight"])
    return x + (h @ t["mlp.w1.weight"].T * silu(h @ t["mlp.w2.weight"].T)) @ t["mlp.c_proj.weight"].T


def logits(embeddings, state, num_layers, num_heads, **options):
    """[T, V] from [T, H]."""
    x = embeddings
    for layer in range(num_layers):
        x = decoder_layer(x, state, f"transformer.h.{layer}.", num_heads, **options)
    return rms_norm(x, state["transformer.ln_f.weight"]) @ state["lm_head.weight"].T


def embed(ids, features, state, start_id):
    """[T, H]: the rows between each start and its end id replaced by the features of the next image."""
    x = state["transformer.wte.weight"][ids].clone()
    images = iter(features)
    for position, token in enumerate(ids.tolist()):
        if token == start_id:
            image = next(images)
            x[position + 1 : position + 1 + len(image)] = image
    return x


def next_token_loss(all_logits, labels):
    """Mean over the positions of all rows whose next token has a label; logits [B, T, V]."""
    losses = []
    for row, targets in zip(all_logits, labels.tolist(), strict=True):
        for position, target in enumerate(targets[1:]):
            if target != -100:
                scores = row[position]
                losses.append(torch.log(torch.exp(scores - scores.max()).sum()) + scores.max() - scores[target])
    return torch.stack(losses).mean()


def bpe(piece, ranks):
    """Token ids of one piece of bytes: the pair whose concatenation has the lowest rank merges, leftmost first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        candidates = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not candidates:
            return [ranks[part] for part in parts]
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
