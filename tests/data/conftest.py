"""Property tests here run on shared machines: no deadline, and no database beside the sources."""

from hypothesis import settings

settings.register_profile("data", deadline=None, database=None)
settings.load_profile("data")
