"""The train step to look at: as a graph, and under a profiler."""
