"""Studies from Python: objects in, results out. `import mosaic_jax as mj` shows it."""
