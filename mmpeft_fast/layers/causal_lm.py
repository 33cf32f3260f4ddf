"""The token-sparse tail: head, cross-entropy and the last layer's queries only where a label is.

In visual question answering 1 to 5 % of the tokens carry one; everything here is exact.
"""

import inspect

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmpeft_fast.layers.class_swap import Swapped
from mmpeft_fast.layers.sites import Unfusable, read_linear
from mmpeft_fast.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from mmpeft_fast.ops.rows import take_rows
from mmpeft_fast.ops.segments import Segment

# Above this share of supervised positions gathering saves too little to be worth its copies.
_SPARSE_SHARE = 0.75


def supervised_targets(labels: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions whose next token carries a label, and that label.

    Args:
        labels: [B, T] int64 aligned with the inputs (not shifted), -100 = ignored.
        capacity: C, at least the largest number of supervised positions in a sample. Read from `labels` when None,
            which costs a host synchronisation on an accelerator; T under torch.compile, which allows none.

    Returns:
        rows [B, C] int64, ascending, and targets [B, C]; surplus places hold position T - 1 and -100. With C = T all
        positions in order.
    """
    batch, length = labels.shape
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    position = torch.arange(length, device=labels.device)
    if capacity is None and torch.compiler.is_compiling():
        capacity = length
    if capacity is not None and capacity >= length:
        return position.expand(batch, length), targets
    supervised = targets != IGNORE_INDEX
    if capacity is None:
        capacity = max(1, int(supervised.sum(1).max())) if batch else 1
    # Unsupervised positions sort behind all others and read as the last position, whose target is always ignored.
    rows = torch.where(supervised, position, length).sort(dim=1).values[:, :capacity].clamp(max=length - 1)
    return rows, targets.gather(1, rows)


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

    Extra keywords of `forward`, both to spare host synchronisations: `supervised_capacity` (see `supervised_targets`)
    and `right_padded` (padding, if any, is on the right and unlabelled; read from a mask on the CPU when not given):
    attention then needs no mask. Under torch.compile neither is read from tensors: without them the tail takes all
    positions, and attention the mask. `num_items_in_batch` divides the summed loss, as in transformers.
    """

    keep_logits = False
    sparse_last_layer = True
    full_attention = True

    def forward(self, *args, **kwargs):
        hints = {name: kwargs.get(name) for name in ("supervised_capacity", "right_padded")}
        # A dict of our own: a compiler does not look through what others do once it has seen the caller's changed.
        kwargs = {name: value for name, value in kwargs.items() if name not in hints}
        base_forward = super().forward
        if args:
            # Only the names bound to positions matter here; transformers' models are called by keyword.
            kwargs = dict(zip(inspect.signature(base_forward).parameters, args, strict=False)) | kwargs
        if self.training:
            kwargs.setdefault("use_cache", False)  # a training pass has no use for keys and values
        if not self.training or self.keep_logits or kwargs.get("labels") is None:
            return base_forward(**kwargs)
        if asks_for_attentions(self, kwargs):  # the layers run unfused, and nothing is saved by a tail behind them
            return base_forward(**kwargs)
        return self._loss_from_tail(**hints, **kwargs)

    def _loss_from_tail(
        self,
        *,
        supervised_capacity,
        right_padded,
        labels,
        num_items_in_batch=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        rows, targets = supervised_targets(labels, supervised_capacity)
        if right_padded is None:
            right_padded = causality_suffices(kwargs.get("attention_mask"), rows, targets)
        tail = {}
        has_past = kwargs.get("past_key_values") is not None  # keys that the queries' own positions do not count
        if right_padded and self.full_attention and not has_past:
            tail["ignore_padding"] = True
        if (
            self.sparse_last_layer
            and not has_past
            and rows.shape[1] <= _SPARSE_SHARE * labels.shape[1]
            and not kwargs.get("output_hidden_states")
        ):
            tail["supervised_rows"] = rows
        outputs = self.base_model(**kwargs, **tail)
        hidden = outputs.last_hidden_state
        if "supervised_rows" not in tail and rows.shape[1] < hidden.shape[1]:
            hidden = take_rows(hidden, rows)
        loss = self._head_loss(hidden.flatten(0, 1), targets.flatten(), num_items_in_batch)
        names = ("hidden_states", "image_hidden_states", "video_hidden_states")
        fields = {name: outputs.get(name) for name in names}
        return self.output_class(loss=loss, **{k: v for k, v in fields.items() if v is not None})

    def _head_loss(self, hidden: Tensor, targets: Tensor, count: Tensor | int | None) -> Tensor:
        head = _plain_head(self.lm_head)
        if head is not None:
            return linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, count=count)
        # An adapted, wrapped or hooked head computes its own logits; they are few.
        logits = self.lm_head(hidden).float()
        total = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (
            (targets != IGNORE_INDEX).sum() if count is None else torch.as_tensor(count, device=total.device)
        )


def asks_for_attentions(model: nn.Module, kwargs: dict) -> bool:
    """Whether a call of a transformers model wants attention weights, by argument or else by configuration."""
    asked = kwargs.get("output_attentions")
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "output_attentions", False) for config in configs) if asked is None else bool(asked)


def _plain_head(module: nn.Module) -> Segment | None:
    """The head's weight and bias where they are all of it: no branches, no scales, nothing that a call would do."""
    try:
        segment, in_scale = read_linear(module)
    except Unfusable:
        return None
    return None if segment.branches or segment.out_scale is not None or in_scale is not None else segment
