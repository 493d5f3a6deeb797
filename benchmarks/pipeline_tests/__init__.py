"""Run diffusers' own pipeline tests with accelerated pipelines, and compare: ``python -m benchmarks.pipeline_tests``.

It takes a checkout of diffusers, of the version that is installed, for its tests. They make small pipelines from
configurations; a pytest plugin accelerates each at its calls. Each test runs

- ``compared``: each call of a pipeline is made twice from the same state, plain and accelerated, and the outputs are
  compared. Matrices that begin as zeros are drawn, since a model whose output is zero shows nothing.
- If it fails so, ``accelerated`` alone, and ``plain``. A test that fails plain says nothing about fastguide: mostly it
  compares with numbers of weights or vocabularies that were downloaded.
"""
