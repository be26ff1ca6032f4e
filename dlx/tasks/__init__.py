"""The Experiment of a task, for experiments that differ by little, and what tasks decode or are
compared with.

Nothing else in dlx knows these modules: an experiment of a new kind needs none of them.
"""
