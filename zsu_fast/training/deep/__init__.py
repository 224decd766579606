"""Deep forgetting: trains layers ahead of the last one, so that the features lose the classes too.

In: a model, the classes to forget, and the images that it takes. Out: the layers, trained in place,
and what the data-free checks measured, for the record. `split.py` chooses the layers, `rows.py`
draws and inverts the rows, `losses.py` has the loss as a formula; `deep.py` puts them together.
"""
