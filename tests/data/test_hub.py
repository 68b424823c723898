"""Two sets of one Hub repository are two texts."""

import socket
import threading
from pathlib import Path

import pytest
from ranks import everywhere
from toys.mixture import own_cache  # noqa: F401 (a fixture)

import lab.data.hub
import lab.data.text
from lab.data import hub, tables
from lab.errors import UserError


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


def test_a_folder_without_a_model_is_called_so_and_its_runs_are_named():
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("prose")
    Path("runs/gpt_scratch/20260101_000000").mkdir(parents=True)
    Path("runs/gpt_scratch/20260101_000000/config.json").write_text("{}")
    for what in ("model", "tokenizer"):
        with pytest.raises(UserError, match=rf"^{what} in folder texts cannot be loaded: it has no"):
            hub.local_or_hub(what, "texts", fails, "none")
        with pytest.raises(UserError, match=r"holds runs, name one, e.g. runs/gpt_scratch/2026"):
            hub.local_or_hub(what, "runs/gpt_scratch", fails, "none")
    Path("texts/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter: run_lora.py --model BASE --adapter texts$"):
        hub.local_or_hub("tokenizer", "texts", fails, "none")
    with pytest.raises(UserError, match=r"^model texts/a.txt is a file: use a folder, or none$"):
        hub.local_or_hub("model", "texts/a.txt", fails, "none")
    assert hub.first_line(ValueError("of field 'n':\n    no integer\nmore")) == "of field 'n': no integer"
    Path("texts/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^model in folder texts cannot be loaded: of several lines$"):
        hub.local_or_hub("model", "texts", fails, "none")


def fails():
    raise ValueError("of several lines\nand more")


@pytest.mark.parametrize(("variables", "words"), [
    ({"HF_HUB_OFFLINE": "1"}, "(HF_HUB_OFFLINE is set and HF_HOME"),
    ({"HF_ENDPOINT": "hf-mirror.com"}, "(the Hub does not answer at HF_ENDPOINT hf-mirror.com and HF_HOME"),
    ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "(the Hub does not answer at HF_ENDPOINT http://127.0.0.1:9 "),
    ({"HF_HUB_OFFLINE": "off"}, "(of several lines)"),
])  # fmt: skip
def test_why_the_hub_is_not_asked_is_said(variables, words, monkeypatch, capfd):
    import huggingface_hub.constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_asked", [])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # is put back
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        hub.from_hub("model", "owner/name", fails, "tiny:gpt2")
    assert words in str(error.value) and capfd.readouterr().err == ""


def test_an_answer_that_is_no_HTTP_is_none_and_ends_no_thread_in_a_traceback(monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def garble():
            with server.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=garble, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        assert not hub._hub_answers()
    assert raised == []
