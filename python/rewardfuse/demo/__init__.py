"""`python -m rewardfuse.demo`: a small reward model, trained on preferences whose truth is known.

`world` makes the preferences, `run` trains and measures, `rankings` compares losses on ranked lists, `rloo` trains
policies (`policy`) on the reward model with and without a KL penalty, `setting` holds what they share, `report` prints,
`plot` draws.
"""
