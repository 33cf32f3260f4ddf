"""Loss and in-place gradient of gathered rows."""

import pytest
import torch
from mmpeft_kernels.cross_entropy import cross_entropy_
from mmpeft_kernels.tile import Tile

from tests.closeness import assert_as_close_as_eager


def reference(logits, labels, count):
    logits = logits.detach().requires_grad_()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(wide, labels, ignore_index=-100, reduction="sum") / count
    return loss, *torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows, num_words", [(1, 7), (7, 130)])
def test_loss_and_gradient(dtype, num_rows, num_words):
    torch.manual_seed(0)
    buffer = (3 * torch.randn(num_rows, num_words + 2)).to(dtype)
    logits = buffer[:, :num_words]
    logits[-1, : num_words // 2] = float("-inf")
    labels = torch.randint(num_words // 2, num_words, (num_rows,))
    labels[2:3] = -100
    count = torch.tensor(max(1, num_rows - 1))
    eager, truth = reference(logits, labels, count), reference(logits.double(), labels, count)
    beyond = buffer[:, num_words:].clone()
    tile = Tile(block_m=1, block_n=32)
    before = logits.clone()
    loss = cross_entropy_(logits, labels, count, need_grad=False, tile=tile)
    assert torch.equal(logits, before) and loss.shape == () and loss.dtype == torch.float32
    assert torch.equal(cross_entropy_(logits, labels, count, tile=tile), loss)
    assert_as_close_as_eager(loss, eager[0], truth[0], "loss")
    assert_as_close_as_eager(logits, eager[1], truth[1], "dlogits")
    assert torch.equal(buffer[:, num_words:], beyond)


def test_rows_without_a_label_and_no_rows():
    logits, labels = torch.randn(3, 9), torch.full((3,), -100)
    assert cross_entropy_(logits, labels, torch.tensor(1)) == 0 and not logits.any()
    logits = torch.randn(3, 9)
    assert cross_entropy_(logits, labels, torch.tensor(0)).isnan() and not logits.any()
    assert cross_entropy_(logits[:0], labels[:0], torch.tensor(1)) == 0
