import itertools

import pytest

from mmpeft_fast.data import Packing, Size
from mmpeft_fast.train import SampleOrder


def order(**options):
    return SampleOrder(**{"num_samples": 22, "global_batch_size": 8, "batch_size": 2, "seed": 5, **options})


def flat(batches):
    return [index for batch in batches for index in batch]


def test_every_epoch_sees_every_sample_once_in_a_new_order():
    plan = order()
    assert plan.steps_per_epoch == 3
    epochs = [[plan.micro_batches(3 * epoch + step) for step in range(3)] for epoch in range(2)]
    first, second = ([index for step in epoch for index in flat(step)] for epoch in epochs)
    assert sorted(first) == sorted(second) == list(range(22))
    assert first != second
    assert [[len(batch) for batch in step] for step in epochs[0]] == [[2] * 4, [2] * 4, [2] * 3]


def test_step_alone_decides_and_seed_matters():
    assert order().micro_batches(7) == order().micro_batches(7)
    assert order().micro_batches(7) != order(seed=6).micro_batches(7)
    assert flat(order().micro_batches(1)) == flat(order(batch_size=8).micro_batches(1))


def test_processes_share_each_global_batch_evenly():
    whole, ranks = (
        order(num_samples=21),
        [order(num_samples=21, process_index=rank, num_processes=2) for rank in (0, 1)],
    )
    for step in range(whole.steps_per_epoch):
        shares = [rank.micro_batches(step) for rank in ranks]
        assert [len(batch) for batch in shares[0]] == [len(batch) for batch in shares[1]]
        chosen = flat(whole.micro_batches(step))
        assert sorted(flat(shares[0]) + flat(shares[1])) == sorted(chosen[: len(chosen) // 2 * 2])


def test_epochs_round_up_and_tiny_sets_are_one_step():
    assert order().num_steps(1.5) == 5
    assert order(num_samples=3).num_steps(2) == 2
    assert order(num_samples=17, num_processes=2, process_index=1).steps_per_epoch == 2


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"multiple of 6 \(batch_size 2 on 3 processes\), got 8"):
        order(num_processes=3)
    with pytest.raises(ValueError, match="data: expected at least 4 samples, got 3"):
        order(num_samples=3, num_processes=4)


def test_samples_of_one_group_stay_together():
    groups = tuple(index % 5 for index in range(22))
    order_ = order(groups=groups)
    for epoch in range(3):
        steps = range(epoch * order_.steps_per_epoch, (epoch + 1) * order_.steps_per_epoch)
        seen = [index for step in steps for batch in order_.micro_batches(step) for index in batch]
        assert sorted(seen) == list(range(22))
        runs = [group for group, _ in itertools.groupby(groups[index] for index in seen)]
        assert sorted(runs) == list(range(5))
    assert order_.micro_batches(0) != order(groups=groups, seed=6).micro_batches(0)


def test_groups_stay_on_a_process():
    groups = tuple(index // 4 for index in range(32))
    for step in range(4):
        shares = []
        for process in range(2):
            order_ = order(groups=groups, num_samples=32, num_processes=2, process_index=process)
            shares.append({groups[index] for batch in order_.micro_batches(step) for index in batch})
        assert not shares[0] & shares[1]


def test_a_group_for_each_sample():
    with pytest.raises(ValueError, match="groups: expected one of each of 22 samples, got 3"):
        order(groups=(0, 1, 2))


def test_token_budgets_cut_a_step_anew_and_alike_on_all_processes():
    sizes = tuple(Size(1 + index % 7) for index in range(22))
    options = {"packing": Packing(sizes=sizes, budget=10), "global_batch_size": 9}
    whole = order(**options)
    by_samples = order(global_batch_size=9, batch_size=9)
    for step in range(2 * whole.steps_per_epoch):
        batches = whole.micro_batches(step)
        assert sorted(flat(batches)) == sorted(flat(by_samples.micro_batches(step)))
        assert all(sum(sizes[index].length for index in batch) <= 10 for batch in batches)
        ranks = [order(**options, process_index=rank, num_processes=2).micro_batches(step) for rank in (0, 1)]
        assert len(ranks[0]) == len(ranks[1])
        seen = flat(ranks[0]) + flat(ranks[1])
        assert len(set(seen)) == len(seen) == len(flat(batches)) // 2 * 2 and set(seen) <= set(flat(batches))
