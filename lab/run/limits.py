"""What a number may be, stated in its type beside the constant: `batch: core.Count = 128`."""

import math
import typing
from typing import Annotated, NamedTuple


class Limits(NamedTuple):
    """Lowest and highest legal value."""

    low: float
    high: float = math.inf

    def __str__(self):
        return f"{self.low} or more" if self.high == math.inf else f"{self.low} to {self.high}"


def within(kind, low, high=math.inf):
    """The type of an int or float from `low` to `high`, both legal."""
    return Annotated[kind, Limits(low, high)]


Count = within(int, 1)  # 1 or more
Whole = within(int, 0)  # 0 or more
Amount = within(float, 0)  # minutes, dollars: 0 or more
Rate = within(float, 0)  # of learning, of decay: 0 or more
Share = within(float, 0, 1)
Seed = within(int, 0, 2**31)


def limits_of(hint) -> Limits | None:
    """Those of a type, or of a part of a union (`Count | None`); none without."""
    if typing.get_origin(hint) is Annotated:
        return next((each for each in hint.__metadata__ if isinstance(each, Limits)), None)
    return next(filter(None, map(limits_of, typing.get_args(hint))), None)
