"""The systems of `step` and `gpu`: each module has `make_step(config, …)`, which gives `step(batch) -> loss`.

A batch holds arrays or tensors; the loss is the mean over the batch's targets before the update. All start from normal
weights of deviation 0.02 and use AdamW (3e-4, betas 0.9 and 0.95, decay 0.1) behind clipping to a norm of 1.
"""
