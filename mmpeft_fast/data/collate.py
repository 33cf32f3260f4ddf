"""Samples to a padded batch with labels on the answers, or on what the publisher's fine-tuning counts.

The processor's own chat template writes the text and the processor's own tokenizer splits it, once per sample; answer
tokens are found by character offsets, so merges across words and several turns are exact.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mmpeft_fast.data.conversations import Sample
from mmpeft_fast.data.feature_store import FeatureStore
from mmpeft_fast.data.packing import Packing, Size
from mmpeft_fast.documents import with_dense_mask
from mmpeft_fast.fields import at_least, between, check_value, shown
from mmpeft_fast.labels import IGNORE_INDEX

# Facts of a batch that fused models take as keywords, to spare an accelerator the question; others do not know them.
HOST_HINTS = ("supervised_capacity", "right_padded")

# What a batch holds in place of pixels where a collator has a `FeatureStore`: of each image a dict with its `key`, and
# `output`, its features, or `inputs`, what they are to be computed from, and `others`, what else is to be kept.
FEATURES = "image_features"

# Longer than any sample: more would be a mistake, and fill the memory with padding.
_MOST_MULTIPLE = 1 << 16
# A question and an answer, as the shortest conversation that a template takes.
_PAIR = [
    {"role": "user", "content": [{"type": "text", "text": "question"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "answer"}]},
]


def without_hints(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch for a model that knows no hints: documents become a dense attention mask."""
    return with_dense_mask({name: value for name, value in batch.items() if name not in HOST_HINTS})


class Collator:
    """Turn samples into a batch for training: `Collator(processor)(samples)`.

    processor: a multimodal processor with a chat template, a fast tokenizer and an `image_token`; for models of text
    alone a fast tokenizer with a chat template. padding_side: "right" or "left". max_length: longer samples are cut at
    the end, see `__call__`. multiple_of: batches are padded to a length that it divides, so that fewer lengths occur
    (`fuse(cuda_graphs=True)` records a graph for each). loss: "answers", or "publisher", which is the same but where
    the processor makes ids and both masks itself (`encode_chat`): Qwen-VL-Chat's fine-tuning and the study's count the
    turns' markers too.

    Where the chat template ends an answer without any special token (LLaVA-1.5's published one does), the tokenizer's
    end-of-sequence token is added, as the study's Vicuna template has it: else no model could learn to stop.
    A tokenizer without a padding token (LLaMA's and Mistral's published ones) pads with its end-of-sequence token:
    padding is masked and carries no label, so any token does.

    features: where images' features are kept (`mmpeft_fast.cache_vision`). An image with features there is not decoded.
    """

    def __init__(
        self,
        processor: Any,
        *,
        padding_side: str = "right",
        max_length: int | None = None,
        multiple_of: int = 1,
        loss: str = "publisher",
        features: FeatureStore | None = None,
    ) -> None:
        tokenizer = getattr(processor, "tokenizer", processor)
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side: expected 'right' or 'left', got {padding_side!r}")
        if loss not in ("publisher", "answers"):
            raise ValueError(f"loss: expected 'publisher' or 'answers', got {loss!r}")
        check_value("max_length", max_length, Annotated[int, at_least(1)] | None)
        check_value("multiple_of", multiple_of, Annotated[int, between(1, _MOST_MULTIPLE)])
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer: expected a fast one, which knows offsets, got {type(tokenizer).__name__}")
        if not processor.chat_template:
            raise ValueError(f"processor: expected a chat template, {type(processor).__name__} has none")
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if self.pad_token_id is None:
            raise ValueError(
                f"tokenizer: expected a padding or an end-of-sequence token, {type(tokenizer).__name__} has neither"
            )
        self.processor = processor
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.max_length = max_length
        self.multiple_of = multiple_of
        self.loss = loss
        self.features = features
        self._encode_chat = getattr(processor, "encode_chat", None)
        self._is_text_only = processor is tokenizer
        self._proven: list[str] = []  # the sample that has shown labels to be where they belong
        self._answer_end = "" if self._encode_chat else self._missing_end_token()

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collate B samples into a batch.

        Returns `input_ids`, `attention_mask`, `labels` [B, T] int64 (labels are -100 except on answers and their end
        token, and on what `loss` adds, not shifted), what the processor gives for the images (`pixel_values`, for Qwen
        `image_grid_thw`), per token `mm_token_type_ids` [B, T] where the processor has them, and HOST_HINTS: the int
        `supervised_capacity`, the largest number of next-token targets of a sample, and the bool `right_padded`. Raises
        ValueError as `check` does, and for a sample whose image cannot be decoded, whose text holds an image
        placeholder of its own, that keeps nothing that counts within max_length, or whose image would be cut. What
        Qwen-VL-Chat's `loss="publisher"` counts begins with the first turn's markers, so a sample whose answers lie
        behind max_length is kept there, as the publisher's fine-tuning keeps it; where answers alone count it is
        refused.
        """
        self.check(samples)
        rows, image_inputs = self._conversations(samples) if self._encode_chat else self._templated(samples)
        for sample, row in zip(samples, rows, strict=True):
            self._truncate(sample, row)
        batch = self._pad(rows)
        capacity = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1).max()
        hints = {"supervised_capacity": int(capacity), "right_padded": self.padding_side == "right"}
        return {**batch, **image_inputs, **hints}

    def packing(self, samples: Sequence[Sample], budget: int) -> Packing:
        """What the samples need of a token budget a batch. Raises ValueError as `__call__` does for the first image of
        each size."""
        sizes = tuple(map(Size, self._lengths(samples)))
        return Packing(sizes=sizes, budget=budget, is_padded=True, multiple_of=self.multiple_of)

    def _lengths(self, samples: Sequence[Sample]) -> list[int]:
        """Tokens of each sample's row."""
        lengths = [len(ids) + added for ids, added in self._ids_before_images(samples)]
        return lengths if self.max_length is None else [min(length, self.max_length) for length in lengths]

    def _ids_before_images(self, samples: Sequence[Sample]) -> Iterator[tuple[list[int], int]]:
        """Of each sample the token ids with one placeholder for its image, and how many the processor adds to them.
        That depends on the image's size alone; one of each size is decoded."""
        added: dict[tuple[int, int] | None, int] = {}
        for sample in tqdm(samples, desc="lengths", unit="sample", delay=5, disable=None):
            if self._encode_chat:
                yield self._chat(sample, sample.messages()).input_ids, 0
                continue
            text = self._template(self._messages(sample))
            self._check_placeholders(sample, text)
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            size = sample.image_size()
            if size not in added:
                (row,), _ = self._tokenize([sample], [text])
                added[size] = len(row["input_ids"]) - len(ids)
            yield ids, added[size]

    def _conversations(self, samples: Sequence[Sample]) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """Rows with labels and the images' inputs, by a processor that tokenises conversations itself."""
        rows = []
        for sample in samples:
            chat = self._chat(sample, sample.messages())
            input_ids = torch.tensor(chat.input_ids)
            counted = torch.tensor(chat.publisher if self.loss == "publisher" else chat.answers)
            labels = torch.where(counted, input_ids, IGNORE_INDEX)
            rows.append({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels})
        return rows, self._image_inputs(samples)

    def _chat(self, sample: Sample, messages: list[dict], **options: Any) -> Any:
        try:
            chat = self._encode_chat(messages, **options)
        except ValueError as error:
            raise ValueError(f"{sample.source}: {error}") from error
        token = self.processor.image_token
        expected = int(sample.image is not None)
        written = sum(part.get("text", "").count(token) for message in messages for part in message["content"])
        if len(chat.paths) + written != expected:
            raise ValueError(
                f"{sample.source}: expected {expected} {token} in the templated text, found {len(chat.paths) + written}"
            )
        return chat

    def _image_inputs(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        images = [image for sample in samples if (image := sample.load_image()) is not None]
        return dict(self.processor.image_processor(images, return_tensors="pt")) if images else {}

    def _templated(self, samples: Sequence[Sample]) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """Rows with labels and the images' inputs, by the chat template and character offsets."""
        texts, answer_spans = [], []
        for sample in samples:
            text, spans = self._render(sample)
            texts.append(text)
            answer_spans.append(spans)
        rows, image_inputs = (self._tokenize if self.features is None else self._with_features)(samples, texts)
        for sample, text, row, spans in zip(samples, texts, rows, answer_spans, strict=True):
            row["labels"] = self._labels(row, text, spans)
            row.pop("offset_mapping")
            if not self._proven:
                self._prove(sample, row["labels"], [text[start:end] for start, end in spans])
        return rows, image_inputs

    def _prove(self, sample: Sample, labels: torch.Tensor, answers: list[str]) -> None:
        """Raises ValueError unless the labels of the first sample spell its answers, white space aside: a processor
        that writes an image in a way that is not known here would shift them silently."""
        alone = [self.tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
        spelt, wanted = (
            "".join(self.tokenizer.decode(run) for run in runs) for runs in (_runs(labels.tolist()), alone)
        )
        spelt, wanted = ("".join(text.replace("\u2581", "").split()) for text in (spelt, wanted))
        if spelt != wanted:
            raise ValueError(
                f"{sample.source}: expected labels on {shown(wanted)}, they would be on {shown(spelt)}: "
                f"{type(self.processor).__name__} writes an image in a way that this collator does not know"
            )
        self._proven.append(sample.source)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what a batch of the same samples holds: the plain settings as they are, and digests
        of the tokenizer and of the rest of the processor."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, str | int | None)}
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for name in ("padding", "truncation"):  # what the last call has left there
            tokenizer.pop(name, None)
        parts = {"tokenizer": tokenizer, "chat_template": self.processor.chat_template}
        if not self._is_text_only:
            parts["processor"] = self.processor.to_dict()
        digests = {
            name: hashlib.sha256(json.dumps(part, sort_keys=True, default=_kind_of).encode()).hexdigest()
            for name, part in parts.items()
        }
        if self.features is not None:
            plain["features"] = "kept"  # computed for an image alone, which may round otherwise than many at once
        return {name.removeprefix("_"): value for name, value in plain.items()} | digests

    def check(self, samples: Iterable[Sample]) -> None:
        """Raises ValueError where a sample has an image and the model reads text alone; decodes nothing."""
        for sample in samples:
            if self._is_text_only and sample.image is not None:
                raise ValueError(
                    f"{sample.source}: expected a conversation without an image, as the model reads text alone, "
                    f"got the image {sample.image}"
                )

    def encode_prompt(self, sample: Sample) -> dict[str, torch.Tensor]:
        """`encode_prompts` of one sample."""
        return self.encode_prompts([sample])

    def encode_prompts(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """The first questions of B samples with the generation prompt and no answer, as a batch for `model.generate`.

        Returns `input_ids`, `attention_mask` [B, T] int64, padded on the left whatever `padding_side` says, the image
        inputs, and `mm_token_type_ids` where the processor has them. Raises ValueError as `__call__` does; nothing is
        cut at max_length.
        """
        self.check(samples)
        if self._encode_chat:
            rows, image_inputs = [], self._image_inputs(samples)
            for sample in samples:
                chat = self._chat(sample, sample.messages()[:1], add_generation_prompt=True)
                input_ids = torch.tensor(chat.input_ids)
                rows.append({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
        else:
            texts = [self._template(sample.messages()[:1], add_generation_prompt=True) for sample in samples]
            for sample, text in zip(samples, texts):
                self._check_placeholders(sample, text)
            rows, image_inputs = self._tokenize(samples, texts)
            for row in rows:
                row.pop("offset_mapping")
        return {**self._pad(rows, "left"), **image_inputs}

    def _template(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        if self._is_text_only:  # whose templates take the content as a string
            messages = [
                {**message, "content": "".join(part["text"] for part in message["content"])} for message in messages
            ]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _missing_end_token(self) -> str:
        """The end-of-sequence token if the template ends an answer without a special token, else nothing."""
        tokenizer = self.tokenizer
        rendered = self._template(_PAIR)
        answer = _PAIR[1]["content"][0]["text"]
        ending = rendered[rendered.rindex(answer) + len(answer) :]
        if any(token in ending for token in tokenizer.all_special_tokens):
            return ""
        if tokenizer.eos_token is None:
            raise ValueError("tokenizer: expected an end-of-sequence token, as the chat template does not end answers")
        return tokenizer.eos_token

    def _render(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """The sample's text before image expansion, and each answer's [start, end) in it, end token included."""
        messages = self._messages(sample)
        text = self._template(messages)
        spans = self._answer_spans(messages, text)
        if spans is None:
            raise ValueError(
                f"{sample.source}: expected the chat template to only append as turns are added, but it changes "
                "earlier text or writes a turn by what follows it; the answers' tokens cannot be told"
            )
        self._check_placeholders(sample, text)
        return text, spans

    def _messages(self, sample: Sample) -> list[dict]:
        messages = sample.messages()
        for message in messages[1::2]:
            message["content"][0]["text"] += self._answer_end
        return messages

    def _answer_spans(self, messages: list[dict], text: str) -> list[tuple[int, int]] | None:
        """Where the answers are in the text; None where the template does not append pair after pair.

        Every pair is rendered with nothing but one short pair in front, in linear time, and what that appends has to
        be, in order, the whole text.
        """
        spans, position, first = [], 0, []
        for index in range(0, len(messages), 2):
            opening = self._template(first) if first else ""
            before = self._template([*first, messages[index]], add_generation_prompt=True)
            through = self._template([*first, *messages[index : index + 2]])
            if not (through.startswith(before) and before.startswith(opening) and len(before) < len(through.rstrip())):
                return None
            if not text.startswith(through[len(opening) :], position):
                return None
            shift = position - len(opening)
            spans.append((len(before) + shift, len(through.rstrip()) + shift))
            position = len(through) + shift
            first = _PAIR
        return spans if position == len(text) else None

    def _check_placeholders(self, sample: Sample, text: str) -> None:
        if self._is_text_only:
            return
        token = self.processor.image_token
        expected, found = int(sample.image is not None), text.count(token)
        if found != expected:
            raise ValueError(f"{sample.source}: expected {expected} {token} in the templated text, found {found}")

    def _tokenize(self, samples: Sequence[Sample], texts: list[str]) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """Per sample the token-wise lists as tensors [T] (offset_mapping [T, 2]), and the images' inputs."""
        text_options = {"padding": False, "truncation": False, "return_offsets_mapping": True}
        if self._is_text_only:  # whose templates write every special token themselves
            encoded = self.tokenizer(texts, add_special_tokens=False, **text_options)
        else:
            images = [image for sample in samples if (image := sample.load_image()) is not None]
            encoded = self.processor(
                text=texts, images=images or None, text_kwargs=text_options, images_kwargs={"return_tensors": "pt"}
            )
        token_wise = [name for name in encoded if isinstance(encoded[name], list)]
        rows = [
            {name: torch.as_tensor(encoded[name][index]) for name in token_wise if name != "token_type_ids"}
            for index in range(len(samples))
        ]
        return rows, {name: value for name, value in encoded.items() if name not in token_wise}

    def _with_features(
        self, samples: Sequence[Sample], texts: list[str]
    ) -> tuple[list[dict], dict[str, torch.Tensor | list[dict]]]:
        """As `_tokenize`, with FEATURES in place of pixels."""
        rows, images = [], []
        for sample, text in zip(samples, texts, strict=True):
            key = self._feature_key(sample)
            kept = self.features.read(key) if key else None
            if kept is None:
                (row,), inputs = self._tokenize([sample], [text])
                others = {name: value for name, value in inputs.items() if name != "pixel_values"}
                image = {"key": key, "inputs": inputs, "others": others}
            else:
                row = self._expanded(text, len(kept["features"]))
                others = {name: kept.pop(name) for name in set(kept) & set(self.processor.model_input_names)}
                image = {"key": key, "output": kept, "others": others}
            rows.append(row)
            if sample.image is not None:
                images.append(image)
        if not images:
            return rows, {}
        together = {name: torch.cat([image["others"][name] for image in images]) for name in images[0]["others"]}
        return rows, {**together, FEATURES: images}

    def _feature_key(self, sample: Sample) -> str | None:
        """None where there is no image, or the sample makes its own of the file (augmentation)."""
        if sample.image is None or type(sample).load_image is not Sample.load_image:
            return None
        settings = self.processor.image_processor.to_dict()
        return self.features.key(json.dumps(settings, sort_keys=True, default=_kind_of), sample.image_digest())

    def _expanded(self, text: str, number: int) -> dict[str, torch.Tensor]:
        """What `_tokenize` gives for a text whose image becomes so many tokens, without the image."""
        token = self.processor.image_token
        encoded = self.tokenizer(text.replace(token, token * number), return_offsets_mapping=True)
        row = {name: torch.as_tensor(value) for name, value in encoded.items() if name != "token_type_ids"}
        if "mm_token_type_ids" in self.processor.model_input_names:
            row["mm_token_type_ids"] = self._is_image(row["input_ids"]).long()
        return row

    def _labels(self, row: dict[str, torch.Tensor], text: str, spans: list[tuple[int, int]]) -> torch.Tensor:
        """Labels [T]: the token ids from the first to the last token that touches an answer, else -100."""
        input_ids, (starts, ends) = row["input_ids"], row["offset_mapping"].unbind(dim=1)
        shift = 0
        if not self._is_text_only:
            # Spans were measured before the processor wrote more than a placeholder for the image, before every answer:
            # so everything is as far from the text's end as before. Ends are those of tokens, as some skip white space.
            plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            shift = int(ends.max()) - max(end for _, end in plain)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        # A token without a place in the text, such as one that the tokenizer adds, ends at 0 and touches nothing.
        placed = ends.nonzero().squeeze(1)
        starts, ends = starts[placed].contiguous(), ends[placed].contiguous()
        span_starts, span_ends = (torch.tensor(spans) + shift).unbind(dim=1)
        firsts = torch.searchsorted(ends, span_starts.contiguous(), right=True)  # the first that ends behind its start
        lasts = torch.searchsorted(starts, span_ends.contiguous()) - 1  # the last that starts before its end
        for first, last in zip(placed[firsts].tolist(), placed[lasts].tolist()):
            # From first to last: a tokenizer that trims offsets gives pure white space an empty range.
            labels[first : last + 1] = input_ids[first : last + 1]
        return labels

    def _is_image(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which tokens stand for image features."""
        if self._is_text_only:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == self.processor.image_token_id

    def _truncate(self, sample: Sample, row: dict[str, torch.Tensor]) -> None:
        """Cut the row's tensors at max_length in place, unless that would cut the image or every target."""
        length = len(row["input_ids"])
        if self.max_length is None or length <= self.max_length:
            return
        image_positions = self._is_image(row["input_ids"]).nonzero()
        image_end = int(image_positions[-1]) + 1 if len(image_positions) else 0
        if image_end > self.max_length:
            raise ValueError(
                f"{sample.source}: expected the image to end within max_length {self.max_length}, "
                f"it ends at token {image_end} of {length}"
            )
        first = 1 + int((row["labels"][1:] != IGNORE_INDEX).nonzero()[0])  # the first token is nobody's target
        if first >= self.max_length:
            raise ValueError(
                f"{sample.source}: expected {'an answer' if self.loss == 'answers' else 'what counts'} to begin within "
                f"max_length {self.max_length}, the first begins at token {first + 1} of {length}"
            )
        for name, value in row.items():
            row[name] = value[: self.max_length]

    def _pad(self, rows: list[dict[str, torch.Tensor]], side: str | None = None) -> dict[str, torch.Tensor]:
        """Stack rows of unequal length into [B, T], each kind with its own padding value; `side` wins."""
        side = side or self.padding_side
        padding = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        missing = -max(len(row["input_ids"]) for row in rows) % self.multiple_of
        further = (missing, 0) if side == "left" else (0, missing)
        batch = {}
        for name in rows[0]:
            value = padding.get(name, 0)
            parts = [row[name] for row in rows]
            if name == "labels":  # a row's first token is nobody's target: not that of padding before it either
                parts = [torch.cat((labels.new_full((1,), IGNORE_INDEX), labels[1:])) for labels in parts]
            stacked = pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)
            batch[name] = torch.nn.functional.pad(stacked, further, value=value)
        return batch


def _runs(labels: list[int]) -> list[list[int]]:
    """The labelled tokens, run by run."""
    groups = itertools.groupby(labels, key=lambda label: label != IGNORE_INDEX)
    return [list(run) for is_labelled, run in groups if is_labelled]


def _kind_of(value: Any) -> str:
    return type(value).__name__
