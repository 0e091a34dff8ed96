"""Data-free distillation methods."""
