"""Estimates what a run will cost before it starts: seconds, peak memory, and how many GPUs.

In: a model, the classes to forget, and the options of `unlearn`. Out: a `Plan`. `pilot` runs the
procedure on a few impressions and times its parts; `plan` turns these times into the whole run's.
Read plan.py first.
"""
