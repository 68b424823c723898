"""Two sets of one Hub repository are two texts."""

from ranks import everywhere
from toys.mixture import own_cache  # noqa: F401 (a fixture)

import lab.data.hub
import lab.data.text
from lab.data import tables


def test_two_sets_of_one_repository_are_two_texts(monkeypatch):
    """Streamed, they share the repository's commit: journal 002's two subsets would be called the same."""
    asked = []
    everywhere(
        monkeypatch.setattr,
        tables,
        "_hub_commit",
        lambda repo, revision: asked.append((repo, revision)) or "c0ffee",
    )
    everywhere(monkeypatch.setattr, lab.data.hub, "_hub_answers", lambda: True)
    names = ("owner/pile:PubMed Abstracts", "owner/pile:USPTO@v1", "owner/pile")
    found = [tables.data_fingerprint(name, streaming=True) for name in names]
    assert found == ["c0ffee:PubMed Abstracts", "c0ffee:USPTO", "c0ffee"]
    assert asked == [("owner/pile", None), ("owner/pile", "v1"), ("owner/pile", None)]
