"""Dividing devices over stages."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import PlacementError, check_split, deal, dedicate, share, split_gpus

COSTS = st.dictionaries(st.sampled_from("abcd"), st.floats(0.001, 10, allow_nan=False), min_size=1, max_size=4)


@given(COSTS, st.integers(0, 6))
def test_a_split_is_the_best_of_all_splits(costs: dict[str, float], spare: int) -> None:
    gpus = len(costs) + spare
    counts = split_gpus(costs, gpus)
    assert list(counts) == list(costs)
    assert sum(counts.values()) == gpus
    assert min(counts.values()) >= 1

    def throughput(split: tuple[int, ...]) -> float:
        return min(n / cost for n, cost in zip(split, costs.values(), strict=True))

    best = max(throughput(split) for split in product(range(1, spare + 2), repeat=len(costs)) if sum(split) == gpus)
    assert throughput(tuple(counts.values())) == best


def test_spare_gpus_follow_the_cost() -> None:
    assert split_gpus({"detect": 3.0, "recognize": 1.0}, 8) == {"detect": 6, "recognize": 2}


@pytest.mark.parametrize(
    ("costs", "gpus", "says"),
    [({}, 4, "no stage"), ({"a": 0.0}, 4, "above 0"), ({"a": 1.0, "b": 1.0}, 1, "let stages share")],
)
def test_an_impossible_split_says_why(costs: dict[str, float], gpus: int, says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        split_gpus(costs, gpus)


def test_an_explicit_split_is_checked() -> None:
    assert check_split(["a", "b"], [3, 1], 4) == {"a": 3, "b": 1}
    with pytest.raises(PlacementError, match="3 numbers for 2 stages"):
        check_split(["a", "b"], [1, 2, 1], 4)
    with pytest.raises(PlacementError, match="at least one"):
        check_split(["a", "b"], [4, 0], 4)
    with pytest.raises(PlacementError, match="adds up to 3 GPUs, not 4"):
        check_split(["a", "b"], [2, 1], 4)


@given(COSTS, st.integers(1, 6))
def test_sharing_places_every_model_once(costs: dict[str, float], gpus: int) -> None:
    held = share(costs, gpus)
    assert len(held) == gpus
    assert sorted(model for models in held for model in models) == sorted(costs)
    # Greedy by cost: no device carries more than the ideal plus one model.
    heaviest = max(sum(costs[model] for model in models) for models in held)
    assert heaviest <= sum(costs.values()) / gpus + max(costs.values()) + 1e-9


def test_devices_are_dealt_out_evenly_and_in_order() -> None:
    held = dedicate({"a": 3, "b": 2})
    assert held == [["a"], ["a"], ["a"], ["b"], ["b"]]
    assert deal(held, 2) == [{0: ["a"], 1: ["a"], 2: ["a"]}, {0: ["b"], 1: ["b"]}]
    with pytest.raises(PlacementError, match="5 devices"):
        deal(held, 6)
