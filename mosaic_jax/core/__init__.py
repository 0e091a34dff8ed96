"""What everything else stands on: errors, files, trees, keys, types."""
