"""Laws of the data order: quotas at every prefix, every sample once an epoch, a pure function of (seed, position)."""

from copy import deepcopy
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2_vlm.config import UserError
from aimv2_vlm.data.order import (
    ORDER_VERSION,
    Draws,
    Order,
    compare_fingerprints,
    draws,
    fingerprint,
    permute,
    sample_seed,
)

PAPER_MIXTURE = [0.30, 0.30, 0.09, 0.28, 0.03]
shard_sizes = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(length, key):
    assert sorted(permute(index, length, key) for index in range(length)) == list(range(length))


def test_permute_depends_on_key_and_mixes():
    images = {tuple(permute(index, 100, key) for index in range(100)) for key in range(50)}
    assert len(images) == 50
    # over many keys index 0 of ten goes everywhere about equally often (chi-squared, 9 degrees of freedom, p = 1e-6
    # at 45)
    counts = Counter(permute(0, 10, key) for key in range(5000))
    assert sum((counts[place] - 500) ** 2 / 500 for place in range(10)) < 45


def deviation(weights, num_positions):
    order = Order([[5]] * len(weights), weights, seed=0)
    counts, worst, total = [0] * len(weights), 0.0, sum(weights)
    for position in range(num_positions):
        source, rank = order.source_at(position)
        assert rank == counts[source]
        counts[source] += 1
        worst = max(worst, *(abs(count - (position + 1) * weight / total) for count, weight in zip(counts, weights)))
    assert order.counts(num_positions) == counts
    return worst, order


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_quota_within_one_sample_at_every_prefix(weights):
    worst, order = deviation(weights, 600)
    assert order.quota_bound <= 1
    assert worst <= order.quota_bound + 1e-9


@given(st.lists(st.floats(0.001, 10), min_size=5, max_size=12))
@settings(max_examples=25, deadline=None)
def test_quota_of_many_sources_keeps_its_proven_bound(weights):
    worst, order = deviation(weights, 400)
    assert worst <= order.quota_bound + 1e-9


def test_quota_of_the_papers_mixture():
    worst, order = deviation(PAPER_MIXTURE, 20_000)
    assert worst < 1 and order.quota_bound < 1
    # and far away, where counts come from arithmetic alone
    far = 10**12 + 12_345
    assert all(abs(count - far * weight) < 1.01 for count, weight in zip(order.counts(far), PAPER_MIXTURE))


@given(shard_sizes, st.integers(1, 10), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_each_sample_once(sizes, window, seed):
    order = Order([sizes], [1.0], seed, window)
    every = sorted((shard, sample) for shard, size in enumerate(sizes) for sample in range(size))
    for epoch in range(3):
        places = [order.locate(epoch * len(every) + number) for number in range(len(every))]
        assert {place.epoch for place in places} == {epoch}
        assert sorted((place.shard, place.sample) for place in places) == every


def test_every_epoch_of_each_source_in_a_mixture():
    sizes, weights = [[3, 4], [10], [1, 0, 6]], [5, 1, 2]
    order = Order(sizes, weights, seed=3)
    seen = Counter()
    for position in range(order.positions_for_epochs(2)):
        place = order.locate(position)
        seen[place.source, place.shard, place.sample, place.epoch] += 1
    for source, counts in enumerate(sizes):
        for epoch in range(2):
            for shard, count in enumerate(counts):
                assert all(seen[source, shard, sample, epoch] == 1 for sample in range(count))
    assert max(seen.values()) == 1


def test_positions_for_epochs_is_the_least():
    order = Order([[3, 4], [10], [7]], [5, 1, 2], seed=3)
    positions = order.positions_for_epochs()
    enough = [order.counts(positions)[source] >= total for source, total in enumerate(order.totals)]
    one_less = [order.counts(positions - 1)[source] >= total for source, total in enumerate(order.totals)]
    assert all(enough) and not all(one_less)


def test_shuffle_stays_in_its_window():
    order = Order([[10] * 12], [1.0], seed=1, window_shards=4)
    for window in range(3):
        shards = {order.locate(position).shard for position in range(window * 40, window * 40 + 40)}
        assert len(shards) == 4
    first = [order.locate(position)[1:3] for position in range(120)]
    second = [order.locate(position)[1:3] for position in range(120, 240)]
    assert first != second
    assert first != sorted(first)


def test_order_is_pure():
    """Asked backwards, from a copy, after other questions, in another process: the same answers."""
    arguments = ([[5, 9, 2], [11] * 7], [0.3, 0.7], 42, 2)
    order = Order(*arguments)
    forward = [order.locate(position) for position in range(300)]
    copy = deepcopy(Order(*arguments))
    assert [copy.locate(position) for position in reversed(range(300))] == forward[::-1]
    code = f"from aimv2_vlm.data.order import Order\no = Order(*{arguments!r})\n"
    code += "print([tuple(o.locate(p)) for p in range(300)])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert eval(output) == [tuple(place) for place in forward]
    assert forward != [Order(*arguments[:2], 43, 2).locate(position) for position in range(300)]


def test_order_version_is_frozen():
    """These places belong to ORDER_VERSION 1: whoever changes them must raise the version, or running trainings
    repeat samples."""
    order = Order([[5, 9, 2], [11] * 7], [0.3, 0.7], 42, 2)
    assert ORDER_VERSION == 1
    assert [tuple(order.locate(position)) for position in (0, 1, 2, 1000, 10**9)] == FROZEN_PLACES
    assert (sample_seed(1, 2), draws(1, 2, "prefix").integers(1, 256), draws(1, 2, "crop").uniform()) == FROZEN_DRAWS


FROZEN_PLACES = [(1, 5, 1, 0), (0, 1, 2, 0), (1, 5, 5, 0), (1, 1, 9, 9), (1, 6, 3, 9090909)]
FROZEN_DRAWS = (3605582220083422458, 24, 0.1971532034718766)


@pytest.mark.parametrize(
    "counts, weights, text",
    [
        ([[1]], [-1.0], "not negative"),
        ([[1]], [float("nan")], "not negative"),
        ([[1]], [0.0], "every weight is 0"),
        ([[0, 0]], [1.0], "not one usable sample"),
        ([[1], [1]], [1.0], "2 sources and 1 weights"),
        ([], [], "0 sources"),
    ],
)
def test_impossible_mixtures_are_named(counts, weights, text):
    with pytest.raises(UserError, match=text):
        Order(counts, weights, 0)


def test_a_source_of_weight_zero_is_left_out_even_when_empty():
    order = Order([[4], [0]], [1.0, 0], 0)
    assert {order.locate(position).source for position in range(50)} == {0}


def test_draws_are_uniform_and_streams_differ():
    values = [draws(7, position, "crop").uniform() for position in range(4000)]
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 4000 - 0.5) < 0.03
    integers = Counter(draws(7, position, "prefix").integers(1, 5) for position in range(4000))
    assert set(integers) == {1, 2, 3, 4} and min(integers.values()) > 850
    assert draws(7, 0, "crop").bits() != draws(7, 0, "prefix").bits() != draws(8, 0, "prefix").bits()
    stream = Draws(5)
    assert len({stream.bits() for _ in range(1000)}) == 1000


def facts(**changes):
    shard = {"name": "00000.tar", "size": 10, "count": 2, "digest": "a"} | changes.pop("shard", {})
    source = {"name": "coyo", "weight": 0.5, "caption": "txt", "shards": [shard]} | changes.pop("source", {})
    return fingerprint(changes.pop("seed", 1), changes.pop("window", 16), [source], **changes)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seed": 2}, "seed: 1 -> 2"),
        ({"window": 8}, "window_shards: 16 -> 8"),
        ({"source": {"weight": 0.6}}, "source 'coyo': weight: 0.5 -> 0.6"),
        ({"source": {"caption": "json:x"}}, "source 'coyo': caption: 'txt' -> 'json:x'"),
        ({"source": {"name": "dfn"}}, "source 'coyo': removed"),
        ({"shard": {"size": 11}}, "source 'coyo': shard 00000.tar: size 10 -> 11"),
        ({"shard": {"digest": "b"}}, "source 'coyo': shard 00000.tar: digest a -> b"),
        ({"shard": {"name": "x.tar"}}, "source 'coyo': shard number 0: 00000.tar -> x.tar"),
        ({"source": {"shards": []}}, "source 'coyo': shard 00000.tar removed"),
    ],
)
def test_a_changed_fingerprint_says_what_changed(change, said):
    assert compare_fingerprints(facts(), facts()) == []
    assert facts()["digest"] != facts(**change)["digest"]
    assert said in compare_fingerprints(facts(), facts(**change))


def test_sources_in_another_order_are_a_change():
    one, two = ({"name": name, "weight": 1.0, "caption": "txt", "shards": []} for name in "ab")
    assert compare_fingerprints(fingerprint(0, 1, [one, two]), fingerprint(0, 1, [two, one])) == [
        "the order of the sources changed"
    ]
