"""Samples that training meets again: measures how their loss moves while training on others.

`drift.py` has the method on arrays, and `visits.py` runs it online in bounded memory. `passes.py` counts passes over
the data, and `record.py` turns all this into fields of a reading.
"""
