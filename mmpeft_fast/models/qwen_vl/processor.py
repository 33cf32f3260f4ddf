"""Text and images to Qwen-VL's inputs."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from mmpeft_fast.models.qwen_vl.configuration import QwenVLConfig
from mmpeft_fast.models.qwen_vl.images import image_processor, opaque, path_bytes, read_image
from mmpeft_fast.models.qwen_vl.tokenizer import (
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    VOCABULARY_FILE,
    load_tokenizer,
    normalised,
)

_SPAN = re.compile(f"{IMAGE_START}(.*?){IMAGE_END}", re.DOTALL)


class QwenVLProcessor(ProcessorMixin):
    """Tokens and pixel values. In the text an image is `<img>PATH</img>`, or `<img><imgpad></img>` where it is given;
    the chat template writes `Picture 1: ` in front and a newline behind. Either becomes a span of `num_queries` ids."""

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 - transformers' protocol
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_queries: int = 256):
        self.num_queries = num_queries
        self.image_token = IMAGE_PAD
        self.image_start_id, self.image_token_id = tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE_PAD])
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "QwenVLProcessor":
        """From what `save_pretrained` wrote, or from the publisher's `qwen.tiktoken` and `config.json`."""
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / VOCABULARY_FILE).is_file():
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        visual = QwenVLConfig.from_pretrained(pretrained_model_name_or_path, **kwargs).visual
        tokenizer = load_tokenizer(cached_file(pretrained_model_name_or_path, VOCABULARY_FILE, **kwargs))
        return cls(image_processor(visual.image_size), tokenizer, num_queries=visual.num_queries)

    def __call__(
        self,
        images: Image.Image | Sequence | None = None,
        text: str | Sequence[str] | None = None,
        *,
        text_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """`input_ids`, `attention_mask` and, with images, `pixel_values` [images, 3, S, S].

        Args:
            images: one image or (nested) lists of them, in the order of the text: one for each span, or one for each
                span without a path. Files of other paths are read.
            text: one text or several.
            text_kwargs, images_kwargs: for the tokenizer and the image processor alone; `kwargs` go to the tokenizer.
            return_tensors: as in transformers; None gives lists of ids.

        Raises:
            ValueError: images do not fit the spans, a path is too long or not an image.
        """
        if text is None:
            raise ValueError("QwenVLProcessor: expected a text, got none")
        # The publisher normalises the whole text, paths included.
        texts = [normalised(one) for one in ([text] if isinstance(text, str) else text)]
        inner = [[span.replace(IMAGE_PAD, "") for span in _SPAN.findall(one)] for one in texts]
        paths = [path for spans in inner for path in spans]
        images = self._images(None if images is None else list(_flat(images)), paths)

        filled = f"{IMAGE_START}{IMAGE_PAD * self.num_queries}{IMAGE_END}"
        options = {**kwargs, **(text_kwargs or {}), "return_tensors": None}
        replaced = options.pop("return_text_replacement_offsets", False)
        encoded = self.tokenizer([_SPAN.sub(filled, one) for one in texts], **options)
        for ids, spans in zip(encoded["input_ids"], inner, strict=True):
            self._write_paths(ids, spans)
        data = dict(encoded)
        if replaced:
            data["text_replacement_offsets"] = [_replacements(one, len(filled)) for one in texts]
        if images:
            images = [opaque(image) if isinstance(image, Image.Image) else image for image in images]
            data |= self.image_processor(images, **{"return_tensors": return_tensors, **(images_kwargs or {})})
        tensors = {name: value for name, value in data.items() if name != "text_replacement_offsets"}
        result = BatchFeature(tensors, tensor_type=return_tensors)
        if replaced:
            result["text_replacement_offsets"] = data["text_replacement_offsets"]
        return result

    def _images(self, given: list | None, paths: list[str]) -> list:
        """An image for each span."""
        if given is not None and len(given) == len(paths):
            return given
        missing = sum(not path for path in paths)
        if len(given or ()) != missing:
            raise ValueError(
                f"QwenVLProcessor: expected an image for each of {len(paths)} spans, or for the {missing} without a "
                f"path, got {len(given or ())}"
            )
        rest = iter(given or ())
        return [read_image(path) if path else next(rest) for path in paths]

    def _write_paths(self, ids: list[int], paths: list[str]) -> None:
        """Puts the bytes of each path into its span, in place."""
        starts = (position for position, token in enumerate(ids) if token == self.image_start_id)
        for path, start in zip(paths, list(starts), strict=False):
            if path:
                data = path_bytes(path, self.num_queries)
                ids[start + 1 : start + 1 + len(data)] = data

    def decode(self, token_ids, *args, **kwargs) -> str:
        """As the tokenizer's, but a span shows the path that it holds: `<img>PATH</img>`."""
        ids, shown = [int(token) for token in token_ids], []
        while self.image_start_id in ids:
            start = ids.index(self.image_start_id)
            end = start + 1 + self.num_queries
            span = [token for token in ids[start + 1 : end] if token != self.image_token_id]
            if not all(token < 256 for token in span):
                break
            shown += ids[: start + 1] + self.tokenizer(bytes(span).decode(errors="replace"))["input_ids"]
            ids = ids[end:]
        return self.tokenizer.decode(shown + ids, *args, **kwargs)

    def batch_decode(self, sequences, *args, **kwargs) -> list[str]:
        return [self.decode(ids, *args, **kwargs) for ids in sequences]

    def publisher_loss(self, input_ids: Tensor, answers: Tensor) -> Tensor:
        """Which tokens [T] count in the publisher's fine-tuning, from those that belong to answers: these, and in every
        turn both ChatML markers and the newline behind it."""
        start, end = (
            input_ids == token for token in self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        )
        behind = torch.cat((torch.zeros_like(end[:1]), end[:-1]))
        return answers | start | end | behind

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _flat(images):
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flat(image)
    else:
        yield images


def _replacements(text: str, length: int) -> list[dict]:
    """Where spans stood and stand, as transformers' chat templates ask for it."""
    offsets, shift = [], 0
    for match in _SPAN.finditer(text):
        start, end = match.span()
        offsets.append({"span": (start, end), "new_span": (start + shift, start + shift + length)})
        shift += length - (end - start)
    return offsets
