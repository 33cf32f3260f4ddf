"""Text and images to Qwen-VL's inputs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from mmpeft_fast.models.qwen_vl.chat import (
    SPAN,
    EncodedChat,
    conversations_of,
    encode_batch,
    encode_chats,
    paths_in,
    with_shown_paths,
)
from mmpeft_fast.models.qwen_vl.configuration import QwenVLConfig
from mmpeft_fast.models.qwen_vl.images import QwenVLImageProcessor, image_processor, path_bytes, read_image
from mmpeft_fast.models.qwen_vl.tokenizer import VOCABULARY_FILE, QwenVLTokenizer, load_tokenizer
from mmpeft_fast.models.qwen_vl.tokens import IMAGE_END, IMAGE_PAD, IMAGE_START, normalised


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
            settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
            tokenizer = QwenVLTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
            images = QwenVLImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
            template = settings.get("chat_template")
            return cls(images, tokenizer, chat_template=template, num_queries=settings["num_queries"])
        visual = QwenVLConfig.from_pretrained(pretrained_model_name_or_path, **kwargs).visual
        path = cached_file(pretrained_model_name_or_path, VOCABULARY_FILE, **kwargs)
        tokenizer = load_tokenizer(path, num_queries=visual.num_queries)
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
        inner = [paths_in(one) for one in texts]
        images = self._images(images, [path for spans in inner for path in spans])

        filled = f"{IMAGE_START}{IMAGE_PAD * self.num_queries}{IMAGE_END}"
        options = {**kwargs, **(text_kwargs or {}), "return_tensors": None}
        encoded = self.tokenizer([SPAN.sub(filled, one) for one in texts], **options)
        for ids, spans in zip(encoded["input_ids"], inner, strict=True):
            self._write_paths(ids, spans)
        data = dict(encoded)
        if images:
            data |= self.image_processor(images, **{"return_tensors": return_tensors, **(images_kwargs or {})})
        return BatchFeature(data, tensor_type=return_tensors)

    def encode_chat(self, messages: Sequence[Mapping], *, add_generation_prompt: bool = False) -> EncodedChat:
        """Ids of a conversation and what counts in the loss, see `chat.encode_chats`."""
        (chat,) = encode_chats(
            self.tokenizer, [messages], num_queries=self.num_queries, add_generation_prompt=add_generation_prompt
        )
        return chat

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict | None = None,
        loss: str = "publisher",
        **kwargs,
    ):
        """As transformers' own; `assistant_masks` is the mask that `loss` names, "publisher" or "answers"."""
        prompt = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if not tokenize:
            return super().apply_chat_template(conversation, chat_template, tokenize=False, **prompt, **kwargs)
        conversations, _ = conversations_of(conversation)
        chats = encode_chats(self.tokenizer, conversations, num_queries=self.num_queries, **prompt)
        given = [image for messages in conversations for message in messages for image in _images_of(message)]
        images = self._images(given, [path for chat in chats for path in chat.paths])
        options = {**kwargs, **(processor_kwargs or {})}
        images_options = {"return_tensors": return_tensors, **options.pop("images_kwargs", {})}
        options |= options.pop("text_kwargs", {})
        return_tensors = None if return_tensors == "auto" else return_tensors
        mask = loss if return_assistant_tokens_mask else None
        encoded = encode_batch(self.tokenizer, chats, return_tensors=return_tensors, mask=mask, **options)
        if not return_dict:
            return encoded["input_ids"]
        pixels = self.image_processor(images, **images_options) if images else {}
        return BatchFeature({**encoded, **pixels})

    def _images(self, given, paths: list[str]) -> list:
        """An image for each span."""
        given = None if given is None else list(_flat(given))
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
        shown = with_shown_paths(self.tokenizer, token_ids, self.num_queries)
        return self.tokenizer.decode(shown, *args, **kwargs)

    def batch_decode(self, sequences, *args, **kwargs) -> list[str]:
        return [self.decode(ids, *args, **kwargs) for ids in sequences]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _flat(images):
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flat(image)
    else:
        yield images


def _images_of(message: Mapping) -> Iterator:
    """The images of a message's parts that are given otherwise than by a path."""
    for part in message["content"] if not isinstance(message["content"], str) else ():
        if part["type"] == "image" and not isinstance(part.get("path"), str):
            yield from (part[key] for key in ("image", "url", "base64") if key in part)
