"""Measures what an unlearned model has forgotten, and what it only hides.

In: the original model, the unlearned one, the forgotten classes and, if there are any, labelled
images. Out: an `Evaluation` (FA, RA, accuracy per class), a `Verdict` (figures that need no data),
an `Audit` (metrics, checks, findings and a verdict in words) and an HTML report. Start with
``accuracy.py`` and ``check.py``, then ``audit/audit.py``; ``audit/metrics.py`` defines the numbers.
``baselines.py`` has the rivals that models are held to.
"""
