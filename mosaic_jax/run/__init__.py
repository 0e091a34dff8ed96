"""Running studies: order, resume, records."""
