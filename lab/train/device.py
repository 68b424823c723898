"""Between the host and a card: copies that nobody waits for, one read a step, the memory that is free."""

import torch


def to_device(tensor, device) -> torch.Tensor:
    """A host tensor on `device`.

    A card fetches it from pinned memory by itself. A copy from other memory makes the host wait, like
    .item(), until the card has done all that it was given, and then the card waits for the host.
    """
    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # strided ones are copied twice


def free_bytes(device) -> int | None:
    """Memory of a card that this process may still take; none where the driver does not tell."""
    backend = getattr(torch, device.type, None)
    try:
        unused = backend.memory_reserved(device) - backend.memory_allocated(device)
        return backend.mem_get_info(device)[0] + unused
    except (AttributeError, RuntimeError):  # an older torch.xpu; some of Intel's drivers
        return None


def read_step(losses, norm) -> tuple[float, float]:
    """(sum of a step's losses, its gradient norm) as numbers, by one copy: the one wait of a step.

    losses: of the micro-batches, scalars like norm; none on a rank without rows.
    """
    *losses, norm = torch.stack([*losses, norm]).tolist()
    return sum(losses), norm
