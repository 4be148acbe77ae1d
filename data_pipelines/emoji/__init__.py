"""The embedded sample data: 9,652 emoji pictures of 1,636 concepts in seven drawing styles.

`prepare.py` lays them out as training, validation and test shards. Makers and licences are in
`ATTRIBUTION.md`; counts and checksums in `stats.json`; the concepts kept out of training, and the
rule that chose them, in `unseen_concepts.json`.
"""
