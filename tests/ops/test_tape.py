"""Tapes do again what a function did, on other tensors of the same geometry, bit by bit."""

import random
import threading
import weakref
from typing import NamedTuple

import pytest
import torch

from mmpeft_fast.ops import tape


@pytest.fixture(autouse=True)
def _fresh():
    tape.forget()
    yield
    tape.forget()


class Pair(NamedTuple):
    first: torch.Tensor
    rest: list


def results_of(function, calls, key="test"):
    """What every call gives through a tape, and how often the function itself ran."""
    ran = []

    def counted(*tensors):
        ran.append(None)
        return function(*tensors)

    with torch.no_grad():
        return [tape.run(key, tensors, counted) for tensors in calls], len(ran)


def tensors_of(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [tensor for part in result for tensor in tensors_of(part)]
    return []


def assert_same(function, make, calls=5):
    """The function is run twice, for the first call and for the recording; results and what it wrote are the same."""
    torch.manual_seed(0)
    given = [make() for _ in range(calls)]
    copies = [torch.utils._pytree.tree_map(lambda t: t, again) for again in clones(given)]
    results, ran = results_of(function, given)
    assert ran == min(2, calls)
    for result, tensors, copy in zip(results, given, copies, strict=True):
        with torch.no_grad():
            expected = function(*copy)
        assert torch.utils._pytree.tree_structure(result) == torch.utils._pytree.tree_structure(expected)
        for got, wanted in zip(tensors_of(result), tensors_of(expected), strict=True):
            assert got.shape == wanted.shape and got.stride() == wanted.stride() and got.dtype == wanted.dtype
            assert torch.equal(got, wanted)
        for got, wanted in zip(tensors, copy, strict=True):
            assert got is None or torch.equal(got, wanted)


def clones(calls):
    """Copies of the tensors of all calls; tensors of one storage lie in one storage again."""
    copied = []
    for tensors in calls:
        storages = {}
        for tensor in tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                storages.setdefault(storage._cdata, storage.clone())
        copied.append(
            [
                None if t is None
                else torch.empty(0, dtype=t.dtype).set_(
                    storages[t.untyped_storage()._cdata], t.storage_offset(), t.shape, t.stride()
                )
                for t in tensors
            ]
        )  # fmt: skip
    return copied


def test_views_products_and_writes():
    def function(x, weight, bias, out):
        y = torch.addmm(bias, x, weight.t())
        first, second = y.split([2, 4], dim=1)
        first.mul_(2.0)
        wide = y.unflatten(1, (2, 3)).transpose(0, 1)[1:].contiguous()
        out[:, :3].copy_(second[:, 1:])
        torch.mul(second, 0.5, out=out[:, 3:7])
        out[:, 7:].zero_()
        return Pair(first, [second, wide.to(torch.float64), None, 3, (x, out[:0])])

    assert_same(function, lambda: [torch.randn(5, 4), torch.randn(6, 4), torch.randn(6), torch.zeros(5, 9)])


def test_inputs_of_one_storage():
    def function(q, k, together):
        both = q.as_strided((4, 3), (3, 1))
        both += 1
        return k.clone(), together.sum(0), both @ together.t()

    def make():
        buffer = torch.randn(5, 3)
        return [buffer[1:3], buffer[3:5], buffer]

    assert_same(function, make)


def test_a_dropped_tensors_memory_is_used_again():
    """Tensors are told apart by where they lie: names have to follow memory that is freed and given away."""

    def function(x):
        total = torch.zeros_like(x)
        for scale in range(1, 6):
            part = x * scale
            view = part[:, 1:]
            total[:, 1:] += view
            del part, view
        return total

    assert_same(function, lambda: [torch.randn(64, 64)])


def test_random_programs():
    """Straight-line programs of views, products and writes, each on five sets of tensors."""
    for seed in range(40):
        random.seed(seed)
        steps = [(random.randrange(7), random.randrange(100), random.randrange(100)) for _ in range(12)]

        def function(x, y, steps=steps):
            pool = [x, y, x[1:], y.t()]
            for kind, i, j in steps:
                a, b = pool[i % len(pool)], pool[j % len(pool)]
                if kind == 0:
                    pool.append(a @ torch.ones_like(a).t())
                elif kind == 1:
                    pool.append(a[: max(1, a.shape[0] // 2)])
                elif kind == 2:
                    pool.append(a.t())
                elif kind == 3:
                    a.add_(0.5)
                elif kind == 4:
                    pool.append(torch.cat([a.flatten(), b.flatten()])[None])
                elif kind == 5:
                    new = torch.empty_like(a)
                    new.copy_(a)
                    pool.append(new)
                else:
                    pool = [x, y, *pool[-2:], (a * 2)[:, 1:] if a.shape[1] > 1 else a]
            return pool

        tape.forget()
        assert_same(function, lambda: [torch.randn(4, 6), torch.randn(4, 6)], calls=4)


def test_another_geometry_is_another_call():
    def function(x):
        return x.reshape(-1)

    calls = [[torch.randn(4, 4)], [torch.randn(4, 4)], [torch.randn(4, 4).t()], [torch.randn(2, 8)]]
    calls += [[torch.randn(4, 4).double()], [torch.randn(17)[1:].view(4, 4)], [torch.randn(4, 4)]]
    results, ran = results_of(function, calls)
    assert ran == 6  # the last one alone is known
    for result, (x,) in zip(results, calls, strict=True):
        assert torch.equal(result, x.reshape(-1))


def test_one_storage_or_two_is_another_geometry():
    """What lies side by side is read as one matrix where it is one buffer."""
    from mmpeft_fast.ops.stacking import rows

    def function(a, b):
        return rows([a, b]) * 2

    def apart():
        return [torch.randn(2, 3), torch.randn(2, 3)]

    def together():
        return list(torch.randn(4, 3).split(2))

    for makes in ((apart, together), (together, apart)):
        tape.forget()
        for make in (*makes, *makes, *makes):
            a, b = make()
            assert torch.equal(tape.run("rows", (a, b), function), torch.cat([a, b]) * 2)


def test_keys_keep_functions_apart():
    x = torch.randn(3)
    for _ in range(4):
        assert torch.equal(tape.run(("times", 2.0), (x,), lambda x: x * 2.0), x * 2.0)
        assert torch.equal(tape.run(("times", 3.0), (x,), lambda x: x * 3.0), x * 3.0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3),
        lambda x: x.view(torch.int32) + 1,
    ],
    ids=["reads an element", "a shape of elements", "a tensor made before", "a view of another dtype"],
)
def test_what_cannot_be_done_again_is_not_taped(function):
    ones = torch.full((3,), 7.0)
    run = function if "ones" not in function.__code__.co_names else lambda x: x + ones
    results, ran = results_of(run, calls := [[torch.randn(3)] for _ in range(5)])
    assert ran == 5
    assert all(torch.equal(result, run(x)) for result, (x,) in zip(results, calls, strict=True))


def test_random_numbers_are_drawn_anew():
    def function(x):
        return torch.rand_like(x)

    results, ran = results_of(function, [[torch.zeros(8)] for _ in range(4)])
    assert ran == 2 and len({tuple(result.tolist()) for result in results}) == 4
    torch.manual_seed(5)
    again = tape.run("test", [torch.zeros(8)], function)
    torch.manual_seed(5)
    assert torch.equal(again, torch.rand(8))


def test_tensors_are_dropped_after_their_last_use(monkeypatch):
    """As in the function itself: at most two of five intermediates are alive together."""
    alive, most = weakref.WeakSet(), []
    multiply = torch.mul

    def spying(*args, **options):
        result = multiply(*args, **options)
        alive.add(result)
        most.append(len(alive))
        return result

    monkeypatch.setitem(tape._BINDINGS, torch.ops.aten.mul.Tensor, spying)

    def function(x):
        for _ in range(5):
            x = x * 2
        return x

    _, ran = results_of(function, [[torch.randn(3)] for _ in range(3)])
    assert ran == 2 and max(most) == 2 and len(most) == 5


def test_a_recording_holds_no_tensor():
    x = torch.randn(3)
    reference = weakref.ref(x)
    for _ in range(3):
        tape.run("test", (x,), lambda x: (x * 2, x[1:]))
    del x
    assert reference() is None


def test_the_oldest_are_dropped(monkeypatch):
    monkeypatch.setattr(tape, "_MOST", 3)
    for size in range(1, 6):
        for _ in range(3):
            tape.run("test", (torch.zeros(size),), lambda x: x * 2)
    assert len(tape._tapes) == 3
    _, ran = results_of(lambda x: x * 2, [[torch.zeros(5)]])
    assert ran == 0


def test_modes_see_every_step():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(4, 4)
    for _ in range(4):
        tape.run("test", (x,), lambda x: x @ x)
    with FlopCounterMode(display=False) as flops:
        tape.run("test", (x,), lambda x: x @ x)
    assert flops.get_total_flops() == 128
    with tape.no_tapes():
        _, ran = results_of(lambda x: x @ x, [[x]] * 3)
    assert ran == 3


def test_threads_record_their_own_steps():
    """Backward passes run in threads of their own; two recordings at a time do not mix."""
    barrier, results = threading.Barrier(2), {}

    def function(scale, x):
        barrier.wait()
        return (x * scale).add_(1)

    def work(scale):
        x = torch.full((3,), 1.0)
        for _ in range(2):
            tape.run(scale, (x,), lambda x: function(scale, x))
        results[scale] = tape.run(scale, (x,), lambda x: None)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (2.0, 5.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {scale: result[0].item() for scale, result in results.items()} == {2.0: 3.0, 5.0: 6.0}


def test_tensors_that_are_more_than_their_elements_are_left_alone():
    class Tracked(torch.Tensor):
        pass

    _, ran = results_of(lambda x: x * 2, [[torch.zeros(3).as_subclass(Tracked)] for _ in range(4)])
    assert ran == 4
