"""Evidence of what was done: the record of a run, and the ledger of all requests.

In: a model, settings, and the results of the stages. Out: a `Record` of plain values with the
hashes of the weights before and after, and a `Ledger`, a file to which records are appended and in
which later changes can be detected. Read `record` first.
"""
