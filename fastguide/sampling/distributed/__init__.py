"""Sampling by several processes, on ``torch.distributed``: samples, and the predictions of a guidance, over a mesh."""
