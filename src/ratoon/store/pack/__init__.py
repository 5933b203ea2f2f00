"""One snapshot with its chain in one file, to be kept or brought to another store."""
