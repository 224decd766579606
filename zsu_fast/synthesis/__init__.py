"""Synthesises class impressions: inputs that a model assigns to a class, by gradient ascent.

In: a model or a `space.SearchSpace` of it, classes, an `ascent_settings.AscentSettings`.
Out: `impressions.ClassImpressions`. Read first: synthesize.py (public function, shards, cache),
then ascent.py (continuous batching), space.py (images or boundary tensors), inference_copy.py.
Beside them: class_sampling.py (which classes) and dead_leaves.py (images without a model).
"""
