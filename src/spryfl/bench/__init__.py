"""Measurements behind `spry bench`."""
