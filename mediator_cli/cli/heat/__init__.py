"""The heat map of conflict: as a table, a picture, and a page."""
