"""4-bit weights as numbers, in C++ against indices and scales taken one by one."""

import pytest
import torch

from tests.csrc.arrays import strided


def UNPACK(*arguments):
    torch.ops.mmpeft_fast_c.unpack_4bit(*arguments)


@pytest.mark.parametrize("num_rows, width", [(1, 2), (3, 64), (5, 48), (4, 40), (7, 33), (3, 1), (2, 1000), (0, 8)])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_every_element_has_its_number_and_its_scale(num_rows, width, blocksize, dtype, instruction_set):
    count = num_rows * width
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8)
    scales, code = torch.rand(-(-count // blocksize)) + 0.5, torch.randn(16)
    indices = torch.stack((packed >> 4, packed & 15), 1).flatten()[:count].long()
    expected = (code[indices] * scales[torch.arange(count) // blocksize]).to(dtype).view(num_rows, width)
    out = strided(num_rows, width, dtype=dtype)
    around = out._base.clone()
    UNPACK(packed, scales, code, blocksize, out)
    assert torch.equal(out, expected)
    out.copy_(around[..., 3 : 3 + width])
    assert torch.equal(out._base, around)  # nothing was written beside it


@pytest.mark.parametrize("num_rows, width", [(1, 1), (3, 64), (5, 33), (0, 8), (4, 0)])
def test_rows_of_bytes(num_rows, width, dtype, instruction_set):
    values = torch.randint(-128, 128, (num_rows, width + 3), dtype=torch.int8)[:, 1 : 1 + width]
    scales, out = torch.rand(num_rows), strided(num_rows, width, dtype=dtype)
    torch.ops.mmpeft_fast_c.unpack_8bit(values, scales, out)
    assert torch.equal(out, (values.float() * scales[:, None]).to(dtype))
    with pytest.raises(ValueError, match=r"unpack_8bit: expected scales of sizes"):
        torch.ops.mmpeft_fast_c.unpack_8bit(values, torch.rand(num_rows + 1), out)


def test_what_does_not_fit_is_refused():
    packed, scales, code = torch.zeros(16, dtype=torch.uint8), torch.ones(1), torch.zeros(16)
    out = torch.empty(4, 8)
    for arguments, message in (
        ((packed[:-1], scales, code, 64, out), r"unpack_4bit: expected packed of sizes \[16\], got \[15\]"),
        ((packed, scales[:0], code, 64, out), r"expected scales of sizes \[1\], got \[0\]"),
        ((packed, scales, code[:8], 64, out), r"expected code of sizes \[16\], got \[8\]"),
        ((packed, scales, code, 48, out), "expected a blocksize that is a power of two and at least 16, got 48"),
        ((packed, scales, code, 64, out.int()), "expected out in Float, BFloat16 or Half, got Int"),
        ((packed, scales, code, 64, out.t()), "expected packed of sizes|expected out with unit column stride"),
    ):
        with pytest.raises(ValueError, match=message):
            UNPACK(*arguments)
