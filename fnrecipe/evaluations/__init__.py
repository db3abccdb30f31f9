"""What recipes of text measure beside training, by the section `evaluations` of their config."""

from fnrecipe.evaluations.named import named_evaluations as named_evaluations
