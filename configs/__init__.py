"""One file per experiment; `get_config(variant)` returns an ml_collections ConfigDict."""
