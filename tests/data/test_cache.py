"""The one cache of tokenised rows: whose folder is whose, and what is believed; bad rows; splits by group."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import core
from core import UserError, World
from lab.data import cache
from lab.data.cache import BadRows, cached_folder, cached_rows, is_whole, write_ids, write_texts
from lab.data.pairs import load_pairs, load_unlabelled, pairs_key, unlabelled_key


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_CACHE", str(tmp_path / "cache"))


def key(texts, builds):
    return {"fingerprint": {"data": texts}}


def build(folder, texts, builds):
    """Token ids of the letters; notes in the list `builds` that it was called."""
    builds.append(texts)
    letters = core.make_tokenizer("ascii", lambda: [])
    return {"integers": write_texts(folder, texts, letters), "texts": texts}


def dying(folder, texts, builds):
    build(folder, texts, builds)
    raise KeyError("in the middle")


def folders() -> list[str]:
    return sorted(path.name for path in Path("cache").iterdir() if path.name[0] != ".")


def test_rows_are_built_once_and_read_as_they_were_built():
    builds = []
    first = cached_rows(World(), "toy", key, build, ["ab", "", "abc"], builds)
    second = cached_rows(World(), "toy", key, build, ["ab", "", "abc"], builds)
    assert len(builds) == 1 and first.folder == second.folder and isinstance(second.tokens, np.memmap)
    assert second.offsets.tolist() == [0, 2, 2, 5] and second.tokens.dtype == np.uint16
    assert second.tokens[0:2].tolist() == second.tokens[2:4].tolist() == first.tokens[0:2].tolist()
    assert second.columns["texts"] == ["ab", "", "abc"] and second.fingerprint == {"data": ["ab", "", "abc"]}


def test_kinds_never_share_a_folder_and_a_changed_key_makes_another():
    builds = []
    one = cached_rows(World(), "toy", key, build, ["ab"], builds).folder
    other = cached_rows(World(), "other", key, build, ["ab"], builds).folder
    assert one.name.split("_")[1] != other.name.split("_")[1]
    cached_rows(World(), "toy", key, build, ["abc"], builds)
    assert len(builds) == len(folders()) == 3


def test_pairs_to_learn_from_and_the_same_file_to_be_judged_are_cached_apart():
    row = {"id": 1, "prompt": '["p"]', "response_a": '["a"]', "response_b": '["b"]'}
    winners = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    Path("test.jsonl").write_text(json.dumps(row | winners) + "\n")
    cfg = SimpleNamespace(data="test.jsonl", model="tiny:", max_documents=None, extra_data=(), teacher=())
    learnt = load_pairs(cfg, World())
    judged = load_unlabelled("test.jsonl", None, World())
    assert pairs_key(cfg, None)["fingerprint"] == unlabelled_key("test.jsonl", None)["fingerprint"]
    assert learnt.labels.tolist() == [0] and judged.labels.tolist() == [-1] and len(folders()) == 2


def test_a_builder_that_fails_leaves_nothing():
    builds = []
    with pytest.raises(KeyError):
        cached_rows(World(), "toy", key, dying, ["ab"], builds)
    assert list(Path("cache").iterdir()) == []
    assert cached_rows(World(), "toy", key, build, ["ab"], builds).columns["texts"] == ["ab"]


KILLED = """
import os, signal
from core import UserError, World
from lab.data.cache import BadRows, cached_rows
from data.test_cache import build, key

def killed(folder, texts, builds):
    build(folder, texts, builds)
    os.kill(os.getpid(), signal.SIGKILL)

cached_rows(World(), "toy", key, killed, ["ab"], [])
"""


def test_what_a_killed_builder_leaves_is_not_believed():
    assert subprocess.run([sys.executable, "-c", KILLED], env=os.environ).returncode == -9
    (half,) = Path("cache").iterdir()
    assert (half / "tokens.bin").exists() and folders() == []
    builds = []
    cached_rows(World(), "toy", key, build, ["ab"], builds)
    assert len(builds) == 1 and len(folders()) == 1


def test_two_builders_of_the_same_rows_do_not_hurt_each_other():
    builds = []

    def overtaken(folder, texts, builds):
        cached_rows(World(), "toy", key, build, texts, builds)  # as another process, meanwhile
        return build(folder, texts, builds)

    rows = cached_rows(World(), "toy", key, overtaken, ["ab"], builds)
    assert len(builds) == 2 and rows.offsets.tolist() == [0, 2]
    assert [path.name for path in Path("cache").iterdir()] == [rows.folder.name]


def test_no_token_at_all_can_be_read():
    def empty(folder):
        write_ids(folder, [[], []], "uint32")
        return {"integers": "uint32"}

    rows = cached_rows(World(), "toy", empty_key, empty)
    assert rows.offsets.tolist() == [0, 0, 0] and rows.tokens.dtype == np.uint32 and not len(rows.tokens)


def empty_key():
    return {"fingerprint": {}}


def test_bad_rows_are_named_and_too_many_are_an_error():
    bad = BadRows()
    bad.add(7, "no winner")
    bad.add(9, "no winner")
    assert bad.report(1000, "x.csv") == ["left out 2 row(s), no winner: 7, 9"]
    bad.add(12, "prompt is empty")
    with pytest.raises(
        UserError,
        match=r"x.csv: 3 of 100 rows are unusable, more than 1%.*row 7: no winner.*row 12: prompt is empty",
    ):
        bad.report(100, "x.csv")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def empty_file(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "rows.json", "manifest.json"])
@pytest.mark.parametrize("harm", [flip, cut, empty_file, Path.unlink], ids=lambda harm: harm.__name__)
def test_damaged_rows_are_named_set_aside_and_made_anew(name, harm, capfd):
    builds = []
    folder = cached_rows(World(), "toy", key, build, ["ab", "abc"], builds).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    harm(folder / name)
    rows = cached_rows(World(), "toy", key, build, ["ab", "abc"], builds)
    assert len(builds) == 2 and rows.columns["texts"] == ["ab", "abc"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    said = capfd.readouterr().err
    assert said.count("WARNING") == said.count("\n") == 1 and f"{folder}: {name}" in said
    (aside,) = Path("cache").glob(".damaged_*")
    assert aside.name in said
    cached_rows(World(), "toy", key, build, ["ab", "abc"], builds)
    assert len(builds) == 2 and capfd.readouterr().err == ""


def test_a_cache_is_hashed_once_a_start_and_again_when_a_file_changed(monkeypatch):
    folder, hashed = cached_rows(World(), "toy", key, build, ["ab"], []).folder, []
    cached_rows(World(), "toy", key, build, ["ab"], [])  # the first opening behind the building

    def noting(path):
        hashed.append(path.name)
        return core.sha256_file(path)

    monkeypatch.setattr(cache, "sha256_file", noting)
    assert is_whole(folder) and hashed == []
    os.utime(folder / "tokens.bin", ns=(1, 1))
    assert is_whole(folder) and sorted(hashed) == ["offsets.npy", "rows.json", "tokens.bin"]
    cache._checked.clear()  # as in another process
    assert is_whole(folder) and len(hashed) == 6


def full_disk(folder):
    raise OSError(28, "No space left on device")


def full_in_rust(folder):
    raise Exception("No space left on device (os error 28)")  # as tokenizers say it


@pytest.mark.parametrize("failing", [full_disk, full_in_rust])
def test_a_cache_that_cannot_be_written_is_one_line(failing):
    line = "the cache .*cache cannot be written .No space left on device.: set TOKEN_CACHE"
    with pytest.raises(UserError, match=line):
        cached_folder(core.cache_root() / "x", failing)


@pytest.mark.parametrize("where", ["file", "file/below", "x" * 300])
def test_a_cache_at_an_impossible_place_is_one_line(where, monkeypatch):
    Path("file").write_text("no folder")
    monkeypatch.setenv("TOKEN_CACHE", str(Path(where).absolute()))
    with pytest.raises(UserError, match="cannot be written") as error:
        cached_rows(World(), "toy", key, build, ["ab"], [])
    assert "\n" not in str(error.value)


def test_an_empty_TOKEN_CACHE_is_none(monkeypatch):
    monkeypatch.setenv("TOKEN_CACHE", "")
    assert core.cache_root().name == "cache" and core.cache_root().is_absolute()


def test_empty_rows_are_passed_over_and_told_unless_hardly_others_come():
    bad = BadRows()
    for number in range(1, 500):
        bad.pass_over(number, "x.jsonl")
    assert bad.report(1000, "x.jsonl") == ["passed over 499 empty row(s): 1, 2, 3, 4, 5, 6, 7, 8, ..."]
    with pytest.raises(UserError, match=r"x.jsonl: 1000 of 1000 rows are empty"):
        for number in range(500, 1001):
            bad.pass_over(number, "x.jsonl")


@pytest.mark.parametrize("where", ["data/rows.csv", "/usr/lib/python3/os.py"])
def test_data_that_cannot_be_read_amid_a_build_are_named_and_not_the_cache(where):
    def unreadable(folder):
        raise PermissionError(13, "Permission denied", where)

    with pytest.raises(UserError, match=rf"^{where} cannot be read \(Permission denied\): take it out"):
        cached_folder(core.cache_root() / "x", unreadable)


@pytest.mark.parametrize("where", ["cache", "cache/x/tokens.bin", "."])
def test_a_place_on_the_way_to_the_cache_is_the_caches(where):
    def unwritable(folder):
        raise PermissionError(13, "Permission denied", where)

    with pytest.raises(UserError, match=r"cache cannot be written \(Permission denied\): set TOKEN_CACHE"):
        cached_folder(core.cache_root() / "x", unwritable)
