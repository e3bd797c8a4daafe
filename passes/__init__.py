"""Graph passes: one file, one pass, one name."""
