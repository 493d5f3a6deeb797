"""Say how much of diffusers is served: for each pipeline class, its default scheduler and its form of guidance.

``python -m benchmarks.coverage`` reads the source of the installed diffusers and runs none of it: no model, no network.
What that cannot see:

- Which checkpoint people load, and how many do. A class counts once, whether a million use it or nobody. Its default
  scheduler is what its annotation or its own example says; where neither does, that of the example's checkpoint, from a
  table which was written by hand and says where it has each entry from (``checkpoints.py``).
- Values. Guidance is on, negative prompts are given, other arguments have their defaults, and a loop is read once.
  Where that does not decide a test, both branches are read; a prediction that one of them changes counts as changed.
- What a model returns, but for the calls, attributes and subscripts after it; whether it is compiled; and whether a
  scale that is a tensor has one value a sample, unless it plainly has one a frame.
- Whether the scheduler leaves steps to diffusers for its configuration, such as a warm-up by Runge and Kutta.

So nothing here was run. What accelerated pipelines do when they run is tested in ``tests/diffusers``.
"""
