"""Configuration of the original Qwen-VL and Qwen-VL-Chat (Bai et al. 2023); reads the publisher's `config.json`."""

from transformers import PretrainedConfig


class QwenVLVisionConfig(PretrainedConfig):
    """The tower and its resampler: the publisher's `visual` entry.

    Arguments:
        image_size, patch_size: pixels a side.
        width, layers, heads, mlp_ratio: of the tower; the inner width of its MLP is int(width * mlp_ratio).
        output_dim: the decoder's hidden size; the resampler has heads of 128.
        num_queries: learned queries of the resampler = ids of an image span; a square number. The publisher's key is
            `n_queries`.
        image_start_id: id of `<img>`; `</img>` and `<imgpad>` follow.
    """

    model_type = "qwen_vl_visual"
    base_config_key = "visual"

    def __init__(
        self,
        image_size: int = 448,
        patch_size: int = 14,
        width: int = 1664,
        layers: int = 48,
        heads: int = 16,
        mlp_ratio: float = 4.9231,
        output_dim: int = 4096,
        num_queries: int = 256,
        image_start_id: int = 151857,
        n_queries: int | None = None,
        **kwargs,
    ):
        if n_queries is not None and num_queries not in (256, n_queries):
            raise ValueError(
                f"QwenVLVisionConfig: expected one number of queries, got num_queries {num_queries} and n_queries "
                f"{n_queries}"
            )
        num_queries = num_queries if n_queries is None else n_queries
        if image_size % patch_size or width % heads or output_dim % 128 or round(num_queries**0.5) ** 2 != num_queries:
            raise ValueError(
                "QwenVLVisionConfig: expected an image of whole patches, a width of whole heads, output_dim a multiple "
                f"of 128 and a square num_queries, got image_size {image_size}, patch_size {patch_size}, "
                f"width {width}, heads {heads}, output_dim {output_dim}, num_queries {num_queries}"
            )
        self.image_size, self.patch_size = image_size, patch_size
        self.width, self.layers, self.heads, self.mlp_ratio = width, layers, heads, mlp_ratio
        self.output_dim, self.num_queries, self.image_start_id = output_dim, num_queries, image_start_id
        super().__init__(**kwargs)


def visual_setting(config: PretrainedConfig, name: str) -> int:
    """A setting of the vision part, also from the publisher's own configuration class, which keeps a plain dict."""
    visual = config.visual
    return getattr(QwenVLVisionConfig(**visual) if isinstance(visual, dict) else visual, name)


class QwenVLConfig(PretrainedConfig):
    """The decoder's settings under the publisher's names, and `visual`.

    Arguments:
        intermediate_size: of both MLP branches together; w1 and w2 have half of it each.
        kv_channels: width of a head.
        seq_length: positions up to which log-n scaling and dynamic NTK change nothing.
        use_logn_attn, use_dynamic_ntk: at inference only.
        visual: a QwenVLVisionConfig or its entries.

    Raises:
        ValueError: dropout, biases or partial rotation, which the model does not have.
    """

    model_type = "qwen"
    sub_configs = {"visual": QwenVLVisionConfig}  # noqa: RUF012 - transformers' protocol
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        kv_channels: int = 128,
        intermediate_size: int = 22016,
        layer_norm_epsilon: float = 1e-6,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 8192,
        seq_length: int = 2048,
        rotary_emb_base: float = 10000,
        rotary_pct: float = 1.0,
        use_logn_attn: bool = True,
        use_dynamic_ntk: bool = True,
        attn_dropout_prob: float = 0.0,
        emb_dropout_prob: float = 0.0,
        no_bias: bool = True,
        use_cache: bool = True,
        visual: QwenVLVisionConfig | dict | None = None,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        if attn_dropout_prob or emb_dropout_prob or not no_bias or rotary_pct != 1.0 or tie_word_embeddings:
            raise ValueError(
                "QwenVLConfig: expected no dropout, no biases, full rotation and an untied head, got "
                f"attn_dropout_prob {attn_dropout_prob}, emb_dropout_prob {emb_dropout_prob}, no_bias {no_bias}, "
                f"rotary_pct {rotary_pct}, tie_word_embeddings {tie_word_embeddings}"
            )
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads, self.kv_channels = (
            num_hidden_layers,
            num_attention_heads,
            kv_channels,
        )
        self.intermediate_size = intermediate_size
        self.layer_norm_epsilon, self.initializer_range = layer_norm_epsilon, initializer_range
        self.max_position_embeddings, self.seq_length = max_position_embeddings, seq_length
        self.rotary_emb_base, self.rotary_pct = rotary_emb_base, rotary_pct
        self.use_logn_attn, self.use_dynamic_ntk = use_logn_attn, use_dynamic_ntk
        self.attn_dropout_prob, self.emb_dropout_prob, self.no_bias = attn_dropout_prob, emb_dropout_prob, no_bias
        self.use_cache = use_cache
        self.visual = visual if isinstance(visual, QwenVLVisionConfig) else QwenVLVisionConfig(**(visual or {}))
        if kv_channels * num_attention_heads != hidden_size or self.visual.output_dim != hidden_size:
            raise ValueError(
                "QwenVLConfig: expected heads and image features of the hidden size together, got hidden_size "
                f"{hidden_size}, {num_attention_heads} heads of {kv_channels}, output_dim {self.visual.output_dim}"
            )
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels
