"""Data pipelines: what turns shards into batches."""
