"""Components that a config names: a module each, with the class of its config and the function that makes it of that.

They are free of torch, which their functions import when they are called: `fnrecipe dump-config` reads them too.
"""
