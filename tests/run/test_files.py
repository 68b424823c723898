"""Files and folders that appear whole or not at all."""

import os

import pytest

import core


def test_a_folder_or_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), core.whole_folder(tmp_path / "a") as aside:
        (aside / "x").write_text("half")
        raise KeyError
    with pytest.raises(KeyError), core.whole_file(tmp_path / "b") as file:
        file.write("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".a.leftover").mkdir()  # by a process that was killed yesterday
    os.utime(tmp_path / ".a.leftover", (0, 0))
    with core.whole_folder(tmp_path / "a") as aside:
        (aside / "x").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
