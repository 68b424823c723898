"""torch.compile of a model's parts: of training alone, and when a run does it unasked."""

import torch

WORTH = 600  # seconds of training, by the forecast: on a card start-up takes about one of these ten minutes


class Compiled:
    """What a module does when it is called: compiled where gradients are recorded, elsewhere as written.

    Evaluation and generation would be further graphs, of the eight that torch keeps of a piece of code, for a
    few percent of a run's time. Off until `switch`.
    """

    def __init__(self, part, dynamic):
        self.part, self.dynamic, self.on, self.fast = part, dynamic, False, None
        part._compiled_call_impl = self  # what Module.compile sets, too

    def __call__(self, *args, **kwargs):
        if not (self.on and torch.is_grad_enabled()):
            return self.part._call_impl(*args, **kwargs)
        if self.fast is None:  # importing the compiler takes seconds
            self.fast = torch.compile(self.part._call_impl, dynamic=self.dynamic)
        return self.fast(*args, **kwargs)


_parts = []  # of the model that is being trained


def prepare(parts, dynamic):
    """Makes ready to compile these parts, until the next call. dynamic: one graph for all lengths (none: once
    a second one comes). Per block, not the whole model: one small graph serves all blocks, checkpointing and
    caches stay outside, and what is left, a lookup and a norm, is a hundredth of a step."""
    _parts[:] = [Compiled(part, dynamic) for part in parts]


def switch(on, falls_back=False):
    """Whether training is compiled from here on. falls_back: where that fails it runs as written, with a
    warning of torch's, instead of ending in an error."""
    if on:
        import torch._dynamo

        torch._dynamo.config.suppress_errors = falls_back
    for part in _parts:
        part.on = on
