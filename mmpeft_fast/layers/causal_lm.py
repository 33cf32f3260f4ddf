"""The token-sparse tail: head, cross-entropy and the last layer's queries only where a label is.

In visual question answering 1 to 5 % of the tokens carry one; everything here is exact.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmpeft_fast.documents import Documents, check_documents, misplaced
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.layers.class_swap import Swapped, is_swapped, own_class
from mmpeft_fast.layers.decoder_paths import DecoderPaths
from mmpeft_fast.layers.known import package_of, why_unknown, why_unknown_function
from mmpeft_fast.layers.reading import is_fused
from mmpeft_fast.layers.shared_contexts import SharedContexts
from mmpeft_fast.layers.sites import Unfusable, has_hooks, is_plain, read_linear, read_norm, why_not_as_known
from mmpeft_fast.ops.cross_entropy import linear_cross_entropy
from mmpeft_fast.ops.rows import take_rows
from mmpeft_fast.ops.segments import Segment

# Keywords beside those in the signature of a model's forward whose meaning for the loss is known.
_KEYWORDS = frozenset(("num_items_in_batch", "output_attentions", "output_hidden_states", "return_dict", "use_cache"))
# Above this share of supervised positions gathering saves too little to be worth its copies.
_SPARSE_SHARE = 0.75


def supervised_targets(labels: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions whose next token carries a label, and that label.

    Args:
        labels: [B, T] int64 aligned with the inputs (not shifted), -100 = ignored.
        capacity: C, at least the largest number of supervised positions in a sample. Read from `labels` when None,
            which costs a host synchronisation on an accelerator; T where nothing can be read: under torch.compile, on
            meta and fake tensors.

    Returns:
        rows [B, C] int64, ascending, and targets [B, C]; surplus places hold position T - 1 and -100. With C = T all
        positions in order.

    Raises:
        ValueError: capacity is no positive integer; on the CPU also where a sample has more supervised positions.
            Elsewhere that would cost a synchronisation: see `overflow`.
    """
    _check_capacity(capacity)
    batch, length = labels.shape
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    position = torch.arange(length, device=labels.device)
    readable = not (torch.compiler.is_compiling() or isinstance(labels, FakeTensor) or labels.is_meta)
    if capacity is None and not readable:
        capacity = length
    if capacity is not None and capacity >= length:
        return position.expand(batch, length), targets
    supervised = targets != IGNORE_INDEX
    if capacity is None or (readable and labels.device.type == "cpu"):
        most = int(supervised.sum(1).max()) if batch else 0
        if capacity is not None and most > capacity:
            raise ValueError(f"expected supervised_capacity of at least {most}, got {capacity}")
        capacity = max(1, most) if capacity is None else capacity
    # Unsupervised positions sort behind all others and read as the last position, whose target is always ignored.
    rows = torch.where(supervised, position, length).sort(dim=1).values[:, :capacity].clamp(max=length - 1)
    return rows, targets.gather(1, rows)


def _check_capacity(capacity: int | None) -> None:
    if capacity is not None and (type(capacity) is not int or capacity < 1):
        raise ValueError(f"expected supervised_capacity to be a positive integer or None, got {capacity!r}")


def overflow(labels: Tensor, capacity: int) -> Tensor:
    """1 where every sample of labels [B, T] has at most `capacity` supervised positions, nan otherwise, without a
    synchronisation: what the loss is multiplied by, so that labels are never dropped silently."""
    most = (labels[:, 1:] != IGNORE_INDEX).sum(1).amax()
    return torch.where(most > capacity, torch.nan, 1.0)


def causality_suffices(attention_mask: Tensor | None, rows: Tensor, targets: Tensor) -> bool:
    """Whether a padding mask [B, T] can be left out: padding is on the right only and carries no label itself, so no
    supervised row (`supervised_targets`) can see it.

    Decided only where that needs no host synchronisation; on accelerators and under torch.compile the caller has to say
    so (`right_padded`).
    """
    if torch.compiler.is_compiling() or isinstance(attention_mask, FakeTensor):
        return False
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.device.type != "cpu":
        return False
    real = attention_mask.bool()
    labelled_are_real = (real.gather(1, rows) | (targets == IGNORE_INDEX)).all()
    return bool(real[:, 0].all() and (real[:, 1:] <= real[:, :-1]).all() and labelled_are_real)


class FusedCausalLM(Swapped):
    """Mixin for `...ForConditionalGeneration`: training with labels takes the loss from the token-sparse tail and
    returns `logits=None`, unless the model was fused with `keep_logits=True`.

    The tail runs only where the model's own forward and loss are known to be what it computes (`why_not_known`),
    and the call has nothing that changes them (a keyword that is not known, labels of another shape than the
    inputs, embeddings that are trained outside, a tuple as result). Everything else runs the model's own forward
    over the fused decoder. A training call that does not ask for `use_cache` gets no keys and values.

    Extra keywords of `forward`, both to spare host synchronisations: `supervised_capacity` (see `supervised_targets`)
    and `right_padded` (padding, if any, is on the right and unlabelled; read from a mask on the CPU when not given):
    attention then needs no mask. Under torch.compile neither is read from tensors: without them the tail takes all
    positions, and attention the mask. `num_items_in_batch` divides the summed loss, as in transformers. A
    `supervised_capacity` that is too small is an error on the CPU and a loss of nan elsewhere.

    `documents` (`mmpeft_fast.Documents`), with position_ids and without a cache, says which tokens of a row see which.
    It stands in place of attention_mask, which is then not read. Where a layer does not run fused, all take a dense
    mask.
    """

    keep_logits = False
    sparse_last_layer = True
    full_attention = True
    decoder_path = ""
    paths = DecoderPaths()

    def forward(self, *args, **kwargs):
        hints = {name: kwargs.get(name) for name in ("supervised_capacity", "right_padded")}
        _check_capacity(hints["supervised_capacity"])
        documents = kwargs.get("documents")
        # A dict of our own: a compiler does not look through what others do once it has seen the caller's changed.
        kwargs = {name: value for name, value in kwargs.items() if name not in (*hints, "documents")}
        base_forward = super().forward
        if args:
            # Only the names bound to positions matter here; transformers' models are called by keyword.
            kwargs = dict(zip(inspect.signature(base_forward).parameters, args, strict=False)) | kwargs
        if documents is not None:
            kwargs |= self._of_documents(documents, kwargs)
        is_free = self._returns_fields(kwargs) and not self._may_be_packed(kwargs)
        if self.training and is_free and kwargs.get("use_cache") is None:
            # A training pass has no use for keys and values, where nobody counts on their place in a tuple.
            kwargs["use_cache"] = False
        if self.training and not self.keep_logits and self._takes_loss(kwargs):
            return self._loss_from_tail(**hints, **kwargs)
        return base_forward(**kwargs)

    def _of_documents(self, documents: Documents, kwargs: dict) -> dict:
        """What a call has beside its own arguments where its rows are documents.

        Raises:
            ValueError: what the rows hold cannot be told, or would not be computed.
        """
        inputs = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        (batch, length), labels = inputs.shape[:2], kwargs.get("labels")
        check_documents(documents, batch, length)
        if kwargs.get("position_ids") is None and any(len(row) > 1 for row in documents.rows):
            raise ValueError("documents: expected position_ids, which begin anew with each document, got none")
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            raise ValueError("documents: expected a call without a cache of keys and values, got one with")
        if not self.full_attention:
            raise ValueError("documents: expected attention to every token before, but the decoder's window slides")
        if isinstance(labels, Tensor) and labels.device.type == "cpu" and labels.shape == (batch, length):
            marked = misplaced(documents, labels)
            if marked.any():
                row, position = marked.nonzero()[0].tolist()
                raise ValueError(
                    "documents: expected labels where one token beside it predicts another, not on a document's first "
                    f"token nor on what several documents share, got one at row {row}, position {position}"
                )
        layers = self._mark_tail()
        if layers and self._run_fused(layers):
            # Of four dimensions, so that no mask is made of it; the layers do not read it.
            return {
                "documents": documents, "use_cache": False,
                "attention_mask": torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=inputs.device),
            }  # fmt: skip
        mask = documents.mask(length, inputs.device)
        if self.config.get_text_config()._attn_implementation == "eager":
            dtype = next(self.parameters()).dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return {"use_cache": False, "attention_mask": mask}

    def _run_fused(self, layers: list[nn.Module]) -> bool:
        """Whether all layers would run fused, and are called as they are known to be."""
        return all(is_fused(layer, self.paths) and not has_hooks(layer) for layer in layers)

    def _may_be_packed(self, kwargs) -> bool:
        """Without a mask and a cache transformers takes positions that jump for several sequences in one."""
        return kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None

    def _returns_fields(self, kwargs) -> bool:
        asked = kwargs.get("return_dict")
        return getattr(self.config, "return_dict", True) if asked is None else bool(asked)

    def _takes_loss(self, kwargs) -> bool:
        """Whether the tail computes what the model's own forward would, for these arguments."""
        labels = kwargs.get("labels")
        if labels is None or not self._returns_fields(kwargs):
            return False
        if asks_for(self, "output_attentions", kwargs):  # all layers run unfused: a tail behind them saves nothing
            return False
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if isinstance(inputs, Tensor) and inputs.requires_grad:
            # Somebody above the model trains what it is given, and may take a loss of his own from the logits, as HF
            # PEFT's CPT does: nothing here tells it from prompt tuning, which does not.
            return False
        known_tensors = (
            isinstance(labels, Tensor)
            and isinstance(inputs, Tensor)
            and labels.dtype == torch.int64
            and labels.device == inputs.device
            and labels.dim() == 2
            and labels.shape == inputs.shape[:2]
            and labels.numel() > 0
        )
        if not known_tensors or not _is_count(kwargs.get("num_items_in_batch")):
            return False
        keep = kwargs.get("logits_to_keep", 0)
        if isinstance(keep, Tensor) or keep:
            return False
        unknown = set(kwargs) - _KEYWORDS - _parameters_of(own_class(self)) - {"documents"}
        if any(name != "shift_labels" or kwargs[name] is not None for name in unknown):
            return False
        return why_not_known(self) is None

    def why_no_tail(self) -> str | None:
        """Why training runs the last layer at every position, and attention under a padding mask; None: it need not."""
        decoder = self.get_submodule(self.decoder_path)
        for module, role in called_parts(self, decoder):
            reason = why_not_as_known(module, role)
            if reason is not None:
                return reason
        if not _is_read(self.paths.norm_of(decoder)):
            return "its final norm is not known"
        depth = decoder.config.num_hidden_layers
        layers = self.paths.layers_of(decoder)[:depth]
        if len(layers) < depth or len(set(map(id, layers))) < depth:
            return f"its {depth} layers are not {depth} modules"
        return None if all(map(is_swapped, layers)) else "not all of its layers are fused"

    def _mark_tail(self) -> list[nn.Module]:
        """The layers that run at this call, the last one marked; none where nobody can say which these are."""
        if self.why_no_tail() is not None:
            return []
        decoder = self.get_submodule(self.decoder_path)
        layers = self.paths.layers_of(decoder)[: decoder.config.num_hidden_layers]
        for layer in layers:
            if layer.is_tail != (layer is layers[-1]):
                layer.is_tail = layer is layers[-1]
        return layers

    def _loss_from_tail(
        self,
        *,
        supervised_capacity,
        right_padded,
        labels,
        num_items_in_batch=None,
        logits_to_keep=0,
        return_dict=None,
        shift_labels=None,
        documents=None,
        **kwargs,
    ):
        rows, targets = supervised_targets(labels, supervised_capacity)
        mask = kwargs.get("attention_mask")
        if right_padded is None:
            right_padded = causality_suffices(mask, rows, targets)
        tail = {}
        # Keys of a cache are not counted by the queries' own positions, and it wants to be given all of them.
        no_cache = kwargs.get("past_key_values") is None and kwargs.get("use_cache") is False
        is_seen = asks_for(self, "output_hidden_states", kwargs)
        shared = None
        if isinstance(self.base_model, SharedContexts) and documents is None and not is_seen:
            shared = tail["shared_rows"] = self.base_model.rows_to_share(kwargs)
        layers = self._mark_tail() if no_cache and not is_seen and shared is None else []
        if layers and not has_hooks(layers[-1]):
            is_padding = mask.dim() == 2 if isinstance(mask, Tensor) else mask is None
            can_be_ignored = right_padded and self.full_attention and is_padding and not self._may_be_packed(kwargs)
            if can_be_ignored and self._run_fused(layers):
                tail["ignore_padding"] = True
            if self.sparse_last_layer and rows.shape[1] <= _SPARSE_SHARE * labels.shape[1]:
                tail["supervised_rows"] = rows
        if documents is not None:
            tail["documents"] = documents
        outputs = self.base_model(**kwargs, **tail)
        hidden = outputs.last_hidden_state
        if "supervised_rows" not in tail and rows.shape[1] < hidden.shape[1]:
            hidden = take_rows(hidden, rows)
        loss = self._head_loss(hidden.flatten(0, 1), targets.flatten(), num_items_in_batch)
        if labels.device.type != "cpu":
            if supervised_capacity is not None and rows.shape[1] < labels.shape[1]:
                loss = loss * overflow(labels, supervised_capacity)
            if documents is not None:  # what is an error on the CPU
                loss = loss * torch.where(misplaced(documents, labels).any(), torch.nan, 1.0)
        names = ("past_key_values", "hidden_states", "attentions", "image_hidden_states", "video_hidden_states")
        fields = {name: outputs.get(name) for name in names}
        return self.output_class(loss=loss, **{k: v for k, v in fields.items() if v is not None})

    def _head_loss(self, hidden: Tensor, targets: Tensor, count: Tensor | int | None) -> Tensor:
        supervised = (targets != IGNORE_INDEX).sum()
        count = supervised if count is None else torch.as_tensor(count, device=hidden.device)
        head = _plain_head(self.lm_head)
        if head is None or not is_plain(hidden):
            # An adapted, wrapped or hooked head computes its own logits; they are few.
            logits = self.lm_head(hidden).float()
            total = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
            return total / count
        # Where nothing is supervised the gradients are zero, whatever the loss is divided by.
        divisor = torch.where(supervised > 0, count.reshape(()), 1)
        loss = linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, count=divisor)
        return torch.where(supervised > 0, loss, torch.zeros_like(loss) / count)


def called_parts(model: nn.Module, decoder: nn.Module) -> list[tuple[nn.Module, str]]:
    """What stands between a model and its layers, and what it is known as."""
    above = [] if model.base_model is decoder else [(model.base_model, "multimodal_model")]
    return [*above, (decoder, "decoder")]


def _is_read(norm: nn.Module) -> bool:
    """Whether the final norm works row by row."""
    if any("forward" in part.__dict__ or has_hooks(part) for part in norm.modules()):
        return False
    try:
        read_norm(norm, is_called=True)
    except Unfusable:
        return False
    return True


def why_not_known(model: nn.Module) -> str | None:
    """Why the token-sparse tail may not take over a model's head and loss, or None: it computes what the library's own
    forward does with the library's own loss and a head that works row by row."""
    reason = why_not_own_forward(model, "causal_lm")
    if reason is None:
        reason = why_unknown_function(model.loss_function, "loss")
    return reason or _why_not_head(model)


def why_not_own_forward(module: nn.Module, role: str) -> str | None:
    """Why calling the module may run another forward than what is known as `role`, or None."""
    if "forward" in module.__dict__ and not (is_swapped(module) and _is_wrapped_by_library(module)):
        return f"the forward of a {type(module).__name__} was replaced; fuse before that"
    return why_unknown(own_class(module), role)


def _is_wrapped_by_library(model: nn.Module) -> bool:
    """Whether a replaced forward is the class's own inside wrappers of accelerate (autocast) or torch."""
    forward = model.__dict__["forward"]
    while getattr(forward, "__func__", forward) is not type(model).forward:
        if package_of(forward) not in ("accelerate", "torch") or not hasattr(forward, "__wrapped__"):
            return False
        forward = forward.__wrapped__
    return True


def _why_not_head(model: nn.Module) -> str | None:
    head, config = model.lm_head, model.config.get_text_config()
    called = [module for module in head.modules() if type(module) is not nn.ParameterDict]
    if any(why_not_as_known(module, "head") is not None for module in called):
        return "its head is of a kind that is not known, or carries hooks"
    width = getattr(head, "out_features", None)
    return None if width == config.vocab_size else f"its head has {width} outputs, its vocabulary {config.vocab_size}"


def _is_count(count) -> bool:
    """Whether a loss may be divided by it inside the tail."""
    return count is None or isinstance(count, (int, float)) or (isinstance(count, Tensor) and count.numel() == 1)


@torch.compiler.assume_constant_result
def _parameters_of(kind: type) -> frozenset[str]:
    return _parameters(kind.forward)


@functools.cache
def _parameters(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def asks_for(model: nn.Module, name: str, kwargs: dict) -> bool:
    """Whether a call of a transformers model asks for more than its result ("output_attentions"), by argument or else
    by configuration."""
    asked = kwargs.get(name)
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, name, False) for config in configs) if asked is None else bool(asked)


def _plain_head(module: nn.Module) -> Segment | None:
    """The head's weight and bias where they are all of it: no branches, no scales, nothing that a call would do."""
    try:
        segment, in_scale = read_linear(module)
    except Unfusable:
        return None
    return None if segment.branches or segment.out_scale is not None or in_scale is not None else segment
