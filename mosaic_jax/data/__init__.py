"""Data sets, their split over clients, and what happens to an image on the way in."""
