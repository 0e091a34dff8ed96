"""Federated learning: clients on devices, local training, algorithms."""
