"""Several boxes: what rank 0 writes must be seen by all before the first step."""

import os
from pathlib import Path

import pytest

from core import UserError, World
from lab.run import disks


def test_the_cache_is_below_the_project_unless_a_place_is_given(monkeypatch):
    monkeypatch.setenv("TOKEN_CACHE", "")  # as `TOKEN_CACHE= python ...` has it
    assert disks.cache_root() == disks.PROJECT / "cache"
    monkeypatch.setenv("TOKEN_CACHE", "/volume")
    assert disks.cache_root() == Path("/volume")


def test_one_disk_leaves_no_token_and_another_is_named(monkeypatch):
    disks.require_one_disk(World(), "runs", "cache")
    assert sorted(path.name for path in Path().iterdir()) == ["cache", "runs"]
    assert os.listdir("runs") == os.listdir("cache") == []


class Store(dict):
    set = dict.__setitem__

    def get(self, key):
        return self[key].encode()


def test_a_rank_that_does_not_see_it_is_named_with_its_host(monkeypatch):
    world, store = World(rank=1, size=2), Store()
    object.__setattr__(world, "store", store)
    monkeypatch.setattr(disks, "SIGHT_SECONDS", 0.1)
    monkeypatch.setattr(disks.socket, "gethostname", lambda: "box2")
    monkeypatch.setattr(disks, "all_reduce_sum", lambda world, values: values)
    monkeypatch.setattr(disks, "on_main", lambda world, function, *args: "elsewhere/token")
    with pytest.raises(UserError, match="rank 1 on box2 does not see rank 0's runs: use one that all boxes"):
        disks.require_one_disk(world, "runs")
