"""Models as pairs of pure functions: `init(config, key) -> params` and `apply(config, params, …) -> logits`."""
