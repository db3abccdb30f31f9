"""Types of config values that carry their own bound: `Count = Annotated[int, Bound("an integer of at least 1", …)]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import attrs


@attrs.frozen
class Bound:
    """What a value must satisfy, and how to say so."""

    expected: str
    holds: Callable[[float], bool]


PositiveInt = Annotated[int, Bound("an integer of at least 1", lambda x: x >= 1)]
NonNegativeInt = Annotated[int, Bound("an integer of at least 0", lambda x: x >= 0)]
PowerOfTwo = Annotated[int, Bound("a power of two", lambda x: x >= 1 and int(x) & (int(x) - 1) == 0)]
Positive = Annotated[float, Bound("a number above 0", lambda x: x > 0)]
NonNegative = Annotated[float, Bound("a number of at least 0", lambda x: x >= 0)]
NonPositive = Annotated[float, Bound("a number of at most 0", lambda x: x <= 0)]
AtLeastOne = Annotated[float, Bound("a number of at least 1", lambda x: x >= 1)]
Fraction = Annotated[float, Bound("a number from 0 up to 1", lambda x: 0 <= x <= 1)]
PositiveFraction = Annotated[float, Bound("a number above 0, up to 1", lambda x: 0 < x <= 1)]
ProperFraction = Annotated[float, Bound("a number from 0 up to, but not including, 1", lambda x: 0 <= x < 1)]
StepFraction = Annotated[float, Bound("a fraction below 1", lambda x: 0 <= x < 1)]
