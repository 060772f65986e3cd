"""Samples that training meets again: how their loss moves while the network trains on other samples.

`drift.py` is the method on arrays, `visits.py` the same online in bounded memory. `passes.py` counts passes over the
data, and `record.py` makes the fields of a reading of all this.
"""
