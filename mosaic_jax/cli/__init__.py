"""The console `mosaic` and its commands."""
