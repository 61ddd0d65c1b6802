"""Between the checkpoints of other libraries and workdirs: one table per family, read in both directions."""
