"""Deep forgetting: trains layers before the last one, so that the features lose the classes too.

In: a model split by `find_deep_split`, its impressions, and the classes to forget. Out: the tail,
trained in place, and what its validation measured, for the record. Start with `deep.py`; the loss
is a formula in `losses.py`, its rows come from `data.py`, and the trainer is the room's own.
"""
