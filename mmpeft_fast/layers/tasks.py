"""Which task each sample of a call is of, as a trained embedding that branches' gates read.

A model with one takes `task_ids` [B] among its arguments; it goes no further. Samples that name no task are of
`default_task`, which is also where `generate` has it.
"""

import torch
from torch import Tensor, nn

from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.placement import TaskPlacement

TASK_IDS = "task_ids"


class TaskEmbedding(nn.Module):
    """`embedding` [tasks, width], trained, in at least float32; lies on the decoder as `task_embedding`."""

    def __init__(self, placement: TaskPlacement, *, like: Tensor):
        super().__init__()
        options = {"dtype": accumulate_dtype(like.dtype), "device": like.device}
        self.embedding = nn.Embedding(placement.num_tasks, placement.width, **options)
        self.default_task = 0
        self._given: Tensor | None = None  # with a call of the model that has not come to its decoder
        self._ids: Tensor | None = None  # of the decoder's last call, and of its recomputation

    def forward(self) -> Tensor:
        """The embedding of each sample's task [B, width], or of one for all [1, width]."""
        if self._ids is None:
            return self.embedding.weight[self.default_task, None]
        return self.embedding(self._ids)

    def take(self, _, args, kwargs):
        """The model's forward pre-hook. Raises ValueError for ids that are no tasks of this model."""
        ids = kwargs.pop(TASK_IDS, None)
        if ids is not None:
            count = self.embedding.num_embeddings
            # On a GPU the look-up refuses others itself, and to ask for them here would make the host wait.
            is_outside = ids.device.type == "cpu" and bool(((ids < 0) | (ids >= count)).any())
            if ids.dim() != 1 or ids.is_floating_point() or is_outside:
                raise ValueError(f"{TASK_IDS}: expected integers [B] below {count}, got {ids.dtype} {list(ids.shape)}")
            ids = ids.to(self.embedding.weight.device)
        self._given = ids
        return args, kwargs

    def begin(self, *_) -> None:
        """The decoder's forward pre-hook."""
        self._ids, self._given = self._given, None

    def __getstate__(self):
        return {**self.__dict__, "_given": None, "_ids": None}


class TaskGate:
    """Kept on a branch as a plain attribute, so that the embedding stays registered in one place."""

    def __init__(self, tasks: TaskEmbedding):
        self.tasks = tasks

    def __call__(self, router: Tensor) -> Tensor:
        """softmax(G e) over experts [B or 1, 1, E], e the embedding of a sample's task; router: G [E, width]."""
        return torch.softmax(self.tasks().to(router.dtype) @ router.t(), dim=-1)[:, None]


def attach_tasks(model: nn.Module, decoder: nn.Module, tasks: TaskEmbedding) -> TaskGate:
    """Registers `tasks` on the decoder and lets the model take `task_ids`."""
    decoder.task_embedding = tasks
    model.register_forward_pre_hook(tasks.take, with_kwargs=True)
    decoder.register_forward_pre_hook(tasks.begin)
    return TaskGate(tasks)
