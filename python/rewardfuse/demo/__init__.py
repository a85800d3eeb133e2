"""`python -m rewardfuse.demo`: a small reward model, trained on preferences whose truth is known.

`world` makes the preferences, `run` trains and measures, `report` prints, `plot` draws.
"""
