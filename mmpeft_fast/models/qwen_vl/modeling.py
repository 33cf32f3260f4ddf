"""Qwen-VL-Chat (Bai et al. 2023): Qwen-7B's decoder, where spans of the prompt are replaced by image features.

The modules and tensors have the published checkpoint's names.
"""

import math

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mmpeft_fast.models.qwen_vl.configuration import QwenVLConfig, visual_setting
from mmpeft_fast.models.qwen_vl.decoder import QwenVLDecoderLayer, QwenVLRMSNorm, QwenVLRotaryEmbedding
from mmpeft_fast.models.qwen_vl.images import image_processor, path_of, read_image
from mmpeft_fast.models.qwen_vl.vision import QwenVLResampler, QwenVLVision, sincos_positions


def stop_at_turn_ends(settings: GenerationConfig | None) -> None:
    """Adds `<|im_end|>` and `<|im_start|>` to the ends of a ChatML model's generation, in place.

    The publisher's settings name `<|endoftext|>` alone; its `chat` stops at the two, whose ids follow.
    """
    if getattr(settings, "chat_format", None) == "chatml" and isinstance(settings.eos_token_id, int):
        end_of_text = settings.eos_token_id
        settings.eos_token_id = [end_of_text, end_of_text + 2, end_of_text + 1]


class QwenVLPreTrainedModel(PreTrainedModel):
    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["QwenVLDecoderLayer", "QwenVLVisionBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QwenVLVision):
            for parameter in (module.positional_embedding, module.proj):
                init.normal_(parameter, std=module.config.output_dim**-0.5)
        if isinstance(module, QwenVLResampler):
            init.normal_(module.query, std=0.02)
            num_queries, width = module.pos_embed.shape
            init.copy_(module.pos_embed, sincos_positions(width, round(num_queries**0.5)))


class QwenVLModel(QwenVLPreTrainedModel):
    """Decoder without head, vision tower inside."""

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = QwenVLRotaryEmbedding(config.kv_channels, config.rotary_emb_base)
        self.h = nn.ModuleList(QwenVLDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = QwenVLVision(config.visual)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As transformers' decoders.

        Args:
            input_ids: [B, T]; each image is a span of `visual.num_queries` ids between `<img>` and `</img>`.
            pixel_values: [images, 3, S, S], in the order of the spans. Without it the spans hold the paths of image
                files as bytes, and the files are read.
            attention_mask: [B, T] padding mask, or what the attention implementation takes.

        Raises:
            ValueError: ids and embeddings both or neither, images that do not fit the spans, unreadable paths.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Qwen-VL: expected exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("Qwen-VL: attention weights are not kept; expected output_attentions=False")
        if input_ids is None and pixel_values is not None:
            raise ValueError("Qwen-VL: expected input_ids with pixel_values, got inputs_embeds")
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, pixel_values)
        config = self.config
        if use_cache is None:
            use_cache = config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = inputs_embeds.shape[1]
        columns = torch.arange(past_length, past_length + length, device=inputs_embeds.device)[None]
        if position_ids is None:
            position_ids = columns
        mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        cos, sin, query_scale = self.rotary_emb(
            inputs_embeds,
            position_ids=position_ids,
            ntk_alpha=self._ntk_alpha(length, past_length, past_key_values),
            columns=columns if config.use_logn_attn and not self.training else None,
            logn_length=config.seq_length,
        )
        hidden, kept = inputs_embeds, ()
        for layer in self.h:
            kept += (hidden,) if output_hidden_states else ()
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=(cos, sin),
                query_scale=query_scale,
                past_key_values=past_key_values,
                **kwargs,
            )
        hidden = self.ln_f(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*kept, hidden) if output_hidden_states else None,
        )

    def _ntk_alpha(self, length: int, past_length: int, cache) -> float:
        """The dynamic NTK factor of a prompt; it stays with the prompt's cache for what is generated behind it."""
        if self.training or not self.config.use_dynamic_ntk:
            return 1.0
        if past_length:
            return getattr(cache, "ntk_alpha", 1.0)
        alpha = max(1.0, 2.0 ** math.ceil(math.log2(length / self.config.seq_length) + 1) - 1) if length else 1.0
        if cache is not None:
            cache.ntk_alpha = alpha
        return alpha

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Embeddings [B, T, H] with image features in the spans."""
        embeddings = self.wte(input_ids)
        # A decoding step cannot hold a span, and need not ask the device for one.
        if pixel_values is None and input_ids.shape[1] == 1:
            return embeddings
        starts = self._span_starts(input_ids)
        if pixel_values is None:
            if not len(starts):
                return embeddings
            pixel_values = self._read_images(input_ids, starts)
        if len(starts) != pixel_values.shape[0]:
            raise ValueError(
                f"Qwen-VL: expected an image for each of {len(starts)} spans, "
                f"got pixel_values {list(pixel_values.shape)}"
            )
        features = self.visual(pixel_values.to(embeddings.device)).to(embeddings.dtype)
        rows, before = starts[:, :1], starts[:, 1:]
        columns = before + torch.arange(1, 1 + features.shape[1], device=starts.device)
        return embeddings.index_put((rows, columns), features)

    def _span_starts(self, input_ids: Tensor) -> Tensor:
        """[images, 2]: row and position of each `<img>`; checks that every span is whole."""
        start_id, num_queries = (visual_setting(self.config, name) for name in ("image_start_id", "num_queries"))
        starts, ends = (input_ids == start_id).nonzero(), (input_ids == start_id + 1).nonzero()
        if not torch.equal(starts + starts.new_tensor([0, num_queries + 1]), ends):
            raise ValueError(
                f"Qwen-VL: expected {num_queries} ids between each <img> and its </img>, got <img> at "
                f"{starts.tolist()} and </img> at {ends.tolist()} (row, position)"
            )
        return starts

    def _read_images(self, input_ids: Tensor, starts: Tensor) -> Tensor:
        """pixel_values [images, 3, S, S] of the files whose paths are in the spans."""
        num_queries, size, start_id = (
            visual_setting(self.config, name) for name in ("num_queries", "image_size", "image_start_id")
        )
        ids = input_ids.tolist()
        spans = [ids[row][column + 1 : column + 1 + num_queries] for row, column in starts.tolist()]
        images = [read_image(path_of(span, start_id + 2)) for span in spans]
        return image_processor(size)(images, return_tensors="pt")["pixel_values"]


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its head; see `QwenVLModel.forward` for the inputs."""

    def __init__(self, config: QwenVLConfig):
        super().__init__(config)
        self.transformer = QwenVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As transformers' own; the published chat model then stops where the publisher's `chat` stops."""
        loaded = super().from_pretrained(*args, **kwargs)
        stop_at_turn_ends((loaded[0] if isinstance(loaded, tuple) else loaded).generation_config)
        return loaded

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """As transformers' own.

        Raises:
            ValueError: a prompt in chunks, whose dynamic NTK factor would be the first chunk's.
        """
        settings = self.generation_config if generation_config is None else generation_config
        chunk = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        if chunk is not None and self.config.use_dynamic_ntk:
            raise ValueError(
                "Qwen-VL: expected prefill_chunk_size=None, as dynamic NTK depends on the whole prompt's length, "
                f"got {chunk}"
            )
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx: Tensor):
        """Beam search: transformers asks for it where a class has one, and the publisher's takes tuples."""
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits, and with `labels` [B, T] (not shifted, -100 = ignored) the mean loss of the next tokens."""
        outputs = self.transformer(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, pixel_values=None, is_first_iteration=False, **kwargs
    ):
        """Images belong to the prompt: with a cache only its first pass sees them."""
        inputs = GenerationMixin.prepare_inputs_for_generation(
            self, input_ids, past_key_values=past_key_values, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs["pixel_values"] = pixel_values
        return inputs
