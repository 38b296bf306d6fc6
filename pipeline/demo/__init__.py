"""Data only: the demo pool with its labels, and three small models for the demo and for tests.

`tools/build_demo_pool.py` makes the pool, `tools/train_demo_models.py` the models;
`docs/demo-models.md` says of what, how good they are, and under which licences.
"""
