"""What goes to a card and what is read from it; on one itself: test_fake_device.py."""

import pytest
import torch

from lab.train.device import read_step, to_device


def test_on_a_cpu_nothing_is_copied():
    ids = torch.arange(6)[1:]
    assert to_device(ids, "cpu") is ids and to_device(ids, torch.device("cpu")) is ids


def test_to_a_card_it_goes_from_pinned_memory_and_nobody_waits(monkeypatch):
    ids, sent = torch.arange(6), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *how, **more: sent.append((self, how, more)))
    to_device(ids, "cuda")
    ((tensor, how, more),) = sent
    assert tensor is not ids and torch.equal(tensor, ids)
    assert how == (torch.device("cuda"),) and more == {"non_blocking": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_summed_as_python_sums_them_and_read_with_the_norm(dtype):
    """In fp64, whatever their dtype, in their order: as the sum of each one's .item()."""
    losses = [torch.tensor(value, dtype=dtype) for value in (1e8, 0.1, 3.3, 7e-5)]
    norm = torch.tensor(0.7, dtype=dtype)
    assert read_step(losses, norm) == (sum(loss.item() for loss in losses), norm.item())
    assert read_step([], norm) == (0, norm.item())
