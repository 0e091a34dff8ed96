"""Networks (flax linen), their losses, and classifiers."""
