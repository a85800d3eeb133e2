"""`python -m rewardfuse.demo`: a small reward model, trained on preferences whose truth is known.

`world` makes the preferences, `run` trains and measures, `rankings` compares losses on ranked lists, `setting` holds
what both share, `report` prints, `plot` draws.
"""
