"""Trains the tail on cached features of the impressions, at the output level or in depth.

In: a split model, its impressions' features at the split, and the classes to forget. Out: the
tail, trained in place, and a `Fit` that says how it went. Start with `fit_task.py` (what is
trained, on which rows, with which loss), then `trainer.py` (the loop and its settings) and
`train_step.py` (one step). `teacher.py` builds the rows, `losses.py` has the objectives.
"""
