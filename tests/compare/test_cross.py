"""Every run on every text: as its own weights measure it, and as the run itself did."""

import itertools
import math

import numpy as np
import pytest
import torch
from toys.diversity import (
    TINY,
    parsed,
    results_of,
    run_folders,
    study_of,
    whole,  # noqa: F401 (a fixture)
)

import run_pretrain_diversity as script
from core import World
from lab.compare import diversity_report
from lab.data import mixture


def test_a_cell_of_the_matrix_is_the_mean_loss_of_the_runs_own_weights_on_that_text(whole, monkeypatch):
    monkeypatch.chdir(whole)
    study = study_of()
    for arm, tag in (("a", "a-s0"), ("a+b", "a_b-s0")):
        cfg, model, _ = script.load_model(run_folders()[tag], World())
        text = mixture.load_text(parsed(*TINY), World())
        for name in "abc":
            tokens = text.tokens[name]
            end, stream = tokens.tokenizer.eos_token_id, tokens.parts["test"].astype(np.int64)
            places = np.flatnonzero(stream == end)
            nats = hits = count = size = 0
            for begin, stop in itertools.pairwise(places):
                for at in range(begin, stop, cfg.block_size):
                    last = min(at + cfg.block_size, stop)  # the last window is moved back, to be a full one
                    first = max(begin, last - cfg.block_size)
                    ids = torch.from_numpy(stream[first : last + 1])
                    with torch.no_grad():
                        hidden = model.hidden(ids[None, :-1])[0]
                        log_probs = (hidden @ model.wte.weight.t()).log_softmax(-1)[at - first :]
                    targets = ids[at - first + 1 :]
                    nats -= log_probs[range(len(targets)), targets].double().sum().item()
                    hits += (log_probs.argmax(-1) == targets).sum().item()
                    count += len(targets)
                    size += (targets != end).sum().item()  # a byte each, and none for the end
            found = {
                figure: study["matrix"][figure][arm][name]["mean"] for figure in diversity_report.FIGURES
            }
            want = {
                "loss": nats / count,
                "accuracy": hits / count,
                "bits per byte": nats / size / math.log(2),
            }
            assert found == pytest.approx(want, abs=2e-5), (arm, name)


def test_the_figures_that_a_run_ends_with_are_those_of_the_study(whole, monkeypatch):
    monkeypatch.chdir(whole)
    losses, ended = study_of()["matrix"]["loss"], results_of()
    for arm, tag in {"a": "a-s0", "b": "b-s0", "a+b": "a_b-s0"}.items():
        assert losses[arm]["c"]["mean"] == pytest.approx(ended[tag]["test/loss"], abs=1e-6)
        assert losses[arm]["c"]["interval"] == pytest.approx(ended[tag]["test/loss_interval"], abs=1e-6)
        for name in mixture.shares_of(arm):
            assert losses[arm][name]["mean"] == pytest.approx(ended[tag][f"test/{name}/loss"], abs=1e-6)
        assert ended[tag]["blocks_read"] == {n: 36 * s for n, s in mixture.shares_of(arm).items()}
