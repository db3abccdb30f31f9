"""Models from elsewhere, and for elsewhere: weights of other directories as parameters, and parameters as such a directory."""

from fnrecipe.interop.pretrained import pretrained as pretrained
