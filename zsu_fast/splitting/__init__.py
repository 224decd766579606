"""Splits a model into a frozen backbone and a trainable tail.

In: a `models.wrapper.LogitsModel`, where to split (`split.find_split`, or a module's name), images.
Out: a `split.Split`, whose ``tail(*backbone(x))`` equals ``model(x)``.
Read first: split.py; then fx_split.py (by symbolic tracing) and replay_split.py (where that fails).
Of the last layer only the classifier is trained: classifier.py, and class_rows.py, which finds the
tensors with one row per class; copies.py finds further ones in the file.
Imports run one way: batch_dim <- fx_split, replay_split; class_rows, layers, operand_split <-
parts, classifier; these <- split.
"""
